"""Intervals against tables, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedalign.metrics import fairness
from fedalign.metrics.intervals import (
    bootstrap_difference,
    bootstrap_questions,
    paired_difference,
    resample_counts,
    seed_interval,
    wilson,
)


def test_t_interval_by_the_table():
    """Values 1, 2, 3: mean 2, standard error 1/sqrt 3, t(2, .975) = 4.303."""
    got = seed_interval([1.0, 2.0, 3.0])
    assert got.centre == 2.0
    assert got.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert got.low == pytest.approx(4.0 - got.high)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.6]])
def test_fewer_than_three_seeds_have_no_interval(values):
    assert seed_interval(values) is None


def test_paired_difference_removes_what_the_seeds_share():
    a = {1: 0.80, 2: 0.70, 3: 0.60}
    b = {3: 0.58, 1: 0.78, 2: 0.68}
    got = paired_difference(a, b)
    assert got.centre == pytest.approx(0.02)
    assert got.high - got.low == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"seeds \[4\]"):
        paired_difference({1: 0.5, 4: 0.5}, {1: 0.5})


def test_wilson_by_scipy_and_at_the_ends():
    from scipy.stats import binomtest

    for k, n in [(0, 10), (3, 10), (10, 10), (1, 1000), (450, 700)]:
        got, want = wilson(k, n), binomtest(k, n).proportion_ci(0.95, "wilson")
        assert (got.low, got.high) == (pytest.approx(want.low), pytest.approx(want.high))
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_rate(k, n):
    with pytest.raises(ValueError, match="no rate"):
        wilson(k, n)


def scores(questions: int, seed: int, mean: float = 0.7):
    rng = np.random.default_rng(seed)
    return {
        f"q{i}": {g: float(np.clip(rng.normal(mean, 0.1), 0, 1)) for g in "abc"}
        for i in range(questions)
    }


def test_bootstrap_centres_are_the_plain_statistics():
    data = scores(40, 0)
    data["q0"].pop("b")
    got = bootstrap_questions(data, seed=1)
    means = fairness.group_means(data)
    for name in ("average", "worst", "gap", "std", "worst_k20"):
        assert got[name].centre == pytest.approx(fairness.STATISTICS[name](means))
    assert got["fairness_index"].centre == pytest.approx(fairness.fairness_index(data, "abc").value)
    for g in "abc":
        assert got[f"group/{g}/score"].centre == pytest.approx(means[g])
    assert all(i.low <= i.high for i in got.values())


def test_bootstrap_of_one_group_is_near_the_normal_interval():
    data = scores(400, 2)
    x = np.array([s["a"] for s in data.values()])
    got = bootstrap_questions(data, seed=3)["group/a/score"]
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
    assert got.low == pytest.approx(x.mean() - half, abs=0.15 * half)
    assert got.high == pytest.approx(x.mean() + half, abs=0.15 * half)


def test_bootstrap_is_keyed():
    data = scores(20, 4)
    assert bootstrap_questions(data, seed=1) == bootstrap_questions(data, seed=1)
    assert bootstrap_questions(data, seed=1) != bootstrap_questions(data, seed=2)
    assert (resample_counts(20, 50, 1).sum(1) == 20).all()


def test_differences_use_the_same_resample():
    """A constant lead of .05 on every question has an interval of width zero."""
    a = scores(30, 5, 0.6)
    b = {q: {g: s - 0.05 for g, s in x.items()} for q, x in a.items()}
    got = bootstrap_difference(a, b, seed=1)
    for name in ("average", "worst", "group/c/score"):
        assert got[name].centre == pytest.approx(0.05)
        assert got[name].high - got[name].low == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="same questions"):
        bootstrap_difference(a, {q: x for q, x in b.items() if q != "q1"}, seed=1)


def test_what_cannot_be_had_has_no_key():
    """A group with one question of thirty is missing from a third of the draws."""
    data = {f"q{i}": {"a": 0.5 + i / 100} for i in range(30)}
    data["q3"]["b"] = 0.9
    got = bootstrap_questions(data, seed=1)
    assert "group/a/score" in got
    assert "group/b/score" not in got
    assert "worst" not in got


def test_nan_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_questions({"q": {"a": math.nan}}, seed=1)
    with pytest.raises(ValueError, match="not finite"):
        seed_interval([0.1, math.nan, 0.3])
    with pytest.raises(ValueError, match="no question"):
        bootstrap_questions({}, seed=1)
    with pytest.raises(ValueError, match="level"):
        seed_interval([1, 2, 3], 95)
