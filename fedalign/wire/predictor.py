"""Messages of the federated preference predictor: parameters out, trained parameters back.

A request is the shared part of every message (phase ``predictor``) and the array ``predictor``:
(P,) float32, in the order of ``fedalign.rewards.predictor_parameters``.  Rounds 1 to
``predictor.rounds`` ask for local training; the round after them asks for the error of the final
predictor alone.

A reply holds, for each client: a status; its trained parameters, (P,) float32; the loss of the
first and last step (nats an option); the option tokens trained on; and the *error* of the
parameters as received: the mean Jensen-Shannon distance (natural logarithm) between predicted and
true shares on its validation questions, in [0, sqrt(ln 2)], with the number of those questions.
A site that withholds its scores sends 0 for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedalign.errors import WireError
from fedalign.wire.records import F32, MAX_ENTRY, NON_FINITE, OK, OUT_OF_RANGE, PROTOCOL
from fedalign.wire.replies import open_reply
from fedalign.wire.values import array, floats, ints

PREDICTOR = "train.predictor"

LARGEST_ERROR = math.sqrt(math.log(2.0))
"""Largest Jensen-Shannon distance, natural logarithm."""


@dataclass(frozen=True)
class PredictorReply:
    """One client's answer in a round of the predictor."""

    client: str
    status: int
    loss_first: float = 0.0
    loss_last: float = 0.0
    tokens: int = 0
    """Option tokens the loss was taken over, all steps together; 0 when nothing was trained."""
    error: float = 0.0
    """Of the parameters as received, on validation questions; lower is better."""
    questions: int = 0
    """Validation questions behind ``error``; 0 with status ``ok``: the site withholds both."""


def predictor_record(flat: F32) -> ArrayRecord:
    """Wrap parameters (P,) for sending; one record serves all messages of a round."""
    return ArrayRecord({"predictor": Array(np.ascontiguousarray(flat, dtype=np.float32))})


def encode_predictor(content: RecordDict, record: ArrayRecord) -> RecordDict:
    """Add the predictor's parameters to a request made by ``encode_request``."""
    content["predictor"] = record
    return content


def decode_predictor(content: RecordDict, size: int) -> F32:
    """Return the parameters (P,) of a request; ``WireError`` for anything but ``size`` numbers."""
    flat = array(content, "predictor", (size,))
    if not np.isfinite(flat).all() or np.abs(flat).max(initial=0.0) > MAX_ENTRY:
        raise WireError("bad-predictor", "parameters must be finite and below 1e4")
    return flat


def encode_predictor_replies(replies: Sequence[PredictorReply], updates: F32) -> RecordDict:
    """Return the answer to ``predictor``; ``updates`` (k, P), zero rows for failed clients."""
    metrics: dict[str, list[int] | list[float]] = {
        "status": [r.status for r in replies],
        "loss-first": [float(r.loss_first) for r in replies],
        "loss-last": [float(r.loss_last) for r in replies],
        "tokens": [r.tokens for r in replies],
        "error": [float(r.error) for r in replies],
        "questions": [r.questions for r in replies],
    }
    return RecordDict(
        {
            "reply": ConfigRecord({"protocol": PROTOCOL, "clients": [r.client for r in replies]}),
            "status": MetricRecord(metrics),  # type: ignore[arg-type]
            "update": ArrayRecord({"update": Array(np.ascontiguousarray(updates, np.float32))}),
        }
    )


def decode_predictor_replies(
    content: RecordDict, clients: Sequence[str], size: int
) -> tuple[list[PredictorReply], F32]:
    """Read the answer for exactly the clients asked: one record each, and parameters (k, P).

    A client whose row is not finite or out of range is marked so, alone.
    """
    status = open_reply(content, clients)
    k = len(clients)
    if all(s != OK for s in status):
        failed = [PredictorReply(c, s) for c, s in zip(clients, status, strict=True)]
        return failed, np.zeros((k, size), dtype=np.float32)
    updates = array(content, "update", (k, size))
    m = content.metric_records["status"]
    try:
        first, last = floats(m["loss-first"], k), floats(m["loss-last"], k)
        error = floats(m["error"], k)
        tokens, questions = ints(m["tokens"], k), ints(m["questions"], k)
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    replies = []
    for i, client in enumerate(clients):
        state = status[i]
        if state == OK:
            state = _state(updates[i], first[i] + last[i], error[i], questions[i])
        if state != OK:
            replies.append(PredictorReply(client, state))
            continue
        replies.append(
            PredictorReply(client, OK, first[i], last[i], tokens[i], error[i], questions[i])
        )
    return replies, updates


def _state(update: F32, losses: float, error: float, questions: int) -> int:
    if not (np.isfinite(update).all() and math.isfinite(losses + error)):
        return NON_FINITE
    in_range = 0.0 <= error <= LARGEST_ERROR + 1e-6 and (questions >= 1 or error == 0.0)
    if not in_range or np.abs(update).max(initial=0.0) > MAX_ENTRY:
        return OUT_OF_RANGE
    return OK
