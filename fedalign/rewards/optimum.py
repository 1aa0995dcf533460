"""The policy that rewards ask for, in closed form, and how much of the way to it was gone.

PPO with a KL penalty maximises E_pi[R] - kl KL(pi || pi_ref) over distributions of whole texts.
The maximum is pi*(x) proportional to pi_ref(x) exp(R(x) / kl) (Korbak et al., arXiv 2205.11275).
Where the answers to a question can be listed, pi* can be computed, and a trained policy compared
with it; no training method can do better on these rewards.

A question has M well-formed answers, each with its own reward, and all other texts, which share one
reward.  Texts with equal reward keep their proportions in pi*, so all others together are one more
entry, the *rest*: vectors here have M + 1 entries, the rest last.

With *reference correction* the reward of a well-formed answer is R - kl ln pi_ref, so its factor
pi_ref cancels: pi* is proportional to exp(R / kl) there.  The rest keeps its own.

An order or letter is taken as the one token sequence that training uses.  Other spellings that the
parser accepts are in the rest, which makes their reward too low here: a small error while the rest
is small, and the reason why the mass of the answers is reported beside the result.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedalign.metrics.alignment import jsd

Array = NDArray[np.float64]

LEAST_REST = 1e-9
"""Least probability of the rest: float32 log-probabilities do not resolve less (about 1e-7), and
it keeps divergences finite."""
ROUNDING = 1e-4
"""By how much probabilities of answers may exceed 1 together (a base in bfloat16)."""


def with_rest(logps: ArrayLike) -> Array:
    """Return the probabilities (M + 1,) of M answers and the rest.

    Args:
        logps: (M,) log-probabilities of the answers, nats.

    Raises:
        ValueError: no answers, a log-probability that is NaN, or a sum above 1.
    """
    x = np.asarray(logps, dtype=np.float64)
    mass = float(np.exp(x).sum()) if x.ndim == 1 and x.size else math.nan
    if not mass <= 1.0 + ROUNDING:
        raise ValueError(
            f"log-probabilities of shape {x.shape} sum to {mass:.6g}; they must be a vector of "
            "answers that exclude each other, with a sum of at most 1."
        )
    p = np.append(np.exp(x), max(1.0 - mass, LEAST_REST))
    return np.asarray(p / p.sum(), dtype=np.float64)


def optimum(
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    kl: float,
    *,
    malformed: float,
    corrected: bool = False,
) -> Array:
    """Return pi* (M + 1,): the best policy for these rewards, the rest last.

    Args:
        ref_logps: (M,) log-probability of each answer under the base, nats.
        rewards: (M,) combined reward of each answer.
        kl: KL coefficient, above 0, in units of reward a nat.
        malformed: combined reward of all other texts.
        corrected: whether kl ln pi_ref is taken off the reward of well-formed answers.

    Raises:
        ValueError: lengths differ, or a number is not finite or out of range.
    """
    base, r = with_rest(ref_logps), np.asarray(rewards, dtype=np.float64)
    if r.shape != (len(base) - 1,) or not np.isfinite(r).all() or not math.isfinite(malformed):
        raise ValueError(f"{r.shape} rewards for {len(base) - 1} answers; all must be finite.")
    if not (math.isfinite(kl) and kl > 0):
        raise ValueError(f"kl = {kl} must be finite and above 0.")
    # An answer that the base never gives stays impossible: its probability underflowed to 0.
    with np.errstate(divide="ignore"):
        logs = np.log(base) + np.append(r, malformed) / kl
    if corrected:
        logs[:-1] = r / kl
    p = np.exp(logs - logs.max())
    return np.asarray(p / p.sum(), dtype=np.float64)


def divergence(p: Array, q: Array) -> float:
    """Return the Jensen-Shannon divergence of two vectors (M + 1,) in bits, in [0, 1]."""
    return float(jsd(p, q)) / math.log(2.0)


def kl_divergence(p: Array, q: Array) -> float:
    """Return KL(p || q) in nats; infinite where q is 0 and p is not.

    The rest counts as one entry, so this is at most the divergence over all texts.
    """
    held = p > 0
    with np.errstate(divide="ignore"):
        return max(0.0, float((p[held] * np.log(p[held] / q[held])).sum()))


def closed(base: Array, opt: Array, model: Array) -> float | None:
    """Return which share of the way from ``base`` to ``opt`` the model has gone, all (M + 1,).

    (JSD(base, opt) - JSD(model, opt)) / JSD(base, opt): 1 at the optimum, 0 as far away as the
    base, negative beyond.  None where base and optimum are equal (there is no way to go).
    """
    return closed_share(divergence(base, opt), divergence(model, opt))


def closed_share(jsd_base: float, jsd_model: float) -> float | None:
    """Return the same from the two divergences (of one question, or means over questions)."""
    return (jsd_base - jsd_model) / jsd_base if jsd_base > 0 else None
