"""Rules over group rewards: hand-worked numbers, limits, derivatives, absent groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedalign.aggregation.group_rewards import (
    Combined,
    adaptive_branch,
    combine,
    kl_factor,
    mixture_scale,
    reward_index,
)
from fedalign.config import REWARD_RULES

BETWEEN = ("mean", "min", "max", "reweighted", "soft-min", "mixture", "multiplicative", "mean-kl-n")
"""Rules between the least and the largest reward, with derivatives summing to 1."""
NAN = float("nan")


def run(rule: str, rewards, weights=None, adaptive=True, sharpness=-10.0, log_scale=1.0):
    r = np.asarray(rewards, dtype=float)
    if r.ndim == 1:
        r = r[:, None]
    a = np.full(len(r), 1 / len(r)) if weights is None else np.asarray(weights, dtype=float)
    return combine(rule, r, a, adaptive=adaptive, sharpness=sharpness, log_scale=log_scale)


def value(rule: str, rewards, weights=None, **kw) -> float:
    return float(run(rule, rewards, weights, **kw).values[0])


@st.composite
def cases(draw, holes: bool = False):
    """Return rewards (G, N), each column with some reward, and weights (G,)."""
    groups, n = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    unit = st.floats(0, 1, width=32)
    r = draw(hnp.arrays(np.float64, (groups, n), elements=unit))
    if holes:
        mask = draw(hnp.arrays(np.bool_, (groups, n)))
        mask[draw(st.integers(0, groups - 1))] = False
        r[mask] = np.nan
    raw = draw(hnp.arrays(np.float64, groups, elements=st.floats(0.01, 1)))
    return r, raw / raw.sum()


# --- by hand ------------------------------------------------------------------------------------


def test_simple_rules_by_hand():
    r = [0.2, 0.6, 1.0]
    assert value("mean", r) == pytest.approx(0.6)
    assert value("mean-kl-n", r) == pytest.approx(0.6)
    assert value("min", r) == 0.2
    assert value("max", r) == 1.0
    assert value("mean-over-n", r) == pytest.approx(0.2)
    assert value("reweighted", r, [0.5, 0.25, 0.25]) == pytest.approx(0.1 + 0.15 + 0.25)


def test_literal_and_scaled_by_hand():
    """Two groups, a = (.75, .25), r = (.4, .8): exponents .3 and .2.

    exp(.3) = 1.349859, exp(.2) = 1.221403, mean 1.285631, log .251250; times two .502499.
    The weighted mean is .3 + .2 = .5.
    """
    assert value("literal", [0.4, 0.8], [0.75, 0.25]) == pytest.approx(0.251250, abs=1e-6)
    assert value("placebo", [0.4, 0.8], [0.75, 0.25]) == pytest.approx(0.251250, abs=1e-6)
    assert value("scaled", [0.4, 0.8], [0.75, 0.25]) == pytest.approx(0.502499, abs=1e-6)
    assert value("reweighted", [0.4, 0.8], [0.75, 0.25]) == pytest.approx(0.5)


def test_the_scale_artefact_by_hand():
    """Eight groups at reward .86: literal gives about .86 / 8 = .1075, and 1/8 of the slope."""
    got = run("literal", np.full((8, 3), 0.86))
    assert got.values == pytest.approx(np.full(3, 0.1075))
    assert got.scale == pytest.approx(1 / 8)
    assert run("mean-over-n", np.full((8, 3), 0.86)).values == pytest.approx(np.full(3, 0.1075))
    assert run("scaled", np.full((8, 3), 0.86)).scale == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["literal", "scaled", "placebo"])
def test_the_fair_branch_is_the_plain_mean(rule):
    got = run(rule, [0.1, 0.5], [0.9, 0.1], adaptive=False)
    assert got.values[0] == pytest.approx(0.3)
    assert got.influence == pytest.approx([0.5, 0.5])
    assert got.scale == pytest.approx(1.0)


def test_only_the_switched_rules_look_at_the_branch():
    for rule in set(REWARD_RULES) - {"literal", "scaled", "placebo"}:
        a, b = (run(rule, [0.1, 0.5], [0.9, 0.1], adaptive=x) for x in (True, False))
        assert a.values == pytest.approx(b.values)


def test_soft_min_by_hand_and_limits():
    """r = (0, 1), k = -1: -log((1 + 1/e) / 2) = .379885."""
    assert value("soft-min", [0.0, 1.0], sharpness=-1.0) == pytest.approx(0.379885, abs=1e-6)
    assert value("soft-min", [0.3, 0.5, 0.9], sharpness=-1e-6) == pytest.approx(1.7 / 3, abs=1e-6)
    assert value("soft-min", [0.3, 0.5, 0.9], sharpness=-1e4) == pytest.approx(0.3, abs=1.2e-4)


def test_mixture_is_the_log_reward_of_the_mean_share():
    """Shares .5 and .0001 under floor .01: mean of .5 and .01 is .255; 1 + ln(.255)/ln(100)."""
    floor = 0.01
    scale = mixture_scale("log", floor)
    assert scale == pytest.approx(math.log(100))
    r = [1 + math.log(max(p, floor)) / scale for p in (0.5, 0.0001)]
    assert value("mixture", r, log_scale=scale) == pytest.approx(1 + math.log(0.255) / scale)
    assert value("mixture", [0.2, 0.6], log_scale=mixture_scale("borda", floor)) == pytest.approx(
        math.log((math.exp(0.2) + math.exp(0.6)) / 2)
    )


def test_ties_share_the_derivative():
    assert run("min", [0.2, 0.2, 0.9]).influence == pytest.approx([0.5, 0.5, 0.0])
    assert run("max", [0.2, 0.9, 0.9]).influence == pytest.approx([0.0, 0.5, 0.5])


def test_kl_factor():
    assert kl_factor("mean-kl-n", 8) == 8.0
    assert {kl_factor(rule, 8) for rule in REWARD_RULES if rule != "mean-kl-n"} == {1.0}


# --- relations between rules --------------------------------------------------------------------


@given(cases())
def test_uniform_weights_make_reweighted_the_mean(case):
    r, _ = case
    assert run("reweighted", r).values == pytest.approx(run("mean", r).values, abs=1e-12)


@given(cases(), st.floats(1e-3, 1.0))
def test_scaled_is_reweighted_to_second_order(case, size):
    """The difference is n/2 Var_g(a_g r_g) up to third order, so it falls with size squared."""
    r, a = case
    n = len(a)
    small = r * size
    difference = run("scaled", small, a).values - run("reweighted", small, a).values
    second = 0.5 * n * (a[:, None] * small).var(0)
    assert (np.abs(difference - second) <= n * size**3 / 6 + 1e-12).all()


@given(cases())
def test_scaled_is_n_times_literal(case):
    r, a = case
    assert run("scaled", r, a).values == pytest.approx(len(a) * run("literal", r, a).values)


@given(cases())
def test_literal_counts_about_one_in_n(case):
    """sum_g a_g softmax_g(a r) lies within a factor e of 1/n, since exponents lie in [0, 1]."""
    r, a = case
    n = len(a)
    assert 1 / (math.e * n) - 1e-12 <= run("literal", r, a).scale <= math.e / n + 1e-12


# --- invariants of every rule -------------------------------------------------------------------


@pytest.mark.parametrize("rule", BETWEEN)
@given(case=cases(holes=True))
def test_value_lies_between_the_rewards(rule, case):
    r, a = case
    got = run(rule, r, a, log_scale=4.6)
    assert (np.nanmin(r, 0) - 1e-9 <= got.values).all()
    assert (got.values <= np.nanmax(r, 0) + 1e-9).all()
    assert got.scale == pytest.approx(1.0)


@pytest.mark.parametrize("rule", REWARD_RULES)
@given(case=cases(holes=True), data=st.data())
def test_permuting_groups_permutes_the_influence(rule, case, data):
    r, a = case
    order = list(data.draw(st.permutations(range(len(a)))))
    plain, moved = run(rule, r, a), run(rule, r[order], a[order])
    assert moved.values == pytest.approx(plain.values, abs=1e-9)
    assert moved.influence == pytest.approx(plain.influence[order], abs=1e-9)


@pytest.mark.parametrize("rule", REWARD_RULES)
@given(case=cases(holes=True))
def test_influence_is_a_distribution_and_values_are_finite(rule, case):
    got: Combined = run(rule, *case)
    assert got.influence.sum() == pytest.approx(1.0)
    assert (got.influence >= 0).all()
    assert np.isfinite(got.values).all()
    assert got.scale > 0


@pytest.mark.parametrize("rule", REWARD_RULES)
@pytest.mark.parametrize("adaptive", [True, False])
def test_influence_is_the_derivative(rule, adaptive):
    """Central differences in every entry that a group answered; holes have no derivative."""
    r = np.random.default_rng(3).uniform(0.05, 0.95, size=(4, 6))
    r[1, 2] = r[3, 0] = np.nan
    a = np.array([0.1, 0.4, 0.3, 0.2])
    step = 1e-6

    def at(x):
        return run(rule, x, a, adaptive=adaptive, log_scale=4.6).values

    slopes = np.zeros_like(r)
    for g, i in np.argwhere(~np.isnan(r)):
        up, down = r.copy(), r.copy()
        up[g, i] += step
        down[g, i] -= step
        slopes[g, i] = (at(up)[i] - at(down)[i]) / (2 * step)
    got = run(rule, r, a, adaptive=adaptive, log_scale=4.6)
    assert got.scale == pytest.approx(slopes.sum(0).mean(), rel=1e-6)
    assert got.influence == pytest.approx(slopes.mean(1) / slopes.mean(1).sum(), abs=1e-6)


# --- absent groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", REWARD_RULES)
def test_an_absent_group_is_as_if_it_were_not_there(rule):
    """Never a zero: the rule over the groups that answered, with their weights renormalised."""
    a = np.array([0.2, 0.5, 0.3])
    got = run(rule, [[0.3, 0.3], [0.9, NAN], [0.7, 0.7]], a)
    alone = value(rule, [0.3, 0.7], [0.4, 0.6])
    assert got.values[1] == pytest.approx(alone)
    assert got.values[0] == pytest.approx(value(rule, [0.3, 0.9, 0.7], a))


@pytest.mark.parametrize("rule", REWARD_RULES)
def test_nobody_answered_a_rollout(rule):
    got = run(rule, [[0.3, NAN], [0.9, NAN]], [0.25, 0.75])
    assert np.isnan(got.values).tolist() == [False, True]
    one = run(rule, [0.3, 0.9], [0.25, 0.75])
    assert got.influence == pytest.approx(one.influence)
    assert got.scale == pytest.approx(one.scale)


def test_weights_of_zero_over_those_present_count_equally():
    assert value("reweighted", [0.2, 0.6, NAN], [0.0, 0.0, 1.0]) == pytest.approx(0.4)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"rule": "median"}, "median"),
        ({"rewards": [[NAN], [NAN]]}, "no group answered"),
        ({"rewards": [[0.5], [1.5]]}, "outside"),
        ({"rewards": [[0.5], [math.inf]]}, "outside"),
        ({"rewards": [0.5, 0.5]}, "shape"),
        ({"weights": [0.5, 0.6]}, "simplex"),
        ({"weights": [1.5, -0.5]}, "simplex"),
        ({"weights": [1.0]}, "shape"),
        ({"rule": "soft-min", "sharpness": 0.0}, "sharpness"),
        ({"rule": "mixture", "log_scale": 0.0}, "log_scale"),
    ],
)
def test_what_is_refused(kw, message):
    given_ = {
        "rule": "mean",
        "rewards": [[0.5], [0.5]],
        "weights": [0.5, 0.5],
        "sharpness": -1.0,
        "log_scale": 1.0,
    } | kw
    with pytest.raises(ValueError, match=message):
        combine(
            given_["rule"],
            given_["rewards"],
            given_["weights"],
            adaptive=True,
            sharpness=given_["sharpness"],
            log_scale=given_["log_scale"],
        )


# --- the fairness index and its switch ----------------------------------------------------------


def test_index_by_hand():
    """Question 0: means .5 and .5, index 1.  Question 1: .2 and .6, (.8)^2 / (2 * .4) = .8."""
    r = [[0.4, 0.6, 0.2], [0.5, 0.5, 0.6]]
    assert reward_index(r, [0, 0, 1]) == pytest.approx(0.9)


def test_index_leaves_out_what_cannot_be_compared():
    r = [[0.4, NAN, 0.0, 0.2], [0.4, 0.9, 0.0, NAN]]
    assert reward_index(r, [0, 0, 1, 2]) == pytest.approx(1.0)
    assert reward_index([[NAN], [0.5]], [0]) is None
    assert reward_index([[0.0], [0.0]], [0]) is None


@given(cases())
def test_index_range(case):
    r, _ = case
    index = reward_index(r, list(range(r.shape[1])))
    assert index is None or 1 / len(r) - 1e-9 <= index <= 1.0


def test_the_switch_fires_exactly_at_the_threshold():
    assert not adaptive_branch(0.9, 0.9)
    assert adaptive_branch(np.nextafter(0.9, 0), 0.9)
    assert adaptive_branch(1.0, 1.5)
    assert adaptive_branch(None, 0.9)


# --- the two controls of the scale --------------------------------------------------------------


def test_both_controls_have_one_optimum():
    """On a bandit the optimum is base * exp(R / kl): R / n at kl is R at n kl."""
    r = np.array([[0.9, 0.1, 0.4, 0.6], [0.2, 0.8, 0.5, 0.1], [0.3, 0.3, 0.9, 0.2]])
    base, kl = np.array([0.4, 0.3, 0.2, 0.1]), 0.05

    def optimum(rule):
        x = np.log(base) + run(rule, r).values / (kl * kl_factor(rule, len(r)))
        p = np.exp(x - x.max())
        return p / p.sum()

    assert optimum("mean-over-n") == pytest.approx(optimum("mean-kl-n"), abs=1e-12)
    nearer = np.abs(optimum("mean-over-n") - base).sum()
    assert nearer < 0.5 * np.abs(optimum("mean") - base).sum()
