"""Scores of printed orders: hand-worked numbers, scipy, and what must hold for any input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.config_rules import ORDER_METRICS
from fedalign.errors import DataError
from fedalign.metrics import ranking
from fedalign.metrics.ranking import all_orders, chance, kernel, score

DISTINCT = (0.1, 0.4, 0.3, 0.2)  # the group's order is B C D A


@st.composite
def votes(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """An order and shares that often tie."""
    k = draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(0, 3), min_size=k, max_size=k).filter(any))
    return draw(st.permutations(range(k))), [c / sum(counts) for c in counts]


def test_by_hand():
    """Points of the group: A 0, B 3, C 2, D 1; M = 14, m = 4."""
    for metric in ORDER_METRICS:
        assert score(metric, (1, 2, 3, 0), DISTINCT) == 1.0
        assert score(metric, (0, 3, 2, 1), DISTINCT) == 0.0
    # B D C A: points of the order 0, 3, 1, 2, so 9 + 2 + 2 = 13; one of six pairs is wrong.
    assert score("borda", (1, 3, 2, 0), DISTINCT) == pytest.approx((13 - 4) / 10)
    assert score("kendall", (1, 3, 2, 0), DISTINCT) == pytest.approx(5 / 6)
    assert score("binary", (1, 3, 2, 0), DISTINCT) == 1.0
    assert score("binary", (2, 1, 3, 0), DISTINCT) == 0.0


def test_ties_by_hand():
    """Shares .4 .4 .2: points 1.5, 1.5, 0; M = 5, m = 1; two of three pairs are ordered."""
    y = (0.4, 0.4, 0.2)
    assert ranking.share_points(np.array(y)).tolist() == [1.5, 1.5, 0.0]
    for order in ((0, 1, 2), (1, 0, 2)):
        assert score("borda", order, y) == pytest.approx((1.5 * 3 - 1) / 4)
        assert score("kendall", order, y) == pytest.approx(0.5 + 0.5 * 2 / math.sqrt(3 * 2))
        assert score("binary", order, y) == 1.0
    assert score("binary", (2, 0, 1), y) == 0.0
    even = (0.25,) * 4
    for order in all_orders(4):
        assert score("borda", order.tolist(), even) == pytest.approx(0.5)
        assert score("kendall", order.tolist(), even) == 0.5
        assert score("binary", order.tolist(), even) == 1.0


@given(votes())
def test_against_scipy(given_):
    from scipy.stats import kendalltau, spearmanr

    order, y = given_
    if len(set(y)) == 1:
        return  # scipy gives NaN
    points = np.empty(len(y))
    points[order] = np.arange(len(y))[::-1]
    tau = kendalltau(points, y, variant="b").statistic
    assert score("kendall", order, y) == pytest.approx((1 + tau) / 2)
    rho = spearmanr(points, y).statistic
    group = ranking.share_points(np.array(y))
    assert score("borda", order, y) == pytest.approx((1 + rho * group.std() / points.std()) / 2)
    if len(set(y)) == len(y):
        assert score("borda", order, y) == pytest.approx((1 + rho) / 2)


@given(votes(), st.randoms(use_true_random=False))
def test_renaming_options_changes_nothing_and_reversing_mirrors(given_, rng):
    order, y = given_
    new = list(range(len(y)))  # option o becomes option new[o]
    rng.shuffle(new)
    renamed = [0.0] * len(y)
    for o, share in enumerate(y):
        renamed[new[o]] = share
    for metric in ORDER_METRICS:
        value = score(metric, order, y)
        assert 0.0 <= value <= 1.0
        assert score(metric, [new[o] for o in order], renamed) == pytest.approx(value)
        if metric != "binary":
            assert score(metric, order[::-1], y) == pytest.approx(1 - value)


@given(votes())
def test_chance_is_the_mean_over_all_orders(given_):
    _, y = given_
    for metric in ORDER_METRICS:
        mean = kernel(metric, all_orders(len(y)), np.array(y)).mean()
        assert chance(metric, y) == pytest.approx(mean)


def test_many_orders_and_groups_at_once():
    rng = np.random.default_rng(0)
    orders, y = all_orders(4), rng.dirichlet(np.ones(4), 3)
    y[2] = (0.4, 0.4, 0.1, 0.1)
    for metric in ORDER_METRICS:
        table = kernel(metric, orders[:, None, :], y[None])
        assert table.shape == (24, 3)
        for i, g in ((0, 0), (7, 1), (23, 2)):
            assert table[i, g] == score(metric, orders[i].tolist(), y[g])


@pytest.mark.parametrize(
    ("order", "shares", "says"),
    [
        ((0, 1), DISTINCT, "not a permutation of 0..3"),
        ((0, 1, 1, 2), DISTINCT, "not a permutation"),
        ((0, 1), (math.nan, 1.0), "not finite"),
        ((0, 1), (0.0, 0.0), "all zero"),
    ],
)
def test_bad_input_is_an_error(order, shares, says):
    with pytest.raises(DataError, match=says):
        score("borda", order, shares)


def test_unknown_metric():
    for call in (lambda: score("cosine", (0, 1), (0.5, 0.5)), lambda: chance("ndcg", (0.5, 0.5))):
        with pytest.raises(DataError, match="borda, kendall, binary"):
            call()
