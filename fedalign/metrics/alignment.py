"""How well an answer distribution p serves a group whose people answer y: one score a question.

All scores are "higher is better" in [low, 1] (:data:`SCORE_LOW`).  With m = (p + y) / 2,
JSD = (KL(p || m) + KL(y || m)) / 2 and F the cumulative sums over options sorted by ordinal o:

====================  =====================================================  ======
``js_divergence``     1 - JSD, base 2                                        0
``js_distance``       1 - sqrt(JSD), natural log                             .1674
``js_distance_base2`` 1 - sqrt(JSD), base 2                                  0
``wasserstein``       1 - sum_k |F_p - F_y| (o_k+1 - o_k) / (max o - min o)  0
``cosine``            <p, y> / (|p| |y|)                                     0
``pair_accuracy``     q [m > 0] + (1 - q) [m < 0] + [m = 0] / 2              0
====================  =====================================================  ======

``js_distance`` and ``wasserstein`` are the scores of group preference optimisation (arXiv
2310.11523) and OpinionQA (arXiv 2303.17548).  Published texts call both the divergence and its root
"JSD"; the names here say which.  ``pair_accuracy`` takes the margin m of the chosen response over
the rejected one and the share q of voters who chose it; a policy that always sides with the
majority of the voters reaches mean max(q, 1 - q), and no policy exceeds that.

Scores of a printed order of the options (``borda``, ``kendall``, ``binary``) are in ``ranking``.

Inputs are checked: a zero vector, a NaN, a wrong length is an error, never a score.
``wasserstein`` is undefined for a question without ordinals, or whose ordinals are all equal
(nominal answers): :func:`score` raises :class:`UndefinedScore`, :func:`score_questions` returns
None for the caller to count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedalign.config_rules import SURVEY_METRICS
from fedalign.errors import DataError

Array = NDArray[np.float64]

SCORE_LOW: dict[str, float] = {
    "js_divergence": 0.0,
    "js_distance": 1.0 - math.sqrt(math.log(2.0)),
    "js_distance_base2": 0.0,
    "wasserstein": 0.0,
    "cosine": 0.0,
    "pair_accuracy": 0.0,
    "borda": 0.0,
    "kendall": 0.0,
    "binary": 0.0,
}
"""Lower end of each score's range; the upper end is 1 for all."""

SUM_TOLERANCE = 1e-3
"""A distribution whose sum is further from 1 is refused; a nearer one is renormalised."""


class UndefinedScore(DataError):
    """The score has no value for this question; it must be left out and counted."""


def score(
    metric: str, p: ArrayLike, y: ArrayLike, ordinals: Sequence[float] | None = None
) -> float:
    """Return the score of one answer distribution ``p`` (K,) for answers ``y`` (K,).

    Args:
        metric: one of the first five in the table above.
        p: the policy's shares over the K options.
        y: the group's shares over the K options.
        ordinals: ordinal value of each option, for ``wasserstein``.

    Raises:
        DataError: a vector is empty, zero, negative, not finite, of the wrong length, or does not
            sum to 1; or the metric is unknown.
        UndefinedScore: ``wasserstein`` on a question without distinct ordinals.
    """
    if metric == "wasserstein" and not is_defined(metric, ordinals):
        raise UndefinedScore(
            "wasserstein needs ordinals that differ; leave the question out and count it, "
            "or use js_divergence."
        )
    a, b = distribution(p, "p"), distribution(y, "y")
    if len(a) != len(b):
        raise DataError(f"p has {len(a)} options, y has {len(b)}; they must have the same.")
    o = None if ordinals is None else _ordinals(ordinals, len(a))
    return float(kernel(metric, a, b, o))


def score_questions(
    metric: str,
    p: Sequence[ArrayLike],
    y: Sequence[ArrayLike],
    ordinals: Sequence[Sequence[float] | None] | None = None,
) -> list[float | None]:
    """Return the score of each question; None where the score is undefined.

    Questions may have different numbers of options; those with as many go through together, and
    the bits of a score do not depend on which.  Errors as in :func:`score`, with the position of
    the question.
    """
    n = len(p)
    given = [None] * n if ordinals is None else list(ordinals)
    if not len(y) == len(given) == n:
        raise DataError(f"{n} answers, {len(y)} targets and {len(given)} ordinals; lengths differ.")
    if n == 0:
        return []
    ps, ys = _distributions(p, "p"), _distributions(y, "y")
    by_width: dict[int, list[int]] = {}
    for i, (a, b) in enumerate(zip(ps, ys, strict=True)):
        if len(a) != len(b):
            raise DataError(f"question {i}: p has {len(a)} options, y has {len(b)}.")
        if is_defined(metric, given[i]):
            by_width.setdefault(len(a), []).append(i)
    out: list[float | None] = [None] * n
    for width, places in by_width.items():
        os = None
        if metric == "wasserstein":
            os = np.array([_ordinals(o, width) for i in places if (o := given[i]) is not None])
        found = kernel(
            metric, np.array([ps[i] for i in places]), np.array([ys[i] for i in places]), os
        )
        for i, value in zip(places, found.tolist(), strict=True):
            out[i] = value
    return out


def _distributions(vectors: Sequence[ArrayLike], name: str) -> list[Array]:
    """Return :func:`distribution` of each; those of one length are checked together."""
    rows = [np.asarray(v, dtype=np.float64) for v in vectors]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_shape.setdefault(row.shape, []).append(i)
    for shape, places in by_shape.items():
        good = len(shape) == 1 and shape[0] > 0
        if good:
            x = np.array([rows[i] for i in places])
            totals = x.sum(1)
            # Not a number compares false, so it is not good.
            good = bool((x >= 0).all() and (np.abs(totals - 1.0) <= SUM_TOLERANCE).all())
        if not good:  # the first bad one raises and says why
            for i in places:
                distribution(rows[i], f"question {i}: {name}")
        for i, row in zip(places, x / totals[:, None], strict=True):
            rows[i] = row
    return rows


