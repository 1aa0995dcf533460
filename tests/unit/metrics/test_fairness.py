"""Fairness numbers, worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.metrics import fairness as f

REWARDS = {"a": 0.9, "b": 0.8, "c": 0.85, "d": 0.6}


def test_by_hand():
    """Mean .7875; deviations .1125, .0125, .0625, -.1875: variance .0131..., Jain .980."""
    assert f.average(REWARDS) == pytest.approx(0.7875)
    assert f.worst(REWARDS) == 0.6
    assert f.worst_group(REWARDS) == "d"
    assert f.gap(REWARDS) == pytest.approx(0.3)
    variance = (0.1125**2 + 0.0125**2 + 0.0625**2 + 0.1875**2) / 4
    assert f.std(REWARDS) == pytest.approx(math.sqrt(variance))
    assert f.cov(REWARDS) == pytest.approx(math.sqrt(variance) / 0.7875)
    assert f.jain(REWARDS) == pytest.approx(0.980, abs=5e-4)
    assert f.jain(REWARDS) == pytest.approx(1 / (1 + variance / 0.7875**2))
    pairs = 2 * (0.1 + 0.05 + 0.3 + 0.05 + 0.2 + 0.25)
    assert f.gini(REWARDS) == pytest.approx(pairs / (2 * 16 * 0.7875))


def test_the_zero_of_the_score_matters():
    """The same rewards rescaled from [.1674, 1] to [0, 1] have Jain .967."""
    low = 1 - math.sqrt(math.log(2))
    rescaled = {g: (x - low) / (1 - low) for g, x in REWARDS.items()}
    assert f.jain(rescaled) == pytest.approx(0.967, abs=5e-4)


def test_worst_k20_takes_the_ceiling():
    ten = {f"g{i}": i / 10 for i in range(10)}
    assert f.worst_k(ten) == pytest.approx(0.05)
    assert f.worst_k({**ten, "h": 0.95}) == pytest.approx((0 + 0.1 + 0.2) / 3)
    assert f.worst_k(REWARDS) == 0.6
    assert f.worst_k(REWARDS, 1.0) == pytest.approx(0.7875)


def test_ties_for_the_worst_go_by_name():
    assert f.worst_group({"b": 0.1, "a": 0.1, "c": 0.5}) == "a"


def test_fairness_index_by_hand():
    """Question 1: (1, 1) gives 1. Question 2: (1, 0) gives 1/2. Question 3 lacks a group."""
    scores = {"q1": {"a": 1.0, "b": 1.0}, "q2": {"a": 1.0, "b": 0.0}, "q3": {"a": 0.2}}
    got = f.fairness_index(scores, ["a", "b"])
    assert (got.value, got.questions, got.left_out) == (pytest.approx(0.75), 2, 1)
    only_a = f.fairness_index(scores, ["a"])
    assert (only_a.value, only_a.questions) == (1.0, 3)


def test_fairness_index_is_per_question_not_on_means():
    scores = {"q1": {"a": 1.0, "b": 0.5}, "q2": {"a": 0.5, "b": 1.0}}
    assert f.jain(f.group_means(scores)) == pytest.approx(1.0)
    assert f.fairness_index(scores, "ab").value == pytest.approx(0.9)


def test_equal_and_bad_is_still_one():
    assert f.fairness_index({"q": {"a": 0.01, "b": 0.01}}, "ab").value == pytest.approx(1.0)


def test_no_usable_question_gives_a_reason_and_no_value():
    got = f.fairness_index({"q1": {"a": 1.0}, "q2": {"b": 1.0}}, ["a", "b"])
    assert got.value is None
    assert "all groups" in got.reason
    got = f.fairness_index({"q1": {"a": 0.0, "b": 0.0}}, ["a", "b"])
    assert got.value is None
    assert "every score is 0" in got.reason


def test_all_zero_ratios_are_none():
    zero = {"a": 0.0, "b": 0.0}
    assert (f.jain(zero), f.cov(zero), f.gini(zero)) == (None, None, None)


@pytest.mark.parametrize("name", f.STATISTICS)
def test_nan_and_nobody_are_errors(name):
    with pytest.raises(ValueError, match="group 'b' has score nan"):
        f.STATISTICS[name]({"a": 0.5, "b": math.nan})
    with pytest.raises(ValueError, match="no group"):
        f.STATISTICS[name]({})


def test_negative_scores_have_no_ratio():
    for ratio in (f.jain, f.cov, f.gini):
        with pytest.raises(ValueError, match="not negative"):
            ratio({"a": -0.1, "b": 0.5})
    with pytest.raises(ValueError, match="question 'q': group 'a'"):
        f.fairness_index({"q": {"a": -0.1, "b": 0.5}}, "ab")
    with pytest.raises(ValueError, match="question 'q': group 'b'"):
        f.fairness_index({"q": {"a": 0.1, "b": math.nan}}, "ab")


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 1), min_size=1))
def test_ranges(scores):
    n = len(scores)
    assert f.worst(scores) <= f.worst_k(scores) + 1e-12
    assert f.worst_k(scores) <= f.average(scores) + 1e-12
    if max(scores.values()) > 0:
        assert 1 / n - 1e-9 <= f.jain(scores) <= 1.0
        assert 0 <= f.gini(scores) <= 1 - 1 / n + 1e-9
    if max(scores.values()) > 1e-100:
        assert -1e-9 <= f.cov(scores) <= math.sqrt(n - 1) + 1e-9
        assert f.jain(scores) == pytest.approx(1 / (1 + f.cov(scores) ** 2), rel=1e-6)
