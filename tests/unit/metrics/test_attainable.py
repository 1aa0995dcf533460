"""Attainable optima against general solvers, grids, and hand-worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.data.records import SurveyItem
from fedalign.errors import DataError
from fedalign.metrics import fairness
from fedalign.metrics.alignment import score
from fedalign.metrics.attainable import (
    GAP,
    attained,
    collect,
    mean_of_groups_answerer,
    optimum_average,
    optimum_worst,
    references,
    uniform_answerer,
)

EXACT = ("js_divergence", "cosine", "wasserstein")
ALL = (*EXACT, "js_distance", "js_distance_base2")


def population(groups: int, questions: int, seed: int, missing: float = 0.0, k_max: int = 5):
    rng = np.random.default_rng(seed)
    shares, ordinals = {}, {}
    for q in range(questions):
        k = int(rng.integers(2, k_max + 1))
        base = rng.dirichlet(np.ones(k))
        shares[f"q{q}"] = {
            f"g{g}": tuple(rng.dirichlet(2 * base + 0.05).tolist())
            for g in range(groups)
            if g == q % groups or rng.random() >= missing
        }
        ordinals[f"q{q}"] = rng.permutation(k).astype(float).tolist()
    return shares, ordinals


def value(metric, shares, ordinals, answers):
    """Group scores of any answers, one score at a time."""
    scores = {
        q: {g: score(metric, answers[q], y, ordinals[q]) for g, y in by_group.items()}
        for q, by_group in shares.items()
    }
    return fairness.group_means(scores)


OPPOSED = {"q": {"a": (1.0, 0.0), "b": (0.0, 1.0)}}
AGREED = {"q": {"a": (0.2, 0.8), "b": (0.2, 0.8)}}


def test_two_opposed_groups_by_hand():
    """By symmetry (1/2, 1/2): 1 - JSD((.5, .5), (1, 0)) = .6887 for both."""
    half = 1 - 0.5 * (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5)
    for optimum in (optimum_average, optimum_worst):
        got = optimum("js_divergence", OPPOSED)
        assert got.answers["q"] == pytest.approx((0.5, 0.5), abs=1e-6)
        assert got.group_scores == pytest.approx({"a": half, "b": half}, abs=1e-6)
        assert got.is_bound
    got = optimum_average("cosine", OPPOSED)
    assert got.average == pytest.approx(1 / math.sqrt(2))
    got = optimum_worst("wasserstein", OPPOSED, {"q": [1, 2]})
    assert got.worst == pytest.approx(0.5)


@pytest.mark.parametrize("metric", ALL)
def test_groups_that_agree_can_all_be_served(metric):
    for optimum in (optimum_average, optimum_worst, mean_of_groups_answerer):
        got = optimum(metric, AGREED, {"q": [1.0, 2.0]})
        assert got.answers["q"] == pytest.approx((0.2, 0.8), abs=1e-5)
        assert got.worst == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_average_optimum_of_js_divergence_against_a_general_solver(seed):
    from scipy.optimize import minimize

    shares, ordinals = population(4, 3, seed)
    got = optimum_average("js_divergence", shares)
    assert got.gap < 1e-8
    for q, by_group in shares.items():
        k = len(ordinals[q])

        def loss(p, by_group=by_group):
            p = np.clip(p, 0, None) / np.clip(p, 0, None).sum()
            return -np.mean([score("js_divergence", p, y) for y in by_group.values()])

        best = minimize(
            loss,
            np.full(k, 1 / k),
            bounds=[(1e-9, 1)] * k,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        mine = np.mean(list(got.scores[q].values()))
        assert mine >= -best.fun - 1e-9
        assert mine == pytest.approx(-best.fun, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_worst_optimum_of_js_divergence_against_a_general_solver(seed):
    """Maximise t over all answers and t with AS_g >= t, by sequential quadratic programming."""
    from scipy.optimize import minimize

    shares, ordinals = population(3, 3, seed, missing=0.3, k_max=3)
    widths = [len(ordinals[q]) for q in shares]
    cuts = np.cumsum(widths)[:-1]

    def served(x):
        parts = [np.clip(p, 1e-12, None) for p in np.split(x[:-1], cuts)]
        answers = {q: p / p.sum() for q, p in zip(shares, parts, strict=True)}
        means = value("js_divergence", shares, ordinals, answers)
        return np.array([means[g] for g in sorted(means)]) - x[-1]

    constraints = [{"type": "ineq", "fun": served}]
    start = np.append(np.concatenate([np.full(k, 1 / k) for k in widths]), 0.0)
    constraints.append(
        {"type": "eq", "fun": lambda x: [p.sum() - 1 for p in np.split(x[:-1], cuts)]}
    )
    best = minimize(
        lambda x: -x[-1],
        start,
        method="SLSQP",
        bounds=[(1e-9, 1)] * len(start),
        constraints=constraints,
        options={"ftol": 1e-12, "maxiter": 500},
    )
    got = optimum_worst("js_divergence", shares)
    assert got.gap < GAP
    assert got.worst == pytest.approx(best.x[-1], abs=2 * GAP)


def test_worst_optimum_of_wasserstein_against_the_full_linear_program():
    from scipy.optimize import linprog

    shares, ordinals = population(3, 4, 5, k_max=4)
    groups = ["g0", "g1", "g2"]
    # Variables: for each question the cumulative shares F_k, for each group |F_k - F_gk|, then t.
    columns, width = [], 0
    for q in shares:
        k = len(ordinals[q]) - 1
        columns.append((width, k))
        width += k * (1 + len(groups))
    rows, right = [], []
    services = np.zeros((len(groups), width + 1))
    services[:, -1] = 1.0
    for (start, k), (q, by_group) in zip(columns, shares.items(), strict=True):
        order = np.argsort(ordinals[q])
        steps = np.diff(np.sort(ordinals[q]))
        for j in range(k - 1):  # F is monotone
            row = np.zeros(width + 1)
            row[start + j], row[start + j + 1] = 1, -1
            rows.append(row)
            right.append(0.0)
        for i, g in enumerate(groups):
            f = np.cumsum(np.array(by_group[g])[order])[:-1]
            for j in range(k):
                u = start + k * (1 + i) + j
                for sign in (1, -1):
                    row = np.zeros(width + 1)
                    row[start + j], row[u] = sign, -1
                    rows.append(row)
                    right.append(sign * f[j])
                services[i, u] += steps[j] / steps.sum() / len(shares)
    result = linprog(
        np.append(np.zeros(width), -1.0),
        A_ub=np.vstack([rows, services]),
        b_ub=np.append(right, np.ones(len(groups))),
        bounds=[(0, 1)] * width + [(None, None)],
    )
    got = optimum_worst("wasserstein", shares, ordinals)
    assert got.worst == pytest.approx(-result.fun, abs=GAP)
    assert got.worst <= -result.fun + 1e-9


@pytest.mark.parametrize("metric", ["js_distance", "js_distance_base2"])
@pytest.mark.parametrize("seed", range(3))
def test_js_distance_is_no_worse_than_a_fine_grid(metric, seed):
    """Three options, grid of .02: no grid point beats the multi-start optimum."""
    rng = np.random.default_rng(seed)
    shares = {"q": {g: tuple(rng.dirichlet([0.5, 0.5, 0.5]).tolist()) for g in "abcd"}}
    got = optimum_average(metric, shares)
    assert not got.is_bound
    assert got.gap is None
    grid = [(i / 50, j / 50, 1 - i / 50 - j / 50) for i in range(51) for j in range(51 - i)]
    best = max(np.mean([score(metric, np.abs(p), y) for y in shares["q"].values()]) for p in grid)
    assert got.average >= best - 1e-9
    assert optimum_worst(metric, shares).worst >= optimum_average(metric, shares).worst - 1e-9


def test_both_bases_have_the_same_best_answer():
    shares, _ = population(3, 4, 1)
    natural, base2 = (optimum_average(m, shares) for m in ("js_distance", "js_distance_base2"))
    for q in shares:
        assert natural.answers[q] == pytest.approx(base2.answers[q], abs=1e-6)


@pytest.mark.parametrize("metric", EXACT)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(2, 5), missing=st.sampled_from([0.0, 0.4]))
def test_no_answer_exceeds_the_optimum(metric, seed, groups, missing):
    shares, ordinals = population(groups, 4, seed, missing)
    average = optimum_average(metric, shares, ordinals)
    worst = optimum_worst(metric, shares, ordinals)
    assert average.average + average.gap >= worst.average - 1e-9
    assert worst.worst + worst.gap >= average.worst - 1e-9
    assert worst.gap < GAP
    rng = np.random.default_rng(seed)
    for _ in range(10):
        if rng.random() < 0.5:
            answers = {q: rng.dirichlet(np.ones(len(ordinals[q]))) for q in shares}
        else:  # near the optimum, where a wrong optimum would show
            answers = {
                q: 0.98 * np.array(worst.answers[q]) + 0.02 * rng.dirichlet(np.ones(len(o)))
                for q, o in ordinals.items()
            }
        means = value(metric, shares, ordinals, answers)
        assert fairness.average(means) <= average.average + average.gap + 1e-9
        assert fairness.worst(means) <= worst.worst + worst.gap + 1e-9


@pytest.mark.parametrize("metric", ALL)
def test_what_is_reported_is_what_the_answers_score(metric):
    shares, ordinals = population(4, 5, 3, missing=0.3)
    for name, got in references(metric, shares, ordinals).items():
        assert {q: set(x) for q, x in got.scores.items()} == {q: set(x) for q, x in shares.items()}
        means = value(metric, shares, ordinals, got.answers)
        assert got.group_scores == pytest.approx(means, abs=1e-7), name
        assert all(math.fsum(p) == pytest.approx(1.0) for p in got.answers.values())


def test_plain_answerers_by_hand():
    shares = {"q": {"a": (0.6, 0.4), "b": (0.2, 0.8)}, "r": {"b": (1.0, 0.0, 0.0)}}
    mean = mean_of_groups_answerer("cosine", shares)
    assert mean.answers == {"q": pytest.approx((0.4, 0.6)), "r": pytest.approx((1.0, 0.0, 0.0))}
    assert uniform_answerer("cosine", shares).answers == {
        "q": (0.5, 0.5),
        "r": pytest.approx((1 / 3, 1 / 3, 1 / 3)),
    }
    assert uniform_answerer("cosine", shares).scores["r"]["b"] == pytest.approx(1 / math.sqrt(3))


def test_unequal_presence_weighs_by_group_not_by_question():
    """Group a answered two questions, b one: on the shared one b's voice counts double."""
    shares = {"q": {"a": (1.0, 0.0), "b": (0.0, 1.0)}, "r": {"a": (1.0, 0.0)}}
    got = optimum_average("wasserstein", shares, {"q": [0, 1], "r": [0, 1]})
    assert got.answers["q"] == pytest.approx((0.0, 1.0))


