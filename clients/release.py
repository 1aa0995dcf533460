"""What leaves of scores: exact, rounded or not at all, as the site's policy says.

Rounded means the nearest multiple of m, halves up, within the range of the score: mean scores, the
score of a uniform answerer, option mass, losses, question scores, the predictor's error.  Where
every question's score is sent, the mean is that of the rounded ones, as the contract wants it.
Withheld means that all of these are absent; status codes, counts and updates leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from clients.site_policy import ScoresPolicy
from fedalign import wire
from fedalign.wire.predictor import LARGEST_ERROR, PredictorReply


def nearest(value: float, multiple: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Return the nearest multiple, halves up, then held within [low, high]."""
    # Without the inner rounding .15 / .1 is 1.4999999999999998, and a half would go down.
    return min(high, max(low, multiple * math.floor(round(value / multiple, 9) + 0.5)))


def release_score(policy: ScoresPolicy, score: wire.Score | None, low: float) -> wire.Score | None:
    """Return what leaves of one score; ``low`` is the lower end of its range."""
    if score is None or policy.release == "exact":
        return score
    if policy.release == "withheld":
        return None
    m = policy.rounding
    items = tuple((key, nearest(value, m, low, 1.0)) for key, value in score.items)
    mean = nearest(score.score, m, low, 1.0)
    if items and len(items) == score.n:
        mean = math.fsum(value for _, value in items) / len(items)
    return wire.Score(
        score=mean,
        n=score.n,
        option_mass=nearest(score.option_mass, m, 0.0, 1.0),
        uniform=nearest(score.uniform, m, low, 1.0),
        items=items,
    )


def release_scores(
    policy: ScoresPolicy, replies: Sequence[wire.ScoreReply], low: float
) -> list[wire.ScoreReply]:
    """Return what leaves of an answer to ``score`` or ``personal``."""
    out = []
    for reply in replies:
        left = {stage: release_score(policy, s, low) for stage, s in reply.scores.items()}
        out.append(replace(reply, scores={k: s for k, s in left.items() if s is not None}))
    return out


def release_training(policy: ScoresPolicy, reply: wire.TrainReply, low: float) -> wire.TrainReply:
    """Return what leaves of one client's round, beside its update."""
    loss, first, last = (
        _loss(policy, value) for value in (reply.loss, reply.loss_first, reply.loss_last)
    )
    score = release_score(policy, reply.score, low)
    return replace(reply, score=score, loss=loss, loss_first=first, loss_last=last)


def release_predictor(policy: ScoresPolicy, reply: PredictorReply) -> PredictorReply:
    """Return what leaves of one client's round of the predictor, beside its parameters."""
    if policy.release == "exact":
        return reply
    first, last = _loss(policy, reply.loss_first), _loss(policy, reply.loss_last)
    if policy.release == "withheld":
        return replace(reply, loss_first=first, loss_last=last, error=0.0, questions=0)
    error = nearest(reply.error, policy.rounding, 0.0, LARGEST_ERROR)
    return replace(reply, loss_first=first, loss_last=last, error=error)


def _loss(policy: ScoresPolicy, value: float) -> float:
    if policy.release == "withheld":
        return 0.0
    if policy.release == "rounded" and math.isfinite(value):
        return nearest(value, policy.rounding)
    return value
