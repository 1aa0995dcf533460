"""What one shared answer could score at best, when groups disagree.

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

A model that prints shares in tenths answers with one of finitely many distributions, or a mixture
of them, so the same values bound it from above where the score is concave in p.

Scores of a printed *order* (``borda``, ``kendall``, ``binary``) have orders as answers, and
mixtures of orders for the worst group: ``order_problem.py``.

This needs every group's shares in one place, so only simulations have it; a server never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from fedalign.config_rules import ORDER_METRICS
from fedalign.data.records import SurveyItem
from fedalign.errors import DataError
from fedalign.metrics.order_problem import OrderProblem
from fedalign.metrics.share_problem import ShareProblem
from fedalign.metrics.shared_answer import Array, Ordinals, SharedAnswer, Shares

GAP = 1e-4
"""The worst-group search stops when its certified gap is below this."""
CUTS = 400
"""Most cutting planes; a larger gap than ``GAP`` is then reported as it is."""


def uniform_answerer(metric: str, shares: Shares, ordinals: Ordinals | None = None) -> SharedAnswer:
    """Return the answerer that gives every option the same share, or draws an order at random."""
    return _problem(metric, shares, ordinals).uniform_answer()


def mean_of_groups_answerer(
    metric: str, shares: Shares, ordinals: Ordinals | None = None
) -> SharedAnswer:
    """Return the answerer that gives the mean of the groups' shares, or prints its order."""
    return _problem(metric, shares, ordinals).mean_answer()


def optimum_average(metric: str, shares: Shares, ordinals: Ordinals | None = None) -> SharedAnswer:
    """Return the shared answer with the largest mean over groups.

    Args:
        metric: a survey metric, or a score of an order.
        shares: question to group to shares.
        ordinals: question to ordinals, for ``wasserstein``; questions without are skipped.

    Raises:
        UndefinedScore: ``kendall`` with more options than can be searched.
    """
    if metric in ORDER_METRICS:
        return _best_average(OrderProblem(metric, shares))
    return _best_average(ShareProblem(metric, shares, ordinals))


def optimum_worst(metric: str, shares: Shares, ordinals: Ordinals | None = None) -> SharedAnswer:
    """Return the shared answer whose worst-served group is served best.

    Arguments and errors as in :func:`optimum_average`.  For ``js_distance`` a good policy without
    certificate.
    """
    if metric in ORDER_METRICS:
        return _best_worst(OrderProblem(metric, shares))
    return _best_worst(ShareProblem(metric, shares, ordinals))


ANSWERERS: dict[str, Callable[[str, Shares, Ordinals | None], SharedAnswer]] = {
    "uniform": uniform_answerer,
    "mean_of_groups": mean_of_groups_answerer,
    "optimum_average": optimum_average,
    "optimum_worst": optimum_worst,
}
"""The four shared answers that a report shows beside measured values, by name."""


def references(
    metric: str, shares: Shares, ordinals: Ordinals | None = None
) -> dict[str, SharedAnswer]:
    """Return all four shared answers a report shows beside measured values.

    Returns:
        ``uniform``, ``mean_of_groups``, ``optimum_average`` and ``optimum_worst``.

    Raises:
        DataError: bad shares, or no question on which the score is defined.
        UndefinedScore: an optimum cannot be had for this score.
    """
    return {name: solve(metric, shares, ordinals) for name, solve in ANSWERERS.items()}


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


def _problem(metric: str, shares: Shares, ordinals: Ordinals | None) -> OrderProblem | ShareProblem:
    if metric in ORDER_METRICS:
        return OrderProblem(metric, shares)
    return ShareProblem(metric, shares, ordinals)


Policy = TypeVar("Policy")


class _Problem(Protocol[Policy]):
    """What the two searches need: one answer to every question is a policy."""

    groups: list[str]
    concave: bool

    def best_response(self, weights: Array, thorough: bool) -> tuple[Policy, float | None]: ...
    def served(self, p: Policy) -> Array: ...
    def mix(self, policies: Sequence[Policy], mixture: Array) -> Policy: ...
    def answer(self, p: Policy, *, is_bound: bool, gap: float | None) -> SharedAnswer: ...


def _best_average(problem: _Problem[Policy]) -> SharedAnswer:
    equal = np.full(len(problem.groups), 1.0 / len(problem.groups))
    p, slack = problem.best_response(equal, thorough=True)
    return problem.answer(p, is_bound=slack is not None, gap=slack)


def _best_worst(problem: _Problem[Policy]) -> SharedAnswer:
    """Cutting planes on the upper bound U(l), from the top of this file."""
    n = len(problem.groups)
    # Without a certificate nothing says when to stop, and the inner search is slower.
    cuts = CUTS if problem.concave else 40
    policies: list[Policy] = []
    served: list[Array] = []  # (groups,) each
    best_value, bound = -math.inf, math.inf
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
