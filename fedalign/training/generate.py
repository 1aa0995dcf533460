"""Texts sampled from the adapter that is loaded, in batches, with a key-value cache.

Every distinct prompt goes through the model once; its cache is repeated for its samples, and each
further token costs one position a row.  Sampling is from the full softmax at temperature 1: no
top-k, no nucleus, no repetition penalty, whatever the model's own generation settings say, because
the policy gradient is that of the full distribution.

A text ends with one of the model's end-of-sequence tokens (the tokenizer's, and those that the
model's generation settings name, since chat models end a turn with a token of their own), which is
part of the text, or without one at its limit of new tokens.

Prompts of a pass are padded on the left, with an attention mask and explicit positions, as the
library's own generation does.  Draws come from one generator seeded by the caller, in the order of
passes (prompts sorted by length); the global generators are not touched.  The same call gives the
same texts on the same machine; a prompt's texts change with the company it is sampled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.training.batch import HEAD_VALUES, output_head
from fedalign.training.encode import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_TOKENS = 32_768
"""Tokens that the cache of one pass may hold (4 GiB for a model of 8 billion parameters with
grouped queries); more texts go in several passes."""


def generate(
    resident: ResidentModel,
    prompts: Sequence[Ids],
    samples: int,
    max_new_tokens: Sequence[int] | int,
    seed: int,
    stop_at_eos: bool = True,
    greedy: bool = False,
) -> list[tuple[Ids, bool]]:
    """Return ``samples`` texts for each prompt, the first prompt's first.

    Args:
        resident: its loaded adapter is what samples; call within ``resident.reference("base")`` to
            sample from the base.
        prompts: token ids of each prompt, at least one each.
        samples: texts a prompt, at least 1.
        max_new_tokens: limit of a text's tokens, end-of-sequence included; one for all prompts or
            one for each.
        seed: of the draws, made by ``keyed_seed``.
        stop_at_eos: False goes on to the limit, and an end token counts as any other.
        greedy: take the most likely token instead of a draw (equal ones: the lowest id).

    Each text is (token ids, ended); ``ended`` says that its last token is an end token.  Raises
    ``DataError`` for a prompt that leaves no room below ``resident.max_length``, and ``RunFailed``
    when logits are not finite.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    _check(resident, prompts, samples, limits)
    ends = end_tokens(resident) if stop_at_eos else frozenset()
    distinct = {key: k for k, key in enumerate(dict.fromkeys(zip(prompts, limits, strict=True)))}
    copies = np.bincount([distinct[key] for key in zip(prompts, limits, strict=True)], minlength=1)
    draws = torch.Generator(resident.device).manual_seed(seed)
    texts: list[list[tuple[Ids, bool]]] = [[] for _ in distinct]
    keys = list(distinct)
    with torch.inference_mode():
        for chosen in _passes(resident, keys, copies * samples):
            rows = np.repeat(chosen, copies[chosen] * samples)
            made = _sample(resident, keys, chosen, rows, ends, None if greedy else draws)
            for row, text in zip(rows, made, strict=True):
                texts[row].append(text)
    # A prompt given twice has its samples drawn together and dealt out in order.
    waiting = [iter(t) for t in texts]
    return [
        next(waiting[distinct[key]])
        for key in zip(prompts, limits, strict=True)
        for _ in range(samples)
    ]


def end_tokens(resident: ResidentModel) -> frozenset[int]:
    """Return the ids that end a text: the tokenizer's EOS and those of the generation settings."""
    named: Any = resident.network.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    known = {int(i) for i in [resident.tokenizer.eos_token_id, *ids] if i is not None}
    return frozenset(known)


