"""All questions at once, answered by printed orders: scores, and the best order for weights.

A policy gives every question a distribution over orders; its score is the expectation, so it is
linear in the policy.  The best policy for weighted groups is then one order a question:

``borda``
    Sort the options by the weighted mean of the groups' points.  Optimal by the rearrangement
    inequality, since the score is <points of the order, points of the group> up to constants.
``binary``
    Only the first option counts: the one that is a top option of most weight; the others follow by
    mean points.
``kendall``
    The weighted Kemeny order, by trying all K! orders, for K up to ``MOST_SEARCHED``.

For the worst group a mixture of orders can be better than any single one.  That optimum is a linear
program over mixtures, solved by the cutting planes of ``attainable``, with the best order for given
weights as the column to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import factorial

import numpy as np

from fedalign.errors import DataError
from fedalign.metrics import alignment, ranking
from fedalign.metrics.alignment import UndefinedScore
from fedalign.metrics.shared_answer import Array, Order, SharedAnswer, Shares

MOST_SEARCHED = 7
"""Options up to which all orders are tried: 5040 of them."""

OrderPolicy = list[dict[Order, float]]
"""For each question the orders that are printed, and the probability of each."""


class OrderProblem:
    """All questions, with the shares of the groups that answered each.

    Raises:
        DataError: bad shares, or no question at all.
    """

    concave = True
    """The score is linear in the policy."""

    def __init__(self, metric: str, shares: Shares) -> None:
        self.metric = metric
        self.questions = [q for q in sorted(shares) if shares[q]]
        self.skipped = tuple(sorted(set(shares) - set(self.questions)))
        if not self.questions:
            raise DataError(f"no question has a score '{metric}' ({len(shares)} questions given).")
        self.groups = sorted({g for q in self.questions for g in shares[q]})
        position = {g: j for j, g in enumerate(self.groups)}
        self.members: list[list[int]] = []
        """For each question the groups that answered it, by number."""
        self.y: list[Array] = []
        """For each question their shares (groups that answered, options)."""
        self.answered = np.zeros((len(self.questions), len(self.groups)))
        for i, q in enumerate(self.questions):
            rows = [
                alignment.distribution(y, f"question '{q}': group '{g}'")
                for g, y in shares[q].items()
            ]
            if len({len(row) for row in rows}) > 1:
                raise DataError(f"question '{q}': groups have different numbers of shares.")
            self.members.append([position[g] for g in shares[q]])
            self.y.append(np.array(rows))
            self.answered[i, self.members[i]] = 1.0
        self.per_group = self.answered / self.answered.sum(0)  # (questions, groups): 1 / n_g
        self._known: list[dict[Order, Array]] = [{} for _ in self.questions]
        self._preferences = [_pair_preferences(y) for y in self.y]

    def scores(self, p: OrderPolicy) -> Array:
        """Return expected scores (questions, groups); 0 where a group did not answer."""
        out = np.zeros(self.answered.shape)
        for i, orders in enumerate(p):
            for order, probability in orders.items():
                out[i, self.members[i]] += probability * self._value(i, order)
        return out

    def served(self, p: OrderPolicy) -> Array:
        """Return AS_g (groups,)."""
        return np.asarray((self.per_group * self.scores(p)).sum(0), dtype=np.float64)

    def best_response(self, weights: Array, thorough: bool) -> tuple[OrderPolicy, float]:
        """Return the policy that maximises sum_g l_g AS_g; nothing is better, so the slack is 0.

        ``thorough`` is not used.  Raises ``UndefinedScore`` for ``kendall`` with too many options.
        """
        w = self.per_group * weights
        return [{self._best(i, w[i, self.members[i]]): 1.0} for i in range(len(w))], 0.0

    def mix(self, policies: Sequence[OrderPolicy], mixture: Array) -> OrderPolicy:
        """Return the mixture of policies."""
        mixed: OrderPolicy = [{} for _ in self.questions]
        for share, p in zip(mixture, policies, strict=True):
            if share > 0:
                for total, orders in zip(mixed, p, strict=True):
                    for order, probability in orders.items():
                        total[order] = total.get(order, 0.0) + float(share) * probability
        return mixed

    def uniform_answer(self) -> SharedAnswer:
        """Return the answerer that prints an order drawn at random."""
        values = [[ranking.chance(self.metric, y) for y in rows] for rows in self.y]
        return self._shared(values, {}, is_bound=False, gap=None)

    def mean_answer(self) -> SharedAnswer:
        """Return the answerer that prints the order of the mean of the groups' shares.

        Options of equal mean share come in the order of the question.
        """
        p: OrderPolicy = [{_descending(rows.mean(0)): 1.0} for rows in self.y]
        return self.answer(p, is_bound=False, gap=None)

    def answer(self, p: OrderPolicy, *, is_bound: bool, gap: float | None) -> SharedAnswer:
        """Return a policy with what each group makes of it."""
        scores = self.scores(p)
        values = [[float(scores[i, j]) for j in members] for i, members in enumerate(self.members)]
        return self._shared(
            values, dict(zip(self.questions, p, strict=True)), is_bound=is_bound, gap=gap
        )

    def _shared(
        self,
        values: Sequence[Sequence[float]],
        orders: dict[str, dict[Order, float]],
        *,
        is_bound: bool,
        gap: float | None,
    ) -> SharedAnswer:
        return SharedAnswer(
            scores={
                q: {self.groups[j]: v for j, v in zip(members, row, strict=True)}
                for q, members, row in zip(self.questions, self.members, values, strict=True)
            },
            answers={},
            is_bound=is_bound,
            gap=gap,
            skipped=self.skipped,
            orders=orders,
        )

    def _value(self, i: int, order: Order) -> Array:
        """Return the score of one order for the groups that answered question i."""
        known = self._known[i]
        if order not in known:
            known[order] = ranking.kernel(self.metric, np.array(order), self.y[i])
        return known[order]

    def _best(self, i: int, weights: Array) -> Order:
        y = self.y[i]
        if weights.sum() <= 0:  # no weight on any group that answered: any order will do
            weights = np.ones(len(y))
        points = weights @ ranking.share_points(y)
        if self.metric == "borda":
            return _descending(points)
        if self.metric == "binary":
            first = int((weights @ (y == y.max(1, keepdims=True))).argmax())
            rest = tuple(o for o in _descending(points) if o != first)
            return (first, *rest)
        return _kemeny(weights @ self._preferences[i], y.shape[1])


def _descending(points: Array) -> Order:
    return tuple(int(o) for o in np.argsort(-points, kind="stable"))


def _pair_preferences(y: Array) -> Array:
    """Return for each group its sign on each pair of options, over the norm of its tau."""
    i, j = np.triu_indices(y.shape[1], 1)
    signs = np.sign(y[:, i] - y[:, j])
    norm = np.sqrt(len(i) * np.abs(signs).sum(1))
    return np.asarray(signs / np.where(norm > 0, norm, 1.0)[:, None], dtype=np.float64)


def _kemeny(preferences: Array, k: int) -> Order:
    """Return the order with the largest sum of agreed pair preferences (pairs,)."""
    if k > MOST_SEARCHED:
        raise UndefinedScore(
            f"the best order of {k} options under kendall is not searched for: {factorial(k)} "
            f"orders, and the most is {factorial(MOST_SEARCHED)} ({MOST_SEARCHED} options)."
        )
    orders, signs = _candidates(k)
    return tuple(int(o) for o in orders[(signs @ preferences).argmax()])


@lru_cache(maxsize=MOST_SEARCHED)
def _candidates(k: int) -> tuple[ranking.Orders, Array]:
    """Return all orders (k!, k), and the sign that each gives to each pair of options."""
    orders = ranking.all_orders(k)
    points = ranking.order_points(orders)
    i, j = np.triu_indices(k, 1)
    return orders, np.sign(points[:, i] - points[:, j])
