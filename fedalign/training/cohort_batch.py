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

import numpy as np
import torch

from fedalign.training.examples import Label
from fedalign.training.rows import PromptRows

PASS_TOKENS = 16_384
"""Padded tokens of one pass on a CPU: half as many take a tenth longer, and more gain little."""


@dataclass(frozen=True)
class Question:
    """One prompt of one client in one step."""

    owner: int
    """The client's place in the cohort."""
    rows: PromptRows
    labels: tuple[Label, ...]
    reference: np.ndarray | None
    """(completions,) of the prompt, or None."""


@dataclass(frozen=True)
class CohortBatch:
    """C clients of n rows of at most T tokens, S scored positions each, N scored tokens in all."""

    clients: int
    rows: torch.Tensor
    """(C n, T) int64, padded on the right; rows [c n, (c+1) n) are client c's."""
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
    per_client = max(sum(len(x.rows.rows) for x in own) for own in part)
    width = max(x.rows.longest for own in part for x in own)
    table = np.zeros((len(part) * per_client, width), dtype=np.int64)
    places: list[dict[int, int]] = []  # of each client: position to its number among its own
    slot: list[tuple[int, int]] = []
    token: list[int] = []
    lengths: list[int] = []
    i: list[int] = []
    j: list[int] = []
    q: list[float] = []
    owner: list[int] = []
    reference: list[np.ndarray] = []
    for c, own in enumerate(part):
        row = c * per_client
        own_places: dict[int, int] = {}
        places.append(own_places)
        for x in own:
            for k, ids in enumerate(x.rows.rows):
                table[row + k, : len(ids)] = ids
            slot += [
                (c, own_places.setdefault((row + k) * width + column, len(own_places)))
                for k, column in x.rows.where
            ]
            token += x.rows.token
            first = len(lengths)
            i += [first + label.i for label in x.labels]
            j += [first + label.j for label in x.labels]
            q += [label.q for label in x.labels]
            owner += [x.owner] * len(x.labels)
            lengths += x.rows.lengths
            if x.reference is not None:
                reference.append(x.reference)
            row += len(x.rows.rows)
    most = max(map(len, places))
    positions = np.repeat(np.arange(len(part)) * per_client * width, most).reshape(-1, most)
    for c, found in enumerate(places):
        positions[c, : len(found)] = list(found)

    def indices(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return CohortBatch(
        clients=len(part),
        rows=torch.from_numpy(table).to(device),
        positions=torch.from_numpy(positions.reshape(-1)).to(device),
        slot=indices([c * most + place for c, place in slot]),
        token=indices(token),
        lengths=indices(lengths),
        single=len(token) == len(lengths),
        i=indices(i),
        j=indices(j),
        q=torch.tensor(q, dtype=torch.float32, device=device),
        owner=np.array(owner, dtype=np.int64),
        reference=torch.from_numpy(np.concatenate(reference)).to(device) if reference else None,
    )
