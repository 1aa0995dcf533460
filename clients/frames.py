"""Frames: how a message passes between the ClientApp and the resident trainer, one each way.

A frame on the wire of a stream socket::

    4 bytes   magic "FALN"
    4 bytes   format version, big endian
    4 bytes   H, length of the header, at most 1 MiB
    8 bytes   B, length of the body, at most the reader's limit
    H bytes   header: JSON {"kind": ..., "records": [...]}, described below
    B bytes   body: the parts that the header names, in its order, and nothing else

A record is ``{"type": "config" | "metrics", "name": ..., "bytes": n}`` with n bytes of JSON in the
body, or ``{"type": "arrays", "name": ..., "arrays": [{"name", "dtype", "shape", "stype", "bytes"},
...]}`` with the bytes of each array.  Values keep their exact type: JSON tells int from float from
bool from text; bytes are written ``{"bytes": base64}``.  Not-a-number and infinities pass: what to
make of them is for ``fedalign.wire`` to say.

Why an own format: one side runs code that the coordinator sent, the other holds private data.
Nothing here can name a type, a function or a file.  A reader takes what it asked for or raises
``WireError``: another kind, a length that does not fit, a name twice, a type that is not listed, a
byte too many.  It never holds more than the header, the body and the values made from it, and it
allocates as bytes arrive, so a large number in a header costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedalign import wire
from fedalign.errors import WireError
from fedalign.wire.predictor import PREDICTOR

REQUESTS = (wire.HELLO, wire.SCORE, wire.TRAIN, wire.PERSONAL, wire.EXCHANGE, PREDICTOR)
"""Kinds that a trainer answers: the message types of the wire contract."""
REPLY = "reply"

MAGIC = b"FALN"
VERSION = 1
HEAD = struct.Struct(">4sIIQ")
MAX_HEADER = 1 << 20
MAX_BODY = 1 << 30
"""Default limit of a body: an adapter of 268 million float32 entries."""
MAX_VALUES = 64 << 20
"""Most bytes of JSON in the config and metrics records of a frame together: once read, JSON takes
up to ten times its bytes."""
MAX_NAME = 200
CHUNK = 1 << 20

Read = Callable[[int], bytes]
"""Return between 1 and n bytes; empty at the end of the stream."""
Write = Callable[[bytes], object]


def write_frame(write: Write, kind: str, content: RecordDict) -> None:
    """Write one frame.  Raises ``WireError`` for a content that no reader would take."""
    records: list[dict[str, Any]] = []
    parts: list[bytes] = []
    values_size = 0
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = []
            for key, array in record.items():
                arrays.append(
                    {
                        "name": key,
                        "dtype": array.dtype,
                        "shape": list(array.shape),
                        "stype": array.stype,
                        "bytes": len(array.data),
                    }
                )
                parts.append(array.data)
            records.append({"type": "arrays", "name": name, "arrays": arrays})
        else:
            values = {key: _to_json(value) for key, value in record.items()}
            part = json.dumps(values).encode()
            values_size += len(part)
            if values_size > MAX_VALUES:
                raise WireError("frame-too-large", "values of all records")
            type_ = "config" if isinstance(record, ConfigRecord) else "metrics"
            records.append({"type": type_, "name": name, "bytes": len(part)})
            parts.append(part)
    header = json.dumps({"kind": kind, "records": records}).encode()
    if len(header) > MAX_HEADER:
        raise WireError("frame-too-large", "header")
    write(HEAD.pack(MAGIC, VERSION, len(header), sum(map(len, parts))) + header)
    for part in parts:
        write(part)


def read_frame(read: Read, kinds: Collection[str], limit: int = MAX_BODY) -> tuple[str, RecordDict]:
    """Read one frame of one of ``kinds``, its body at most ``limit`` bytes.

    Raises ``WireError`` for anything else; what the stream holds after the frame is not touched
    (:func:`expect_end`).
    """
    magic, version, header_size, body_size = HEAD.unpack(_exactly(read, HEAD.size))
    if magic != MAGIC or version != VERSION:
        raise WireError("bad-frame", "no frame of this version")
    if header_size > MAX_HEADER or body_size > limit:
        raise WireError("frame-too-large")
    header = _parse(_exactly(read, header_size), constants=False)
    kind, described = _fields(header, {"kind": str, "records": list})
    if kind not in kinds:
        raise WireError("unknown-kind")
    plan = [_described(record) for record in described]
    if len({name for _, name, _ in plan}) != len(plan):
        raise WireError("bad-frame", "a record twice")
    if sum(size for _, _, parts in plan for _, size in parts) != body_size:
        raise WireError("bad-frame", "parts and body differ in length")
    values = [size for make, _, parts in plan for _, size in parts if make is not _make_arrays]
    if sum(values) > MAX_VALUES:
        raise WireError("frame-too-large", "values of all records")
    content = RecordDict()
    for make, name, parts in plan:
        filled = [(facts, _exactly(read, size)) for facts, size in parts]
        try:
            content[name] = make(filled)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise WireError("bad-frame", "a value that no record takes") from None
    return kind, content


def expect_end(read: Read) -> None:
    """Raise ``WireError`` unless the stream ends here."""
    if read(1):
        raise WireError("bad-frame", "bytes after the frame")


Part = tuple[dict[str, Any], int]
Make = Callable[[list[tuple[dict[str, Any], bytes]]], ArrayRecord | ConfigRecord | MetricRecord]


def _described(record: Any) -> tuple[Make, str, list[Part]]:
    """Return how a record is made, its name, and the parts of the body that it takes."""
    if isinstance(record, dict) and record.get("type") == "arrays":
        _, name, arrays = _fields(record, {"type": str, "name": str, "arrays": list})
        parts = [_described_array(array) for array in arrays]
        if len({facts["name"] for facts, _ in parts}) != len(parts):
            raise WireError("bad-frame", "an array twice")
        return _make_arrays, _name(name), parts
    type_, name, size = _fields(record, {"type": str, "name": str, "bytes": int})
    if type_ not in ("config", "metrics"):
        raise WireError("bad-frame", "unknown type of record")
    if not 0 <= size <= MAX_VALUES:
        raise WireError("frame-too-large", "values of a record")
    return (_make_config if type_ == "config" else _make_metrics), _name(name), [({}, size)]


def _described_array(array: Any) -> Part:
    wanted = {"name": str, "dtype": str, "shape": list, "stype": str, "bytes": int}
    name, dtype, shape, stype, size = _fields(array, wanted)
    if size < 0 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise WireError("bad-frame", "array")
    facts = {"name": _name(name), "dtype": _name(dtype), "shape": shape, "stype": _name(stype)}
    return facts, size


def _make_arrays(parts: list[tuple[dict[str, Any], bytes]]) -> ArrayRecord:
    return ArrayRecord(
        {
            f["name"]: Array(dtype=f["dtype"], shape=tuple(f["shape"]), stype=f["stype"], data=data)
            for f, data in parts
        }
    )


def _make_config(parts: list[tuple[dict[str, Any], bytes]]) -> ConfigRecord:
    return ConfigRecord(_values(parts[0][1]))


def _make_metrics(parts: list[tuple[dict[str, Any], bytes]]) -> MetricRecord:
    return MetricRecord(_values(parts[0][1]))


def _values(data: bytes) -> dict[str, Any]:
    parsed = _parse(data, constants=True)
    if not isinstance(parsed, dict):
        raise WireError("bad-frame", "values")
    return {_name(key): _from_json(value) for key, value in parsed.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_json(v) for v in value]
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    return value


def _from_json(value: Any, inside: bool = False) -> Any:
    if isinstance(value, list) and not inside:
        return [_from_json(v, inside=True) for v in value]
    if isinstance(value, dict):
        (text,) = _fields(value, {"bytes": str})
        try:
            return base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise WireError("bad-frame", "bytes") from None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise WireError("bad-frame", "an integer of more than 64 bits")
    if not isinstance(value, str | int | float):
        raise WireError("bad-frame", "a value of another type")
    return value


def _fields(value: Any, wanted: dict[str, type]) -> list[Any]:
    """Return the fields of an object that has exactly these, of exactly these types."""
    if not isinstance(value, dict) or set(value) != set(wanted):
        raise WireError("bad-frame", "fields")
    if not all(type(value[name]) is kind for name, kind in wanted.items()):
        raise WireError("bad-frame", "type of a field")
    return [value[name] for name in wanted]


def _name(text: str) -> str:
    if not 0 < len(text) <= MAX_NAME or not text.isprintable():
        raise WireError("bad-frame", "name")
    return text


def _parse(data: bytes, constants: bool) -> Any:
    """Parse strict JSON: UTF-8, no key twice; ``NaN`` and infinities only where allowed."""
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_once,
            parse_constant=float if constants else _refuse,
        )
    except (ValueError, RecursionError):
        raise WireError("bad-frame", "not JSON") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _exactly(read: Read, size: int) -> bytes:
    """Return exactly ``size`` bytes; memory grows with what arrives, not with ``size``."""
    found = bytearray()
    while len(found) < size:
        piece = read(min(CHUNK, size - len(found)))
        if not piece:
            raise WireError("frame-truncated")
        found += piece
    return bytes(found)
