"""Weights of groups in reward federation: history of the round before, by hand and in general."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.aggregation.adaptive import softmax_weights
from fedalign.aggregation.records import RuleState, WeightSettings
from fedalign.aggregation.reward_weights import BY_HISTORY, cold_start, group_weights, observe
from fedalign.config import REWARD_RULES

FREE = WeightSettings(temperature=0.1, floor=0.0, ceiling=1e6, decay=0.8)
NAMES = ("a", "b", "c", "d")

some_scores = st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1), min_size=1)


def start(scores: dict[str, float], settings: WeightSettings = FREE) -> RuleState:
    return cold_start(settings, scores, list(scores))


def weights(rule, state, groups=("a", "b"), settings=FREE, round_=1):
    return group_weights(rule, settings, state, groups, round_)[1]


@pytest.mark.parametrize("rule", ["literal", "scaled", "reweighted"])
def test_softmax_by_hand(rule):
    """h = (.9, .8), T = .1: ratio e."""
    got = weights(rule, start({"a": 0.9, "b": 0.8}))
    assert got == pytest.approx({"a": 1 / (1 + math.e), "b": math.e / (1 + math.e)})


@pytest.mark.parametrize("rule", sorted(set(REWARD_RULES) - set(BY_HISTORY)))
def test_other_rules_start_uniform(rule):
    assert weights(rule, start({"a": 0.9, "b": 0.1})) == pytest.approx({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("rule", REWARD_RULES)
def test_equal_history_gives_uniform_weights(rule):
    state = start(dict.fromkeys(NAMES, 0.37))
    state = observe(rule, FREE, state, dict.fromkeys(NAMES, 0.37), NAMES, 1)
    assert weights(rule, state, NAMES, round_=2) == pytest.approx(dict.fromkeys(NAMES, 0.25))


def test_history_is_that_of_the_round_before():
    """decay .8: .8 * .5 + .2 * 1 = .6; the weights of a round do not see its own rewards."""
    state = start({"a": 0.5, "b": 0.5})
    before = weights("reweighted", state, round_=1)
    state = observe("reweighted", FREE, state, {"a": 1.0, "b": 0.5}, ("a", "b"), 1)
    assert before == pytest.approx({"a": 0.5, "b": 0.5})
    assert state.history["a"].value == pytest.approx(0.6)
    assert weights("reweighted", state, round_=2)["b"] == pytest.approx(math.e / (1 + math.e))


def test_an_absent_group_keeps_its_history_bit_for_bit():
    state = start({"a": 0.1 + 0.2, "b": 0.5})
    after = observe("reweighted", FREE, state, {"b": 0.9}, ("a", "b"), 1)
    assert after.history["a"].value == 0.1 + 0.2
    assert after.history["a"].rounds_since_seen == 1
    assert after.history["b"].rounds_since_seen == 0


def test_a_group_without_history_has_an_equal_share():
    """Of three groups b is new: 1/3; a and c share the other two thirds by softmax."""
    got = weights("reweighted", start({"a": 0.9, "c": 0.8}), ("a", "b", "c"))
    assert got["b"] == pytest.approx(1 / 3)
    assert got["c"] == pytest.approx(2 / 3 * math.e / (1 + math.e))
    assert weights("literal", RuleState(), ("a", "b")) == {"a": 0.5, "b": 0.5}


# --- multiplicative -----------------------------------------------------------------------------


def test_multiplicative_by_hand():
    """Start .5, .5; step .1; rewards .2 and .7: factors exp(.08) and exp(.03)."""
    settings = WeightSettings(step=0.1, floor=0.0, ceiling=1e6)
    state = observe(
        "multiplicative", settings, start({"a": 0.2, "b": 0.7}), {"a": 0.2, "b": 0.7}, "ab", 1
    )
    got = weights("multiplicative", state, settings=settings, round_=2)
    assert got["a"] == pytest.approx(math.exp(0.08) / (math.exp(0.08) + math.exp(0.03)))
    again = observe("multiplicative", settings, state, {"a": 0.2, "b": 0.7}, "ab", 2)
    assert again.iterate["a"] == pytest.approx(1 / (1 + math.exp(-0.10)))


def test_an_absent_group_neither_gains_nor_loses():
    settings = WeightSettings(step=1.0, floor=0.0, ceiling=1e6)
    state = start(dict.fromkeys("abc", 0.5))
    after = observe("multiplicative", settings, state, {"a": 0.0, "b": 0.5}, "abc", 1)
    assert after.iterate["c"] == pytest.approx(1 / 3)
    assert after.iterate["a"] == pytest.approx(2 / 3 / (1 + math.exp(-0.5)))


def test_a_weight_that_underflowed_can_return():
    settings = WeightSettings(step=1000.0, floor=0.0, ceiling=1e6)
    state = observe("multiplicative", settings, start(dict.fromkeys("abc", 0.5)),
                    {"a": 0.0, "b": 0.0, "c": 1.0}, "abc", 1)  # fmt: skip
    assert state.iterate["c"] == 0.0
    for round_ in range(2, 5):
        state = observe("multiplicative", settings, state, {"a": 1.0, "b": 1.0, "c": 0.0}, "abc",
                        round_)  # fmt: skip
    assert state.iterate["c"] > 0.5


def test_only_multiplicative_has_an_iterate():
    for rule in set(REWARD_RULES) - {"multiplicative"}:
        state = observe(rule, FREE, start({"a": 0.1, "b": 0.7}), {"a": 0.1, "b": 0.7}, "ab", 1)
        assert state.iterate == {}


# --- placebo ------------------------------------------------------------------------------------


def test_placebo_has_the_same_weights_and_other_owners():
    state = start({"a": 0.9, "b": 0.6, "c": 0.3, "d": 0.1})
    real = weights("literal", state, NAMES)
    seen = []
    for round_ in range(1, 400):
        got = weights("placebo", state, NAMES, round_=round_)
        assert sorted(got.values()) == pytest.approx(sorted(real.values()))
        seen.append(got["d"])
    assert weights("placebo", state, NAMES, round_=7) == weights("placebo", state, NAMES, round_=7)
    assert sum(seen) / len(seen) == pytest.approx(0.25, abs=0.05)


def test_placebo_keeps_the_true_history():
    scores = {"a": 0.9, "b": 0.2}
    one, two = (observe(r, FREE, start(scores), scores, "ab", 1) for r in ("placebo", "literal"))
    assert one == two


# --- invariants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", REWARD_RULES)
@given(scores=some_scores, later=some_scores, floor=st.floats(0, 1), ceiling=st.floats(1, 6))
def test_weights_are_bounded_and_sum_to_one(rule, scores, later, floor, ceiling):
    settings = WeightSettings(temperature=0.05, floor=floor, ceiling=ceiling, step=3.0)
    state = cold_start(settings, scores, NAMES)
    state = observe(rule, settings, state, later, NAMES, 1)
    state, got = group_weights(rule, settings, state, NAMES, 2)
    assert set(got) == set(NAMES)
    assert math.fsum(got.values()) == pytest.approx(1.0)
    assert min(got.values()) >= floor / 4 - 1e-9
    assert max(got.values()) <= min(ceiling / 4, 0.625) + 1e-9
    assert RuleState.from_dict(state.to_dict()) == state


@pytest.mark.parametrize("rule", sorted(set(REWARD_RULES) - {"placebo"}))
@given(values=st.lists(st.floats(0, 1), min_size=4, max_size=4), order=st.permutations(NAMES))
def test_renaming_groups_renames_their_weights(rule, values, order):
    def after(names):
        scores = dict(zip(names, values, strict=True))
        state = observe(rule, FREE, start(scores), scores, names, 1)
        return weights(rule, state, names, round_=2)

    plain, renamed = after(NAMES), after(order)
    for old, new in zip(NAMES, order, strict=True):
        assert renamed[new] == pytest.approx(plain[old], abs=1e-12)


@given(some_scores)
def test_free_bounds_give_the_published_softmax_up_to_the_cap(scores):
    got = weights("reweighted", start(scores), list(scores))
    top = max(1 - s for s in scores.values())
    mass = {g: math.exp((1 - s - top) / 0.1) for g, s in scores.items()}
    published = {g: m / sum(mass.values()) for g, m in mass.items()}
    if max(published.values()) <= (1 + 1 / len(scores)) / 2:
        assert got == pytest.approx(published)
    assert got == softmax_weights({g: 1 - s for g, s in scores.items()}, FREE)


# --- errors -------------------------------------------------------------------------------------


def test_what_is_refused():
    state = start({"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="'median'"):
        weights("median", state)
    with pytest.raises(ValueError, match="each named once"):
        weights("mean", state, ("a", "a"))
    with pytest.raises(ValueError, match="each named once"):
        weights("mean", state, ())
    with pytest.raises(ValueError, match="not enrolled"):
        observe("mean", FREE, state, {"z": 0.5}, "ab", 1)
    with pytest.raises(ValueError, match="no group is present"):
        observe("mean", FREE, state, {}, "ab", 1)
    with pytest.raises(ValueError, match="score is nan"):
        observe("mean", FREE, state, {"a": float("nan")}, "ab", 1)
    with pytest.raises(ValueError, match="step"):
        observe("multiplicative", WeightSettings(step=0.0), state, {"a": 0.5}, "ab", 1)
