"""Coarse arrays: how much is lost, what is refused, and the bytes that travel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedalign import wire
from fedalign.errors import WireError
from fedalign.wire.coarse import components, decode, encode, from_record, to_record

LAYOUT = (("m.lora_A.weight", (2, 3)), ("m.lora_B.weight", (4, 2)))
MANIFEST = wire.Manifest(LAYOUT, 2, 4.0, ("m",), "base", "tok", False)
P = MANIFEST.upload_size
COARSE = (wire.BFLOAT16, wire.INT8)
# Magnitudes of trained factors and far beyond; tiny ones become zero or subnormal scales.
ROWS = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.just(P)),
    elements=st.floats(-1e4, 1e4, width=32),
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def travelled(values: np.ndarray, precision: str, layout=LAYOUT) -> np.ndarray:
    content = wire.encode_request(
        wire.Request("train", 1, 1, ("a",), "{}"),
        to_record("x", encode(values, layout, precision)),
    )
    content["x"] = content.array_records["adapter"]
    return decode(from_record(content, "x", len(values), layout, precision), layout)


@given(ROWS)
@settings(deadline=None)
def test_float32_is_itself(values: np.ndarray) -> None:
    assert np.array_equal(travelled(values, wire.FLOAT32), values)


@given(ROWS)
@settings(deadline=None)
def test_bfloat16_loses_a_256th_at_most(values: np.ndarray) -> None:
    tiny = np.finfo(np.float32).tiny
    back = travelled(values, wire.BFLOAT16)
    assert (np.abs(back - values) <= 2.0**-8 * np.abs(values) + tiny).all()
    assert np.array_equal(travelled(back, wire.BFLOAT16), back)


@given(ROWS)
@settings(deadline=None)
def test_int8_loses_half_a_step_of_its_rank_component_at_most(values: np.ndarray) -> None:
    back = travelled(values, wire.INT8)
    a, b = np.split(values, [6], axis=1)
    step_a = np.abs(a.reshape(-1, 2, 3)).max(2, keepdims=True) / 127
    step_b = np.abs(b.reshape(-1, 4, 2)).max(1, keepdims=True) / 127
    steps = np.concatenate(
        [
            np.broadcast_to(step_a, (len(values), 2, 3)).reshape(len(values), 6),
            np.broadcast_to(step_b, (len(values), 4, 2)).reshape(len(values), 8),
        ],
        axis=1,
    )
    assert (np.abs(back - values) <= 0.50001 * steps + 1e-40).all()
    assert (np.abs(back) <= np.abs(values).max(1, keepdims=True) * 1.00001).all()


def test_a_small_component_is_not_drowned_by_a_large_one() -> None:
    values = np.zeros((1, P), np.float32)
    values[0, :3] = (1000, -400, 3)
    values[0, 3:6] = (0.001, -0.0005, 0.0002)
    back = travelled(values, wire.INT8)
    assert back[0, 3:6] == pytest.approx(values[0, 3:6], rel=0.02)


def test_bfloat16_is_what_torch_makes(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    values = (rng.normal(size=(50, P)) * 10.0 ** rng.integers(-6, 4, (50, 1))).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(travelled(values, wire.BFLOAT16), expected)


@pytest.mark.parametrize("precision", COARSE)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_encoded(precision: str, bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode(np.full((1, P), bad, np.float32), LAYOUT, precision)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        encode(np.zeros((1, P), np.float32), LAYOUT, "int4")


def reply(precision: str, k: int = 2):
    replies = [wire.TrainReply(f"c{i}", wire.OK, pairs=3) for i in range(k)]
    changes = np.linspace(-1, 1, k * P, dtype=np.float32).reshape(k, P)
    return wire.encode_train(replies, encode(changes, LAYOUT, precision)), changes


def read(content, precision: str, k: int = 2, received: np.ndarray | None = None):
    received = np.zeros(P, np.float32) if received is None else received
    names = tuple(f"c{i}" for i in range(k))
    return wire.decode_train(content, names, MANIFEST, 0.0, precision, received)


@pytest.mark.parametrize("precision", COARSE)
def test_a_change_is_added_to_the_factors_received(precision: str) -> None:
    content, changes = reply(precision)
    received = np.arange(P, dtype=np.float32)
    rows, factors = read(content, precision, received=received)
    assert [r.status for r in rows] == [wire.OK, wire.OK]
    assert factors == pytest.approx(received + changes, abs=0.01)
    with pytest.raises(ValueError, match="means nothing"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0, precision)


@pytest.mark.parametrize("asked", wire.PRECISIONS)
@pytest.mark.parametrize("sent", wire.PRECISIONS)
def test_another_precision_than_the_runs_is_refused(sent: str, asked: str) -> None:
    content, _ = reply(sent)
    if sent == asked:
        assert read(content, asked)[0][0].status == wire.OK
        return
    with pytest.raises(WireError, match="bad-array"):
        read(content, asked)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])  # infinities and NaN
def test_bfloat16_that_no_encoder_writes_condemns_its_client_only(bits: int) -> None:
    sent = encode(np.ones((2, P), np.float32), LAYOUT, wire.BFLOAT16)
    sent.entries[0, 3] = bits
    replies = [wire.TrainReply(f"c{i}", wire.OK) for i in range(2)]
    rows, _ = read(wire.encode_train(replies, sent), wire.BFLOAT16)
    assert [r.status for r in rows] == [wire.NON_FINITE, wire.OK]


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, None])
def test_int8_that_no_encoder_writes_condemns_its_client_only(scale: float | None) -> None:
    sent = encode(np.ones((2, P), np.float32), LAYOUT, wire.INT8)
    if scale is None:
        sent.entries[0, 0] = -128
    else:
        sent.scales[0, 1] = scale
    replies = [wire.TrainReply(f"c{i}", wire.OK) for i in range(2)]
    rows, _ = read(wire.encode_train(replies, sent), wire.INT8)
    assert [r.status for r in rows] == [wire.NON_FINITE, wire.OK]


@pytest.mark.parametrize(("scale", "status"), [(1e3, wire.OUT_OF_RANGE), (3e38, wire.NON_FINITE)])
def test_a_scale_that_makes_enormous_factors_condemns_its_client(scale: float, status: int) -> None:
    sent = encode(np.ones((2, P), np.float32), LAYOUT, wire.INT8)
    sent.scales[1, :] = scale
    replies = [wire.TrainReply(f"c{i}", wire.OK) for i in range(2)]
    rows, _ = read(wire.encode_train(replies, sent), wire.INT8)
    assert [r.status for r in rows] == [wire.OK, status]


@pytest.mark.parametrize(
    "arrays_sent",
    [
        {"update": np.zeros((2, P), np.int8)},  # no scales
        {"update": np.zeros((2, P), np.int8), "scales": np.zeros((2, 3), np.float32)},
        {"update": np.zeros((2, P), np.int8), "scales": np.zeros((2, 4), np.float64)},
        {"update": np.zeros((2, P + 1), np.int8), "scales": np.zeros((2, 4), np.float32)},
        {"update": np.zeros((2, P), np.uint8), "scales": np.zeros((2, 4), np.float32)},
        {
            "update": np.zeros((2, P), np.int8),
            "scales": np.zeros((2, 4), np.float32),
            "more": np.zeros(1, np.int8),
        },
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(arrays_sent: dict[str, np.ndarray]) -> None:
    assert components(LAYOUT) == 4
    content, _ = reply(wire.INT8)
    content["update"] = ArrayRecord({n: Array(x) for n, x in arrays_sent.items()})
    with pytest.raises(WireError, match="bad-array"):
        read(content, wire.INT8)


@given(data=st.binary(max_size=300), which=st.sampled_from(["update", "scales"]))
@settings(deadline=None, max_examples=50)
def test_foreign_bytes_are_refused(data: bytes, which: str) -> None:
    content, _ = reply(wire.INT8)
    content.array_records["update"][which].data = data
    with pytest.raises(WireError, match="bad-array"):
        read(content, wire.INT8)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", COARSE)
def test_a_broadcast_holds_what_changes(
    frozen: bool, precision: str, rng: np.random.Generator
) -> None:
    manifest = replace(MANIFEST, frozen_a=frozen)
    flat = rng.normal(size=manifest.size).astype(np.float32)
    record = wire.broadcast_record(flat, manifest, precision)
    content = wire.encode_request(wire.Request("train", 1, 1, ("a",), "{}"), record)
    back = wire.decode_broadcast(content, manifest, precision)
    assert back == pytest.approx(flat[manifest.upload_mask()], abs=0.02)
    assert len(back) == (8 if frozen else 14)
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_adapter(content, manifest)


def test_a_broadcast_that_is_not_finite_is_refused() -> None:
    sent = encode(np.ones((1, P), np.float32), LAYOUT, wire.BFLOAT16)
    sent.entries[0, 0] = 0x7F80
    request = wire.Request("train", 1, 1, ("a",), "{}")
    content = wire.encode_request(request, to_record("adapter", sent))
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_broadcast(content, MANIFEST, wire.BFLOAT16)


def test_the_whole_adapter_still_travels_in_float32() -> None:
    manifest = replace(MANIFEST, frozen_a=True)
    flat = np.arange(P, dtype=np.float32)
    record = wire.broadcast_record(flat, manifest, wire.FLOAT32)
    content = wire.encode_request(wire.Request("train", 1, 1, ("a",), "{}"), record)
    assert np.array_equal(wire.decode_adapter(content, manifest), flat)


def test_bytes_follow_the_precision() -> None:
    from flwr.common.serde import recorddict_to_proto

    layout = (("m.lora_A.weight", (8, 512)), ("m.lora_B.weight", (512, 8)))
    replies = [wire.TrainReply("a", wire.OK)]
    change = np.ones((1, 8192), np.float32)
    size = {
        p: recorddict_to_proto(wire.encode_train(replies, encode(change, layout, p))).ByteSize()
        for p in wire.PRECISIONS
    }
    assert size["float32"] - size["bfloat16"] == pytest.approx(2 * 8192, abs=8)
    # one byte an entry less, 16 scales and the header of a second array more
    assert size["bfloat16"] - size["int8"] == pytest.approx(8192 - 64, abs=260)