def kernel(metric: str, p: Array, y: Array, ordinals: Array | None = None) -> Array:
    """Return scores for checked distributions (..., K), broadcast over the leading axes.

    Rows may be padded with options of zero share; padded ordinals repeat the largest ordinal
    (:func:`pad_ordinals`).  No checks: callers outside this package use :func:`score`.
    """
    if metric == "js_divergence":
        return 1.0 - jsd(p, y) / math.log(2.0)
    if metric == "js_distance":
        return 1.0 - np.sqrt(jsd(p, y))
    if metric == "js_distance_base2":
        return 1.0 - np.sqrt(jsd(p, y) / math.log(2.0))
    if metric == "cosine":
        norms = np.linalg.norm(p, axis=-1) * np.linalg.norm(y, axis=-1)
        return np.minimum((p * y).sum(-1) / norms, 1.0)
    if metric == "wasserstein":
        if ordinals is None:
            raise UndefinedScore("wasserstein needs ordinals.")
        order = np.argsort(ordinals, axis=-1, kind="stable")
        steps = np.diff(np.take_along_axis(ordinals, order, -1), axis=-1)  # (..., K - 1)
        difference = p - y
        order = np.broadcast_to(order, difference.shape)
        gaps = np.abs(np.cumsum(np.take_along_axis(difference, order, -1), -1)[..., :-1])
        return np.clip(1.0 - (gaps * steps).sum(-1) / steps.sum(-1), 0.0, 1.0)
    raise DataError(f"'{metric}' is not a survey score. Use one of {', '.join(SURVEY_METRICS)}.")


def jsd(p: Array, y: Array) -> Array:
    """Return the Jensen-Shannon divergence in nats, in [0, ln 2], over the last axis."""
    m = 0.5 * (p + y)
    # Where m is 0 both are 0 and the term is 0; where p is 0 its own term is 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / m), 0.0) + np.where(y > 0, y * np.log(y / m), 0.0)
    # Rounding can leave a tiny negative number for p = y, whose root would be NaN.
    return np.clip(0.5 * terms.sum(-1), 0.0, math.log(2.0))


def is_defined(metric: str, ordinals: Sequence[float] | None) -> bool:
    """Return whether a question with these ordinals has this score."""
    return metric != "wasserstein" or (ordinals is not None and len(set(ordinals)) > 1)


def pad_ordinals(ordinals: Sequence[float], k: int, width: int) -> Array:
    """Return (width,) ordinals; padding repeats the largest, so that it adds no distance."""
    o = _ordinals(ordinals, k)
    return np.concatenate([o, np.full(width - k, o.max())])


def pair_accuracy(margins: ArrayLike, vote_shares: ArrayLike) -> Array:
    """Return the share-weighted accuracy (N,) of N pairs, each in [0, 1].

    Args:
        margins: (N,) score of the chosen response minus that of the rejected one.
        vote_shares: (N,) share of voters who preferred the chosen one, in [0, 1].

    An exact tie of the policy gives 1/2.  The best a pair can give is ``max(q, 1 - q)``, see
    :func:`pair_ceiling`.
    """
    m, q = np.asarray(margins, dtype=np.float64), _vote_shares(vote_shares)
    if m.shape != q.shape:
        raise DataError(f"{m.shape} margins for {q.shape} vote shares; shapes must be equal.")
    if not np.isfinite(m).all():
        bad = int(np.flatnonzero(~np.isfinite(m))[0])
        raise DataError(f"margin {bad} is {m.flat[bad]}; margins must be finite.")
    return np.where(m > 0, q, np.where(m < 0, 1.0 - q, 0.5))


def pair_ceiling(vote_shares: ArrayLike) -> Array:
    """Return ``max(q, 1 - q)`` (N,): the best that a policy for this group alone can reach."""
    q = _vote_shares(vote_shares)
    return np.maximum(q, 1.0 - q)


def _vote_shares(vote_shares: ArrayLike) -> Array:
    q = np.asarray(vote_shares, dtype=np.float64)
    if not (np.isfinite(q).all() and (q >= 0).all() and (q <= 1).all()):
        raise DataError("vote shares must be finite and in [0, 1].")
    return q


def _ordinals(ordinals: Sequence[float], k: int) -> Array:
    o = np.asarray(ordinals, dtype=np.float64)
    if o.shape != (k,):
        raise DataError(f"{o.size} ordinals for {k} options; they must be as many.")
    if not np.isfinite(o).all():
        raise DataError(f"ordinals must be finite, got {o.tolist()}.")
    return o


def distribution(values: ArrayLike, name: str) -> Array:
    """Return a checked distribution (K,) in float64, renormalised against rounding.

    Raises:
        DataError: named ``name``, for a vector that is no distribution.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise DataError(f"{name} has shape {x.shape}; it must be a vector of at least one share.")
    if not np.isfinite(x).all():
        raise DataError(f"{name} = {x.tolist()} holds a number that is not finite.")
    if (x < 0).any():
        raise DataError(f"{name} = {x.tolist()} holds a negative share.")
    total = float(x.sum())
    if total == 0:
        raise DataError(f"{name} is all zero; an empty answer has no score.")
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise DataError(f"{name} sums to {total:.6g}; shares must sum to 1.")
    return x / total
