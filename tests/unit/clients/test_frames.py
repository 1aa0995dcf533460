"""Frames: nothing is lost, nothing unexpected is taken."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.frames import (
    HEAD,
    MAGIC,
    MAX_HEADER,
    MAX_VALUES,
    REPLY,
    REQUESTS,
    VERSION,
    expect_end,
    read_frame,
    write_frame,
)
from fedalign import wire
from fedalign.errors import WireError


def framed(content: RecordDict, kind: str = wire.TRAIN) -> bytes:
    out = io.BytesIO()
    write_frame(out.write, kind, content)
    return out.getvalue()


def unframed(data: bytes, kinds=REQUESTS, limit: int = 1 << 20) -> tuple[str, RecordDict]:
    source = io.BytesIO(data)
    found = read_frame(source.read, kinds, limit)
    expect_end(source.read)
    return found


def raw(header: object, body: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return HEAD.pack(MAGIC, VERSION, len(text), len(body) if size is None else size) + text + body


def same(a: object, b: object) -> bool:
    """Equal in value and type, NaN equal to NaN, -0.0 apart from 0.0."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack(">d", a) == struct.pack(">d", b) or (a != a and b != b)
    return type(a) is type(b) and a == b


def same_content(a: RecordDict, b: RecordDict) -> bool:
    if list(a) != list(b):
        return False
    for name, record in a.items():
        other = b[name]
        if type(record) is not type(other) or list(record) != list(other):
            return False
        for key, value in record.items():
            if isinstance(value, Array):
                facts = [(x.dtype, x.shape, x.stype, x.data) for x in (value, other[key])]
                if facts[0] != facts[1]:
                    return False
            elif not same(value, other[key]):
                return False
    return True


INTS = st.integers(-(2**63), 2**63 - 1)
SCALARS = (st.booleans(), INTS, st.floats(), st.text(), st.binary())
NAMES = st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1, max_size=8).filter(
    str.isprintable
)
CONFIGS = st.dictionaries(
    NAMES, st.one_of(*SCALARS, *(st.lists(s, max_size=4) for s in SCALARS)), max_size=4
).map(ConfigRecord)
METRICS = st.dictionaries(
    NAMES,
    st.one_of(INTS, st.floats(), st.lists(INTS, max_size=4), st.lists(st.floats(), max_size=4)),
    max_size=4,
).map(MetricRecord)
ARRAYS = st.dictionaries(
    NAMES,
    st.lists(st.floats(width=32), max_size=5).map(lambda v: Array(np.array(v, dtype=np.float32))),
    max_size=2,
).map(ArrayRecord)
CONTENTS = st.dictionaries(NAMES, st.one_of(CONFIGS, METRICS, ARRAYS), max_size=4).map(RecordDict)


@given(CONTENTS, st.sampled_from(REQUESTS))
def test_round_trip(content, kind):
    found_kind, found = unframed(framed(content, kind))
    assert found_kind == kind
    assert same_content(content, found)


def test_messages_of_the_wire_contract():
    request = wire.Request("round", 3, 1, ("north",), '{"run.seed": 0}', "ab", ("test",))
    update = wire.adapter_record(np.arange(6, dtype=np.float32))
    message = wire.encode_request(request, update)
    _, found = unframed(framed(message))
    assert wire.decode_request(found) == request
    assert same_content(message, found)
    score = wire.Score(0.1 + 0.2, 1, 1.0, 0.25, (("0" * 16, 0.1 + 0.2),))
    reply = wire.encode_scores([wire.ScoreReply("north", wire.OK, {"test": score})], ("test",))
    _, found = unframed(framed(reply, REPLY), (REPLY,))
    (back,) = wire.decode_scores(found, ("north",), ("test",), 0.0)
    assert back.scores["test"] == score


@given(CONTENTS, st.data())
@settings(max_examples=60)
def test_truncated_anywhere(content, data):
    whole = framed(content)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(WireError):
        unframed(whole[:cut])


@given(CONTENTS, st.data())
@settings(max_examples=150)
def test_a_changed_byte_is_refused_or_is_another_content(content, data):
    whole = bytearray(framed(content))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):  # any other exception fails the test
        unframed(bytes(whole))


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(WireError):
        unframed(data)
    with pytest.raises(WireError):
        unframed(raw(data))


def test_bytes_after_the_frame():
    with pytest.raises(WireError, match="after the frame"):
        unframed(framed(RecordDict()) + b"x")


