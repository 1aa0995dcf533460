"""Intervals: over seeds, of paired differences, over questions, and for rates.

Two sources of noise, and each has its interval.  *Seeds* (population, split, sampling, initial
adapter): a t interval of the mean, or of the mean difference of paired runs; fewer than 3 seeds
give None, "no interval".  *Questions*: a percentile bootstrap that draws the same resample of
questions for all groups and all methods, so that differences between methods keep their pairing.
Rates get Wilson intervals (Wilson 1927).

Resamples come from (seed, "bootstrap", number of questions): the same for every method and every
call.  Draws in which some group has no question are left out; when they are more than a tenth of
all draws, there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedalign.metrics.fairness import QuestionScores, jain_rows, worst_count
from fedalign.randomness import generator

Array = NDArray[np.float64]
MIN_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """A centre with a two-sided interval, in the unit of the quantity."""

    centre: float
    low: float
    high: float
    n: int
    """Seeds, questions or trials it stands on."""


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Return the t interval of the mean over seeds; None for fewer than 3.

    Raises:
        ValueError: a value that is not finite, or a level outside (0, 1).
    """
    x = _finite(values)
    _check_level(level)
    if len(x) < MIN_SEEDS:
        return None
    from scipy.stats import t

    centre = float(x.mean())
    half = float(t.ppf(0.5 + level / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(centre, centre - half, centre + half, len(x))


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95
) -> Interval | None:
    """Return the t interval of the mean of ``a - b`` over paired seeds; None for fewer than 3.

    Args:
        a: seed to value.
        b: the same seeds to value.

    Raises:
        ValueError: the seeds differ; unpaired runs have no paired difference.
    """
    if set(a) != set(b):
        odd = sorted(set(a) ^ set(b))
        raise ValueError(f"seeds {odd} are in one of the two only; run both with the same seeds")
    return seed_interval([a[s] - b[s] for s in sorted(a)], level)


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Return the Wilson interval of a rate, in [0, 1].

    Raises:
        ValueError: no trial, or successes outside [0, trials].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is no rate")
    _check_level(level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / trials
    scale = 1 + z**2 / trials
    middle = (rate + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # At 0 and at all successes the exact bounds are 0 and 1; rounding must not miss them.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return Interval(rate, low, high, trials)


def bootstrap_questions(
    scores: QuestionScores, seed: int, draws: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
    """Return intervals over questions for one method.

    Args:
        scores: question to group to score; groups may have answered different questions.
        seed: key of the resamples.
        draws: number of resamples.
        level: coverage of the percentile interval.

    Returns:
        Intervals under ``average``, ``worst``, ``gap``, ``std``, ``worst_k20``, ``fairness_index``
        and ``group/<name>/score``; a statistic that cannot be had has no key.
    """
    table = _table([scores])
    counts = resample_counts(len(table.questions), draws, seed)
    return _intervals(table.centre(0), table.resampled(0, counts), len(table.questions), level)


def bootstrap_difference(
    a: QuestionScores, b: QuestionScores, seed: int, draws: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
    """Return intervals over questions of ``a - b``, both on the same resamples.

    Raises:
        ValueError: the two do not have the same questions and groups.
    """
    if {q: set(x) for q, x in a.items()} != {q: set(x) for q, x in b.items()}:
        raise ValueError("the two methods were not scored on the same questions and groups")
    table = _table([a, b])
    counts = resample_counts(len(table.questions), draws, seed)
    ca, cb = table.centre(0), table.centre(1)
    ra, rb = table.resampled(0, counts), table.resampled(1, counts)
    both = [name for name in ca if name in cb]
    return _intervals(
        {name: ca[name] - cb[name] for name in both},
        {name: ra[name] - rb[name] for name in both},
        len(table.questions),
        level,
    )


def resample_counts(questions: int, draws: int, seed: int) -> Array:
    """Return (draws, questions): how often each question is in each resample."""
    if questions < 1 or draws < 1:
        raise ValueError(f"{draws} draws of {questions} questions; both must be at least 1")
    rng = generator(seed, "bootstrap", questions)
    return rng.multinomial(questions, np.full(questions, 1.0 / questions), size=draws).astype(
        np.float64
    )


@dataclass(frozen=True)
class _Table:
    """Scores of several methods on the same questions."""

    questions: list[str]
    groups: list[str]
    scores: Array
    """(methods, questions, groups); 0 where a group did not answer."""
    answered: Array
    """(questions, groups), 1 or 0."""

    def centre(self, method: int) -> dict[str, float]:
        ones = np.ones((1, len(self.questions)))
        return {name: float(x[0]) for name, x in self.resampled(method, ones).items()}

    def resampled(self, method: int, counts: Array) -> dict[str, Array]:
        """Return each statistic (draws,); NaN in draws where a group has no question."""
        x = self.scores[method]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (counts @ x) / (counts @ self.answered)  # (draws, groups)
        out = {name: f(means) for name, f in _STATISTICS.items()}
        out |= {f"group/{g}/score": means[:, i] for i, g in enumerate(self.groups)}
        usable = (self.answered.min(1) > 0) & (x.max(1) > 0) & (x.min(1) >= 0)
        if usable.any():
            here = counts[:, usable]
            with np.errstate(invalid="ignore", divide="ignore"):
                out["fairness_index"] = (here @ jain_rows(x[usable])) / here.sum(1)
        return out


def _lowest(means: Array) -> Array:
    k = worst_count(means.shape[1])
    return np.asarray(np.sort(means, axis=1)[:, :k].mean(1), dtype=np.float64)


_STATISTICS: dict[str, Callable[[Array], Array]] = {
    "average": lambda m: np.asarray(m.mean(1), dtype=np.float64),
    "worst": lambda m: np.asarray(m.min(1), dtype=np.float64),
    "gap": lambda m: np.asarray(m.max(1) - m.min(1), dtype=np.float64),
    "std": lambda m: np.asarray(m.std(1), dtype=np.float64),
    "worst_k20": _lowest,
}


def _table(methods: Sequence[QuestionScores]) -> _Table:
    questions = sorted(methods[0])
    groups = sorted({g for by_group in methods[0].values() for g in by_group})
    if not questions or not groups:
        raise ValueError("no question has a score")
    scores = np.zeros((len(methods), len(questions), len(groups)))
    answered = np.zeros((len(questions), len(groups)))
    for i, q in enumerate(questions):
        for j, g in enumerate(groups):
            if g in methods[0][q]:
                answered[i, j] = 1.0
                scores[:, i, j] = [m[q][g] for m in methods]
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite; a failed score must be left out by name")
    return _Table(questions, groups, scores, answered)


def _intervals(
    centre: Mapping[str, float], resampled: Mapping[str, Array], n: int, level: float
) -> dict[str, Interval]:
    _check_level(level)
    tail = (1 - level) / 2
    out: dict[str, Interval] = {}
    for name, x in resampled.items():
        good = x[np.isfinite(x)]
        if len(good) >= 0.9 * len(x):
            low, high = np.quantile(good, [tail, 1 - tail])
            out[name] = Interval(centre[name], float(low), float(high), n)
    return out


def _finite(values: Sequence[float]) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"values {list(values)} hold one that is not finite")
    return x


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level = {level} is outside (0, 1)")
