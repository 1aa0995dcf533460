"""From the rewards of groups to the one reward of a sampled text.

In reward federation the server samples N texts (rollouts), every group g of G gives each a reward
r_gi in [0, 1], and the server trains on one number R_i for each text.  With n the number of groups
that answered rollout i, a the group weights (``reward_weights.py``) restricted to those groups and
renormalised, and sums and means over those groups::

    mean          R = mean_g r_g                                     arXiv 2512.08786
    min, max      R = min_g r_g, max_g r_g                           arXiv 2512.08786
    literal       R = log( (1/n) sum_g exp(a_g r_g) )                arXiv 2512.08786, as printed
    scaled        R = n log( (1/n) sum_g exp(a_g r_g) )              literal on the scale of mean
    reweighted    R = sum_g a_g r_g                                  first order of scaled
    soft-min      R = (1/k) log( (1/n) sum_g exp(k r_g) ), k < 0     family of arXiv 2405.00254
    mixture       R = 1 + (1/L) log( (1/n) sum_g exp(L (r_g - 1)) )  ours
    multiplicative  as reweighted; its weights carry the history     arXiv 2405.20304
    placebo       as literal; its weights belong to shuffled groups  control
    mean-over-n   R = (1/n) mean_g r_g                               control: literal's scale alone
    mean-kl-n     as mean, with the KL coefficient times G           control: the same, seen from KL

``literal``, ``scaled`` and ``placebo`` take the plain mean where the fairness index of the rewards
(:func:`reward_index`) reaches a threshold (:func:`adaptive_branch`).

*The scale artefact.*  sum_g dR/dr_g is 1 for mean, min, max, reweighted, soft-min and mixture, but
sum_g a_g softmax_g(a r), about 1/n, for literal: its rewards weigh n times less against a fixed KL
penalty, and jump by n when the branch changes.  A policy held n times closer to the base looks
calmer and more even for that reason alone.  ``mean-over-n`` and ``mean-kl-n`` have the scale
without the weights, ``scaled`` and ``reweighted`` the weights without the scale, ``placebo`` both
without the need.  ``Combined.scale`` reports the sum in every exchange.

*Mixture.*  A ``log`` reward is r = 1 + ln(max(p, floor)) / L with L = -ln(floor).  Its mixture is
the log reward of the groups' mean share: 1 + ln(mean_g max(p_g, floor)) / L.  For every other
reward L = 1 and the rule is the log-mean-exp of r, close to the mean (:func:`mixture_scale`).

*Where we differ from the published rules.*  What a missing answer means is not stated there; here
it is never a zero: the rule is taken over the groups that answered.  The fairness index is taken
over the rollouts of this exchange, by question.  The weights have a floor and a ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedalign.config_rules import REWARD_RULES
from fedalign.metrics.fairness import jain_rows

Array = NDArray[np.float64]

SWITCHED = ("literal", "scaled", "placebo")
"""Rules that take the plain mean where the rewards are fair enough."""

TOLERANCE = 1e-6
"""How far a reward may lie outside [0, 1] by rounding."""


@dataclass(frozen=True)
class Combined:
    """One reward for each rollout, and how it hangs on the groups."""

    values: Array
    """(N,) R_i; NaN where no group answered the rollout."""
    influence: Array
    """(G,) mean over answered rollouts of dR_i / dr_gi, normalised to sum 1."""
    scale: float
    """Mean over answered rollouts of sum_g dR_i / dr_gi: 1 for a mean, about 1/G for literal."""


def combine(
    rule: str,
    rewards: ArrayLike,
    weights: ArrayLike,
    *,
    adaptive: bool,
    sharpness: float,
    log_scale: float = 1.0,
) -> Combined:
    """Return the combined reward of each rollout; formulas at the top of this file.

    Args:
        rule: one of ``rewards.rule``.
        rewards: (G, N) in [0, 1]; NaN where the group did not answer.
        weights: (G,) on the simplex; read by literal, scaled, reweighted, multiplicative, placebo.
            Where the groups that answered a rollout have no weight at all, they count equally.
        adaptive: which branch the fairness index took; read by :data:`SWITCHED` alone.
        sharpness: k of ``soft-min``, below 0.
        log_scale: L of ``mixture``, above 0, see :func:`mixture_scale`.

    Raises:
        ValueError: shapes that do not fit, rewards out of range, weights off the simplex, an
            unknown rule or a setting out of range, or rollouts that no group answered at all.
    """
    r = _rewards(rewards)
    present = ~np.isnan(r)
    answered = present.any(0)
    if not answered.any():
        raise ValueError("no group answered any rollout; there is no reward to combine")
    there = present[:, answered]
    x = np.where(there, r[:, answered], 0.0)  # (G, answered); absent entries are masked below
    if rule in SWITCHED and not adaptive:
        rule = "mean"
    n = there.sum(0)
    even = there / n
    a = _restricted(_simplex(weights, len(r)), there)
    match rule:
        case "mean" | "mean-kl-n":
            value, slope = (even * x).sum(0), even
        case "mean-over-n":
            value, slope = (even * x).sum(0) / n, even / n
        case "min":
            value = np.where(there, x, np.inf).min(0)
            slope = _shared(there & (x == value))
        case "max":
            value = np.where(there, x, -np.inf).max(0)
            slope = _shared(there & (x == value))
        case "literal" | "placebo":
            value, share = _log_mean_exp(a * x, there)
            slope = a * share
        case "scaled":
            value, share = _log_mean_exp(a * x, there)
            value, slope = n * value, n * a * share
        case "reweighted" | "multiplicative":
            value, slope = (a * x).sum(0), a
        case "soft-min":
            if not (math.isfinite(sharpness) and sharpness < 0):
                raise ValueError(f"sharpness = {sharpness} must be finite and below 0")
            value, slope = _log_mean_exp(sharpness * x, there)
            value = value / sharpness
        case "mixture":
            if not (math.isfinite(log_scale) and log_scale > 0):
                raise ValueError(f"log_scale = {log_scale} must be finite and above 0")
            value, slope = _log_mean_exp(log_scale * (x - 1.0), there)
            value = 1.0 + value / log_scale
        case _:
            raise ValueError(f"rule '{rule}' is not one of {', '.join(REWARD_RULES)}")
    values = np.full(r.shape[1], np.nan)
    values[answered] = value
    pull = slope.mean(1)  # (G,)
    scale = float(pull.sum())
    return Combined(values, pull / scale, scale)


def kl_factor(rule: str, groups: int) -> float:
    """Return what the KL coefficient is multiplied by: G for ``mean-kl-n``, else 1."""
    if groups < 1:
        raise ValueError(f"{groups} groups; there must be at least one")
    return float(groups) if rule == "mean-kl-n" else 1.0


def mixture_scale(kind: str, floor: float) -> float:
    """Return L of ``mixture``: -ln(floor) for reward ``log`` with that floor in (0, 1), else 1."""
    return -math.log(floor) if kind == "log" else 1.0


def reward_index(rewards: ArrayLike, question_of: Sequence[int]) -> float | None:
    """Return the fairness index of group rewards (G, N), in [1/G, 1].

    Mean over the samples of a question, then 1 / (1 + CoV^2) over groups (population standard
    deviation), then mean over questions.  Only rollouts that every group answered count, so that
    groups are compared on the same texts.  A question whose rewards are all 0 is left out.  None
    where nothing is left.

    Args:
        rewards: (G, N) in [0, 1]; NaN where the group did not answer.
        question_of: (N,) the question of each rollout, any integers.
    """
    r = _rewards(rewards)
    questions = np.asarray(question_of, dtype=np.int64)
    if questions.shape != (r.shape[1],):
        raise ValueError(f"{questions.size} question numbers for {r.shape[1]} rollouts")
    complete = ~np.isnan(r).any(0)
    if not complete.any():
        return None
    _, place = np.unique(questions[complete], return_inverse=True)
    counts = np.bincount(place)
    sums = np.stack([np.bincount(place, weights=row) for row in r[:, complete]], axis=1)
    means = np.clip(sums / counts[:, None], 0.0, None)  # (questions, G)
    usable = means[means.max(1) > 0]
    return float(jain_rows(usable).mean()) if len(usable) else None


def adaptive_branch(index: float | None, threshold: float) -> bool:
    """Return whether the switched rules weigh: the index is below the threshold.

    The plain mean is taken at the threshold and above.  An undefined index has not shown the
    rewards to be fair, so the rules weigh.
    """
    return index is None or index < threshold


def _rewards(rewards: ArrayLike) -> Array:
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or 0 in r.shape:
        raise ValueError(f"rewards have shape {r.shape}; expected (groups, rollouts), not empty")
    given = r[~np.isnan(r)]
    if ((given < -TOLERANCE) | (given > 1.0 + TOLERANCE)).any():
        raise ValueError(f"rewards span [{given.min():.6g}, {given.max():.6g}], outside [0, 1]")
    return r


def _simplex(weights: ArrayLike, groups: int) -> Array:
    a = np.asarray(weights, dtype=np.float64)
    if a.shape != (groups,):
        raise ValueError(f"weights have shape {a.shape}; expected ({groups},), one a group")
    if not (np.isfinite(a).all() and (a >= 0).all() and abs(float(a.sum()) - 1.0) <= 1e-6):
        raise ValueError(f"weights {a.tolist()} are not on the simplex")
    return a


def _restricted(weights: Array, there: NDArray[np.bool_]) -> Array:
    """Return weights (G, N) over the groups present in each column, each column summing to 1."""
    a = weights[:, None] * there
    total = a.sum(0)
    even = there / there.sum(0)
    return np.where(total > 0, a / np.where(total > 0, total, 1.0), even)


def _shared(tied: NDArray[np.bool_]) -> Array:
    """Return the derivative of a minimum or maximum; groups that tie share it."""
    return np.asarray(tied / tied.sum(0))


def _log_mean_exp(x: Array, there: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return log of the mean of exp(x) over present entries (N,), and its softmax (G, N)."""
    masked = np.where(there, x, -np.inf)
    top = masked.max(0)
    mass = np.exp(masked - top)
    total = mass.sum(0)
    return top + np.log(total / there.sum(0)), mass / total
