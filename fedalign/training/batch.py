"""Rows of tokens, the positions that are scored, and log-probabilities of completions.

A completion t1..tT after a prompt is scored by the row ``prompt + t1..t(T-1)``: the logits after
the prompt give t1, and so on.  Completions whose rows are the same share one row, so all
one-letter answers of a question cost one forward row.

Rows are padded on the right and no attention mask is given: under causal attention a token never
sees what stands after it, so padding changes nothing, whatever the pad id.  Only scored positions
go through the output head: a hook hands it just those hidden states, and the model's own code then
applies whatever it applies to logits (Gemma-2's soft cap, Cohere's scale).  Multiplying hidden
states by the head's weights by hand would be wrong for such models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from fedalign.errors import ConfigError
from fedalign.training.encode import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW_TOKENS = 16_384
"""Padded tokens that one forward pass may hold; larger batches go in several passes."""
HEAD_VALUES = 1 << 28
"""Logits that one forward pass may hold (1 GiB in float32)."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and the completions that are scored after it, as token ids."""

    tokens: Ids
    completions: tuple[Ids, ...]


@dataclass(frozen=True)
class Batch:
    """R rows of at most T tokens, S scored positions, N scored tokens, C completions."""

    rows: torch.Tensor
    """(R, T) int64, padded on the right."""
    positions: torch.Tensor
    """(S,) int64 into the flattened rows, row * T + column, each once."""
    slot: torch.Tensor
    """(N,) int64 into ``positions``: where each scored token is predicted."""
    token: torch.Tensor
    """(N,) int64, the scored token."""
    lengths: torch.Tensor
    """(C,) int64, tokens of each completion; scored tokens stand in completion order."""
    single: bool
    """Every completion has one token, so N = C."""


def collate(prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> Batch:
    """Return the batch of all completions of all prompts, in order."""
    rows: dict[Ids, int] = {}
    places: dict[tuple[int, int], int] = {}
    slot: list[int] = []
    token: list[int] = []
    lengths: list[int] = []
    for prompt in prompts:
        start = len(prompt.tokens) - 1
        for completion in prompt.completions:
            row = rows.setdefault(prompt.tokens + completion[:-1], len(rows))
            lengths.append(len(completion))
            for offset, t in enumerate(completion):
                slot.append(places.setdefault((row, start + offset), len(places)))
                token.append(t)
    width = max(map(len, rows))
    table = np.zeros((len(rows), width), dtype=np.int64)
    for ids, row in rows.items():
        table[row, : len(ids)] = ids
    flat = [row * width + column for row, column in places]
    return Batch(
        rows=torch.from_numpy(table).to(device),
        positions=torch.tensor(flat, dtype=torch.int64, device=device),
        slot=torch.tensor(slot, dtype=torch.int64, device=device),
        token=torch.tensor(token, dtype=torch.int64, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        single=len(token) == len(lengths),
    )


def row_tokens(prompts: Sequence[Prompt]) -> int:
    """Return the tokens, without padding, that one forward pass over the prompts computes."""
    rows = {p.tokens + c[:-1] for p in prompts for c in p.completions}
    return sum(map(len, rows))


def completion_logps(network: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the summed log-probability of each completion: (C,) float32, nats, at most 0."""
    logps = torch.log_softmax(logits_at(network, batch), dim=-1, dtype=torch.float32)
    scored = logps[batch.slot, batch.token]
    if batch.single:
        return scored
    return torch.segment_reduce(scored, "sum", lengths=batch.lengths)


def logits_at(network: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the model's logits at the scored positions: (S, vocabulary), in the model's dtype.

    Raises ``ConfigError`` as :func:`logits_of` does.
    """
    return hidden_and_logits(network, batch)[1]


def hidden_and_logits(network: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the output head, and the logits, at the scored positions.

    (S, width) and (S, vocabulary), both in the model's dtype.  Raises as :func:`logits_of` does.
    """
    return logits_of(network, batch.positions, input_ids=batch.rows, use_cache=False)


def logits_of(
    network: PreTrainedModel, positions: torch.Tensor, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the model on ``inputs``; return what enters the output head, and the logits.

    Only at ``positions`` (S,) int64 into the flattened (R, T) tokens: (S, width) and (S,
    vocabulary), both in the model's dtype.  Raises ``ConfigError`` for an architecture that does
    not compute its logits with its output embedding module.
    """
    kept: list[torch.Tensor] = []

    def only_scored(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # (R, T, width)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        kept.append(picked)
        return (picked.unsqueeze(0), *args[1:])

    handle = output_head(network).register_forward_pre_hook(only_scored)
    try:
        logits = network(**inputs).logits
    finally:
        handle.remove()
    if logits.shape[:2] != (1, len(positions)):
        raise ConfigError(
            f"{type(network).__name__} does not compute its logits with its output embedding "
            "module and cannot be used here. Use another architecture."
        )
    scored: torch.Tensor = logits[0]
    return kept[0], scored


def output_head(network: PreTrainedModel) -> torch.nn.Linear:
    """Return the module that turns hidden states into logits."""
    return cast(torch.nn.Linear, cast(Any, network).get_output_embeddings())


def in_passes(
    prompts: Sequence[Prompt], vocabulary: int, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut prompts, in the given order, into passes that fit in memory.

    Returns lists of indices into ``prompts``.  A single prompt that is larger than the bounds is a
    pass of its own.
    """
    passes: list[list[int]] = []
    rows = width = scored = 0
    for i in order if order is not None else range(len(prompts)):
        p = prompts[i]
        longest = max(map(len, p.completions))
        more_rows = 1 if longest == 1 else len(p.completions)
        more_scored = 1 if longest == 1 else sum(map(len, p.completions))
        new_width = max(width, len(p.tokens) + longest - 1)
        fits = (rows + more_rows) * new_width <= ROW_TOKENS and (
            scored + more_scored
        ) * vocabulary <= HEAD_VALUES
        if passes and fits:
            passes[-1].append(i)
            rows, width, scored = rows + more_rows, new_width, scored + more_scored
        else:
            passes.append([i])
            rows, width, scored = more_rows, len(p.tokens) + longest - 1, more_scored
    return passes
