"""The closed-form optimum: by hand, against a search, and what must hold for any rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.rewards.optimum import (
    LEAST_REST,
    closed,
    closed_share,
    divergence,
    kl_divergence,
    optimum,
    with_rest,
)

unit = st.floats(0.0, 1.0)


@st.composite
def problems(draw: st.DrawFn):
    """Log-probabilities of M answers, their rewards, kl and the reward of the rest."""
    m = draw(st.integers(1, 6))
    mass = draw(st.lists(st.floats(0.01, 1.0), min_size=m + 1, max_size=m + 1))
    p = np.array(mass) / sum(mass)
    rewards = np.array(draw(st.lists(unit, min_size=m, max_size=m)))
    return np.log(p[:-1]), rewards, draw(st.floats(0.05, 2.0)), draw(unit)


def test_by_hand():
    """Base (1/2, 1/4, rest 1/4), rewards (0, kl ln 4, rest 0): weights 1/2, 1, 1/4."""
    got = optimum(np.log([0.5, 0.25]), [0.0, 0.3 * math.log(4)], 0.3, malformed=0.0)
    assert got == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    # Corrected, the answers lose their base factor: 1, 4 and the rest's 1/4.
    got = optimum(np.log([0.5, 0.25]), [0.0, 0.3 * math.log(4)], 0.3, malformed=0.0, corrected=True)
    assert got == pytest.approx(np.array([1, 4, 0.25]) / 5.25)
    # The rest can be worth something too: its weight 1/4 * 4.
    got = optimum(np.log([0.5, 0.25]), [0.0, 0.0], 0.3, malformed=0.3 * math.log(4))
    assert got == pytest.approx(np.array([0.5, 0.25, 1.0]) / 1.75)


@given(problems(), st.integers(0, 1000))
def test_nothing_is_better(problem, seed):
    """E[R] - kl KL(pi || base) is largest at the optimum, and its value is kl ln Z."""
    logps, rewards, kl, malformed = problem
    base, best = with_rest(logps), optimum(logps, rewards, kl, malformed=malformed)
    r = np.append(rewards, malformed)

    def value(p):
        return float(p @ r) - kl * kl_divergence(p, base)

    assert value(best) == pytest.approx(kl * math.log(float(base @ np.exp(r / kl))), abs=1e-9)
    others = np.random.default_rng(seed).dirichlet(np.ones(len(base)), 20)
    for other in (*others, *(0.9 * best + 0.1 * others), base):
        assert value(other) <= value(best) + 1e-9


@given(problems())
def test_correction_takes_the_reference_off(problem):
    logps, rewards, kl, malformed = problem
    direct = optimum(logps, rewards - kl * logps, kl, malformed=malformed)
    assert optimum(logps, rewards, kl, malformed=malformed, corrected=True) == pytest.approx(direct)


@given(problems(), st.floats(-3, 3))
def test_a_constant_reward_changes_nothing(problem, c):
    logps, rewards, kl, malformed = problem
    shifted = optimum(logps, rewards + c, kl, malformed=malformed + c)
    assert shifted == pytest.approx(optimum(logps, rewards, kl, malformed=malformed))
    assert optimum(logps, np.full(len(logps), c), kl, malformed=c) == pytest.approx(
        with_rest(logps)
    )


@given(problems())
def test_closed(problem):
    logps, rewards, kl, malformed = problem
    base, best = with_rest(logps), optimum(logps, rewards, kl, malformed=malformed)
    if divergence(base, best) > 1e-12:
        assert closed(base, best, best) == 1.0
        assert closed(base, best, base) == 0.0
        assert 0.0 < closed(base, best, 0.5 * (base + best)) < 1.0
    assert closed(base, base, best) is None


def test_closed_of_means():
    assert closed_share(0.2, 0.05) == pytest.approx(0.75)
    assert closed_share(0.2, 0.3) == pytest.approx(-0.5)
    assert closed_share(0.0, 0.0) is None


def test_divergences_by_hand():
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    assert kl_divergence(np.array([0.5, 0.5]), np.array([0.25, 0.75])) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )
    assert kl_divergence(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == math.inf
    assert kl_divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(math.log(2))


def test_a_sum_above_one_by_rounding_leaves_the_least_rest():
    p = with_rest(np.log([0.5, 0.5 + 2e-7]))
    assert p[-1] == pytest.approx(LEAST_REST, rel=1e-3)
    assert p.sum() == pytest.approx(1.0)


def test_an_answer_that_the_base_never_gives_stays_impossible():
    got = optimum([math.log(0.5), -math.inf], [0.0, 1.0], 0.01, malformed=0.0)
    assert got[1] == 0.0


@pytest.mark.parametrize(
    ("logps", "rewards", "kl", "malformed"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.1, 0.0),
        ([], [], 0.1, 0.0),
        ([math.nan], [0.0], 0.1, 0.0),
        ([-1.0], [0.0, 1.0], 0.1, 0.0),
        ([-1.0], [math.nan], 0.1, 0.0),
        ([-1.0], [0.0], 0.0, 0.0),
        ([-1.0], [0.0], 0.1, math.inf),
    ],
)
def test_bad_input_is_an_error(logps, rewards, kl, malformed):
    with pytest.raises(ValueError, match="must be"):
        optimum(logps, rewards, kl, malformed=malformed)
