"""Weight rules: hand-worked numbers and invariants that hold for every rule."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign import config
from fedalign.aggregation import WEIGHT_RULES, adaptive, history
from fedalign.aggregation.records import (
    GroupHistory,
    GroupObservation,
    Observation,
    RuleState,
    WeightSettings,
)

FREE = WeightSettings(floor=0.0, ceiling=1e6)
"""No floor; the ceiling is then (1 + 1/n) / 2."""


def seen(scores: dict[str, float], sizes: dict[str, int] | None = None, round: int = 1):
    sizes = sizes or dict.fromkeys(scores, 10)
    return Observation(round, {g: GroupObservation(True, s, sizes[g]) for g, s in scores.items()})


def weights(rule: str, settings: WeightSettings, scores: dict[str, float], **kw):
    return WEIGHT_RULES[rule](settings, RuleState(), seen(scores, **kw))[1]


def test_the_rules_are_those_of_the_configuration():
    assert tuple(WEIGHT_RULES) == config.WEIGHT_RULES


def test_uniform_and_size_by_hand():
    scores = {"a": 0.9, "b": 0.5, "c": 0.7}
    assert weights("uniform", FREE, scores) == dict.fromkeys("abc", 1 / 3)
    got = weights("size", FREE, scores, sizes={"a": 50, "b": 30, "c": 20})
    assert got == {"a": 0.5, "b": 0.3, "c": 0.2}


def test_size_zero_everywhere_is_an_error():
    with pytest.raises(ValueError, match="size 0"):
        weights("size", FREE, {"a": 0.5}, sizes={"a": 0})


def test_adaptive_by_hand():
    """Shortfalls .1 and .2 at T = .1: ratio e, weights 1/(1+e) and e/(1+e)."""
    got = weights(
        "adaptive", WeightSettings(temperature=0.1, floor=0.0, ceiling=9), {"a": 0.9, "b": 0.8}
    )
    assert got["a"] == pytest.approx(1 / (1 + math.e))
    assert got["b"] == pytest.approx(math.e / (1 + math.e))


def test_adaptive_ceiling_and_floor_by_hand():
    """Three groups, T tiny: ceiling (1 + 1/3) / 2 = 2/3 for the worst, floor .2/3 for the best.

    The middle one keeps the rest: 1 - 2/3 - .0667 = .2667.
    """
    settings = WeightSettings(temperature=1e-6)
    got = weights("adaptive", settings, {"a": 0.9, "b": 0.7, "c": 0.8})
    assert got == pytest.approx({"a": 0.2 / 3, "b": 2 / 3, "c": 1 - 2 / 3 - 0.2 / 3})


def test_worst_splits_ties():
    assert weights("worst", FREE, {"a": 0.4, "b": 0.9, "c": 0.4}) == {"a": 0.5, "b": 0.0, "c": 0.5}


def test_qffl_by_hand():
    """Shortfalls .1, .2, .3: q = 1 gives 1/6, 1/3, 1/2; q = 2 gives 1/14, 4/14, 9/14."""
    scores = {"a": 0.9, "b": 0.8, "c": 0.7}
    free = {"floor": 0.0, "ceiling": 9.0}
    one = weights("qffl", WeightSettings(q=1.0, **free), scores)
    assert one == pytest.approx({"a": 1 / 6, "b": 1 / 3, "c": 1 / 2})
    two = weights("qffl", WeightSettings(q=2.0, **free), scores)
    assert two == pytest.approx({"a": 1 / 14, "b": 4 / 14, "c": 9 / 14})
    assert weights("qffl", WeightSettings(q=0.0), scores) == pytest.approx(
        dict.fromkeys("abc", 1 / 3)
    )


def test_qffl_with_everybody_perfectly_served_is_uniform():
    assert weights("qffl", WeightSettings(), {"a": 1.0, "b": 1.0}) == pytest.approx(
        {"a": 0.5, "b": 0.5}
    )


def test_afl_by_hand():
    """Start .5, .5; step .5 on shortfalls .2, .6 adds .1, .3; projection takes .2 from each."""
    settings = WeightSettings(step=0.5, floor=0.0, ceiling=9.0)
    state, got = WEIGHT_RULES["afl"](settings, RuleState(), seen({"a": 0.8, "b": 0.4}))
    assert got == pytest.approx({"a": 0.4, "b": 0.6})
    assert state.iterate == pytest.approx({"a": 0.4, "b": 0.6})
    state, got = WEIGHT_RULES["afl"](settings, state, seen({"a": 0.8, "b": 0.4}, round=2))
    assert got == pytest.approx({"a": 0.3, "b": 0.7})


def test_afl_groups_come_and_go():
    settings = WeightSettings(step=0.5, floor=0.0, ceiling=9.0)
    state = RuleState(iterate={"a": 0.25, "b": 0.75})
    state, got = WEIGHT_RULES["afl"](settings, state, seen({"a": 0.5, "b": 0.5, "c": 0.5}))
    assert got == pytest.approx({"a": 2 / 3 * 0.25, "b": 2 / 3 * 0.75, "c": 1 / 3})
    state, got = WEIGHT_RULES["afl"](settings, state, seen({"a": 0.5, "c": 0.5}))
    assert set(state.iterate) == {"a", "c"}
    assert got["a"] == pytest.approx((2 / 3 * 0.25) / (2 / 3 * 0.25 + 1 / 3))


def test_placebo_gives_adaptive_weights_to_other_owners_and_uniform_on_average():
    scores = {"a": 0.9, "b": 0.8, "c": 0.6}
    target = weights("adaptive", WeightSettings(), scores)
    drawn = [weights("placebo", WeightSettings(seed=3), scores, round=t) for t in range(1, 401)]
    for got in drawn:
        assert sorted(got.values()) == pytest.approx(sorted(target.values()))
    for g in scores:
        assert sum(d[g] for d in drawn) / len(drawn) == pytest.approx(1 / 3, abs=0.05)
    assert weights("placebo", WeightSettings(seed=3), scores, round=7) == drawn[6]
    state, _ = WEIGHT_RULES["placebo"](WeightSettings(), RuleState(), seen(scores))
    assert {g: h.value for g, h in state.history.items()} == scores


def test_coverage_is_the_present_share_of_the_enrolled_softmax():
    settings = WeightSettings(temperature=0.1)
    state, _ = adaptive.update(settings, RuleState(), seen({"a": 0.9, "b": 0.8}))
    half = Observation(
        2, {"a": GroupObservation(True, 0.9, 1), "b": GroupObservation(False, None, 1)}
    )
    state, got = adaptive.update(settings, state, half)
    assert got == {"a": 1.0}
    assert adaptive.coverage(settings, state, half) == pytest.approx(1 / (1 + math.e))


# ---- invariants

groups = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=9, unique=True)
score = st.floats(0.0, 1.0, allow_nan=False)
settings_ = st.builds(
    WeightSettings,
    temperature=st.floats(1e-4, 10.0),
    decay=st.floats(0.0, 0.99),
    floor=st.floats(0.0, 1.0),
    ceiling=st.floats(1.0, 20.0),
    step=st.floats(1e-3, 5.0),
    q=st.floats(0.0, 5.0),
    seed=st.integers(0, 99),
)


@st.composite
def rounds(draw):
    names = draw(groups)
    out = []
    for t in range(1, draw(st.integers(1, 4)) + 1):
        present = draw(st.sets(st.sampled_from(names), min_size=1))
        silent = draw(st.sets(st.sampled_from(sorted(present))))
        out.append(
            Observation(
                t,
                {
                    g: GroupObservation(
                        g in present,
                        draw(score) if g in present - silent else None,
                        draw(st.integers(1, 1000)),
                        g in silent,
                    )
                    for g in names
                },
            )
        )
    return out


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@given(settings=settings_, run=rounds())
def test_simplex_absence_bounds_and_round_trip(rule, settings, run):
    state = RuleState()
    for observation in run:
        before = state
        state, got = WEIGHT_RULES[rule](settings, state, observation)
        assert set(got) == set(observation.present())
        assert all(math.isfinite(w) and w >= 0 for w in got.values())
        assert math.fsum(got.values()) == pytest.approx(1.0, abs=1e-9)
        for g, o in observation.groups.items():
            if not o.present and g in before.history:
                was, now = before.history[g], state.history[g]
                assert (now.value, now.observed) == (was.value, was.observed)
                assert now.rounds_since_seen == was.rounds_since_seen + 1
            if o.withheld:
                after = state.history.get(g)
                assert (after and after.value) == (
                    before.history[g].value if g in before.history else None
                )
        if rule in ("adaptive", "placebo", "afl", "qffl"):
            n = len(got)
            high = min(settings.ceiling / n, (1 + 1 / n) / 2)
            assert min(got.values()) >= settings.floor / n - 1e-9
            assert max(got.values()) <= high + 1e-9
        again = RuleState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert again == state


@pytest.mark.parametrize("rule", [r for r in WEIGHT_RULES if r != "placebo"])
@given(settings=settings_, run=rounds(), data=st.data())
def test_permutation_equivariant(rule, settings, run, data):
    names = sorted(run[0].groups)
    renamed = dict(zip(names, data.draw(st.permutations(names)), strict=True))
    a = b = RuleState()
    for observation in run:
        other = Observation(
            observation.round, {renamed[g]: o for g, o in observation.groups.items()}
        )
        a, wa = WEIGHT_RULES[rule](settings, a, observation)
        b, wb = WEIGHT_RULES[rule](settings, b, other)
        assert wb == pytest.approx({renamed[g]: w for g, w in wa.items()}, abs=1e-9)


@given(settings=settings_, names=groups, s=score)
def test_equal_history_is_uniform(settings, names, s):
    for rule in ("adaptive", "placebo", "qffl", "worst", "afl"):
        got = weights(rule, settings, dict.fromkeys(names, s))
        assert got == pytest.approx(dict.fromkeys(names, 1 / len(names)), abs=1e-9)


@given(settings=settings_, scores=st.dictionaries(st.text("abcdef", min_size=1), score, min_size=2))
def test_worse_served_never_gets_less(settings, scores):
    for rule in ("adaptive", "qffl", "afl", "worst"):
        got = weights(rule, settings, scores)
        order = sorted(scores, key=lambda g: scores[g])
        for worse, better in pairwise(order):
            assert got[worse] >= got[better] - 1e-12


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5, 1.5, None])
def test_no_bad_score_is_accepted(rule, bad):
    with pytest.raises(ValueError, match="score"):
        weights(rule, WeightSettings(), {"a": 0.5, "b": bad})


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_nobody_present_is_an_error(rule):
    nobody = Observation(1, {"a": GroupObservation(False, None, 3)})
    with pytest.raises(ValueError, match="no group is present"):
        WEIGHT_RULES[rule](WeightSettings(), RuleState(), nobody)


# ---- withheld scores


def silent(scores: dict[str, float | None], round: int = 1):
    return Observation(
        round, {g: GroupObservation(True, s, 10, s is None) for g, s in scores.items()}
    )


def test_a_group_that_never_gave_a_score_counts_as_an_average_one():
    """Shortfalls .1 and .3, neutral .2.

    adaptive at T = .1: e^1 : e^2 : e^3.  q-FFL, q = 1: .1 : .2 : .3.  afl, step .5, from thirds:
    .05, .1, .15 added, .1 taken from each.
    """
    free = {"floor": 0.0, "ceiling": 9.0}
    seen_ = silent({"a": 0.9, "b": None, "c": 0.7})
    third, e = 1 / 3, math.e
    expected = {
        "adaptive": (1 / (1 + e + e * e), e / (1 + e + e * e), e * e / (1 + e + e * e)),
        "qffl": (1 / 6, 1 / 3, 1 / 2),
        "afl": (third - 0.05, third, third + 0.05),
        "worst": (0.0, 0.0, 1.0),
        "uniform": (third, third, third),
        "size": (third, third, third),
    }
    for rule, values in expected.items():
        settings = WeightSettings(temperature=0.1, step=0.5, **free)
        state, got = WEIGHT_RULES[rule](settings, RuleState(), seen_)
        assert list(got.values()) == pytest.approx(values), rule
        assert "b" not in state.history


def test_a_group_that_stops_giving_scores_keeps_its_history():
    settings = WeightSettings(temperature=0.1, floor=0.0, ceiling=9.0)
    state, _ = adaptive.update(settings, RuleState(), silent({"a": 0.9, "b": 0.8}))
    state, got = adaptive.update(settings, state, silent({"a": 0.9, "b": None}, round=2))
    assert state.history["b"] == GroupHistory(0.8, 1, 1)
    assert got["b"] == pytest.approx(math.e / (1 + math.e))
    assert adaptive.coverage(settings, state, silent({"a": 0.9, "b": None})) == pytest.approx(1)


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@given(settings=settings_, names=groups)
def test_where_all_withhold_nobody_is_told_apart(rule, settings, names):
    state, got = WEIGHT_RULES[rule](settings, RuleState(), silent(dict.fromkeys(names)))
    assert got == pytest.approx(dict.fromkeys(names, 1 / len(names)), abs=1e-9)
    assert state.history == {}


@given(settings=settings_, names=groups, s=score)
def test_withholding_among_equals_changes_nothing(settings, names, s):
    for rule in ("adaptive", "placebo", "qffl", "worst", "afl"):
        observed: dict[str, float | None] = {**dict.fromkeys(names, s), "zz": None}
        _, got = WEIGHT_RULES[rule](settings, RuleState(), silent(observed))
        assert got == pytest.approx(dict.fromkeys(observed, 1 / len(observed)), abs=1e-9), rule


@pytest.mark.parametrize(
    "wrong", [GroupObservation(True, 0.5, 1, True), GroupObservation(False, None, 1, True)]
)
def test_a_score_is_withheld_or_given_by_somebody_present(wrong):
    observed = Observation(1, {"a": GroupObservation(True, 0.5, 1), "b": wrong})
    with pytest.raises(ValueError, match="withholds"):
        history.observe(RuleState(), WeightSettings(), observed)


# ---- history


def test_history_by_hand():
    settings = WeightSettings(decay=0.8)
    state = history.cold_start(settings, seen({"a": 0.5, "b": 0.9}, round=0))
    assert state.history["a"] == GroupHistory(0.5, 1, 0)
    state = history.observe(state, settings, seen({"a": 1.0, "c": 0.3}))
    assert state.history["a"].value == pytest.approx(0.8 * 0.5 + 0.2 * 1.0)
    assert state.history["b"] == GroupHistory(0.9, 1, 1)
    assert state.history["c"] == GroupHistory(0.3, 1, 0)


def test_decay_zero_keeps_the_latest_score():
    settings = WeightSettings(decay=0.0)
    state = history.observe(RuleState(), settings, seen({"a": 0.1}))
    assert history.observe(state, settings, seen({"a": 0.7})).history["a"].value == 0.7


def test_cold_start_is_round_zero_only():
    with pytest.raises(ValueError, match="round 0"):
        history.cold_start(WeightSettings(), seen({"a": 0.1}, round=1))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay"):
        history.observe(RuleState(), WeightSettings(decay=decay), seen({"a": 0.1}))
