"""What one shared answer distribution could score at best, when groups disagree.

A model whose prompt does not name the group gives every group the same answer p_q to question q.
Groups that disagree cannot all be served; a report that shows "0.84" must show what was possible.
Two optima, of two different policies (all scores s are "higher is better", AS_g = mean over the
questions that g answered of s(p_q, y_gq), so groups may have answered different questions):

*average*:  max over {p_q} of mean_g AS_g.  It falls apart by question:
max_p sum_g w_gq s(p, y_gq) with w_gq = 1 / (G n_g).

*worst group*:  max over {p_q} of min_g AS_g.  For any weights l on the simplex,
U(l) = max over {p_q} of sum_g l_g AS_g is an upper bound, and again falls apart by question.
Minimising the convex U by cutting planes (Kelley, in-out stabilised) gives the best bound; the
mixture of the policies met on the way gives the policy.  The difference is reported as ``gap``: the
true optimum lies in [value, value + gap].

How max_p sum_g w_g s(p, y_g) is solved for each score is in ``best_answer.py``.  For
``js_distance`` (both bases) that problem is not concave: the values are lower bounds on the
optimum, nothing is certified, and ``is_bound`` is False.

This needs every group's shares in one place, so only simulations have it; a server never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedalign.data.records import SurveyItem
from fedalign.errors import DataError
from fedalign.metrics import alignment, fairness
from fedalign.metrics.best_answer import (
    cosine_answer,
    median_answer,
    minimise_distance,
    minimise_jsd,
    weighted_mean,
)

Array = NDArray[np.float64]
Shares = Mapping[str, Mapping[str, Sequence[float]]]
"""Question to group to shares over its options."""
Ordinals = Mapping[str, Sequence[float] | None]
"""Question to ordinal value of each option."""

GAP = 1e-4
"""The worst-group search stops when its certified gap is below this."""
CUTS = 400
"""Most cutting planes; a larger gap than ``GAP`` is then reported as it is."""


@dataclass(frozen=True)
class SharedAnswer:
    """One shared answer to every question, and how each group is served by it."""

    scores: dict[str, dict[str, float]]
    """Question to group to score, as the fairness index needs it."""
    answers: dict[str, tuple[float, ...]]
    """Question to shares over its options."""
    is_bound: bool
    """Whether no shared answer exceeds the value by more than ``gap``."""
    gap: float | None
    """Certified distance to the optimum of its objective, in units of the score; None if none."""
    skipped: tuple[str, ...]
    """Questions on which the score is undefined."""

    @property
    def group_scores(self) -> dict[str, float]:
        """Group to mean score over the questions it answered."""
        return fairness.group_means(self.scores)

    @property
    def average(self) -> float:
        """Mean over groups."""
        return fairness.average(self.group_scores)

    @property
    def worst(self) -> float:
        """Score of the worst-served group."""
        return fairness.worst(self.group_scores)


def references(
    metric: str, shares: Shares, ordinals: Ordinals | None = None
) -> dict[str, SharedAnswer]:
    """Return all four shared answers a report shows beside measured values.

    Returns:
        ``uniform``, ``mean_of_groups``, ``optimum_average`` and ``optimum_worst``.

    Raises:
        DataError: bad shares, or no question on which the score is defined.
    """
    return {
        "uniform": uniform_answerer(metric, shares, ordinals),
        "mean_of_groups": mean_of_groups_answerer(metric, shares, ordinals),
        "optimum_average": optimum_average(metric, shares, ordinals),
        "optimum_worst": optimum_worst(metric, shares, ordinals),
    }


def uniform_answerer(metric: str, shares: Shares, ordinals: Ordinals | None = None) -> SharedAnswer:
    """Return the answerer that gives every option the same share."""
    problem = _Problem(metric, shares, ordinals)
    p = problem.options / problem.options.sum(1, keepdims=True)
    return problem.answer(p, is_bound=False, gap=None)


def mean_of_groups_answerer(
    metric: str, shares: Shares, ordinals: Ordinals | None = None
) -> SharedAnswer:
    """Return the answerer that gives, on each question, the mean of the shares of its groups."""
    problem = _Problem(metric, shares, ordinals)
    return problem.answer(weighted_mean(problem.y, problem.answered), is_bound=False, gap=None)


def optimum_average(metric: str, shares: Shares, ordinals: Ordinals | None = None) -> SharedAnswer:
    """Return the shared answer with the largest mean over groups.

    Args:
        metric: a survey metric.
        shares: question to group to shares.
        ordinals: question to ordinals, for ``wasserstein``; questions without are skipped.
    """
    problem = _Problem(metric, shares, ordinals)
    equal = np.full(len(problem.groups), 1.0 / len(problem.groups))
    p, slack = problem.best_response(equal, thorough=True)
    return problem.answer(p, is_bound=slack is not None, gap=slack)


def optimum_worst(metric: str, shares: Shares, ordinals: Ordinals | None = None) -> SharedAnswer:
    """Return the shared answer whose worst-served group is served best.

    Arguments as in :func:`optimum_average`.  For ``js_distance`` a good policy without certificate.
    """
    problem = _Problem(metric, shares, ordinals)
    n = len(problem.groups)
    # Without a certificate nothing says when to stop, and the inner search is slower.
    cuts = CUTS if problem.concave else 40
    policies: list[Array] = []
    served: list[Array] = []  # (groups,) each
    best, best_value, bound = np.empty(0), -math.inf, math.inf
    centre, weights = np.full(n, 1.0 / n), np.full(n, 1.0 / n)
    for _ in range(cuts):
        p, slack = problem.best_response(weights, thorough=not policies)
        policies.append(p)
        served.append(problem.served(p))
        upper = float(weights @ served[-1]) + (slack or 0.0)
        if upper < bound:
            bound, centre = upper, weights
        target, mixture = _master(np.array(served))
        mixed = problem.mix(policies, mixture)
        for candidate, means in ((mixed, problem.served(mixed)), (p, served[-1])):
            if float(means.min()) > best_value:
                best, best_value = candidate, float(means.min())
        if bound - best_value < GAP and problem.concave:
            break
        weights = 0.5 * centre + 0.5 * target
        if np.abs(target - centre).max() < 1e-12:
            break
    gap = max(0.0, bound - best_value) if problem.concave else None
    return problem.answer(best, is_bound=problem.concave, gap=gap)


def attained(measured: float, base: float, optimum: float) -> float | None:
    """Return ``(measured - base) / (optimum - base)``: 0 is the base, 1 the best shared answer.

    None where the base already scores the optimum or more (nothing was left to attain).

    Raises:
        ValueError: a number that is not finite.
    """
    if not all(math.isfinite(x) for x in (measured, base, optimum)):
        raise ValueError(f"measured {measured}, base {base}, optimum {optimum}: all must be finite")
    return None if optimum <= base else (measured - base) / (optimum - base)


def collect(
    items: Iterable[SurveyItem],
) -> tuple[dict[str, dict[str, tuple[float, ...]]], Ordinals]:
    """Return shares and ordinals by question key, from the items of all groups' clients.

    Raises:
        DataError: a group has two different answers to one question.
    """
    shares: dict[str, dict[str, tuple[float, ...]]] = {}
    ordinals: dict[str, Sequence[float] | None] = {}
    for item in items:
        known = shares.setdefault(item.key, {})
        for group, y in item.shares.items():
            if known.setdefault(group, y) != y:
                raise DataError(
                    f"{item.source or item.id}: group '{group}' has two different answers to the "
                    "same question; merge them into one row."
                )
        ordinals[item.key] = item.ordinals
    return shares, ordinals


class _Problem:
    """All questions on which the score is defined, padded to one number of options."""

    def __init__(self, metric: str, shares: Shares, ordinals: Ordinals | None) -> None:
        given = ordinals or {}
        self.metric = metric
        self.concave = not metric.startswith("js_distance")
        self.questions = [
            q for q in sorted(shares) if shares[q] and alignment.is_defined(metric, given.get(q))
        ]
        self.skipped = tuple(sorted(set(shares) - set(self.questions)))
        if not self.questions:
            raise DataError(
                f"no question has a score '{metric}' ({len(shares)} questions given); "
                "wasserstein needs ordinals that differ."
            )
        self.groups = sorted({g for q in self.questions for g in shares[q]})
        self.width = [len(next(iter(shares[q].values()))) for q in self.questions]
        size = (len(self.questions), len(self.groups), max(self.width))
        self.options = np.zeros((size[0], size[2]))
        """(questions, options), 1 where the option exists."""
        self.answered = np.zeros(size[:2])
        """(questions, groups), 1 where the group answered."""
        self.y = np.zeros(size)
        """(questions, groups, options); uniform where the group did not answer."""
        self.ordinals: Array | None = (
            np.zeros(self.options.shape) if metric == "wasserstein" else None
        )
        position = {g: j for j, g in enumerate(self.groups)}
        for i, (q, k) in enumerate(zip(self.questions, self.width, strict=True)):
            self.options[i, :k] = 1.0
            self.y[i, :, :k] = 1.0 / k
            for g, y in shares[q].items():
                j = position[g]
                if len(y) != k:
                    raise DataError(f"question '{q}': group '{g}' has {len(y)} shares, not {k}.")
                self.y[i, j, :k] = alignment.distribution(y, f"question '{q}': group '{g}'")
                self.answered[i, j] = 1.0
            o = given.get(q)
            if self.ordinals is not None and o is not None:
                self.ordinals[i] = alignment.pad_ordinals(o, k, size[2])
        self.per_group = self.answered / self.answered.sum(0)  # (questions, groups): 1 / n_g

    def scores(self, p: Array) -> Array:
        """Return (questions, groups) for answers p (questions, options)."""
        o = None if self.ordinals is None else self.ordinals[:, None, :]
        return alignment.kernel(self.metric, p[:, None, :], self.y, o)

    def served(self, p: Array) -> Array:
        """Return AS_g (groups,)."""
        return np.asarray((self.per_group * self.scores(p)).sum(0), dtype=np.float64)

    def best_response(self, weights: Array, thorough: bool) -> tuple[Array, float | None]:
        """Return the answers that maximise sum_g l_g AS_g, and a certified slack or None."""
        w = self.per_group * weights  # (questions, groups)
        idle = w.sum(1) <= 0  # no weight on any group that answered: any answer will do
        w = np.where(idle[:, None], self.answered, w)
        scale = w.sum(1)
        w = w / scale[:, None]
        if self.metric == "cosine":
            return cosine_answer(self.y, w), 0.0
        if self.ordinals is not None:
            return median_answer(self.y, w, self.ordinals), 0.0
        p, gap = minimise_jsd(self.y, w)
        if self.metric == "js_divergence":
            return p, float(np.where(idle, 0.0, scale * gap).sum())
        return minimise_distance(self.y, w, p, thorough), None

    def mix(self, policies: Sequence[Array], mixture: Array) -> Array:
        """Return the mixture of answers; for ``cosine`` of their unit vectors."""
        total = np.zeros_like(self.options)
        for share, p in zip(mixture, policies, strict=True):
            if share > 0:
                unit = np.linalg.norm(p, axis=1, keepdims=True) if self.metric == "cosine" else 1.0
                total += share * p / unit
        return total / total.sum(1, keepdims=True)

    def answer(self, p: Array, *, is_bound: bool, gap: float | None) -> SharedAnswer:
        scores = self.scores(p)
        return SharedAnswer(
            scores={
                q: {
                    g: float(scores[i, j]) for j, g in enumerate(self.groups) if self.answered[i, j]
                }
                for i, q in enumerate(self.questions)
            },
            answers={
                q: tuple(p[i, :k].tolist())
                for i, (q, k) in enumerate(zip(self.questions, self.width, strict=True))
            },
            is_bound=is_bound,
            gap=gap,
            skipped=self.skipped,
        )


def _master(served: Array) -> tuple[Array, Array]:
    """Return the weights that minimise max_j l . AS^j, and the best mixture of policies j.

    Args:
        served: (policies, groups).
    """
    from scipy.optimize import linprog

    policies, n = served.shape
    result = linprog(
        c=np.append(np.zeros(n), 1.0),
        A_ub=np.hstack([served, -np.ones((policies, 1))]),
        b_ub=np.zeros(policies),
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs",
    )
    if not result.success:
        raise ArithmeticError(
            f"the linear program of the worst-group optimum failed: {result.message}"
        )
    weights = np.maximum(result.x[:n], 0.0)
    mixture = np.maximum(-result.ineqlin.marginals, 0.0)
    return weights / weights.sum(), mixture / mixture.sum()
