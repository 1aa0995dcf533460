"""What an enrolled site may also say: no score, or no; and what a broken one may not."""

from __future__ import annotations

import numpy as np
import pytest

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
KEYS = tuple(f"{i:016x}" for i in range(2))
SCORE = wire.Score(0.7, 2, 0.99, 0.5, ((KEYS[0], 0.6), (KEYS[1], 0.8)))
NO_ITEMS = wire.Score(0.7, 2, 0.99, 0.5)


def test_a_site_may_withhold_its_scores() -> None:
    replies = [
        wire.TrainReply("a", wire.OK, None, 0.6, 0.9, 0.4, 12, 3, 0.5),
        wire.TrainReply("b", wire.OK, NO_ITEMS, 0.6, 0.9, 0.4, 12, 3, 0.5),
    ]
    updates = np.ones((2, MANIFEST.upload_size), dtype=np.float32)
    content = wire.encode_train(replies, updates)
    status = content.metric_records["status"]
    assert [status[f"received.{n}"][0] for n in ("score", "n", "mass", "uniform")] == [0, 0, 0, 0]
    assert wire.decode_train(content, ("a", "b"), MANIFEST, 0.1)[0] == replies
    silent = [wire.ScoreReply("a", wire.OK, {}), wire.ScoreReply("b", wire.OK, {"test": SCORE})]
    stages = ("validation", "test")
    back = wire.decode_scores(wire.encode_scores(silent, stages), ("a", "b"), stages, 0.1)
    assert back == silent


@pytest.mark.parametrize("column", ["score", "mass", "uniform"])
@pytest.mark.parametrize("value", [0.5, -0.5, float("nan"), float("inf")])
def test_no_question_and_yet_a_number_is_broken(column: str, value: float) -> None:
    train = [wire.TrainReply("a", wire.OK, None)]
    updates = np.ones((1, MANIFEST.upload_size), dtype=np.float32)
    content = wire.encode_train(train, updates)
    content.metric_records["status"][f"received.{column}"] = [value]
    rows, _ = wire.decode_train(content, ("a",), MANIFEST, 0.0)
    assert [r.status for r in rows] == [wire.NON_FINITE]
    scores = wire.encode_scores([wire.ScoreReply("a", wire.OK, {})], ("test",))
    scores.metric_records["status"][f"test.{column}"] = [value]
    assert wire.decode_scores(scores, ("a",), ("test",), 0.0)[0].status == wire.NON_FINITE


def test_no_question_and_yet_an_item_is_broken() -> None:
    content = wire.encode_scores([wire.ScoreReply("a", wire.OK, {})], ("test",))
    content.metric_records["status"]["test.items"] = [1]
    content.config_records["reply"]["item-keys"] = [KEYS[0]]
    content.metric_records["items"]["scores"] = [0.5]
    assert wire.decode_scores(content, ("a",), ("test",), 0.0)[0].status == wire.NON_FINITE


@pytest.mark.parametrize("status", [s for s, t in wire.STATUS.items() if t in wire.POLICY_CODES])
def test_a_refusal_travels_in_every_kind_of_reply(status: int) -> None:
    content = wire.encode_failure(("north",), status)
    with pytest.raises(WireError) as refused:
        wire.decode_hello(content)
    assert refused.value.reason == wire.STATUS[status]
    rows, _ = wire.decode_train(content, ("north",), MANIFEST, 0.0)
    assert rows == [wire.TrainReply("north", status)]
    assert wire.decode_scores(content, ("north",), ("test",), 0.0)[0].status == status
    assert wire.decode_rewards(content, ("north",), 3)[0].status == status


def test_the_codes_of_policies_have_names() -> None:
    assert wire.PROTOCOL == 4
    assert wire.POLICY_CODES == (
        "refused-base-model",
        "refused-objective",
        "refused-aggregation",
        "refused-settings",
        "too-few-examples",
        "budget-exhausted",
    )
    assert wire.STATUS[wire.BUDGET_EXHAUSTED] == "budget-exhausted"
    assert len(set(wire.STATUS.values())) == len(wire.STATUS) == 14


@pytest.mark.parametrize(
    ("given", "reason"),
    [([], "could-not-start"), ([0], "bad-hello"), ([77], "bad-hello"), ([8, 8], "bad-hello")],
)
def test_a_refusal_names_one_known_code(given: list[int], reason: str) -> None:
    content = wire.encode_failure(("a",), wire.REFUSED_SETTINGS)
    content.metric_records["status"]["status"] = given
    with pytest.raises(WireError) as refused:
        wire.decode_hello(content)
    assert refused.value.reason == reason
    content.config_records["reply"]["protocol"] = 2
    with pytest.raises(WireError, match="protocol"):
        wire.decode_hello(content)


@pytest.mark.parametrize("protocol", [float("inf"), float("nan"), "x", [3]])
def test_a_protocol_that_is_no_number_is_refused(protocol: object) -> None:
    reply = wire.encode_train([wire.TrainReply("a", wire.OK)], np.ones((1, 14), np.float32))
    reply.config_records["reply"]["protocol"] = protocol  # type: ignore[assignment]
    with pytest.raises(WireError, match="bad-reply"):
        wire.decode_train(reply, ("a",), MANIFEST, 0.0)
    hello = wire.encode_hello(
        wire.Hello(("a",), ("g",), "survey", (1,), (1,), (1,), (1,), MANIFEST, {})
    )
    hello.config_records["hello"]["protocol"] = protocol  # type: ignore[assignment]
    with pytest.raises(WireError, match="bad-hello"):
        wire.decode_hello(hello)
    refused = wire.encode_failure(("a",), wire.REFUSED_SETTINGS)
    refused.config_records["reply"]["protocol"] = protocol  # type: ignore[assignment]
    with pytest.raises(WireError, match="bad-hello"):
        wire.decode_hello(refused)
