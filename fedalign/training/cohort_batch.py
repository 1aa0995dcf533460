"""One step of a cohort as passes: rows of equal number for every client, sorted by length.

Rows of a pass stand client by client, n rows each, so that a stacked product over (C, n T, width)
meets every token with its own client's factors.  Within a client the step's prompts are ordered by
length, longest first, and pass k takes the k-th few prompts of *every* client: rows of one pass are
of similar length, and little padding is computed.  A prompt's rows stay in one pass, because its
completions are compared with each other.  A client with fewer rows than others gets empty ones,
which are computed and never scored.

What a prompt needs does not depend on the step; it is worked out once (``rows.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign.training.rows import Ints, PairRows, PromptRows

PASS_TOKENS = 16_384
"""Padded tokens of one pass on a CPU: half as many take a tenth longer, and more gain little."""


@dataclass(frozen=True)
class Question:
    """One prompt of one client in one step."""

    owner: int
    """The client's place in the cohort."""
    rows: PromptRows
    pairs: PairRows
    reference: np.ndarray | None
    """(completions,) of the prompt, or None."""


@dataclass(frozen=True)
class CohortBatch:
    """C clients of n rows of at most T tokens, S scored positions each, N scored tokens in all."""

    clients: int
    rows: torch.Tensor
    """(C n, T) int64, padded on the right; rows [c n, (c+1) n) are client c's."""
    nodes: Ints
    """(C n, T): equal where rows of one client begin alike, up to and with a token; -1 behind."""
    row_lengths: Ints
    """(C n,) tokens of each row without padding; 0 for a row that only fills up."""
    positions: torch.Tensor
    """(C S,) int64 into the flattened rows, client by client; some may be there to fill up."""
    slot: torch.Tensor
    """(N,) int64 into ``positions``."""
    token: torch.Tensor
    """(N,) int64."""
    lengths: torch.Tensor
    """(completions,) int64."""
    single: bool
    """Every completion has one token."""
    i: torch.Tensor
    """(pairs,) int64 into the completions, as ``j``."""
    j: torch.Tensor
    q: torch.Tensor
    """(pairs,) float32."""
    owner: np.ndarray
    """(pairs,) int64: the client of each pair."""
    reference: torch.Tensor | None


def in_passes(step: Sequence[Sequence[Question]], most: int) -> list[list[list[Question]]]:
    """Cut a step (for each client its prompts) into passes of about ``most`` padded tokens.

    Each pass again holds a list a client; the first passes hold the longest prompts.
    """
    ordered = [sorted(own, key=lambda x: -x.rows.longest) for own in step]
    passes: list[list[list[Question]]] = []
    at, deepest = 0, max(map(len, ordered))
    while at < deepest:
        width = max(own[at].rows.longest for own in ordered if at < len(own))
        until, rows = at, 0
        while until < deepest:
            more = max(len(own[until].rows.rows) for own in ordered if until < len(own))
            if rows and (rows + more) * len(ordered) * width > most:
                break
            rows, until = rows + more, until + 1
        passes.append([own[at:until] for own in ordered])
        at = until
    return passes


def collate(part: Sequence[Sequence[Question]], device: torch.device) -> CohortBatch:
    """Return one pass as tensors."""
    every = [x.rows for own in part for x in own]
    sizes = np.array([len(own) for own in part])
    per_client = max(sum(len(x.rows.rows) for x in own) for own in part)
    width = max(x.longest for x in every)
    # Of each prompt: its first row, its first position among its client's, its first completion.
    client = np.repeat(np.arange(len(part)), sizes)
    begins = np.cumsum(sizes) - sizes
    first_row = client * per_client + _before([len(x.rows) for x in every], begins, sizes)
    asked = np.array([len(x.row) for x in every])
    place = _before(asked, begins, sizes)
    counts = np.array([len(x.lengths) for x in every])
    completion = np.cumsum(counts) - counts

    table = np.zeros((len(part) * per_client, width), dtype=np.int64)
    nodes = np.full_like(table, -1)
    row_lengths = np.zeros(len(table), dtype=np.int64)
    for row, x in zip(first_row.tolist(), every, strict=True):
        for k, (ids, own) in enumerate(zip(x.rows, x.nodes, strict=True)):
            table[row + k, : len(ids)] = ids
            nodes[row + k, : len(ids)] = own
            row_lengths[row + k] = len(ids)
    most = int(np.add.reduceat(asked, begins[sizes > 0]).max())
    # A client with fewer positions than others fills up with first tokens, the k-th of its k-th
    # row, so that one position a row stays one a row.
    own_rows = np.minimum(np.arange(most), per_client - 1)
    positions = ((np.arange(len(part)) * per_client)[:, None] + own_rows).reshape(-1) * width
    filled = np.repeat(client * most + place, asked) + _within(asked)
    rows = np.repeat(first_row, asked) + np.concatenate([x.row for x in every])
    positions[filled] = rows * width + np.concatenate([x.column for x in every])
    scored = [len(x.slot) for x in every]
    slot = np.repeat(client * most + place, scored) + np.concatenate([x.slot for x in every])
    token = np.concatenate([x.token for x in every])
    lengths = np.concatenate([x.lengths for x in every])

    labelled = [x for own in part for x in own]
    pairs = [len(x.pairs.i) for x in labelled]
    shift = np.repeat(completion, pairs)
    reference = [x.reference for x in labelled if x.reference is not None]

    def tensor(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return CohortBatch(
        clients=len(part),
        rows=tensor(table),
        nodes=nodes,
        row_lengths=row_lengths,
        positions=tensor(positions),
        slot=tensor(slot),
        token=tensor(token),
        lengths=tensor(lengths),
        single=len(token) == len(lengths),
        i=tensor(shift + np.concatenate([x.pairs.i for x in labelled])),
        j=tensor(shift + np.concatenate([x.pairs.j for x in labelled])),
        q=tensor(np.concatenate([x.pairs.q for x in labelled])),
        owner=np.repeat(np.array([x.owner for x in labelled], dtype=np.int64), pairs),
        reference=tensor(np.concatenate(reference)) if reference else None,
    )


def _before(counts: Sequence[int] | Ints, begins: Ints, sizes: Ints) -> Ints:
    """Return for each prompt the sum of ``counts`` over the prompts of its client before it."""
    counts = np.asarray(counts, dtype=np.int64)
    total = np.cumsum(counts) - counts
    return total - np.repeat(total[np.minimum(begins, len(total) - 1)], sizes)


def _within(counts: Ints) -> Ints:
    """Return 0, 1, ... for each prompt anew: (sum of counts,)."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