def test_undefined_questions_are_skipped_and_named():
    shares = {"q": AGREED["q"], "r": AGREED["q"], "s": AGREED["q"]}
    got = optimum_average("wasserstein", shares, {"q": [1, 2], "r": [3, 3], "s": None})
    assert got.skipped == ("r", "s")
    assert set(got.scores) == {"q"}
    with pytest.raises(DataError, match="no question has a score"):
        optimum_average("wasserstein", shares)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"q": {"a": (0.0, 0.0)}}, "question 'q': group 'a' is all zero"),
        ({"q": {"a": (0.5, math.nan)}}, "question 'q': group 'a'.*not finite"),
        ({"q": {"a": (0.5, 0.5), "b": (0.2, 0.3, 0.5)}}, "group 'b' has 3 shares"),
        ({}, "no question"),
    ],
)
def test_errors_name_question_and_group(shares, message):
    with pytest.raises(DataError, match=message):
        optimum_average("js_divergence", shares)


def test_collect_joins_the_groups_of_a_question():
    def item(group, shares):
        return SurveyItem("1", "Tea?", ("yes", "no"), {group: shares}, ordinals=(1.0, 2.0))

    a, b = item("a", (0.5, 0.5)), item("b", (0.1, 0.9))
    shares, ordinals = collect([a, b, a])
    assert shares == {a.key: {"a": (0.5, 0.5), "b": (0.1, 0.9)}}
    assert ordinals == {a.key: (1.0, 2.0)}
    with pytest.raises(DataError, match="two different answers"):
        collect([a, item("a", (0.4, 0.6))])


