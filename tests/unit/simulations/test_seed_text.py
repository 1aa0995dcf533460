"""Values over seeds as text: an interval, or every seed's value."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedalign.metrics.intervals import Interval
from simulations.comparison_plot import plot
from simulations.seed_text import change_cell, mean_cell, too_few


def test_three_seeds_have_an_interval_and_two_show_their_values() -> None:
    # t(.975, 2) = 4.303; the standard error of 1, 2, 3 is 1 / sqrt(3).
    assert mean_cell([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert mean_cell([0.5, 0.25]) == "0.375 (0.500, 0.250; no interval)"
    assert mean_cell([0.5]) == "0.500 (1 seed, no interval)"
    assert mean_cell([]) == "not defined"


def test_differences_carry_their_sign() -> None:
    assert change_cell(Interval(0.1, -0.05, 0.25, 5), (9.0,)) == "+0.100 [-0.050, +0.250]"
    assert change_cell(None, (0.1, -0.2), 2) == "-0.05 (+0.10, -0.20; no interval)"
    assert change_cell(None, ()) == "not defined"


@pytest.mark.parametrize(("seeds", "few"), [(0, False), (1, True), (2, True), (3, False)])
def test_too_few(seeds: int, few: bool) -> None:
    assert too_few(seeds) is few


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_comparison_plot_has_a_dot_a_seed_and_says_when_there_is_no_interval(
    tmp_path: Path, seeds: int
) -> None:
    values = {s: {"average": 0.7 + 0.01 * s, "worst": 0.5 + 0.02 * s} for s in range(seeds)}
    plot(tmp_path / "c.svg", {"mean": values}, {"mean": {}})
    svg = (tmp_path / "c.svg").read_text()
    assert ("no interval (fewer than 3 seeds)" in svg) is (seeds < 3)
    dots = svg[svg.index('id="PathCollection_1"') :]
    assert dots[: dots.index("</g>\n  ")].count("<use") == seeds
