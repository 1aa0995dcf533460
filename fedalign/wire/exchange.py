"""Rollouts for rewards: what the server asks of a group in mode ``rewards``, and the answer.

The message holds N sampled texts: Q questions with their options, and for each rollout the number
of its question and its text.  The answer holds, for each client, one float and one code for each
rollout, and nothing else::

    0 shares      reward from the client's own answers
    1 malformed   the text is no answer; the server knows what that is worth
    2 unanswered  the client has no answer to this question (or it is not a training question)
    3 refused     the site's query budget for this question is spent
    4 predicted   reward from the client's frozen preference predictor

Rewards are in [0, 1].  Where the code is 1, 2 or 3 the float is 0 and is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedalign.errors import WireError
from fedalign.wire.records import F32, NON_FINITE, OK, OUT_OF_RANGE, PROTOCOL
from fedalign.wire.replies import open_reply
from fedalign.wire.values import array, ints

EXCHANGE = "query.exchange"

FROM_SHARES, MALFORMED, UNANSWERED, REFUSED, PREDICTED = range(5)
CODES = ("shares", "malformed", "unanswered", "refused", "predicted")

MAX_ROLLOUTS = 1_000_000
MAX_TEXT = 20_000
"""Characters of a sampled text; a longer one is not answered."""


@dataclass(frozen=True)
class Question:
    """A question and its options, as they stand in the prompt."""

    question: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Rollouts:
    """N sampled texts to Q questions."""

    questions: tuple[Question, ...]
    question_of: tuple[int, ...]
    """(N,) index into ``questions``."""
    texts: tuple[str, ...]
    """(N,) sampled texts; one that did not end in time is sent as it stands."""


@dataclass(frozen=True)
class RewardReply:
    """One client's rewards for N rollouts."""

    client: str
    status: int
    rewards: npt.NDArray[np.float32]
    """(N,) in [0, 1]; read only where ``codes`` is 0 or 4."""
    codes: npt.NDArray[np.int8]
    """(N,) see the top of this file."""


def encode_rollouts(content: RecordDict, rollouts: Rollouts) -> RecordDict:
    """Add rollouts to a request made by ``encode_request``."""
    config: dict[str, list[str] | list[int]] = {
        "questions": [q.question for q in rollouts.questions],
        "options": [o for q in rollouts.questions for o in q.options],
        "option-counts": [len(q.options) for q in rollouts.questions],
        "question-of": list(rollouts.question_of),
        "texts": list(rollouts.texts),
    }
    content["rollouts"] = ConfigRecord(config)  # type: ignore[arg-type]
    return content


def decode_rollouts(content: RecordDict) -> Rollouts:
    """Read the rollouts of a request; ``WireError`` for anything that does not fit together."""
    try:
        c = content.config_records["rollouts"]
        texts = [str(x) for x in c["texts"]]  # type: ignore[union-attr]
        asked = [str(x) for x in c["questions"]]  # type: ignore[union-attr]
        options = [str(x) for x in c["options"]]  # type: ignore[union-attr]
        counts = ints(c["option-counts"], len(asked))
        question_of = ints(c["question-of"], len(texts))
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-rollouts") from None
    if not 0 < len(texts) <= MAX_ROLLOUTS or max(map(len, texts)) > MAX_TEXT:
        raise WireError("bad-rollouts", "no rollouts, too many, or a text too long")
    if (
        not counts
        or sum(counts) != len(options)
        or min(counts) < 2
        or max(question_of) >= len(asked)
    ):
        raise WireError("bad-rollouts", "options or question numbers do not fit")
    questions, at = [], 0
    for text, k in zip(asked, counts, strict=True):
        questions.append(Question(text, tuple(options[at : at + k])))
        at += k
    return Rollouts(tuple(questions), question_of, tuple(texts))


def encode_rewards(replies: Sequence[RewardReply]) -> RecordDict:
    """Return the answer to an exchange; all replies are for the same N rollouts."""
    rewards = np.stack([r.rewards for r in replies]).astype(np.float32)
    codes = [int(x) for r in replies for x in r.codes]
    return RecordDict(
        {
            "reply": ConfigRecord({"protocol": PROTOCOL, "clients": [r.client for r in replies]}),
            "status": MetricRecord({"status": [r.status for r in replies], "codes": codes}),
            "rewards": ArrayRecord({"rewards": Array(np.ascontiguousarray(rewards))}),
        }
    )


def decode_rewards(content: RecordDict, clients: Sequence[str], n: int) -> list[RewardReply]:
    """Read the answer for exactly the clients asked: N rewards and N codes each.

    A client whose row is not finite or out of [0, 1] where it counts is marked so, alone.
    """
    status = open_reply(content, clients)
    k = len(clients)
    nothing: F32 = np.zeros(n, dtype=np.float32)
    unanswered = np.full(n, UNANSWERED, dtype=np.int8)
    if all(s != OK for s in status):
        return [
            RewardReply(c, s, nothing, unanswered) for c, s in zip(clients, status, strict=True)
        ]
    rewards = array(content, "rewards", (k, n))
    try:
        codes = np.array(ints(content.metric_records["status"]["codes"], k * n)).reshape(k, n)
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    if codes.max() >= len(CODES):
        raise WireError("bad-reply", "unknown reward code")
    replies = []
    for i, client in enumerate(clients):
        counts = (codes[i] == FROM_SHARES) | (codes[i] == PREDICTED)
        state = status[i]
        if state == OK and not np.isfinite(rewards[i]).all():
            state = NON_FINITE
        elif state == OK and counts.any():
            low, high = float(rewards[i][counts].min()), float(rewards[i][counts].max())
            if low < 0.0 or high > 1.0:
                state = OUT_OF_RANGE
        if state != OK:
            replies.append(RewardReply(client, state, nothing, unanswered))
        else:
            replies.append(RewardReply(client, OK, rewards[i], codes[i].astype(np.int8)))
    return replies