CONFIG = {"type": "config", "name": "c", "bytes": 2}
ARRAY = {"name": "a", "dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "bytes": 4}


def arrays(*described: object) -> dict[str, object]:
    return {"kind": wire.TRAIN, "records": [{"type": "arrays", "name": "x", "arrays": described}]}


def values(text: bytes, type_: str = "config") -> bytes:
    record = {"type": type_, "name": "c", "bytes": len(text)}
    return raw({"kind": wire.TRAIN, "records": [record]}, text)


@pytest.mark.parametrize(
    "frame",
    [
        raw({"kind": "train.other", "records": []}),
        raw({"kind": "reply", "records": []}),
        raw({"kind": 3, "records": []}),
        raw({"kind": wire.TRAIN}),
        raw({"kind": wire.TRAIN, "records": [], "more": 1}),
        raw(b'{"kind": "train.round", "kind": "train.round", "records": []}'),
        raw(b'{"kind": "train.round", "records": NaN}'),
        raw(b"[" * 100_000),
        raw(b'{"a":' * 100_000),
        raw([]),
        raw({"kind": wire.TRAIN, "records": [CONFIG, CONFIG]}, b"{}{}"),
        raw({"kind": wire.TRAIN, "records": [CONFIG]}, b"{}x"),
        raw({"kind": wire.TRAIN, "records": [CONFIG | {"type": "pickle"}]}, b"{}"),
        raw({"kind": wire.TRAIN, "records": [CONFIG | {"bytes": True}]}, b"{"),
        raw({"kind": wire.TRAIN, "records": [CONFIG | {"bytes": -1}]}, b""),
        raw({"kind": wire.TRAIN, "records": [CONFIG | {"name": ""}]}, b"{}"),
        raw({"kind": wire.TRAIN, "records": [CONFIG | {"name": "a\nb"}]}, b"{}"),
        raw({"kind": wire.TRAIN, "records": [CONFIG | {"name": "a" * 201}]}, b"{}"),
        raw(arrays(ARRAY, ARRAY), b"12345678"),
        raw(arrays(ARRAY | {"shape": [-1]}), b"1234"),
        raw(arrays(ARRAY | {"shape": [1.0]}), b"1234"),
        raw(arrays(ARRAY | {"shape": "1"}), b"1234"),
        raw(arrays(ARRAY | {"bytes": 5}), b"1234"),
        raw(arrays("a"), b""),
        values(b'{"a": null}'),
        values(b'{"a": [[1]]}'),
        values(b'{"a": {"b": 1}}'),
        values(b'{"a": {"bytes": "no base64!"}}'),
        values(b'{"a": [1, "b"]}'),
        values(b'{"a": 9223372036854775808}'),
        values(b'{"a": ' + b"9" * 5000 + b"}"),
        values(b'{"a": 1, "a": 2}'),
        values(b"[1]"),
        values(b"\xff"),
        values(b'{"a": "text"}', "metrics"),
        values(b'{"a": true}', "metrics"),
        b"FALX" + framed(RecordDict())[4:],
        MAGIC + struct.pack(">I", 2) + framed(RecordDict())[8:],
    ],
)
def test_refused(frame):
    with pytest.raises(WireError):
        unframed(frame)


def test_a_large_claim_costs_no_memory():
    huge = raw({"kind": wire.TRAIN, "records": []}, size=1 << 40)
    claim = 1 << 29
    promised = arrays(ARRAY | {"bytes": claim, "shape": [claim // 4]})
    header = HEAD.pack(MAGIC, VERSION, MAX_HEADER + 1, 0)
    tracemalloc.start()
    for frame in (huge, header, raw(promised, b"1234", size=claim)):
        with pytest.raises(WireError):
            unframed(frame, limit=1 << 30)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_values_are_limited_over_all_records():
    half = MAX_VALUES // 2 + 1
    records = [CONFIG | {"name": name, "bytes": half} for name in ("a", "b")]
    with pytest.raises(WireError, match="frame-too-large"):
        unframed(raw({"kind": wire.TRAIN, "records": records}, b"{}", size=2 * half))
    large = {name: ConfigRecord({"x": "y" * half}) for name in ("a", "b")}
    with pytest.raises(WireError, match="frame-too-large"):
        framed(RecordDict(large))


def test_a_body_over_the_limit_is_refused_before_it_is_read():
    content = RecordDict({"x": wire.adapter_record(np.zeros(100, dtype=np.float32))})
    whole = framed(content)
    read: list[int] = []
    source = io.BytesIO(whole)

    def counting(n: int) -> bytes:
        read.append(n)
        return source.read(n)

    with pytest.raises(WireError, match="frame-too-large"):
        read_frame(counting, REQUESTS, 100)
    assert sum(read) == HEAD.size
