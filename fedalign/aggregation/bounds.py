"""Floor and ceiling on group weights.

Nothing in the published rules keeps a group from vanishing or from taking over, and a site that
reports poor service gains weight under every rule that helps the worst served.  The bound ::

    a_g  <-  clip(kappa * a_g, floor / n, ceiling / n),    kappa > 0 such that the weights sum to 1

keeps the order of the weights and is idempotent.  kappa exists because floor <= 1 <= ceiling; it is
found by bisection in log space, so that a softmax with a very small temperature cannot underflow
to a weight that no kappa lifts.  The ceiling is never above (1 + 1/n) / 2: two groups can reach
.75 at most, eight .5625 (with the default ceiling of 3/n: .375), one group always has weight 1.

:func:`project` is the same idea with a shift in place of a factor: the Euclidean projection onto
the bounded simplex, which projected gradient ascent (``afl``) needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def limits(n: int, floor: float, ceiling: float) -> tuple[float, float]:
    """Return the least and the largest weight for ``n`` groups; settings are in units of 1/n.

    Raises:
        ValueError: ``floor`` outside [0, 1], ``ceiling`` below 1, or no group.
    """
    if n < 1:
        raise ValueError("weights over no group; at least one group must be present")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor = {floor} is outside [0, 1] (units of 1/n)")
    if not ceiling >= 1.0:
        raise ValueError(f"ceiling = {ceiling} is below 1 (units of 1/n)")
    return floor / n, min(ceiling / n, (1.0 + 1.0 / n) / 2.0)


def bound(log_weights: Mapping[str, float], floor: float, ceiling: float) -> dict[str, float]:
    """Return weights proportional to ``exp(log_weights)`` within floor and ceiling, summing to 1.

    Args:
        log_weights: finite logarithm of the unnormalised weight of each group.
        floor: least weight, in units of 1/n, in [0, 1].
        ceiling: largest weight, in units of 1/n, at least 1.
    """
    groups = sorted(log_weights)
    x = np.array([log_weights[g] for g in groups], dtype=np.float64)  # (groups,)
    if not np.isfinite(x).all():
        raise ValueError(f"log weights must be finite, got {dict(log_weights)}")
    low, high = limits(len(groups), floor, ceiling)
    x = x - x.max()
    log_low, log_high = (float(np.log(low)) if low > 0 else -np.inf), float(np.log(high))

    def clipped(log_kappa: float) -> Vector:
        return np.exp(np.clip(x + log_kappa, log_low, log_high))

    # At the left end every weight is at most 1/n, at the right end every weight is at least 1/n.
    log_share = -float(np.log(len(groups)))
    log_kappa = _bisect(lambda k: float(clipped(k).sum()), log_share, log_share - float(x.min()))
    free = (x + log_kappa > log_low) & (x + log_kappa < log_high)
    return dict(zip(groups, _settle(clipped(log_kappa), free).tolist(), strict=True))


def project(weights: Mapping[str, float], floor: float, ceiling: float) -> dict[str, float]:
    """Return the Euclidean projection of any finite vector onto the bounded simplex.

    ``clip(a_g + tau, floor / n, ceiling / n)`` with tau such that the weights sum to 1.
    """
    groups = sorted(weights)
    x = np.array([weights[g] for g in groups], dtype=np.float64)  # (groups,)
    if not np.isfinite(x).all():
        raise ValueError(f"weights must be finite, got {dict(weights)}")
    low, high = limits(len(groups), floor, ceiling)
    share = 1.0 / len(groups)
    tau = _bisect(
        lambda t: float(np.clip(x + t, low, high).sum()),
        share - float(x.max()),
        share - float(x.min()),
    )
    free = (x + tau > low) & (x + tau < high)
    y = np.clip(x + tau, low, high)
    if free.any():
        y[free] += (1.0 - y.sum()) / free.sum()
    return dict(zip(groups, y.tolist(), strict=True))


def _bisect(total: Callable[[float], float], low: float, high: float) -> float:
    """Return where the non-decreasing ``total`` reaches 1, to the last bit of the argument."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if total(middle) < 1.0:
            low = middle
        else:
            high = middle
    return high


def _settle(weights: Vector, free: NDArray[np.bool_]) -> Vector:
    """Scale the weights that touch no bound so that the sum is 1 to rounding."""
    rest, scaled = 1.0 - float(weights[~free].sum()), float(weights[free].sum())
    if rest > 0 and scaled > 0:  # else the free weights underflowed, and the bounds sum to 1
        weights = weights.copy()
        weights[free] *= rest / scaled
    return weights
