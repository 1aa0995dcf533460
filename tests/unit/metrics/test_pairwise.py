"""The attainable optimum for pairs, against hand-worked numbers and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.data.records import Pair
from fedalign.metrics import pairwise
from fedalign.metrics.fairness import group_means

TABLE = {"c1": {"a": 1.0, "b": 0.0}, "c2": {"a": 0.9, "b": 0.6}}


def test_votes_do_not_depend_on_which_response_is_called_chosen() -> None:
    one = Pair("1", "p", "x", "y", "g", 0.8)
    turned = Pair("2", "p", "y", "x", "h", 0.2)
    assert pairwise.votes([one, turned]) == {one.comparison: {"g": 0.8, "h": 0.8}}


def test_a_comparison_made_twice_is_averaged() -> None:
    pairs = [Pair("1", "p", "x", "y", "g", 1.0), Pair("2", "p", "y", "x", "g", 1.0)]
    assert list(pairwise.votes(pairs).values()) == [{"g": 0.5}]


def test_hand_worked() -> None:
    # c1 is a tie between the groups; c2 both prefer the first: a .9, b .6.
    assert group_means(pairwise.optimum_average(TABLE)) == pytest.approx({"a": 0.7, "b": 0.55})
    # Worst group: x2 = 1, and x1 with (x1 + .9) / 2 = (1 - x1 + .6) / 2, so x1 = .35: both .625.
    worst = group_means(pairwise.optimum_worst(TABLE))
    assert worst == pytest.approx({"a": 0.625, "b": 0.625})


def test_no_shared_comparison() -> None:
    assert not pairwise.shares_comparisons({"c1": {"a": 1.0}, "c2": {"b": 1.0}})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=5))
def test_no_deterministic_answer_is_better(shares: list[list[float]]) -> None:
    table = {f"c{i}": {"a": a, "b": b} for i, (a, b) in enumerate(shares)}
    best_average = np.mean(list(group_means(pairwise.optimum_average(table)).values()))
    best_worst = min(group_means(pairwise.optimum_worst(table)).values())
    for answer in itertools.product((0.0, 1.0), repeat=len(shares)):
        means = [
            np.mean([x * s[g] + (1 - x) * (1 - s[g]) for x, s in zip(answer, shares, strict=True)])
            for g in (0, 1)
        ]
        assert np.mean(means) <= best_average + 1e-9
        assert min(means) <= best_worst + 1e-7
