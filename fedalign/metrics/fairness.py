"""Fairness numbers over groups: each group counts once, whatever its size.

Let x_g be the score of group g (mean over its questions), n the number of groups, and std the
population standard deviation (divisor n).

=====================  ===============================================  =============  ====
``average``            mean_g x_g                                       [low, 1]       1
``worst``              min_g x_g; ``worst_group`` names it              [low, 1]       1
``gap``                max_g x_g - min_g x_g                            [0, 1 - low]   0
``std``                std_g x_g                                        [0, .5]        0
``worst_k20``          mean of the ceil(.2 n) lowest x_g                [low, 1]       1
``jain_group_means``   (sum x)^2 / (n sum x^2)                          [1/n, 1]       1
``cov_group_means``    std(x) / mean(x)                                 [0, rt(n-1)]   0
``gini_group_means``   sum_ij |x_i - x_j| / (2 n^2 mean(x))             [0, 1 - 1/n]   0
``fairness_index``     mean over questions of 1 / (1 + CoV_q^2)         [1/n, 1]       1
=====================  ===============================================  =============  ====

The fairness index is Jain's index of the groups' scores on one question, averaged over questions,
as used for federated preference alignment (arXiv 2512.08786; a published summary prints the square
of CoV, and the published figures agree with the square only).  It ignores quality: equally bad
scores give 1, so it is read next to the average and the worst group, and next to its value for a
uniform answerer.  It depends on the zero of the score: values under different scores must not be
compared.  ``worst`` is biased down by noise and ``gap`` up.

Jain, CoV and Gini are ratios to the mean: they need scores that are not negative, and are None when
every score is 0.  Nothing here accepts NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GroupScores = Mapping[str, float]
"""Group to score."""
QuestionScores = Mapping[str, Mapping[str, float]]
"""Question to group to score."""


@dataclass(frozen=True)
class FairnessIndex:
    """The fairness index, and how much it stands on."""

    value: float | None
    """In [1/n, 1]; None where no question could be used."""
    questions: int
    """Questions used: answered by all groups, with some score above 0."""
    left_out: int
    """Questions that a group did not answer, or on which every score is 0."""
    reason: str = ""
    """Why there is no value."""


def average(scores: GroupScores) -> float:
    """Return the mean over groups."""
    return float(_values(scores).mean())


def worst(scores: GroupScores) -> float:
    """Return the lowest group score."""
    return float(_values(scores).min())


def worst_group(scores: GroupScores) -> str:
    """Return the group with the lowest score; the first by name where groups tie."""
    _values(scores)
    return min(sorted(scores), key=lambda g: scores[g])


def gap(scores: GroupScores) -> float:
    """Return the highest minus the lowest group score."""
    x = _values(scores)
    return float(x.max() - x.min())


def std(scores: GroupScores) -> float:
    """Return the population standard deviation over groups (divisor n)."""
    return float(_values(scores).std())


def worst_k(scores: GroupScores, share: float = 0.2) -> float:
    """Return the mean of the lowest ``ceil(share * n)`` group scores."""
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} is outside (0, 1]")
    x = np.sort(_values(scores))
    return float(x[: worst_count(len(x), share)].mean())


def worst_count(n: int, share: float = 0.2) -> int:
    """Return ``ceil(share * n)``; rounding of ``share * n`` does not add a group."""
    return math.ceil(share * n - 1e-9)


def jain(scores: GroupScores) -> float | None:
    """Return Jain's index of the group scores; None when all are 0."""
    x = _not_negative(scores)
    return None if x.max() == 0 else float(jain_rows(x[None])[0])


def cov(scores: GroupScores) -> float | None:
    """Return the coefficient of variation of the group scores; None when all are 0."""
    x = _not_negative(scores)
    return None if x.max() == 0 else float(x.std() / x.mean())


def gini(scores: GroupScores) -> float | None:
    """Return the Gini coefficient of the group scores; None when all are 0."""
    x = np.sort(_not_negative(scores))
    if x.max() == 0:
        return None
    n = len(x)
    # Sorted ascending, sum_ij |x_i - x_j| = 2 sum_k (2 k - n - 1) x_k with k = 1..n.
    ranks = 2.0 * np.arange(1, n + 1) - n - 1.0
    return max(0.0, float((ranks * x).sum() / (n**2 * x.mean())))


STATISTICS: dict[str, Callable[[GroupScores], float | None]] = {
    "average": average,
    "worst": worst,
    "gap": gap,
    "std": std,
    "worst_k20": worst_k,
    "jain_group_means": jain,
    "cov_group_means": cov,
    "gini_group_means": gini,
}
"""Metric name to function of the group scores; the names are those of ``docs/metrics.md``."""


def fairness_index(scores: QuestionScores, groups: Iterable[str]) -> FairnessIndex:
    """Return the mean of Jain's index over the questions that all ``groups`` answered.

    Args:
        scores: question to group to score.
        groups: the groups of the run; a question that one of them did not answer is left out.

    Raises:
        ValueError: no group, or a score that is negative or not finite.
    """
    names = sorted(set(groups))
    if not names:
        raise ValueError("a fairness index needs at least one group")
    complete = [q for q in sorted(scores) if all(g in scores[q] for g in names)]
    if not complete:
        return FairnessIndex(None, 0, len(scores), "no question was answered by all groups")
    x = np.array([[scores[q][g] for g in names] for q in complete], dtype=np.float64)
    if not (np.isfinite(x).all() and (x >= 0).all()):
        q, g = np.argwhere(~(np.isfinite(x) & (x >= 0)))[0]
        raise ValueError(
            f"question '{complete[q]}': group '{names[g]}' has score {x[q, g]}; the fairness index "
            "needs finite scores that are not negative"
        )
    usable = x[x.max(1) > 0]
    if not len(usable):
        return FairnessIndex(None, 0, len(scores), "every score is 0 on every question")
    value = float(jain_rows(usable).mean())
    return FairnessIndex(value, len(usable), len(scores) - len(usable))


def jain_rows(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Jain's index of each row of (rows, groups); no row may be all zero."""
    scaled = x / x.max(1, keepdims=True)  # squares of tiny scores would underflow
    return np.minimum(scaled.sum(1) ** 2 / (x.shape[1] * (scaled**2).sum(1)), 1.0)


def group_means(scores: QuestionScores) -> dict[str, float]:
    """Return each group's mean over the questions it answered."""
    totals: dict[str, list[float]] = {}
    for by_group in scores.values():
        for g, s in by_group.items():
            totals.setdefault(g, []).append(s)
    return {g: math.fsum(x) / len(x) for g, x in sorted(totals.items())}


def _values(scores: GroupScores) -> NDArray[np.float64]:
    if not scores:
        raise ValueError("no group has a score")
    for g, s in scores.items():
        if not math.isfinite(s):
            raise ValueError(f"group '{g}' has score {s}; a failed score must be left out by name")
    return np.array([scores[g] for g in sorted(scores)], dtype=np.float64)


def _not_negative(scores: GroupScores) -> NDArray[np.float64]:
    x = _values(scores)
    if (x < 0).any():
        raise ValueError(
            f"ratios to the mean need scores that are not negative, got {dict(scores)}"
        )
    return x
