"""Texts sampled from the adapter that is loaded, in batches, with a key-value cache.

Every distinct prompt goes through the model once; its cache is repeated for its samples, and each
further token costs one position a row.  Sampling is from the full softmax at temperature 1: no
top-k, no nucleus, no repetition penalty, whatever the model's own generation settings say, because
the policy gradient is that of the full distribution.

A text ends with one of the model's end-of-sequence tokens (the tokenizer's, and those that the
model's generation settings name, since chat models end a turn with a token of their own), which is
part of the text, or without one at its limit of new tokens.

Prompts of a pass are padded on the left, with an attention mask and explicit positions, as the
library's own generation does.  Each text has its own uniform numbers, one a token, from a numpy
generator seeded for its prompt; a number picks the token by inverting the distribution function
(tokens in the order of their ids).  A prompt's texts therefore depend on its seed, its tokens and
the adapter alone, not on the company it is sampled in, up to rounding of the logits; and two
adapters sampled with one seed see the same random numbers.  No global generator is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.randomness import keyed_seed
from fedalign.training.batch import HEAD_VALUES, logits_of, output_head
from fedalign.training.encode import Ids
from fedalign.training.prefix import left_padded, prefill

CACHE_TOKENS = 32_768
"""Tokens that the cache of one pass may hold (4 GiB for a model of 8 billion parameters with
grouped queries); more texts go in several passes."""

Uniforms = np.ndarray[Any, np.dtype[np.float64]]


def generate(
    resident: ResidentModel,
    prompts: Sequence[Ids],
    samples: int,
    max_new_tokens: Sequence[int] | int,
    seed: int | Sequence[int],
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
        seed: of the draws, made by ``keyed_seed``; one for each prompt, or one for the call, from
            which each place among the prompts gets its own.
        stop_at_eos: False goes on to the limit, and an end token counts as any other.
        greedy: take the most likely token instead of a draw (equal ones: the lowest id).

    Each text is (token ids, ended); ``ended`` says that its last token is an end token.  Raises
    ``DataError`` for a prompt that leaves no room below ``resident.max_length``, and ``RunFailed``
    when logits are not finite.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    seeds = (
        [keyed_seed(seed, "prompt", place) for place in range(len(prompts))]
        if isinstance(seed, int)
        else seed
    )
    check_request(resident, prompts, samples, limits, seeds)
    ends = end_tokens(resident) if stop_at_eos else frozenset()
    places: dict[tuple[Ids, int], list[int]] = {}
    for place, key in enumerate(zip(prompts, limits, strict=True)):
        places.setdefault(key, []).append(place)
    keys = list(places)
    texts: dict[int, list[tuple[Ids, bool]]] = {}
    with torch.inference_mode():
        for chosen in _passes(resident, keys, [len(places[key]) * samples for key in keys]):
            order = [place for k in chosen for place in places[keys[k]]]
            copies = [len(places[keys[k]]) * samples for k in chosen]
            uniforms = None
            if not greedy:
                uniforms = uniform_table([(seeds[p], limits[p]) for p in order], samples)
            made, broken = write(resident, [keys[k] for k in chosen], copies, ends, uniforms)
            if broken:
                raise RunFailed(
                    "the policy's logits are not finite while it writes. Lower ppo.learning-rate, "
                    "or run with model.dtype = float32."
                )
            for row, place in enumerate(order):
                texts[place] = made[row * samples : (row + 1) * samples]
    return [text for place in range(len(prompts)) for text in texts[place]]


def end_tokens(resident: ResidentModel) -> frozenset[int]:
    """Return the ids that end a text: the tokenizer's EOS and those of the generation settings."""
    named: Any = resident.network.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    known = {int(i) for i in [resident.tokenizer.eos_token_id, *ids] if i is not None}
    return frozenset(known)


def uniform_table(draws: Sequence[tuple[int, int]], samples: int) -> Uniforms:
    """Return numbers in [0, 1) for (seed, limit) of each prompt: (prompts * samples, tokens)."""
    table = np.zeros((len(draws), samples, max(limit for _, limit in draws)))
    for row, (seed, limit) in enumerate(draws):
        table[row, :, :limit] = np.random.Generator(np.random.PCG64(seed)).random((samples, limit))
    return table.reshape(len(draws) * samples, -1)


