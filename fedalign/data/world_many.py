"""The synthetic world ``many``: fifty groups spread evenly over a box of values.

For runs of many clients.  The centre of group k = 1, ..., 50 has on axis i the value

    SPREAD * (2 ((k g_i mod 50) + 1/2) / 50 - 1),   g = (9, 11, 17, 23),

a rank-1 lattice: every axis has each of fifty evenly spaced values once.  Of all g the chosen one
keeps the groups furthest apart with little correlation of axes with each other and with size.  The
people of a group are proportional to k^(-1/2).
"""

from __future__ import annotations

GROUPS = tuple(f"parish-{k:02d}" for k in range(1, 51))
"""Largest first."""

SPREAD = 1.2
"""How far the box reaches on each axis."""

LATTICE = (9, 11, 17, 23)

CENTRES: dict[str, tuple[float, ...]] = {
    name: tuple(SPREAD * (2.0 * (k * g % 50 + 0.5) / 50 - 1.0) for g in LATTICE)
    for k, name in enumerate(GROUPS, start=1)
}

_TOTAL = sum(k**-0.5 for k in range(1, 51))

POPULATION_SHARES: dict[str, float] = {
    name: k**-0.5 / _TOTAL for k, name in enumerate(GROUPS, start=1)
}
