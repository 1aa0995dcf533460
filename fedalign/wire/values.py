"""Strict reading of single values; a ``ValueError`` means that the record is broken."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, RecordDict

from fedalign.errors import WireError
from fedalign.wire.records import F32

HEADER_BYTES = 4096
"""Most that a serialised array may have beside its entries."""
MAX_COUNT = 2**31 - 1
MAX_NAME = 200


def array(content: RecordDict, name: str, shape: tuple[int, ...]) -> F32:
    """Return the one array of a record: float32 of exactly this shape, else ``WireError``."""
    return np.asarray(arrays(content, name, {name: (shape, "float32")})[name], dtype=np.float32)


def arrays(
    content: RecordDict, record: str, expected: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a record by name: exactly those expected, each of its shape and type.

    Size and declared shape are looked at before the bytes are decoded, so that a short message
    cannot ask for much memory.  Anything else is a ``WireError``.
    """
    try:
        sent = content.array_records[record]
        if set(sent.keys()) != set(expected):
            raise WireError("bad-array", f"expected {', '.join(expected)}")
        return {name: _decoded(sent[name], *what) for name, what in expected.items()}
    except WireError:
        raise
    except Exception:
        # Whatever foreign bytes make a decoder raise, the message is broken and nothing else.
        raise WireError("bad-array") from None


def _decoded(sent: Array, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    room = np.dtype(dtype).itemsize * math.prod(shape) + HEADER_BYTES
    if (str(sent.dtype), tuple(sent.shape)) != (dtype, shape) or len(sent.data) > room:
        raise WireError("bad-array", f"expected {dtype} {shape}")
    header = io.BytesIO(sent.data[:HEADER_BYTES])
    np.lib.format.read_magic(header)
    described = np.lib.format.read_array_header_1_0(header)
    if described != (shape, False, np.dtype(dtype)):
        raise WireError("bad-array", f"expected {dtype} {shape}")
    return np.asarray(np.load(io.BytesIO(sent.data), allow_pickle=False))


def name(text: object) -> str:
    """Return the name of a client or group; ``ValueError`` unless short, printable, not empty."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_NAME or not text.isprintable():
        raise ValueError("name")
    return text


def floats(values: object, k: int) -> tuple[float, ...]:
    """Return ``k`` floats, finite or not."""
    if not isinstance(values, list) or len(values) != k:
        raise ValueError("length")
    return tuple(float(v) for v in values)


def finite(values: object, k: int) -> tuple[float, ...]:
    """Return ``k`` finite floats."""
    found = floats(values, k)
    if not all(math.isfinite(v) for v in found):
        raise ValueError("not finite")
    return found


def ints(values: object, k: int) -> tuple[int, ...]:
    """Return ``k`` counts in [0, 2^31)."""
    if not isinstance(values, list) or len(values) != k:
        raise ValueError("length")
    if not all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_COUNT for v in values
    ):
        raise ValueError("counts")
    return tuple(int(v) for v in values)
