"""Numbers over seeds as text: the mean with its interval, or with every seed's value.

An interval over seeds needs three of them (``fedalign.metrics.intervals``).  With fewer the mean
stands with the seeds' own values in brackets, in order of seeds, and says that there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedalign.metrics.intervals import MIN_SEEDS, Interval, seed_interval

NO_INTERVAL = "no interval (fewer than 3 seeds)"
TOO_FEW = (
    "**No interval where there are fewer than 3 seeds:** there the mean stands with each seed's "
    "own value in brackets, and nothing is concluded from it."
)


def mean_cell(values: Sequence[float], digits: int = 3) -> str:
    """Return ``mean ± half-width``; with fewer than 3 ``mean (value, value; no interval)``."""
    if not values:
        return "not defined"
    interval = seed_interval(values)
    mean = float(np.mean(values))
    if interval is None:
        return f"{mean:.{digits}f}{_points(values, digits, '')}"
    return f"{mean:.{digits}f} ± {interval.high - interval.centre:.{digits}f}"


def change_cell(interval: Interval | None, points: Sequence[float], digits: int = 3) -> str:
    """Return a mean difference with its interval; without one, with each seed's difference.

    Args:
        interval: of the mean, or None.
        points: one difference a seed; read only where there is no interval.
        digits: after the point.
    """
    if interval is not None:
        low, high = (f"{x:+.{digits}f}" for x in (interval.low, interval.high))
        return f"{interval.centre:+.{digits}f} [{low}, {high}]"
    if not points:
        return "not defined"
    return f"{float(np.mean(points)):+.{digits}f}{_points(points, digits, '+')}"


def too_few(seeds: int) -> bool:
    """Say whether so many seeds give no interval."""
    return 0 < seeds < MIN_SEEDS


def _points(values: Sequence[float], digits: int, sign: str) -> str:
    if len(values) == 1:
        return " (1 seed, no interval)"
    return f" ({', '.join(f'{x:{sign}.{digits}f}' for x in values)}; no interval)"
