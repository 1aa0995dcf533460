"""How the tokens of a pass lie: packed for products, in padded buckets of rows for attention.

A product of tokens with weights wants no padding: the M real tokens of a pass stand one after
another, client by client, row by row, and a client's are one slice.  Attention wants rows of equal
length: rows of all clients are sorted by length and cut into a few buckets, each as wide as its
longest row, (R_b heads, T_b, d).  Two index arrays lead from one layout to the other.

Rows shorter than their bucket are filled up with their last token.  Under causal attention no real
token sees what stands behind it, so values there are never used; gradients there are set to zero
before they enter (:meth:`Bucket.split_gradient`), so nothing comes back from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ints = np.ndarray[Any, np.dtype[np.int64]]

BUCKET_ROWS = 16
"""Least rows of a bucket: fewer, and calls cost more than the padding they save."""
MOST_BUCKETS = 4


@dataclass(frozen=True)
class Heads:
    """Attention of the model."""

    count: int
    size: int
    """Width d of a head."""
    frequencies: Tensor
    """(d / 2,) of the rotary positions."""


@dataclass(frozen=True)
class Bucket:
    """R_b rows of T_b columns."""

    rows: Tensor
    """(R_b,) numbers of the rows in the pass."""
    tokens: Tensor
    """(R_b T_b,) the packed token at each place."""
    filled: Tensor
    """Places that only fill up."""
    start: int
    """Places of the buckets before."""
    heads: Heads
    turn: Tensor
    """(T_b, d / 2) complex: rotary positions; adjacent entries of a head are one number."""
    back: Tensor
    """Its conjugate."""
    future: Tensor
    """(T_b, T_b): 0, and minus infinity above the diagonal."""

    @property
    def columns(self) -> int:
        """T_b."""
        return len(self.turn)

    @property
    def places(self) -> slice:
        """Of this bucket among those of all."""
        return slice(self.start, self.start + len(self.tokens))

    def split(self, packed: Tensor, parts: int) -> Tensor:
        """Return (M, parts heads d) as (parts, R_b heads, T_b, d)."""
        shape = (len(self.rows), self.columns, parts, self.heads.count, self.heads.size)
        cut = packed.index_select(0, self.tokens).view(shape).permute(2, 0, 3, 1, 4)
        return cut.contiguous().view(parts, -1, self.columns, self.heads.size)

    def split_gradient(self, packed: Tensor) -> Tensor:
        """Return (M, heads d) as (R_b heads, T_b, d), zero where a place only fills up."""
        g = packed.index_select(0, self.tokens).index_fill_(0, self.filled, 0.0)
        shape = (len(self.rows), self.columns, self.heads.count, self.heads.size)
        return g.view(shape).transpose(1, 2).reshape(-1, self.columns, self.heads.size)

    def join(self, x: Tensor, out: Tensor) -> None:
        """Write (parts, R_b heads, T_b, d) to this bucket's places of ``out`` (places, parts h d)."""
        heads, size = self.heads.count, self.heads.size
        cut = x.view(-1, len(self.rows), heads, self.columns, size).permute(1, 3, 0, 2, 4)
        out[self.places].view(cut.shape).copy_(cut)


@dataclass(frozen=True)
class Pass:
    """M tokens of R rows of C clients."""

    sizes: list[int]
    """Tokens of each client."""
    buckets: list[Bucket]
    place: Tensor
    """(M,) where each token stands among the places of all buckets."""
    column: Tensor
    """(M,) its place in its own row."""
    epsilon: float
    """Of the norms."""

    def packed(self, places: Tensor) -> Tensor:
        """Return values at all places as values of tokens."""
        return places.index_select(0, self.place)

    def room(self, like: Tensor, width: int) -> Tensor:
        """Return room for ``width`` values at every place."""
        last = self.buckets[-1].places.stop
        return like.new_empty((last, width))


def lay_out(lengths: Ints, clients: int, heads: Heads, epsilon: float) -> Pass:
    """Return the layout of ``clients`` clients with as many rows each.

    ``lengths`` (R,) tokens of each row, at least 1, client by client.
    """
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    count = int(np.clip(len(lengths) // BUCKET_ROWS, 1, MOST_BUCKETS))
    column = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    place = np.empty(len(column), dtype=np.int64)
    widest = int(lengths.max())
    angles = torch.outer(torch.arange(widest, dtype=torch.float32), heads.frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)
    back = turn.conj().resolve_conj()
    future = torch.full((widest, widest), float("-inf")).triu(1)
    buckets: list[Bucket] = []
    start = 0
    for rows in np.array_split(order, count):
        own = lengths[rows]
        width = int(own[0])
        columns = np.arange(width)
        real = columns < own[:, None]  # (R_b, T_b)
        tokens = starts[rows][:, None] + np.minimum(columns, own[:, None] - 1)
        place[tokens[real]] = start + np.flatnonzero(real)
        buckets.append(
            Bucket(
                torch.from_numpy(rows),
                torch.from_numpy(tokens.reshape(-1)),
                torch.from_numpy(np.flatnonzero(~real)),
                start,
                heads,
                turn[:width],
                back[:width],
                future[:width, :width],
            )
        )
        start += tokens.size
    sizes = lengths.reshape(clients, -1).sum(axis=1).tolist()
    return Pass(sizes, buckets, torch.from_numpy(place), torch.from_numpy(column), epsilon)
