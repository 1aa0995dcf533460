"""The wire contract: what is sent is read back; anything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from fedalign import wire
from fedalign.errors import WireError

MANIFEST = wire.Manifest(
    layout=(("m.lora_A.weight", (2, 3)), ("m.lora_B.weight", (4, 2))),
    rank=2,
    alpha=4.0,
    targets=("m",),
    base_revision="base",
    tokenizer_hash="tok",
    frozen_a=False,
)
KEYS = tuple(f"{i:016x}" for i in range(8))
SCORE = wire.Score(0.7, 2, 0.99, 0.5, ((KEYS[0], 0.6), (KEYS[1], 0.8)))
NO_ITEMS = replace(SCORE, items=())


def train_content(k: int = 2, **changes: object):
    replies = [
        wire.TrainReply(f"c{i}", wire.OK, NO_ITEMS, 0.6, 0.9, 0.4, 12, 3, 0.5) for i in range(k)
    ]
    updates = np.arange(k * MANIFEST.upload_size, dtype=np.float32).reshape(k, -1)
    return replies, updates, wire.encode_train(replies, updates)


def test_sizes_follow_the_layout() -> None:
    assert MANIFEST.size == 14
    assert replace(MANIFEST, frozen_a=True).upload_size == 8


def test_manifest_round_trip_and_hash() -> None:
    again = wire.Manifest.from_json(MANIFEST.to_json())
    assert again == MANIFEST
    assert again.hash == MANIFEST.hash
    assert replace(MANIFEST, rank=3).hash != MANIFEST.hash


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"layout": []}'])
def test_broken_manifest_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="bad-manifest"):
        wire.Manifest.from_json(text)


def test_unsorted_manifest_is_refused() -> None:
    d = json.loads(MANIFEST.to_json())
    d["layout"].reverse()
    with pytest.raises(WireError, match="bad-manifest"):
        wire.Manifest.from_json(json.dumps(d))


def test_request_round_trip() -> None:
    request = wire.Request("train", 3, 2, ("a", "b"), "{}", "hash", ("test",))
    assert wire.decode_request(wire.encode_request(request)) == request


def test_request_of_another_protocol_is_refused() -> None:
    content = wire.encode_request(wire.Request("train", 1, 1, ("a",), "{}"))
    content.config_records["request"]["protocol"] = 99
    with pytest.raises(WireError, match="protocol"):
        wire.decode_request(content)


def test_adapter_must_have_the_manifests_size() -> None:
    flat = np.zeros(MANIFEST.size, dtype=np.float32)
    request = wire.Request("train", 1, 1, ("a",), "{}")
    good = wire.encode_request(request, wire.adapter_record(flat))
    assert np.array_equal(wire.decode_adapter(good, MANIFEST), flat)
    bad = wire.encode_request(request, wire.adapter_record(flat[:-1]))
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_adapter(bad, MANIFEST)


def test_hello_round_trip() -> None:
    hello = wire.Hello(
        ("a", "b"), ("g", "h"), "survey", (1, 2), (3, 4), (5, 6), (7, 8), MANIFEST, {"x": "1"}
    )
    assert wire.decode_hello(wire.encode_hello(hello)) == hello


def test_hello_with_a_client_twice_is_refused() -> None:
    hello = wire.Hello(
        ("a", "a"), ("g", "h"), "survey", (1, 2), (3, 4), (5, 6), (7, 8), MANIFEST, {}
    )
    with pytest.raises(WireError, match="bad-hello"):
        wire.decode_hello(wire.encode_hello(hello))


def test_scores_round_trip_with_items_and_missing_stage() -> None:
    replies = [
        wire.ScoreReply("a", wire.OK, {"validation": NO_ITEMS, "test": SCORE}),
        wire.ScoreReply("b", wire.OK, {"validation": NO_ITEMS}),
        wire.ScoreReply("c", wire.UNKNOWN_CLIENT, {}),
    ]
    stages = ("validation", "test")
    back = wire.decode_scores(wire.encode_scores(replies, stages), ("a", "b", "c"), stages, 0.0)
    assert back == replies


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_scores_survive_any_number_of_items(values: list[float], n: int) -> None:
    score = wire.Score(
        sum(values) / len(values), len(values) + n, 1.0, 0.5, tuple(zip(KEYS, values, strict=False))
    )
    replies = [wire.ScoreReply("a", wire.OK, {"test": score})]
    back = wire.decode_scores(wire.encode_scores(replies, ("test",)), ("a",), ("test",), 0.0)
    assert back == replies


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_score_out_of_range_condemns_its_client_only(bad: float) -> None:
    replies = [
        wire.ScoreReply("a", wire.OK, {"test": replace(SCORE, score=bad)}),
        wire.ScoreReply("b", wire.OK, {"test": SCORE}),
    ]
    back = wire.decode_scores(
        wire.encode_scores(replies, ("test",)), ("a", "b"), ("test",), low=0.0
    )
    assert [r.status for r in back] == [wire.NON_FINITE, wire.OK]
    assert back[0].scores == {}


def test_a_bad_question_score_condemns_its_client() -> None:
    broken = replace(SCORE, items=((KEYS[0], float("nan")),))
    replies = [wire.ScoreReply("a", wire.OK, {"test": broken})]
    back = wire.decode_scores(wire.encode_scores(replies, ("test",)), ("a",), ("test",), 0.0)
    assert back[0].status == wire.NON_FINITE


def test_a_question_reported_twice_condemns_its_client() -> None:
    broken = replace(SCORE, items=((KEYS[0], 0.5), (KEYS[0], 0.6)))
    replies = [wire.ScoreReply("a", wire.OK, {"test": broken})]
    back = wire.decode_scores(wire.encode_scores(replies, ("test",)), ("a",), ("test",), 0.0)
    assert back[0].status == wire.NON_FINITE


def test_the_metrics_floor_is_kept() -> None:
    replies = [wire.ScoreReply("a", wire.OK, {"test": replace(SCORE, score=0.1, items=())})]
    content = wire.encode_scores(replies, ("test",))
    assert wire.decode_scores(content, ("a",), ("test",), 0.1674)[0].status == wire.NON_FINITE


def test_train_round_trip() -> None:
    replies, updates, content = train_content()
    rows, arrays = wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)
    assert rows == replies
    assert np.array_equal(arrays, updates)


def test_a_nan_row_condemns_its_client_only() -> None:
    replies, updates, _ = train_content()
    updates[1, 0] = np.nan
    rows, _ = wire.decode_train(wire.encode_train(replies, updates), ("c0", "c1"), MANIFEST, 0.0)
    assert [r.status for r in rows] == [wire.OK, wire.NON_FINITE]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, MANIFEST.upload_size), dtype=np.float64),
        np.zeros((2, MANIFEST.upload_size - 1), dtype=np.float32),
        np.zeros((1, MANIFEST.upload_size), dtype=np.float32),
        np.zeros((2 * MANIFEST.upload_size,), dtype=np.float32),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(array: np.ndarray) -> None:
    _, _, content = train_content()
    content["update"] = ArrayRecord({"update": Array(array)})
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)


def test_an_extra_array_is_refused() -> None:
    _, updates, content = train_content()
    content["update"] = ArrayRecord({"update": Array(updates), "more": Array(updates)})
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)


def test_a_pickled_array_is_refused() -> None:
    """Object arrays would need pickle; numpy refuses them and so do we."""
    _, _, content = train_content()
    array = Array(np.zeros((2, MANIFEST.upload_size), dtype=np.float32))
    array.data = b"\x80\x04garbage"
    content["update"] = ArrayRecord({"update": array})
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)


def test_replies_for_other_clients_are_refused() -> None:
    _, _, content = train_content()
    with pytest.raises(WireError, match="bad-reply"):
        wire.decode_train(content, ("c0", "x"), MANIFEST, 0.0)
    with pytest.raises(WireError, match="bad-reply"):
        wire.decode_train(content, ("c0",), MANIFEST, 0.0)


def test_unknown_status_is_refused() -> None:
    content = wire.encode_failure(("c0",), 77)
    with pytest.raises(WireError, match="bad-reply"):
        wire.decode_train(content, ("c0",), MANIFEST, 0.0)


def test_all_failed_needs_no_array() -> None:
    rows, arrays = wire.decode_train(
        wire.encode_failure(("c0", "c1"), wire.INTERNAL_ERROR), ("c0", "c1"), MANIFEST, 0.0
    )
    assert {r.status for r in rows} == {wire.INTERNAL_ERROR}
    assert arrays.shape == (2, 0)


def test_negative_counts_are_refused() -> None:
    _, _, content = train_content()
    content.metric_records["status"]["pairs"] = [-1, 3]
    with pytest.raises(WireError, match="bad-reply"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)


def test_empty_content_is_refused() -> None:
    from flwr.app import RecordDict

    with pytest.raises(WireError):
        wire.decode_train(RecordDict(), ("c0",), MANIFEST, 0.0)
    with pytest.raises(WireError):
        wire.decode_hello(RecordDict())
    with pytest.raises(WireError):
        wire.decode_request(RecordDict({"request": ConfigRecord(), "m": MetricRecord()}))


@pytest.mark.parametrize(
    "items",
    [
        (("What do you think?", 0.6), (KEYS[1], 0.8)),  # text in place of a hash
        ((KEYS[0], 1.0), (KEYS[1], 1.0)),  # another mean than the score beside it
    ],
)
def test_question_scores_that_are_not_what_they_say(items: tuple[tuple[str, float], ...]) -> None:
    replies = [wire.ScoreReply("a", wire.OK, {"test": replace(SCORE, items=items)})]
    back = wire.decode_scores(wire.encode_scores(replies, ("test",)), ("a",), ("test",), 0.0)
    assert back[0].status == wire.NON_FINITE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 not an array",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (999999999,)}\n",
        b"\x93NUMPY\x09\x00",
    ],
)
def test_bytes_that_are_no_array_are_refused(data: bytes) -> None:
    _, updates, content = train_content()
    array = Array(updates)
    array.data = data
    content["update"] = ArrayRecord({"update": array})
    with pytest.raises(WireError, match="bad-array"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)


def test_an_enormous_update_condemns_its_client_only() -> None:
    replies, updates, _ = train_content()
    updates[0, 0] = 1e25
    rows, _ = wire.decode_train(wire.encode_train(replies, updates), ("c0", "c1"), MANIFEST, 0.0)
    assert [r.status for r in rows] == [wire.OUT_OF_RANGE, wire.OK]


@pytest.mark.parametrize("column", ["seconds", "loss"])
def test_a_number_that_is_not_finite_condemns_its_client(column: str) -> None:
    _, _, content = train_content()
    content.metric_records["status"][column] = [float("inf"), 1.0]
    rows, _ = wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)
    assert [r.status for r in rows] == [wire.NON_FINITE, wire.OK]


def test_counts_have_a_limit() -> None:
    _, _, content = train_content()
    content.metric_records["status"]["received.n"] = [2**63 - 1, 1]
    with pytest.raises(WireError, match="bad-reply"):
        wire.decode_train(content, ("c0", "c1"), MANIFEST, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": 3},
        {"alpha": float("inf")},
        {"layout": (("m.lora_A.weight", (2, 3)),)},
        {"layout": (("m.lora_A.weight", (2, -3)), ("m.lora_B.weight", (4, 2)))},
        {"layout": (("m.lora_A.weight", (2, 2**31)), ("m.lora_B.weight", (4, 2)))},
        {"layout": (("m.bias", (2,)), ("m.lora_A.weight", (2, 3)), ("m.lora_B.weight", (4, 2)))},
    ],
)
def test_manifests_that_no_adapter_has_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(WireError, match="bad-manifest"):
        wire.Manifest.from_json(replace(MANIFEST, **change).to_json())


@pytest.mark.parametrize("bad", ["", "x" * 1000, "two\nlines"])
def test_names_are_short_and_printable(bad: str) -> None:
    hello = wire.Hello((bad,), ("g",), "survey", (1,), (1,), (1,), (1,), MANIFEST, {})
    with pytest.raises(WireError, match="bad-hello"):
        wire.decode_hello(wire.encode_hello(hello))


def test_a_node_that_failed_says_so() -> None:
    with pytest.raises(WireError, match="could-not-start"):
        wire.decode_hello(wire.encode_failure((), wire.INTERNAL_ERROR))
