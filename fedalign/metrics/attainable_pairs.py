"""What one shared preference could score at best on pairs that several groups have judged.

Pairs have no answer distribution.  Where groups judged the same comparison, a shared policy must
side with one of the two responses for all of them.  Let x_c in [0, 1] be the chance of siding with
the first response of comparison c and q the share of a group's voters who preferred it; the pair
then scores x q + (1 - x)(1 - q), and AS_g is the mean over the rows of group g.

*average*:  for each comparison the share-weighted majority, sum_g mean (2 q - 1) above or below 0.
*worst group*:  max over x of min_g AS_g, a linear program.  At most as many comparisons as groups
come out strictly between 0 and 1; a policy without chance reaches a little less.

Both are upper bounds for a policy that ranks responses: majorities may be intransitive.  Where no
comparison is shared by two groups every group could be served perfectly, and the optimum is "not
defined" (None).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedalign.data.records import Pair, plain
from fedalign.errors import DataError
from fedalign.metrics.attainable import SharedAnswer

Array = NDArray[np.float64]

NOT_DEFINED = "not defined: no comparison is shared by two groups"


class PairRow(NamedTuple):
    """One judged comparison of one group."""

    comparison: str
    """Identity of the unordered comparison."""
    group: str
    share: float
    """Share of the group's voters who preferred the first response, in [0, 1]."""


def pair_rows(pairs: Iterable[Pair]) -> list[PairRow]:
    """Return the rows of pairs; the first response of a comparison is the first by text."""
    return [
        PairRow(
            p.comparison,
            p.group,
            p.vote_share if plain(p.chosen) <= plain(p.rejected) else 1.0 - p.vote_share,
        )
        for p in pairs
    ]


def pair_references(rows: Sequence[PairRow]) -> dict[str, SharedAnswer] | None:
    """Return ``uniform`` (a tie everywhere), ``optimum_average`` and ``optimum_worst``, or None.

    In the result an answer is (x, 1 - x); a group's second row for a comparison is under
    ``<comparison>#2``.

    Raises:
        DataError: a share outside [0, 1].
    """
    for row in rows:
        if not 0.0 <= row.share <= 1.0:
            raise DataError(f"comparison {row.comparison}: share {row.share} is outside [0, 1].")
    judges: dict[str, set[str]] = {}
    for row in rows:
        judges.setdefault(row.comparison, set()).add(row.group)
    if all(len(groups) < 2 for groups in judges.values()):
        return None
    comparisons = sorted(judges)
    lean, base = _linear(rows, comparisons)
    total = lean.sum(0)
    majority = np.where(total > 1e-12, 1.0, np.where(total < -1e-12, 0.0, 0.5))
    return {
        "uniform": _answer(rows, comparisons, np.full(len(comparisons), 0.5), None),
        "optimum_average": _answer(rows, comparisons, majority, 0.0),
        "optimum_worst": _answer(rows, comparisons, _best_worst(lean, base), 0.0),
    }


def _linear(rows: Sequence[PairRow], comparisons: list[str]) -> tuple[Array, Array]:
    """Return lean (groups, comparisons) and base (groups,) with AS = base + lean x."""
    groups = sorted({r.group for r in rows})
    at = {c: i for i, c in enumerate(comparisons)}
    lean, base, count = (
        np.zeros((len(groups), len(at))),
        np.zeros(len(groups)),
        np.zeros(len(groups)),
    )
    for r in rows:
        g = groups.index(r.group)
        lean[g, at[r.comparison]] += 2.0 * r.share - 1.0
        base[g] += 1.0 - r.share
        count[g] += 1.0
    return lean / count[:, None], base / count


def _best_worst(lean: Array, base: Array) -> Array:
    """Return argmax_x min_g base_g + lean_g x over x in [0, 1]."""
    from scipy.optimize import linprog

    groups, n = lean.shape
    result = linprog(
        c=np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-lean, np.ones((groups, 1))]),
        b_ub=base,
        bounds=[(0, 1)] * n + [(None, None)],
        method="highs",
    )
    if not result.success:
        raise ArithmeticError(f"the linear program over comparisons failed: {result.message}")
    return np.clip(result.x[:n], 0.0, 1.0)


def _answer(
    rows: Sequence[PairRow], comparisons: list[str], x: Array, gap: float | None
) -> SharedAnswer:
    side = dict(zip(comparisons, x.tolist(), strict=True))
    scores: dict[str, dict[str, float]] = {}
    for r in rows:
        key, n = r.comparison, 1
        while r.group in scores.get(key, {}):
            n += 1
            key = f"{r.comparison}#{n}"
        first = side[r.comparison]
        scores.setdefault(key, {})[r.group] = first * r.share + (1.0 - first) * (1.0 - r.share)
    return SharedAnswer(
        scores=scores,
        answers={c: (s, 1.0 - s) for c, s in side.items()},
        is_bound=gap is not None,
        gap=gap,
        skipped=(),
    )
