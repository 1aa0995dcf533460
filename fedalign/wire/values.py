"""Strict reading of single values; a ``ValueError`` means that the record is broken."""

from __future__ import annotations

import numpy as np
from flwr.app import RecordDict

from fedalign.errors import WireError
from fedalign.wire.records import F32


def array(content: RecordDict, name: str, shape: tuple[int, ...]) -> F32:
    try:
        record = content.array_records[name]
        array = record[name].numpy()
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-array") from None
    if len(record) != 1 or array.dtype != np.float32 or array.shape != shape:
        raise WireError("bad-array", f"expected float32 {shape}")
    return np.asarray(array, dtype=np.float32)


def floats(values: object, k: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != k:
        raise ValueError("length")
    return tuple(float(v) for v in values)


def ints(values: object, k: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) != k:
        raise ValueError("length")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ValueError("counts")
    return tuple(int(v) for v in values)