def write(
    resident: ResidentModel,
    keys: Sequence[tuple[Ids, int]],
    copies: Sequence[int],
    ends: frozenset[int],
    uniforms: Uniforms | None,
) -> tuple[list[tuple[Ids, bool]], list[int]]:
    """Return ``copies`` texts for each (prompt, limit), and those cut off at broken logits.

    Args:
        resident: what writes; no gradients must be recorded.
        keys: prompts and their limits of new tokens.
        copies: texts of each.
        ends: tokens that end a text.
        uniforms: (texts, tokens) of :func:`uniform_table`; None writes greedily.

    The second list holds the numbers of texts whose logits were not finite: such a text stops
    there, with a token that means nothing.
    """
    network, device = resident.network, resident.device
    prefixes = left_padded([ids for ids, _ in keys], device)
    _, logits, cache = prefill(network, prefixes)
    spread = torch.from_numpy(np.repeat(np.arange(len(keys)), copies)).to(device)
    cache.batch_select_indices(spread)
    logits, attention = logits[spread], prefixes.attention[spread]
    position = prefixes.positions[spread, -1:]
    every = torch.arange(len(spread), device=device)
    limit = torch.tensor([limit for _, limit in keys], device=device)[spread]
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    draws = None if uniforms is None else torch.from_numpy(uniforms).to(device)
    alive = torch.ones(len(spread), dtype=torch.bool, device=device)
    columns: list[torch.Tensor] = []
    lengths = torch.zeros(len(spread), dtype=torch.int64, device=device)
    ended = torch.zeros_like(alive)
    broken = torch.zeros_like(alive)
    while True:
        finite = torch.isfinite(logits).all(dim=-1)
        if not bool(finite.all()):
            broken |= ~finite
            alive = alive & finite
            logits = torch.where(finite.unsqueeze(1), logits, 0.0)
        token = draw(logits, None if draws is None else draws[:, len(columns)])
        columns.append(token)
        lengths += alive
        stopped = alive & torch.isin(token, stops)
        ended |= stopped
        alive = alive & ~stopped & (lengths < limit)
        if not bool(alive.any()):
            break
        attention = torch.cat([attention, torch.ones_like(position)], dim=1)
        position = position + alive.unsqueeze(1)  # texts that are over stay within the model
        _, logits = logits_of(
            network,
            every,
            input_ids=token.unsqueeze(1),
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
    tokens = torch.stack(columns, dim=1).tolist()
    texts = [
        (tuple(row[:length]), end)
        for row, length, end in zip(tokens, lengths.tolist(), ended.tolist(), strict=True)
    ]
    return texts, torch.nonzero(broken).squeeze(1).tolist()


def draw(logits: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Return one token a row, (rows,) int64, from logits (rows, vocabulary) and numbers (rows,)."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    # In float64, or the sum over a large vocabulary would round rare tokens away.
    below = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum_(dim=-1)
    # The sum is 1 only up to rounding; a number times it stays under it.
    target = uniforms.unsqueeze(1) * below[:, -1:]
    return torch.searchsorted(below, target, right=True).squeeze(1)


def _passes(
    resident: ResidentModel, keys: Sequence[tuple[Ids, int]], counts: Sequence[int]
) -> list[list[int]]:
    """Cut prompts, by length, into passes whose caches and logits fit in memory."""
    vocabulary = output_head(resident.network).weight.shape[0]
    order = sorted(range(len(keys)), key=lambda k: len(keys[k][0]) + keys[k][1])
    passes: list[list[int]] = []
    rows = 0
    for k in order:
        length, more = len(keys[k][0]) + keys[k][1], counts[k]  # the longest so far
        fits = (rows + more) * length <= CACHE_TOKENS and (rows + more) * vocabulary <= HEAD_VALUES
        if passes and fits:
            passes[-1].append(k)
            rows += more
        else:
            passes.append([k])
            rows = more
    return passes


def check_request(
    resident: ResidentModel,
    prompts: Sequence[Ids],
    samples: int,
    limits: Sequence[int],
    seeds: Sequence[int],
) -> None:
    if len(seeds) != len(prompts):
        raise DataError(f"{len(prompts)} prompts, {len(seeds)} seeds; give one seed a prompt.")
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
