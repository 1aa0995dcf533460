"""Fewer bytes for an array of LoRA factors: float32, bfloat16 or int8, and back.

::

    float32    4 bytes an entry, as it is
    bfloat16   2 bytes: the upper half of float32, rounded to nearest, ties to even
    int8       1 byte, and 4 for each scale: q = round(x / s), s = max |x| / 127, x' = s q

An int8 scale serves one *rank component* of a factor: a row of A (r, in), a column of B (out, r).
Components differ in size by the singular values they stand for, so one scale for a whole tensor
would drown the small ones; and r scales a tensor cost next to nothing.

How much is lost: ``|x - x'| <= 2^-8 |x|`` in bfloat16 (normal numbers) and ``<= s / 2`` in int8, up
to float32's own rounding.  In int8 a component of n entries so keeps ``|x - x'|^2 <= n / 254^2
|x|^2``: a contraction up to n = 64,516, which error feedback needs (``clients/coarse.py``).

Decoding is strict.  Sizes and types are those of the manifest, else the message is broken
(``WireError``).  A row that no encoder writes (an entry -128, a scale that is negative or not
finite, infinity or NaN in bfloat16) decodes to NaN, so that it condemns its client alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, RecordDict

from fedalign.wire.records import A_SUFFIX, F32
from fedalign.wire.values import arrays

FLOAT32, BFLOAT16, INT8 = PRECISIONS = ("float32", "bfloat16", "int8")
STORED: dict[str, str] = {FLOAT32: "float32", BFLOAT16: "uint16", INT8: "int8"}
"""Type of the array that travels."""
LARGEST = 127
SCALES = "scales"

Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Coarse:
    """k rows of P entries as they travel."""

    precision: str
    entries: npt.NDArray[Any]
    """(k, P) of the type in ``STORED``."""
    scales: F32
    """(k, S), S the rank components of the layout; (k, 0) unless int8."""


def encode(values: F32, layout: Layout, precision: str) -> Coarse:
    """Return rows (k, P) float32 in a precision; ``layout`` names the tensors of P.

    Raises ``ValueError`` for an unknown precision, and for entries that are not finite in another
    precision than float32.
    """
    x = np.ascontiguousarray(values, dtype=np.float32)
    none = np.zeros((len(x), 0), dtype=np.float32)
    if precision == FLOAT32:
        return Coarse(precision, x, none)
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    if not np.isfinite(x).all():
        raise ValueError(f"entries that are not finite cannot be sent as {precision}")
    if precision == BFLOAT16:
        bits = x.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return Coarse(precision, rounded.astype(np.uint16), none)
    scales = (_largest(np.abs(x), layout) / LARGEST).astype(np.float32)
    spread = scales[:, _components(layout)].astype(np.float64)
    steps = np.divide(x, spread, out=np.zeros(x.shape), where=spread > 0)
    entries = np.clip(np.rint(steps), -LARGEST, LARGEST).astype(np.int8)
    return Coarse(precision, entries, scales)


def decode(sent: Coarse, layout: Layout) -> F32:
    """Return rows (k, P) float32; a row that no encoder writes is NaN.  Same bits on both sides."""
    if sent.precision == FLOAT32:
        return np.asarray(sent.entries, dtype=np.float32)
    if sent.precision == BFLOAT16:
        values = (sent.entries.astype(np.uint32) << 16).view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(np.nan))
    bad = ~(np.isfinite(sent.scales) & (sent.scales >= 0)).all(1, keepdims=True)
    bad |= (sent.entries < -LARGEST).any(1, keepdims=True)
    scales = np.where(bad, np.float32(np.nan), sent.scales)
    with np.errstate(over="ignore"):  # a huge scale gives infinity, which condemns the row as well
        return sent.entries.astype(np.float32) * scales[:, _components(layout)]


def to_record(name: str, sent: Coarse) -> ArrayRecord:
    """Return the record that travels: an array ``name``, in int8 another of scales."""
    record = {name: Array(np.ascontiguousarray(sent.entries))}
    if sent.precision == INT8:
        record[SCALES] = Array(np.ascontiguousarray(sent.scales))
    return ArrayRecord(record)


def from_record(
    content: RecordDict, name: str, rows: int, layout: Layout, precision: str
) -> Coarse:
    """Read ``rows`` rows of exactly this layout and precision; anything else: ``WireError``."""
    size = sum(math.prod(shape) for _, shape in layout)
    expected = {name: ((rows, size), STORED[precision])}
    if precision == INT8:
        expected[SCALES] = ((rows, components(layout)), "float32")
    found = arrays(content, name, expected)
    scales = found.get(SCALES, np.zeros((rows, 0), dtype=np.float32))
    return Coarse(precision, found[name], scales)


def components(layout: Layout) -> int:
    """Return the number of rank components of a layout: the scales of a row (S)."""
    return sum(_rank(name, shape) for name, shape in layout)


def _rank(name: str, shape: Sequence[int]) -> int:
    return shape[0] if name.endswith(A_SUFFIX) else shape[1]


def _largest(x: F32, layout: Layout) -> F32:
    """Return the largest entry of each rank component, (k, S), of magnitudes (k, P)."""
    found, at = [], 0
    for name, shape in layout:
        tensor = x[:, at : at + math.prod(shape)].reshape(len(x), *shape)
        found.append(tensor.max(2 if name.endswith(A_SUFFIX) else 1))
        at += math.prod(shape)
    return np.concatenate(found, axis=1)


@lru_cache(maxsize=4)
def _components(layout: Layout) -> npt.NDArray[np.int32]:
    """Return the rank component of each entry, (P,)."""
    found, first = [], 0
    for name, shape in layout:
        rank = _rank(name, shape)
        own = np.arange(first, first + rank, dtype=np.int32)
        grid = own[:, None] if name.endswith(A_SUFFIX) else own[None, :]
        found.append(np.broadcast_to(grid, shape).ravel())
        first += rank
    return np.concatenate(found)
