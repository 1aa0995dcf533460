"""Attainable optima of printed orders against brute force and a linear program over all orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.config_rules import ORDER_METRICS
from fedalign.errors import DataError
from fedalign.metrics import ranking
from fedalign.metrics.alignment import UndefinedScore
from fedalign.metrics.attainable import (
    GAP,
    mean_of_groups_answerer,
    optimum_average,
    optimum_worst,
    references,
    uniform_answerer,
)

OPPOSED = {"q": {"a": (0.6, 0.3, 0.1), "b": (0.1, 0.3, 0.6)}}


def population(groups: int, questions: int, seed: int, missing: float, k: int):
    """Shares in tenths, so that options tie."""
    rng = np.random.default_rng(seed)
    shares = {}
    for q in range(questions):
        width = int(rng.integers(2, k + 1))
        shares[f"q{q}"] = {
            f"g{g}": tuple((rng.multinomial(10, rng.dirichlet(np.ones(width))) / 10).tolist())
            for g in range(groups)
            if g == q % groups or rng.random() >= missing
        }
    return shares


def tables(metric, shares):
    """What every order adds to each group's score, by question: (orders, groups)."""
    groups = sorted({g for by in shares.values() for g in by})
    n = {g: sum(g in by for by in shares.values()) for g in groups}
    out = []
    for by in shares.values():
        orders = ranking.all_orders(len(next(iter(by.values()))))
        table = np.zeros((len(orders), len(groups)))
        for j, g in enumerate(groups):
            if g in by:
                table[:, j] = [ranking.score(metric, o, by[g]) / n[g] for o in orders.tolist()]
        out.append(table)
    return out


def worst_by_lp(metric, shares):
    """Maximise t over distributions of all orders, all questions in one program."""
    from scipy.optimize import linprog

    parts = tables(metric, shares)
    groups = parts[0].shape[1]
    size = sum(len(t) for t in parts)
    equal = np.zeros((len(parts), size + 1))
    at = 0
    for row, table in zip(equal, parts, strict=True):
        row[at : at + len(table)] = 1
        at += len(table)
    result = linprog(
        c=np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-np.vstack(parts).T, np.ones((groups, 1))]),
        b_ub=np.zeros(groups),
        A_eq=equal,
        b_eq=np.ones(len(parts)),
        bounds=[(0, 1)] * size + [(None, None)],
    )
    return -result.fun


def test_opposed_groups_by_hand():
    """ABC against CBA: borda of any order is 1/2 on average, and a fair coin serves both 1/2."""
    for metric in ("borda", "kendall"):
        assert optimum_average(metric, OPPOSED).average == pytest.approx(0.5)
        worst = optimum_worst(metric, OPPOSED)
        assert worst.group_scores == pytest.approx({"a": 0.5, "b": 0.5})
        assert worst.is_bound
        assert worst.gap <= GAP
    # Printing A first serves a, C first serves b: only a coin serves both.
    coin = optimum_worst("binary", OPPOSED)
    assert coin.worst == pytest.approx(0.5)
    first = {order[0]: p for order, p in coin.orders["q"].items()}
    assert first == pytest.approx({0: 0.5, 2: 0.5})
    assert coin.answers == {}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(ORDER_METRICS))
def test_average_against_brute_force(seed, metric):
    shares = population(3, 4, seed, 0.3, 4)
    best = sum(t.mean(1).max() for t in tables(metric, shares))
    got = optimum_average(metric, shares)
    assert got.average == pytest.approx(best)
    assert got.is_bound
    assert got.gap == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(ORDER_METRICS))
def test_worst_group_against_one_linear_program(seed, metric):
    shares = population(4, 4, seed, 0.3, 4)
    got = optimum_worst(metric, shares)
    truth = worst_by_lp(metric, shares)
    assert got.gap < GAP
    assert truth - got.gap - 1e-9 <= got.worst <= truth + 1e-9
    for orders in got.orders.values():
        assert sum(orders.values()) == pytest.approx(1.0)


def test_references_of_a_population():
    shares = population(4, 12, 1, 0.2, 5)
    for metric in ORDER_METRICS:
        got = references(metric, shares)
        assert list(got) == ["uniform", "mean_of_groups", "optimum_average", "optimum_worst"]
        assert all(got["optimum_average"].average >= a.average - 1e-9 for a in got.values())
        assert all(got["optimum_worst"].worst >= a.worst - GAP for a in got.values())
        again = references(metric, dict(reversed(shares.items())))
        assert again == got


def test_uniform_and_mean_answerers():
    shares = {"q": {"a": (0.5, 0.5, 0.0), "b": (0.1, 0.2, 0.7)}, "r": {"a": (0.2, 0.8)}}
    got = uniform_answerer("binary", shares).scores
    assert got == {"q": {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}, "r": {"a": 0.5}}
    assert uniform_answerer("borda", shares).average == 0.5
    mean = mean_of_groups_answerer("borda", shares)  # means .3 .35 .35 and .2 .8
    assert mean.orders == {"q": {(1, 2, 0): 1.0}, "r": {(1, 0): 1.0}}
    assert mean.gap is None
    assert not mean.is_bound


def test_what_is_searched_for():
    rng = np.random.default_rng(0)
    eight = {"q": {g: tuple(rng.dirichlet(np.ones(8)).tolist()) for g in "ab"}}
    with pytest.raises(UndefinedScore, match="8 options under kendall"):
        optimum_average("kendall", eight)
    assert uniform_answerer("kendall", eight).average == 0.5
    assert optimum_worst("borda", eight).worst > 0.5
    assert optimum_average("binary", eight).average in (0.5, 1.0)
    seven = {"q": {g: tuple(rng.dirichlet(np.ones(7)).tolist()) for g in "abc"}}
    best = max(
        np.mean([ranking.score("kendall", o, y) for y in seven["q"].values()])
        for o in itertools.permutations(range(7))
    )
    assert optimum_average("kendall", seven).average == pytest.approx(best)


def test_bad_shares_name_the_question():
    with pytest.raises(DataError, match="question 'q': group 'a'"):
        optimum_average("borda", {"q": {"a": (0.2, 0.2)}})
    with pytest.raises(DataError, match="'q': groups have different"):
        optimum_average("borda", {"q": {"a": (0.2, 0.8), "b": (0.2, 0.3, 0.5)}})
    with pytest.raises(DataError, match="no question"):
        optimum_average("borda", {"q": {}})
