"""Aggregation of LoRA adapters: the exact weighted sum of updates, as one adapter of the same rank.

A LoRA adapter stands for the update ``scale * B A`` of each adapted matrix, B (out, r), A (r, in).
What the weights speak of is the sum ``G = sum_c w_c B_c A_c``; averaging B and A apart is another
thing, off by the weighted cross-covariance of the factors.  Three methods:

``product``
    G exactly, then its best rank-r approximation once (truncated singular value decomposition;
    the aggregation of FlexLoRA, arXiv 2402.11505).  Clients arrive one by one; the factors of each
    group are stacked, and re-compressed by QR *without truncation* when the stack is wider than
    twice the matrix, so nothing is lost before the end and the result does not depend on grouping.
    The matrix itself is formed only where the stack is at least as wide as the matrix, where it is
    the smaller of the two.  For a narrow stack: QR of both factors, then the SVD of the core.
``frozen-a``
    A is shared and never trained, B is averaged: exact without truncation, half the upload
    (FFA-LoRA, arXiv 2403.12313).
``factor-mean``
    Mean of A and mean of B.  Not exact; the baseline that most code uses.

How the result of ``product`` is split: A = a V^T with orthonormal rows times a = 1/sqrt(3) (the row
norm of LoRA's usual initial A), B = U S / a.  The balanced split with sqrt(S) on both sides would
leave A = B = 0 in every direction that is not used yet; such a rank has gradient zero for ever.
Null directions (rank deficiency, or B = 0 at the start) have B = 0 and rows of A completed from the
row space of the previous global A, then orthonormalised.  Signs: the largest entry of each row of A
is positive.

What truncation removes is reported for each module, and for each group: with P the projection onto
the kept left and right subspaces, ``|G_g - P(G_g)| / |G_g|`` for the group's own sum G_g (relative
Frobenius norm; the share of energy is its square).  A group of low weight lives in the small
singular values, so it can lose most of its update where the sum loses little.

All sums are in float64, results are float32.  Clients of weight 0 are left out of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedalign.randomness import generator

Array = NDArray[np.float64]
Tensors = Mapping[str, NDArray[np.float32]]

METHODS = ("product", "frozen-a", "factor-mean")
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
ROW_NORM = 1.0 / math.sqrt(3.0)
"""Norm of each row of A."""
NULL = 1e-10
"""A singular value below this share of the largest is a null direction."""


class Contribution(NamedTuple):
    """What one client brings to the sum."""

    client: str
    group: str
    weight: float
    """In [0, 1]; the weights of all contributions sum to 1."""
    tensors: Tensors
    """PEFT name to array: ``*.lora_A.weight`` (r, in), ``*.lora_B.weight`` (out, r)."""


@dataclass(frozen=True)
class Aggregate:
    """The new global adapter, and what truncation removed (``product`` only)."""

    tensors: dict[str, NDArray[np.float32]]
    discarded: dict[str, float] = field(default_factory=dict)
    """Module to relative Frobenius norm of the part of the sum that was removed, in [0, 1]."""
    discarded_by_group: dict[str, dict[str, float]] = field(default_factory=dict)
    """Module to group to the same for the group's own sum; a group without update is left out."""


def aggregate(method: str, contributions: Iterable[Contribution], previous: Tensors) -> Aggregate:
    """Return the weighted aggregate of the contributions, which are consumed one by one.

    Args:
        method: ``product``, ``frozen-a`` or ``factor-mean``.
        contributions: in a fixed order (sorted by client); weights sum to 1.  Under ``frozen-a``
            the A tensors may be left out; where given they must equal the previous ones.
        previous: the global adapter the clients received; gives names, shapes and rank.

    Raises:
        ValueError: unknown method, no contribution, weights that do not sum to 1, or tensors whose
            names, shapes or values do not fit ``previous``.
    """
    if method not in METHODS:
        raise ValueError(f"aggregation method '{method}' is not one of {', '.join(METHODS)}")
    if method == "product":
        return _Products(previous).run(contributions)
    if method == "frozen-a":
        return _frozen_a(contributions, previous)
    return Aggregate(_weighted_mean(contributions, previous, list(previous)))