def test_same_input_same_result():
    shares, ordinals = population(4, 10, 9)
    for metric in ("js_divergence", "js_distance"):
        one, two = (optimum_worst(metric, shares, ordinals) for _ in range(2))
        assert one == two


def test_attained_by_hand():
    assert attained(0.8, 0.7, 0.9) == pytest.approx(0.5)
    assert attained(0.65, 0.7, 0.9) == pytest.approx(-0.25)
    assert attained(0.9, 0.9, 0.9) is None
    with pytest.raises(ValueError, match="finite"):
        attained(math.nan, 0.7, 0.9)


@pytest.mark.parametrize("metric", EXACT)
def test_hard_shapes(metric):
    """Point masses, a lone group, a group with one question, options nobody chose."""
    shares = {
        "q": {"a": (1.0, 0.0, 0.0), "b": (0.0, 1.0, 0.0), "c": (1.0, 0.0, 0.0)},
        "r": {"b": (0.0, 0.0, 1.0)},
        "s": {"a": (0.5, 0.5), "b": (0.5, 0.5)},
    }
    ordinals = {"q": [1, 2, 3], "r": [1, 2, 3], "s": [1, 2]}
    worst = optimum_worst(metric, shares, ordinals)
    assert worst.gap < GAP
    assert worst.answers["r"] == pytest.approx((0.0, 0.0, 1.0), abs=1e-9)
    alone = {"q": {"a": (0.3, 0.7)}}
    assert optimum_worst(metric, alone, {"q": [1, 2]}).worst == pytest.approx(1.0)
