"""Paired comparisons of the real-data page, on numbers worked by hand."""

from __future__ import annotations

import pytest

from simulations.comparison_report import NOISE, verdict
from simulations.real_data_report import METRICS, SPLITS, TOO_FEW, Table, compare_arms


def constant(by_seed: dict[int, float]) -> dict[int, dict[str, float]]:
    """The same value for every split and metric of a seed."""
    return {s: {f"{x}/{m}": v for x in SPLITS for m in METRICS} for s, v in by_seed.items()}


def table(seeds: int) -> Table:
    arms = {
        "uniform": [0.70, 0.72, 0.74],
        "adaptive": [0.71, 0.71, 0.75],  # +.01, -.01, +.01
        "base": [0.60, 0.63, 0.63],  # uniform is .10, .09, .11 above
        "uniform_answerer": [0.50, 0.50, 0.50],
        "mean_of_groups": [0.90, 0.92, 0.94],  # .2 above at every seed
    }
    return {name: constant(dict(enumerate(v[:seeds]))) for name, v in arms.items()}


def test_differences_are_paired_by_seed() -> None:
    found = {
        (c.arm, c.against): c
        for c in compare_arms(table(3), ["uniform", "adaptive"], "uniform")
        if (c.split, c.metric) == ("unseen", "worst")
    }
    arms = found["adaptive", "uniform"]
    assert arms.interval is not None
    # Mean 1/300; standard deviation .011547; t(.975, 2) = 4.3027; half-width .028684.
    assert arms.interval.centre == pytest.approx(1 / 300)
    assert arms.interval.high - arms.interval.centre == pytest.approx(0.028684, abs=1e-6)
    assert arms.verdict == NOISE
    base = found["uniform", "base"]
    assert base.interval is not None
    assert base.interval.centre == pytest.approx(0.10)
    assert base.verdict == "better"
    assert found["uniform", "mean_of_groups"].verdict == "worse"
    assert ("uniform", "uniform") not in found


def test_two_seeds_give_no_interval_and_no_verdict() -> None:
    found = compare_arms(table(2), ["uniform", "adaptive"], "uniform")
    assert {c.interval for c in found} == {None}
    assert {c.verdict for c in found} == {TOO_FEW}


def test_verdict_needs_every_interval_on_one_side() -> None:
    assert verdict([0.1, 0.01], [0.3, 0.2]) == "better"
    assert verdict([0.1, -0.01], [0.3, 0.2]) == NOISE
    assert verdict([-0.2], [-0.1]) == "worse"
    assert verdict([-0.2], [-0.1], higher_is_better=False) == "better"
    assert verdict([0.0], [0.1]) == NOISE
