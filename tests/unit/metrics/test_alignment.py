"""Alignment scores against scipy, by hand, and on what must be refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.config import SURVEY_METRICS
from fedalign.config_rules import ORDER_METRICS
from fedalign.errors import DataError
from fedalign.metrics.alignment import (
    SCORE_LOW,
    UndefinedScore,
    pair_accuracy,
    pair_ceiling,
    score,
    score_questions,
)

ORDINALS = [1.0, 2.0, 3.0, 4.0, 2.5]


def draws(n: int, k: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    p, y = rng.dirichlet(np.full(k, 0.5), n), rng.dirichlet(np.full(k, 0.5), n)
    y[: n // 4, 0] = 0.0
    return p, y / y.sum(1, keepdims=True)


def test_every_metric_of_the_configuration_has_a_range():
    assert set(SCORE_LOW) == {*SURVEY_METRICS, *ORDER_METRICS, "pair_accuracy"}
    assert SCORE_LOW["js_distance"] == pytest.approx(0.1674, abs=1e-4)


def test_against_scipy():
    from scipy.spatial.distance import cosine, jensenshannon
    from scipy.stats import wasserstein_distance

    for p, y in zip(*draws(40, 5), strict=True):
        js = jensenshannon(p, y)
        assert score("js_distance", p, y) == pytest.approx(1 - js, abs=1e-12)
        js2 = jensenshannon(p, y, base=2)
        assert score("js_distance_base2", p, y) == pytest.approx(1 - js2, abs=1e-12)
        assert score("js_divergence", p, y) == pytest.approx(1 - js2**2, abs=1e-12)
        assert score("cosine", p, y) == pytest.approx(1 - cosine(p, y), abs=1e-12)
        w1 = wasserstein_distance(ORDINALS, ORDINALS, p, y)
        assert score("wasserstein", p, y, ORDINALS) == pytest.approx(1 - w1 / 3.0, abs=1e-12)


def test_by_hand():
    """p = (1, 0), y = (.5, .5): m = (.75, .25), JSD = (log2 4/3 + .5 log2 2/3 + .5) / 2 = .3113."""
    p, y = [1.0, 0.0], [0.5, 0.5]
    jsd = 0.5 * (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))
    assert jsd == pytest.approx(0.3113, abs=1e-4)
    assert score("js_divergence", p, y) == pytest.approx(1 - jsd)
    assert score("js_distance_base2", p, y) == pytest.approx(1 - math.sqrt(jsd))
    assert score("js_distance", p, y) == pytest.approx(1 - math.sqrt(jsd * math.log(2)))
    assert score("cosine", p, y) == pytest.approx(1 / math.sqrt(2))
    assert score("wasserstein", p, y, [1, 3]) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", SURVEY_METRICS)
def test_extremes(metric):
    """Equal answers give 1 and opposite answers the declared lower end."""
    o = [1.0, 2.0, 3.0]
    assert score(metric, [0.2, 0.3, 0.5], [0.2, 0.3, 0.5], o) == pytest.approx(1.0, abs=1e-7)
    assert score(metric, [1, 0, 0], [0, 0, 1], o) == pytest.approx(SCORE_LOW[metric], abs=1e-12)


@pytest.mark.parametrize("metric", SURVEY_METRICS)
@given(data=st.data())
def test_range_symmetry_and_permutation(metric, data):
    k = data.draw(st.integers(2, 7))
    vector = st.lists(st.floats(0, 1), min_size=k, max_size=k).filter(lambda v: sum(v) > 1e-6)
    p, y = (np.array(data.draw(vector)) for _ in range(2))
    p, y = p / p.sum(), y / y.sum()
    o = list(range(1, k + 1))
    s = score(metric, p, y, o)
    assert SCORE_LOW[metric] - 1e-12 <= s <= 1.0
    assert score(metric, y, p, o) == pytest.approx(s, abs=1e-12)
    order = data.draw(st.permutations(range(k)))
    moved = score(metric, p[order], y[order], [o[i] for i in order])
    assert moved == pytest.approx(s, abs=1e-7)


@pytest.mark.parametrize("metric", SURVEY_METRICS)
def test_many_questions_equal_one_by_one(metric):
    """Unequal numbers of options, unsorted and tied ordinals; None where there is no score."""
    ps, ys, os = [], [], []
    for k in (2, 3, 5, 7):
        p, y = draws(4, k, seed=k)
        ps += list(p)
        ys += list(y)
        os += [
            [float(v) for v in range(1, k + 1)],
            [float(k - v // 2) for v in range(k)],
            None,
            [1.0] * k,
        ]
    os[1] = [2.0, 1.0]
    got = score_questions(metric, ps, ys, os)
    for p, y, o, s in zip(ps, ys, os, got, strict=True):
        if metric == "wasserstein" and (o is None or len(set(o)) == 1):
            assert s is None
        else:
            assert s == pytest.approx(score(metric, p, y, o), abs=1e-12)
    assert score_questions(metric, [], []) == []


@pytest.mark.parametrize("ordinals", [None, [1.0, 1.0]])
def test_wasserstein_is_undefined_without_distinct_ordinals(ordinals):
    with pytest.raises(UndefinedScore, match="leave the question out"):
        score("wasserstein", [0.5, 0.5], [0.5, 0.5], ordinals)


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([0.0, 0.0], [0.5, 0.5], "p is all zero"),
        ([0.5, 0.5], [0.0, 0.0], "y is all zero"),
        ([math.nan, 0.5], [0.5, 0.5], "p = .* not finite"),
        ([0.5, 0.5], [math.inf, 0.5], "y = .* not finite"),
        ([1.5, -0.5], [0.5, 0.5], "negative"),
        ([0.5, 0.5], [0.2, 0.3, 0.5], "p has 2 options, y has 3"),
        ([], [], "shape"),
        ([0.5, 0.4], [0.5, 0.5], "p sums to 0.9"),
    ],
)
@pytest.mark.parametrize("metric", SURVEY_METRICS)
def test_bad_vectors_are_errors_and_never_scores(metric, p, y, message):
    ordinals = list(range(1, len(p) + 1)) if len(p) > 1 else [1, 2]
    with pytest.raises(DataError, match=message):
        score(metric, p, y, ordinals)
    with pytest.raises(DataError, match=r"question 1"):
        score_questions(metric, [[0.5, 0.5], p], [[0.5, 0.5], y], [[1, 2], ordinals])


def test_other_errors():
    with pytest.raises(DataError, match="not a survey score"):
        score("jsd", [0.5, 0.5], [0.5, 0.5])
    with pytest.raises(DataError, match="3 ordinals for 2"):
        score("wasserstein", [0.5, 0.5], [0.5, 0.5], [1, 2, 3])
    with pytest.raises(DataError, match="lengths differ"):
        score_questions("cosine", [[0.5, 0.5]], [])


def test_pair_accuracy_by_hand():
    got = pair_accuracy([2.0, -1.0, 0.0, 0.5], [1.0, 0.7, 0.9, 0.6])
    assert got.tolist() == pytest.approx([1.0, 0.3, 0.5, 0.6])
    assert pair_ceiling([1.0, 0.7, 0.2]).tolist() == pytest.approx([1.0, 0.7, 0.8])


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=1))
def test_no_margin_beats_the_pair_ceiling(pairs):
    m, q = zip(*pairs, strict=True)
    got = pair_accuracy(m, q)
    assert (got <= pair_ceiling(q) + 1e-12).all()
    best = pair_accuracy([1.0 if x >= 0.5 else -1.0 for x in q], q)
    assert np.allclose(best, pair_ceiling(q))


@pytest.mark.parametrize(
    ("m", "q", "message"),
    [
        ([math.nan], [0.5], "margin 0 is nan"),
        ([1.0], [1.5], "vote shares"),
        ([1.0], [math.nan], "vote shares"),
        ([1.0, 2.0], [0.5], "shapes"),
    ],
)
def test_pair_accuracy_errors(m, q, message):
    with pytest.raises(DataError, match=message):
        pair_accuracy(m, q)
