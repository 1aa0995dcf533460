"""Attainable optimum for preference pairs: one shared answer to every comparison.

A *comparison* is a prompt with two responses, whichever way round.  A shared policy prefers the
first response with probability x_c in [0, 1].  Group g, of whose voters the share q_gc prefers the
first, then scores q_gc x_c + (1 - q_gc) (1 - x_c) on it, and AS_g is the mean over the comparisons
the group answered (n_g of them).  Everything is linear in x:

* average over groups: x_c = 1 where sum_g (2 q_gc - 1) / n_g > 0, the share-weighted majority;
* worst group: the linear programme max t subject to AS_g(x) >= t.  A policy that always answers one
  way (x in {0, 1}) cannot exceed it, so it bounds every measured value.

Where no two groups share a comparison nothing ties the groups together and no optimum is defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedalign.data.records import Pair, plain

Array = NDArray[np.float64]
Votes = Mapping[str, Mapping[str, float]]
"""Comparison to group to the share that prefers the response whose text sorts first."""


def votes(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Return the votes of all groups; a comparison that a group made twice is averaged."""
    found: dict[str, dict[str, list[float]]] = {}
    for p in pairs:
        first = plain(p.chosen) <= plain(p.rejected)
        share = p.vote_share if first else 1.0 - p.vote_share
        found.setdefault(p.comparison, {}).setdefault(p.group, []).append(share)
    return {c: {g: float(np.mean(s)) for g, s in by.items()} for c, by in found.items()}


def shares_comparisons(given: Votes) -> bool:
    """Say whether any comparison was made by at least two groups."""
    return any(len(by) > 1 for by in given.values())


def mean_of_groups(given: Votes) -> dict[str, dict[str, float]]:
    """Return comparison -> group -> score of the majority of the groups' mean shares.

    A tie of the groups is answered at random and scores 1/2.
    """
    x = {c: _step(float(np.mean(list(by.values()))) - 0.5) for c, by in given.items()}
    return _scores(given, x)


def optimum_average(given: Votes) -> dict[str, dict[str, float]]:
    """Return comparison -> group -> score of the shared answer that is best for the average."""
    n = _counts(given)
    x = {c: _step(sum((2 * q - 1) / n[g] for g, q in by.items())) for c, by in given.items()}
    return _scores(given, x)


def optimum_worst(given: Votes) -> dict[str, dict[str, float]]:
    """Return comparison -> group -> score of the shared answer best for the worst group.

    Raises:
        ArithmeticError: the solver did not finish.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    comparisons, groups = sorted(given), sorted(_counts(given))
    n = _counts(given)
    rows, columns, values = [], [], []
    constant = np.zeros(len(groups))
    for j, c in enumerate(comparisons):
        for g, q in given[c].items():
            i = groups.index(g)
            rows.append(i)
            columns.append(j)
            values.append(-(2 * q - 1) / n[g])
            constant[i] += (1 - q) / n[g]
    for i in range(len(groups)):
        rows.append(i)
        columns.append(len(comparisons))
        values.append(1.0)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(groups), len(comparisons) + 1))
    cost = np.zeros(len(comparisons) + 1)
    cost[-1] = -1.0
    found = linprog(
        cost, A_ub=matrix.tocsr(), b_ub=constant, bounds=[(0, 1)] * len(comparisons) + [(0, 1)]
    )
    if not found.success:
        raise ArithmeticError(f"the worst-group optimum was not found: {found.message}")
    return _scores(given, dict(zip(comparisons, found.x[:-1].tolist(), strict=True)))


def _counts(given: Votes) -> dict[str, int]:
    n: dict[str, int] = {}
    for by in given.values():
        for g in by:
            n[g] = n.get(g, 0) + 1
    return n


def _scores(given: Votes, x: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {
        c: {g: q * x[c] + (1 - q) * (1 - x[c]) for g, q in by.items()} for c, by in given.items()
    }


def _step(value: float) -> float:
    return 0.5 if abs(value) < 1e-12 else float(value > 0)
