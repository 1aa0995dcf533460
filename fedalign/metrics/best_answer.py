"""The one answer to each question that serves weighted groups best: max_p sum_g w_g s(p, y_g).

Everything is batched over questions: y is (questions, groups, options), w is (questions, groups)
with rows that sum to 1, answers are (questions, options).  Shorter questions are padded with
options that nobody chose.  For each score:

``js_divergence``
    Concave.  Minorise-maximise: p <- normalised geometric mean, with weights w, of the midpoints
    (p + y_g) / 2.  That is mirror ascent with the largest safe step (the objective is 1/2-smooth
    relative to the entropy), so it never overshoots.  A Frank-Wolfe bound certifies what is left.
``cosine``
    Closed form: p proportional to sum_g w_g y_g / |y_g|.
``wasserstein``
    Closed form: at each threshold the weighted median of the groups' cumulative shares.  Medians
    of cumulative distributions are one again.
``js_distance``
    Not concave, because of the root.  Majorise-minimise: sqrt(J) <= sqrt(J0) + (J - J0) /
    (2 sqrt(J0)) turns it into the divergence with weights w_g / sqrt(J_g); from several starts, and
    every y_g itself, since each y_g is a kink and often a local optimum.  No certificate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedalign.metrics import alignment

Array = NDArray[np.float64]

CERTIFIED = 1e-9
"""The iteration stops when no question can gain more than this."""
STEPS = 400
NEWTON = (2, 14)
"""Steps that are Newton steps."""
TINY = 1e-300


def cosine_answer(y: Array, w: Array) -> Array:
    """Return argmax_p sum_g w_g cosine(p, y_g)."""
    p = np.einsum("qg,qgk->qk", w, y / np.linalg.norm(y, axis=2, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True), dtype=np.float64)


def weighted_mean(y: Array, w: Array) -> Array:
    """Return the weighted arithmetic mean (questions, options)."""
    return np.einsum("qg,qgk->qk", w, y) / w.sum(1, keepdims=True)


def minimise_jsd(y: Array, w: Array) -> tuple[Array, Array]:
    """Return argmin_p sum_g w_g JSD(p, y_g), and the certified gap of each question (base 2).

    With r = ln p - sum_g w_g ln m_g, the gradient is r / 2, the plain step sets ln p to ln p - r,
    and the Frank-Wolfe bound on what is left is (<p, r> - min r) / 2.  The Hessian is diagonal, so
    Newton steps on ln p are as cheap; they are tried after a few plain steps, and plain steps
    finish what they leave.
    """
    chosen = np.einsum("qg,qgk->qk", w, y) > 0
    p = weighted_mean(y, w)
    gap = np.full(len(p), np.inf)
    left = np.arange(len(p))  # questions not yet certified
    for step in range(STEPS):
        here, others, v = np.maximum(p[left], TINY), y[left], w[left]
        sums = here[:, None, :] + others
        logs = np.log(here)
        r = logs - np.einsum("qg,qgk->qk", v, np.log(0.5 * sums))
        gap[left] = np.maximum((p[left] * r).sum(1) - r.min(1), 0.0) / (2.0 * np.log(2.0))
        moving = gap[left] > CERTIFIED
        if not moving.any():
            break
        change = -r
        if NEWTON[0] <= step < NEWTON[1]:
            slope = np.maximum(np.einsum("qg,qgk->qk", v, others / sums), 0.05)
            level = (p[left] * r / slope).sum(1) / (p[left] / slope).sum(1)
            change = np.clip((level[:, None] - r) / slope, -3.0, 3.0)
        left, logs = left[moving], (logs + change)[moving]
        p[left] = _normalised(logs, chosen[left])
    return p, gap


def _normalised(logs: Array, chosen: NDArray[np.bool_]) -> Array:
    """Return exp(logs), normalised; zero for an option that nobody with weight chose."""
    q = np.where(chosen, np.exp(logs - logs.max(1, keepdims=True)), 0.0)
    return np.asarray(q / q.sum(1, keepdims=True), dtype=np.float64)


def _step(p: Array, y: Array, w: Array) -> Array:
    """Return the normalised geometric mean of the midpoints (p + y_g) / 2."""
    logs = np.einsum("qg,qgk->qk", w, np.log(0.5 * (np.maximum(p, TINY)[:, None, :] + y)))
    return _normalised(logs, np.einsum("qg,qgk->qk", w, y) > 0)


def minimise_distance(y: Array, w: Array, jsd_optimum: Array, thorough: bool) -> Array:
    """Return a good argmin_p sum_g w_g sqrt(JSD(p, y_g)): several starts, and every y_g itself."""
    mean = weighted_mean(y, w)
    starts = [mean, jsd_optimum]
    if thorough:
        starts += [0.5 * (mean + y[:, g]) for g in range(y.shape[1])]
    candidates = [_majorise_distance(y, w, p) for p in starts]
    candidates += [y[:, g] for g in range(y.shape[1])]
    values = np.array(
        [(w * np.sqrt(alignment.jsd(p[:, None, :], y))).sum(1) for p in candidates]
    )  # (candidates, questions)
    return np.asarray(np.array(candidates)[values.argmin(0), np.arange(len(mean))])


def _majorise_distance(y: Array, w: Array, start: Array, steps: int = 60) -> Array:
    """Iterate from one start: sqrt(J) <= sqrt(J0) + (J - J0) / (2 sqrt(J0)), then a JSD step."""
    p = start
    for _ in range(steps):
        v = w / np.sqrt(np.maximum(alignment.jsd(p[:, None, :], y), 1e-16))
        q = _step(p, y, v / v.sum(1, keepdims=True))
        if np.abs(q - p).max() < 1e-7:
            return q
        p = q
    return p


def median_answer(y: Array, w: Array, ordinals: Array) -> Array:
    """Return the answer whose cumulative share is the weighted median at every threshold."""
    order = np.argsort(ordinals, axis=1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(y, order[:, None, :], 2), 2)  # (q, g, k)
    rank = np.argsort(cumulative, axis=1, kind="stable")
    ascending = np.take_along_axis(cumulative, rank, 1)
    mass = np.cumsum(np.take_along_axis(np.broadcast_to(w[:, :, None], y.shape), rank, 1), 1)
    middle = (mass >= 0.5 - 1e-12).argmax(1)  # (q, k): first group at half of the weight
    f = np.take_along_axis(ascending, middle[:, None, :], 1)[:, 0]
    f[:, -1] = 1.0
    # Medians of cumulative sums are cumulative sums, up to rounding.
    sorted_p = np.maximum(np.diff(f, axis=1, prepend=0.0), 0.0)
    p = np.zeros_like(sorted_p)
    np.put_along_axis(p, order, sorted_p / sorted_p.sum(1, keepdims=True), 1)
    return p