def _sample(
    resident: ResidentModel,
    keys: Sequence[tuple[Ids, int]],
    chosen: Sequence[int],
    rows: np.ndarray[Any, Any],
    ends: frozenset[int],
    draws: torch.Generator | None,
) -> list[tuple[Ids, bool]]:
    """Return one text a row; ``rows`` repeats each of ``chosen`` for its samples."""
    from transformers import DynamicCache

    network, device = resident.network, resident.device
    width = max(len(keys[k][0]) for k in chosen)
    table = np.zeros((len(chosen), width), dtype=np.int64)
    mask = np.zeros_like(table)
    for row, k in enumerate(chosen):
        ids = keys[k][0]
        table[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = 1
    attention = torch.from_numpy(mask).to(device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    # Given the configuration, the cache has the layers the model asks for (sliding windows).
    cache = DynamicCache(config=network.config)
    logits = _last_logits(network, torch.from_numpy(table).to(device), attention, positions, cache)
    place = {k: row for row, k in enumerate(chosen)}
    spread = torch.tensor([place[k] for k in rows], device=device)
    cache.batch_select_indices(spread)
    logits, attention, position = logits[spread], attention[spread], positions[spread, -1:]
    limit = torch.tensor([keys[k][1] for k in rows], device=device)
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    columns: list[torch.Tensor] = []
    lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
    ended = torch.zeros_like(alive)
    while True:
        token = _draw(logits, draws)
        columns.append(token)
        lengths += alive
        stopped = alive & torch.isin(token, stops)
        ended |= stopped
        alive = alive & ~stopped & (lengths < limit)
        if not bool(alive.any()):
            break
        attention = torch.cat([attention, torch.ones_like(position)], dim=1)
        position = position + 1
        logits = _last_logits(network, token.unsqueeze(1), attention, position, cache)
    tokens = torch.stack(columns, dim=1).tolist()
    return [
        (tuple(row[:length]), end)
        for row, length, end in zip(tokens, lengths.tolist(), ended.tolist(), strict=True)
    ]


def _draw(logits: torch.Tensor, draws: torch.Generator | None) -> torch.Tensor:
    """Return one token a row, (rows,) int64, from logits (rows, vocabulary)."""
    if draws is None:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.multinomial(probabilities, 1, generator=draws).squeeze(1)


def _last_logits(
    network: PreTrainedModel,
    tokens: torch.Tensor,
    attention: torch.Tensor,
    positions: torch.Tensor,
    cache: Any,
) -> torch.Tensor:
    """Return the logits after the last column, (rows, vocabulary); the cache grows."""

    def only_last(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -1:], *args[1:])

    handle = output_head(network).register_forward_pre_hook(only_last)
    try:
        logits: torch.Tensor = network(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    finally:
        handle.remove()
    last = logits[:, -1]
    if not bool(torch.isfinite(last).all()):
        raise RunFailed(
            "the policy's logits are not finite while it writes. Lower ppo.learning-rate, or run "
            "with model.dtype = float32."
        )
    return last


def _passes(
    resident: ResidentModel, keys: Sequence[tuple[Ids, int]], counts: np.ndarray[Any, Any]
) -> list[list[int]]:
    """Cut prompts, by length, into passes whose caches and logits fit in memory."""
    vocabulary = output_head(resident.network).weight.shape[0]
    order = sorted(range(len(keys)), key=lambda k: len(keys[k][0]) + keys[k][1])
    passes: list[list[int]] = []
    rows = 0
    for k in order:
        length, more = len(keys[k][0]) + keys[k][1], int(counts[k])  # the longest so far
        fits = (rows + more) * length <= CACHE_TOKENS and (rows + more) * vocabulary <= HEAD_VALUES
        if passes and fits:
            passes[-1].append(k)
            rows += more
        else:
            passes.append([k])
            rows = more
    return passes


def _check(
    resident: ResidentModel, prompts: Sequence[Ids], samples: int, limits: Sequence[int]
) -> None:
    if samples < 1 or not prompts or len(limits) != len(prompts) or min(limits) < 1:
        raise DataError(
            f"{len(prompts)} prompts, {samples} samples, {len(limits)} limits from "
            f"{min(limits, default=0)} tokens; each must be at least 1, one limit a prompt."
        )
    for prompt, limit in zip(prompts, limits, strict=True):
        if not prompt:
            raise DataError("a prompt has no tokens.")
        if len(prompt) + limit > resident.max_length:
            raise DataError(
                f"a prompt of {len(prompt)} tokens with {limit} new ones is longer than "
                f"{resident.max_length}, from model.max-length and the model's positions."
            )
