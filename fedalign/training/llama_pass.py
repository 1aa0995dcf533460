"""How the tokens of a pass lie: packed for products, in padded buckets of rows for attention.

*Packed.*  A product of tokens with weights wants no padding, and no token twice: under causal
attention a token's values follow from the tokens up to it, so rows that begin alike share their
beginning.  The M distinct tokens of a pass stand client by client, and a client's are one slice.

*Places.*  Attention wants rows of equal length: rows of all clients are sorted by length and cut
into a few buckets, each as wide as its longest row, (R_b heads, T_b, d).  Every place has a token;
a token that several rows share has several places, and one of them is *its own*.  Places behind a
row's end hold its last token again.

Values of a token are read at its own place.  So gradients enter at own places alone
(:meth:`Bucket.split_gradient`); what comes out at the places of shared keys and values is summed
(:meth:`Pass.summed`).  No real token sees what stands behind a row's end, and no gradient enters
there, so none comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedalign.training.rows import Ints

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
    others: Tensor
    """Places that are not their token's own."""
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
        """Return (M, heads d) as (R_b heads, T_b, d), zero where a place is not a token's own."""
        g = packed.index_select(0, self.tokens).index_fill_(0, self.others, 0.0)
        shape = (len(self.rows), self.columns, self.heads.count, self.heads.size)
        return g.view(shape).transpose(1, 2).reshape(-1, self.columns, self.heads.size)

    def join(self, x: Tensor, out: Tensor) -> None:
        """Write (parts, R_b heads, T_b, d) to its places of ``out`` (places, parts heads d)."""
        heads, size = self.heads.count, self.heads.size
        cut = x.view(-1, len(self.rows), heads, self.columns, size).permute(1, 3, 0, 2, 4)
        out[self.places].view(cut.shape).copy_(cut)


@dataclass(frozen=True)
class Pass:
    """M distinct tokens of R rows of C clients."""

    sizes: list[int]
    """Tokens of each client."""
    buckets: list[Bucket]
    token: Tensor
    """(R, T) the packed token at each column of each row."""
    first: Tensor
    """(M,) where each token is found first among the flattened (R, T)."""
    place: Tensor
    """(M,) its own place among those of all buckets."""
    again: Tensor
    """Places of real tokens that are not their own."""
    again_token: Tensor
    """The tokens there."""
    column: Tensor
    """(M,) how many tokens stand before it in its row."""
    epsilon: float
    """Of the norms."""

    def own(self, places: Tensor) -> Tensor:
        """Return values at tokens' own places: (places, n) to (M, n)."""
        return places.index_select(0, self.place)

    def summed(self, places: Tensor) -> Tensor:
        """Return sums over all places of each token: (places, n) to (M, n)."""
        total = self.own(places)
        if len(self.again):
            total.index_add_(0, self.again_token, places.index_select(0, self.again))
        return total

    def room(self, like: Tensor, width: int) -> Tensor:
        """Return room for ``width`` values at every place."""
        last = self.buckets[-1].places.stop
        return like.new_empty((last, width))


def lay_out(nodes: Ints, lengths: Ints, clients: int, heads: Heads, epsilon: float) -> Pass:
    """Return the layout of ``clients`` clients with as many rows each.

    Args:
        nodes: (R, T), client by client: equal where rows of one client begin alike, up to and with
            a column (``rows.py``).  What stands behind a row's end does not matter.
        lengths: (R,) tokens of each row, at least 1.
        clients: C.
        heads: attention of the model.
        epsilon: of its norms.
    """
    rows, columns = nodes.shape
    column = np.arange(columns)
    real = column < lengths[:, None]
    client = np.repeat(np.arange(clients), rows // clients)
    known = (client[:, None] * (nodes.max() + 2) + nodes + 1)[real]
    _, first, inverse = np.unique(known, return_index=True, return_inverse=True)
    flat = np.flatnonzero(real)
    token = np.empty(nodes.shape, dtype=np.int64)
    token[real] = inverse
    token = np.where(real, token, token[np.arange(rows), lengths - 1][:, None])
    first = flat[first]
    is_own = np.zeros(nodes.size, dtype=bool)
    is_own[first] = True
    is_own = is_own.reshape(nodes.shape)

    angles = torch.outer(torch.arange(columns, dtype=torch.float32), heads.frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)
    back = turn.conj().resolve_conj()
    future = torch.full((columns, columns), float("-inf")).triu(1)
    order = np.argsort(-lengths, kind="stable")
    count = int(np.clip(rows // BUCKET_ROWS, 1, MOST_BUCKETS))
    place = np.empty(len(first), dtype=np.int64)
    again: list[Ints] = []
    again_token: list[Ints] = []
    buckets: list[Bucket] = []
    start = 0
    for chosen in np.array_split(order, count):
        width = int(lengths[chosen[0]])
        tokens, own = token[chosen, :width].reshape(-1), is_own[chosen, :width].reshape(-1)
        place[tokens[own]] = start + np.flatnonzero(own)
        repeated = np.flatnonzero(real[chosen, :width].reshape(-1) & ~own)
        again.append(start + repeated)
        again_token.append(tokens[repeated])
        buckets.append(
            Bucket(
                torch.from_numpy(chosen),
                torch.from_numpy(tokens),
                torch.from_numpy(np.flatnonzero(~own)),
                start,
                heads,
                turn[:width],
                back[:width],
                future[:width, :width],
            )
        )
        start += tokens.size
    return Pass(
        np.bincount(client[first // columns], minlength=clients).tolist(),
        buckets,
        torch.from_numpy(token),
        torch.from_numpy(first),
        torch.from_numpy(place),
        torch.from_numpy(np.concatenate(again)),
        torch.from_numpy(np.concatenate(again_token)),
        torch.from_numpy(first % columns),
        epsilon,
    )
