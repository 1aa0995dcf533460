"""Messages of the preference predictor: read back as sent, or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedalign import wire
from fedalign.errors import WireError
from fedalign.wire.predictor import (
    LARGEST_ERROR,
    PredictorReply,
    decode_predictor,
    decode_predictor_replies,
    encode_predictor,
    encode_predictor_replies,
    predictor_record,
)

NAMES = ("a", "b")
SIZE = 5
GOOD = PredictorReply("a", wire.OK, 1.5, 1.2, 640, 0.31, 9)


def request(flat: np.ndarray):
    asked = wire.Request("predictor", 1, 1, NAMES, "{}")
    return encode_predictor(wire.encode_request(asked), predictor_record(flat))


def answer(second: PredictorReply | None = None, updates: np.ndarray | None = None):
    rows = [GOOD, replace(GOOD, client="b") if second is None else second]
    flat = np.arange(2 * SIZE, dtype=np.float32).reshape(2, SIZE) if updates is None else updates
    return encode_predictor_replies(rows, flat)


def test_parameters_come_back_bit_for_bit() -> None:
    flat = np.linspace(-1, 1, SIZE).astype(np.float32)
    content = request(flat)
    assert np.array_equal(decode_predictor(content, SIZE), flat)
    assert wire.decode_request(content).clients == NAMES


@pytest.mark.parametrize(
    ("flat", "reason"),
    [
        (np.zeros(SIZE + 1, np.float32), "bad-array"),
        (np.array([0, 0, np.nan, 0, 0], np.float32), "bad-predictor"),
        (np.array([0, 0, 2e4, 0, 0], np.float32), "bad-predictor"),
    ],
)
def test_other_parameters_are_refused(flat: np.ndarray, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode_predictor(request(flat), SIZE)


def test_replies_come_back_as_sent() -> None:
    rows, updates = decode_predictor_replies(answer(), NAMES, SIZE)
    assert rows[0].client == "a"
    assert rows[0].tokens == 640
    assert rows[0].questions == 9
    assert rows[1].error == pytest.approx(0.31)
    assert np.array_equal(updates, np.arange(10, dtype=np.float32).reshape(2, SIZE))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"error": float("nan")}, wire.NON_FINITE),
        ({"loss_last": float("inf")}, wire.NON_FINITE),
        ({"error": -0.1}, wire.OUT_OF_RANGE),
        ({"error": LARGEST_ERROR + 0.01}, wire.OUT_OF_RANGE),
        ({"questions": 0}, wire.OUT_OF_RANGE),
        ({"status": wire.NO_DATA}, wire.NO_DATA),
    ],
)
def test_a_broken_row_condemns_its_client_alone(change: dict[str, float], status: int) -> None:
    rows, _ = decode_predictor_replies(answer(replace(GOOD, client="b", **change)), NAMES, SIZE)
    assert [r.status for r in rows] == [wire.OK, status]
    assert rows[1] == PredictorReply("b", status)


@pytest.mark.parametrize(("value", "status"), [(np.nan, wire.NON_FINITE), (2e4, wire.OUT_OF_RANGE)])
def test_broken_parameters_condemn_their_client_alone(value: float, status: int) -> None:
    updates = np.zeros((2, SIZE), np.float32)
    updates[1, 3] = value
    rows, _ = decode_predictor_replies(answer(updates=updates), NAMES, SIZE)
    assert [r.status for r in rows] == [wire.OK, status]


def test_other_clients_or_shapes_are_refused() -> None:
    with pytest.raises(WireError, match="bad-reply"):
        decode_predictor_replies(answer(), ("a", "c"), SIZE)
    with pytest.raises(WireError, match="bad-array"):
        decode_predictor_replies(answer(), NAMES, SIZE - 1)
    content = answer()
    content["update"] = ArrayRecord({"update": Array(np.zeros((2, SIZE)))})  # float64
    with pytest.raises(WireError, match="bad-array"):
        decode_predictor_replies(content, NAMES, SIZE)


def test_a_failed_message_has_no_arrays_to_read() -> None:
    content = wire.encode_failure(NAMES, wire.INTERNAL_ERROR)
    rows, _ = decode_predictor_replies(content, NAMES, SIZE)
    assert [r.status for r in rows] == [wire.INTERNAL_ERROR] * 2


@given(st.sampled_from(["loss-first", "loss-last", "error", "tokens", "questions"]), st.booleans())
def test_a_missing_or_short_column_condemns_the_message(column: str, missing: bool) -> None:
    content = answer()
    metrics = content.metric_records["status"]
    if missing:
        del metrics[column]
    else:
        metrics[column] = metrics[column][:1]
    with pytest.raises(WireError, match="bad-reply"):
        decode_predictor_replies(content, NAMES, SIZE)


def test_a_site_may_withhold_the_error() -> None:
    withheld = replace(GOOD, client="b", error=0.0, questions=0)
    rows, _ = decode_predictor_replies(answer(withheld), NAMES, SIZE)
    assert rows[1] == withheld