def modules(tensors: Tensors) -> list[str]:
    """Return the sorted module names of an adapter (tensor names without the factor's suffix).

    Raises:
        ValueError: a tensor that is no LoRA factor, or a factor without its partner.
    """
    a = {n.removesuffix(A_SUFFIX) for n in tensors if n.endswith(A_SUFFIX)}
    b = {n.removesuffix(B_SUFFIX) for n in tensors if n.endswith(B_SUFFIX)}
    other = [n for n in tensors if not n.endswith((A_SUFFIX, B_SUFFIX))]
    if other or a != b:
        raise ValueError(f"not a LoRA adapter: {(other + sorted(a ^ b))[:3]} has no partner factor")
    return sorted(a)


def initial_adapter(
    shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, NDArray[np.float32]]:
    """Return the adapter before round 1: A with orthonormal rows times 1/sqrt(3), B zero.

    Args:
        shapes: PEFT name to shape, A (r, in), B (out, r).
        seed: the run's seed; every A is drawn by (seed, "initial adapter", name).
    """
    out: dict[str, NDArray[np.float32]] = {}
    for name in sorted(shapes):
        if name.endswith(B_SUFFIX):
            out[name] = np.zeros(shapes[name], dtype=np.float32)
            continue
        rank, width = shapes[name]
        _check_rank(name, rank, width)
        draw = generator(seed, "initial adapter", name).standard_normal((width, rank))
        out[name] = (ROW_NORM * _orthonormal_columns(draw).T).astype(np.float32)
    modules(out)
    return out


