"""From the answer shares of a question to preference pairs over its options.

For shares y over K options a pair (i, j), i < j, carries the label

    q = y_i / (y_i + y_j),

the Bradley-Terry probability with reward log y.  The loss with soft label q is smallest where
beta * (log-ratio of i to j) = log y_i - log y_j for every pair, so the optimum of DPO
(arXiv 2305.18290) with strength beta is pi proportional to pi_ref * y^(1/beta); with beta = 1 and a
flat reference it is the group's distribution itself.

n pairs are drawn without replacement, one after another, with probability proportional to
y_i + y_j: pairs that nobody chose teach nothing and have no label.  With labels "hard" each pair
gets one drawn vote, 1 with probability q, else 0, so its mean is q.
Not for ordinal targets: the label knows nothing of the distance between options.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedalign.errors import DataError


class OptionPair(NamedTuple):
    """Options i < j and the probability in [0, 1] that i is preferred to j."""

    i: int
    j: int
    q: float


def option_pairs(
    shares: npt.ArrayLike, n: int, labels: str, rng: np.random.Generator
) -> list[OptionPair]:
    """Return up to ``n`` option pairs (0: all with y_i + y_j > 0), sorted by (i, j).

    ``shares``: (K,), not negative, summing to 1.  ``labels``: ``shares`` or ``hard``.
    Raises ``DataError`` for shares that are no distribution, a negative n or another label.
    """
    y = np.asarray(shares, dtype=np.float64)
    if y.ndim != 1 or len(y) < 2:
        raise DataError(f"shares must be one row of at least 2 numbers, got shape {y.shape}.")
    if not np.isfinite(y).all() or (y < 0).any() or not math.isclose(y.sum(), 1, abs_tol=1e-6):
        raise DataError(f"shares must be finite, not negative and sum to 1, got {y.tolist()}.")
    if n < 0:
        raise DataError(f"{n} pairs asked for; give 0 (all) or more.")
    if labels not in ("shares", "hard"):
        raise DataError(f"labels = '{labels}' is not one of shares, hard.")
    first, second = np.triu_indices(len(y), k=1)  # (pairs,), sorted by (i, j)
    mass = y[first] + y[second]
    taken = np.flatnonzero(mass > 0)
    if 0 < n < len(taken):
        p = mass[taken] / mass[taken].sum()
        taken = np.sort(rng.choice(taken, size=n, replace=False, p=p))
    q = y[first[taken]] / mass[taken]
    if labels == "hard":
        q = (rng.random(len(taken)) < q).astype(np.float64)
    return [
        OptionPair(int(i), int(j), float(label))
        for i, j, label in zip(first[taken], second[taken], q, strict=True)
    ]
