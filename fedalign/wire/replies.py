"""Answers to ``score``, ``train`` and ``personal``.

**Withheld scores.**  A site may train and keep its scores to itself: question count 0 and every
other number of the score exactly 0, with status ``ok``.  A count of 0 beside any other number is a
broken row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedalign.errors import WireError
from fedalign.wire.coarse import FLOAT32, Coarse, decode, from_record, to_record
from fedalign.wire.records import (
    F32,
    MAX_ENTRY,
    MAX_ITEMS,
    NON_FINITE,
    OK,
    OUT_OF_RANGE,
    PROTOCOL,
    STATUS,
    Manifest,
    Score,
    ScoreReply,
    TrainReply,
)
from fedalign.wire.values import floats, ints

QUESTION_KEY = re.compile(r"[0-9a-f]{16}")
"""A question travels as a hash; anything else could be its text."""
ITEM_TOLERANCE = 1e-4
"""Question scores must have the mean that is reported beside them."""
_NO_SCALES: F32 = np.zeros((0, 0), dtype=np.float32)


def encode_failure(clients: Sequence[str], status: int) -> RecordDict:
    """Return a reply in which every named client failed with the same code."""
    k = len(clients)
    return RecordDict(
        {
            "reply": ConfigRecord({"protocol": PROTOCOL, "clients": list(clients)}),
            "status": MetricRecord({"status": [status] * k}),
        }
    )


def encode_scores(replies: Sequence[ScoreReply], stages: Sequence[str]) -> RecordDict:
    """Return the answer to ``score`` or ``personal``; ``stages`` are splits or stages, in order."""
    metrics: dict[str, list[int] | list[float]] = {"status": [r.status for r in replies]}
    keys: list[str] = []
    values: list[float] = []
    for stage in stages:
        rows = [r.scores.get(stage) for r in replies]
        metrics.update(_score_columns(stage, rows))
        metrics[f"{stage}.items"] = [len(s.items) if s else 0 for s in rows]
        for s in rows:
            if s:
                keys += [k for k, _ in s.items]
                values += [float(v) for _, v in s.items]
    config: dict[str, int | list[str]] = {
        "protocol": PROTOCOL,
        "clients": [r.client for r in replies],
        "stages": list(stages),
        "item-keys": keys,
    }
    return RecordDict(
        {
            "reply": ConfigRecord(config),  # type: ignore[arg-type]
            "status": MetricRecord(metrics),  # type: ignore[arg-type]
            "items": MetricRecord({"scores": values}),
        }
    )


def decode_scores(
    content: RecordDict, clients: Sequence[str], stages: Sequence[str], low: float
) -> list[ScoreReply]:
    """Read the answer to ``score`` or ``personal`` for exactly the clients asked, in their order.

    A client whose row is broken comes back with status ``non-finite``; a broken message raises.
    ``low`` is the lower end of the score's range.
    """
    status = open_reply(content, clients)
    if all(s != OK for s in status):
        return [ScoreReply(c, s, {}) for c, s in zip(clients, status, strict=True)]
    m = content.metric_records["status"]
    try:
        c = content.config_records["reply"]
        if tuple(str(x) for x in c["stages"]) != tuple(stages):  # type: ignore[union-attr]
            raise WireError("bad-reply", "other stages than asked")
        keys = [str(x) for x in c["item-keys"]]  # type: ignore[union-attr]
        values = [float(x) for x in content.metric_records["items"]["scores"]]  # type: ignore[union-attr]
        counts = {s: ints(m[f"{s}.items"], len(clients)) for s in stages}
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    if len(keys) != len(values) or len(keys) > MAX_ITEMS:
        raise WireError("bad-reply", "question scores do not match their keys")
    if sum(sum(n) for n in counts.values()) != len(keys):
        raise WireError("bad-reply", "question scores do not match their counts")
    found: list[dict[str, Score]] = [{} for _ in clients]
    bad: set[int] = set()
    at = 0
    for stage in stages:
        columns = _columns(m, stage, len(clients))
        for i in range(len(clients)):
            n = counts[stage][i]
            items = tuple(zip(keys[at : at + n], values[at : at + n], strict=True))
            at += n
            if status[i] != OK:
                continue
            if columns[1][i] == 0:
                # No question of this split, or withheld: then there is nothing else to say.
                if not _is_absent(columns, i) or n:
                    bad.add(i)
                continue
            score = _score(columns, i, items, low)
            if score is None:
                bad.add(i)
            else:
                found[i][stage] = score
    return [
        ScoreReply(c, NON_FINITE if i in bad else status[i], {} if i in bad else found[i])
        for i, c in enumerate(clients)
    ]


def encode_train(replies: Sequence[TrainReply], updates: F32 | Coarse) -> RecordDict:
    """Return the answer to ``train``; zero rows for failed clients.

    ``updates`` is (k, P): the factors in float32, or in another precision their change against the
    factors received.
    """
    if not isinstance(updates, Coarse):
        updates = Coarse(FLOAT32, np.ascontiguousarray(updates, np.float32), _NO_SCALES)
    metrics: dict[str, list[int] | list[float]] = {"status": [r.status for r in replies]}
    metrics.update(_score_columns("received", [r.score for r in replies]))
    metrics["loss"] = [float(r.loss) for r in replies]
    metrics["loss-first"] = [float(r.loss_first) for r in replies]
    metrics["loss-last"] = [float(r.loss_last) for r in replies]
    metrics["pairs"] = [r.pairs for r in replies]
    metrics["steps"] = [r.steps for r in replies]
    metrics["seconds"] = [float(r.seconds) for r in replies]
    metrics["tokens"] = [r.tokens for r in replies]
    config = ConfigRecord({"protocol": PROTOCOL, "clients": [r.client for r in replies]})
    return RecordDict(
        {
            "reply": config,
            "status": MetricRecord(metrics),  # type: ignore[arg-type]
            "update": to_record("update", updates),
        }
    )


def decode_train(
    content: RecordDict,
    clients: Sequence[str],
    manifest: Manifest,
    low: float,
    precision: str = FLOAT32,
    received: F32 | None = None,
) -> tuple[list[TrainReply], F32]:
    """Read the answer to ``train``: one record for each client asked, and factors (k, P).

    In another precision than float32 the clients sent a change, which is added to ``received``
    (P,): the exact factors, of which the clients may have got a coarse copy.
    """
    status = open_reply(content, clients)
    k = len(clients)
    if all(s != OK for s in status):
        failed = [TrainReply(c, s) for c, s in zip(clients, status, strict=True)]
        return failed, np.zeros((k, 0), dtype=np.float32)
    updates = decode(from_record(content, "update", k, manifest.upload, precision), manifest.upload)
    if precision != FLOAT32:
        if received is None:
            raise ValueError("a change means nothing without the factors it was taken from")
        updates = received + updates
    m = content.metric_records["status"]
    columns = _columns(m, "received", k)
    try:
        first, last = floats(m["loss-first"], k), floats(m["loss-last"], k)
        loss = floats(m["loss"], k)
        pairs, steps = ints(m["pairs"], k), ints(m["steps"], k)
        seconds, tokens = floats(m["seconds"], k), ints(m["tokens"], k)
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    replies = []
    for i, client in enumerate(clients):
        if status[i] != OK:
            replies.append(TrainReply(client, status[i]))
            continue
        withheld = _is_absent(columns, i)
        score = None if withheld else _score(columns, i, (), low)
        numbers = loss[i] + first[i] + last[i] + seconds[i]
        broken = score is None and not withheld
        if broken or not (np.isfinite(updates[i]).all() and math.isfinite(numbers)):
            replies.append(TrainReply(client, NON_FINITE))
            continue
        if np.abs(updates[i]).max(initial=0.0) > MAX_ENTRY:
            replies.append(TrainReply(client, OUT_OF_RANGE))
            continue
        replies.append(
            TrainReply(
                client,
                OK,
                score,
                loss[i],
                first[i],
                last[i],
                pairs[i],
                steps[i],
                seconds[i],
                tokens[i],
            )
        )
    return replies, updates


def _score_columns(name: str, rows: Sequence[Score | None]) -> dict[str, list[int] | list[float]]:
    return {
        f"{name}.score": [float(s.score) if s else 0.0 for s in rows],
        f"{name}.n": [int(s.n) if s else 0 for s in rows],
        f"{name}.mass": [float(s.option_mass) if s else 0.0 for s in rows],
        f"{name}.uniform": [float(s.uniform) if s else 0.0 for s in rows],
    }


def _columns(m: MetricRecord, name: str, k: int) -> tuple[tuple[float, ...], ...]:
    try:
        return (
            floats(m[f"{name}.score"], k),
            tuple(float(x) for x in ints(m[f"{name}.n"], k)),
            floats(m[f"{name}.mass"], k),
            floats(m[f"{name}.uniform"], k),
        )
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None


def _is_absent(columns: tuple[tuple[float, ...], ...], i: int) -> bool:
    """Say whether a client gives no score: all four numbers exactly 0."""
    return all(c[i] == 0.0 for c in columns)


def _score(
    columns: tuple[tuple[float, ...], ...],
    i: int,
    items: tuple[tuple[str, float], ...],
    low: float,
) -> Score | None:
    score, n, mass, uniform = (c[i] for c in columns)
    if n < 1:
        return None
    tolerance = 1e-6
    in_range = all(
        math.isfinite(x) and low - tolerance <= x <= 1 + tolerance
        for x in (score, uniform, *(v for _, v in items))
    )
    keys = {key for key, _ in items}
    honest = len(keys) == len(items) and all(QUESTION_KEY.fullmatch(key) for key in keys)
    if honest and len(items) == n:
        honest = abs(math.fsum(v for _, v in items) / n - score) <= ITEM_TOLERANCE
    if not honest or not in_range or not (math.isfinite(mass) and -tolerance <= mass <= 1 + 1e-3):
        return None
    return Score(score, int(n), mass, uniform, items)


def open_reply(content: RecordDict, clients: Sequence[str]) -> tuple[int, ...]:
    """Return the status of each client; ``WireError`` unless exactly those asked are answered."""
    try:
        c = content.config_records["reply"]
        if int(c["protocol"]) != PROTOCOL:  # type: ignore[arg-type]
            raise WireError("protocol")
        named = tuple(str(x) for x in c["clients"])  # type: ignore[union-attr]
        status = ints(content.metric_records["status"]["status"], len(clients))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise WireError("bad-reply") from None
    if named != tuple(clients):
        raise WireError("bad-reply", "other clients than asked")
    if any(s not in STATUS for s in status):
        raise WireError("bad-reply", "unknown status code")
    return status