def product_norm(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return the Frobenius norm of ``B A`` for A (r, in), B (out, r), from the factors alone."""
    ra = _triangle(np.asarray(a, dtype=np.float64).T)
    rb = _triangle(np.asarray(b, dtype=np.float64))
    return float(np.linalg.norm(rb @ ra.T))


def update_norm(new: Tensors, old: Tensors) -> float:
    """Return the Frobenius norm of ``B' A' - B A`` over all modules (root of the sum of squares).

    From the factors ``[B', -B] [A'; A]``, never the matrices.  Without the LoRA scale.
    """
    squares = 0.0
    for shape_modules in _by_shape(new).values():
        a = np.concatenate(
            [_stack(new, shape_modules, A_SUFFIX), _stack(old, shape_modules, A_SUFFIX)], 1
        )
        b = np.concatenate(
            [_stack(new, shape_modules, B_SUFFIX), -_stack(old, shape_modules, B_SUFFIX)], 2
        )
        ra = _triangle(a.transpose(0, 2, 1))
        rb = _triangle(b)
        squares += float(((rb @ ra.transpose(0, 2, 1)) ** 2).sum())
    return math.sqrt(squares)


class _Products:
    """The weighted sum of products, kept as stacked factors for each shape of module and group."""

    def __init__(self, previous: Tensors) -> None:
        self.previous = previous
        self.shapes = _by_shape(previous)
        for (_, width, rank), names in self.shapes.items():
            _check_rank(names[0], rank, width)
        # (shape, group) -> weighted B (modules, out, columns), A (modules, columns, in)
        self.stacks: dict[tuple[tuple[int, int, int], str], tuple[list[Array], list[Array]]] = {}

    def run(self, contributions: Iterable[Contribution]) -> Aggregate:
        total, count = 0.0, 0
        for c in contributions:
            total, count = total + _check_weight(c), count + 1
            _check_tensors(c, self.previous, list(self.previous))
            if c.weight > 0:
                self._add(c)
        _check_total(total, count)
        tensors: dict[str, NDArray[np.float32]] = {}
        discarded: dict[str, float] = {}
        by_group: dict[str, dict[str, float]] = {}
        for shape, names in self.shapes.items():
            self._finish(shape, names, total, tensors, discarded, by_group)
        return Aggregate({n: tensors[n] for n in sorted(tensors)}, discarded, by_group)

    def _add(self, c: Contribution) -> None:
        for shape, names in self.shapes.items():
            b, a = self.stacks.setdefault((shape, c.group), ([], []))
            b.append(c.weight * _stack(c.tensors, names, B_SUFFIX))
            a.append(_stack(c.tensors, names, A_SUFFIX))
            if sum(x.shape[2] for x in b) > 2 * min(shape[:2]):
                b[:], a[:] = ([x] for x in _compress(np.concatenate(b, 2), np.concatenate(a, 1)))

    def _finish(
        self,
        shape: tuple[int, int, int],
        names: list[str],
        total: float,
        tensors: dict[str, NDArray[np.float32]],
        discarded: dict[str, float],
        by_group: dict[str, dict[str, float]],
    ) -> None:
        rank = shape[2]
        groups = {
            g: (np.concatenate(b, 2), np.concatenate(a, 1))
            for (s, g), (b, a) in sorted(self.stacks.items())
            if s == shape
        }
        b = np.concatenate([x for x, _ in groups.values()], 2) / total  # (modules, out, columns)
        a = np.concatenate([x for _, x in groups.values()], 1)  # (modules, columns, in)
        u, s, v = _svd(b, a)
        kept = s[:, :rank] > NULL * np.maximum(s[:, :1], np.finfo(np.float64).tiny)
        u, v, top = u[:, :, :rank] * kept[:, None, :], v[:, :rank] * kept[:, :, None], s[:, :rank]
        energy = (s**2).sum(1)
        lost = np.sqrt((s[:, rank:] ** 2).sum(1) / np.where(energy > 0, energy, 1.0))
        for i, name in enumerate(names):
            tensors |= self._split(name, rank, u[i], top[i], v[i], kept[i])
            discarded[name] = float(lost[i])
            by_group[name] = {}
        for g, (bg, ag) in groups.items():
            norms = ((bg.transpose(0, 2, 1) @ bg) * (ag @ ag.transpose(0, 2, 1))).sum((1, 2))
            inside = ((u.transpose(0, 2, 1) @ bg) @ (ag @ v.transpose(0, 2, 1))) ** 2
            for i, name in enumerate(names):
                if norms[i] > 0:
                    share = 1.0 - float(inside[i].sum() / norms[i])
                    by_group[name][g] = math.sqrt(min(max(share, 0.0), 1.0))

    def _split(
        self, name: str, rank: int, u: Array, s: Array, v: Array, kept: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.float32]]:
        """Return A (r, in) and B (out, r) of one module from u (out, k), s (k,), v (k, in)."""
        n = int(kept.sum())
        rows = v[:n]
        if n < rank:
            before = np.asarray(self.previous[name + A_SUFFIX], dtype=np.float64)
            rows = np.concatenate([rows, _complement(rows, before, rank - n)])
        largest = np.abs(rows).argmax(1)
        signs = np.sign(rows[np.arange(rank), largest])
        b = np.zeros((u.shape[0], rank))
        b[:, :n] = u[:, :n] * (s[:n] * signs[:n] / ROW_NORM)
        return {
            name + A_SUFFIX: (ROW_NORM * signs[:, None] * rows).astype(np.float32),
            name + B_SUFFIX: b.astype(np.float32),
        }


def _frozen_a(contributions: Iterable[Contribution], previous: Tensors) -> Aggregate:
    names = [n for n in previous if n.endswith(B_SUFFIX)]

    def checked() -> Iterable[Contribution]:
        for c in contributions:
            for n, x in c.tensors.items():
                if n.endswith(A_SUFFIX) and not np.array_equal(x, previous[n]):
                    raise ValueError(f"client '{c.client}': {n} changed, but A is frozen")
            yield c

    mean = _weighted_mean(checked(), previous, names)
    frozen = {n: previous[n].astype(np.float32) for n in previous if n.endswith(A_SUFFIX)}
    return Aggregate(dict(sorted((frozen | mean).items())))


def _weighted_mean(
    contributions: Iterable[Contribution], previous: Tensors, names: list[str]
) -> dict[str, NDArray[np.float32]]:
    """Return the weighted mean of the named tensors.

    Weights are taken relative to the first one, so that equal weights are a plain mean to the bit.
    """
    sums: dict[str, Array] = {n: np.zeros(previous[n].shape) for n in sorted(names)}
    total, relative, first, count = 0.0, 0.0, 0.0, 0
    for c in contributions:
        total, count = total + _check_weight(c), count + 1
        _check_tensors(c, previous, names)
        if c.weight == 0:
            continue
        first = first or c.weight
        relative += c.weight / first
        for n, x in sums.items():
            x += (c.weight / first) * np.asarray(c.tensors[n], dtype=np.float64)
    _check_total(total, count)
    return {n: (x / relative).astype(np.float32) for n, x in sums.items()}


def _compress(b: Array, a: Array) -> tuple[Array, Array]:
    """Return factors of the same products with min(out, in) columns; nothing is truncated."""
    if b.shape[1] <= a.shape[2]:
        q, r = np.linalg.qr(b)  # (modules, out, out), (modules, out, columns)
        return q, r @ a
    q, r = np.linalg.qr(a.transpose(0, 2, 1))
    return b @ r.transpose(0, 2, 1), q.transpose(0, 2, 1)


def _svd(b: Array, a: Array) -> tuple[Array, Array, Array]:
    """Return u (modules, out, k), s (modules, k), v (modules, k, in) of the products ``b a``."""
    if b.shape[2] >= min(b.shape[1], a.shape[2]):
        u, s, v = np.linalg.svd(b @ a, full_matrices=False)
        return u, s, v
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.transpose(0, 2, 1))
    u, s, v = np.linalg.svd(rb @ ra.transpose(0, 2, 1))
    return qb @ u, s, v @ qa.transpose(0, 2, 1)


def _complement(rows: Array, before: Array, n: int) -> Array:
    """Return n orthonormal rows, orthogonal to ``rows`` (k, in), from the row space of ``before``.

    Where that space is exhausted, QR supplies directions outside it.
    """
    rest = before - (before @ rows.T) @ rows
    candidates = np.linalg.svd(rest, full_matrices=False)[2][:n]
    return _orthonormal_columns(np.concatenate([rows, candidates]).T)[:, len(rows) :].T


def _orthonormal_columns(x: Array) -> Array:
    """Return Q of the QR decomposition with a positive diagonal of R (unique, so reproducible)."""
    q, r = np.linalg.qr(x)
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


def _triangle(x: Array) -> Array:
    """Return R of the QR decomposition, batched over leading axes."""
    return np.asarray(np.linalg.qr(x, mode="r"), dtype=np.float64)


def _by_shape(tensors: Tensors) -> dict[tuple[int, int, int], list[str]]:
    """Return (out, in, rank) to the sorted modules of that shape, which are one batch."""
    shapes: dict[tuple[int, int, int], list[str]] = {}
    for m in modules(tensors):
        (rank, width), (out, rank_b) = tensors[m + A_SUFFIX].shape, tensors[m + B_SUFFIX].shape
        if rank != rank_b:
            raise ValueError(f"{m}: A has rank {rank}, B has rank {rank_b}")
        shapes.setdefault((out, width, rank), []).append(m)
    return shapes


def _stack(tensors: Tensors, names: list[str], suffix: str) -> Array:
    return np.array([tensors[n + suffix] for n in names], dtype=np.float64)


def _check_rank(name: str, rank: int, width: int) -> None:
    if rank > width:
        raise ValueError(
            f"{name}: rank {rank} exceeds the {width} inputs; rows of A cannot be orthonormal. "
            "Set a smaller model.rank."
        )


def _check_weight(c: Contribution) -> float:
    if not (math.isfinite(c.weight) and 0.0 <= c.weight <= 1.0 + 1e-9):
        raise ValueError(f"client '{c.client}' has weight {c.weight}, outside [0, 1]")
    return c.weight


def _check_total(total: float, count: int) -> None:
    if count == 0:
        raise ValueError("no adapter to aggregate")
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the weights of {count} clients sum to {total:.9g}; they must sum to 1")


def _check_tensors(c: Contribution, previous: Tensors, names: list[str]) -> None:
    missing = [n for n in names if n not in c.tensors]
    unknown = [n for n in c.tensors if n not in previous]
    if missing or unknown:
        raise ValueError(
            f"client '{c.client}': missing {missing[:3]}, unknown {unknown[:3]}; the tensors must "
            "be those of the adapter that was sent"
        )
    for n in names:
        x = c.tensors[n]
        if x.shape != previous[n].shape:
            raise ValueError(f"client '{c.client}': {n} is {x.shape}, not {previous[n].shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"client '{c.client}': {n} holds a number that is not finite")
