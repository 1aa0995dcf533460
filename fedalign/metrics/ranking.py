"""How well a printed order of the options serves a group whose people answer y.

An order is a permutation of 0..K-1, most to least chosen.  The group's own ranking comes from its
shares; options with equal shares share their mean rank.  Scores are in [0, 1], higher is better.

===========  ====================================================================  =================
``borda``    (sum_o b(o) c(o) - m) / (M - m), b the points of the order            .5 by chance
``kendall``  (1 + tau) / 2                                                         .5 by chance
``binary``   1 if the first option printed is a top option of the group, else 0    tied tops / K
===========  ====================================================================  =================

*Borda.*  The points of an option are the number of options ranked below it, equal ones counting
half: b for the order, c for the group.  M = sum k^2 over k = 0..K-1 is the value of equal orders, m
that of reversed ones.  Without ties this is exactly (1 + rho) / 2 with Spearman's rho.  With ties
it is (1 + rho sd(c) / sd(b)) / 2: it stays linear in the group's points, and an order, which cannot
say "equal", then stays short of 1.

*Kendall.*  tau-a where the group's shares all differ, tau-b where some are equal (an order has no
ties of its own, so tau-b too stays short of 1 then).

A group whose shares are all equal ranks nothing above anything: every order has borda and kendall
.5 and binary 1.

Published Borda, Kendall and "binary" scores of group alignment do not state their normalisation;
these forms are ours and need not be theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedalign.config_rules import ORDER_METRICS
from fedalign.errors import DataError
from fedalign.metrics.alignment import distribution

Array = NDArray[np.float64]
Orders = NDArray[np.int64]


def score(metric: str, order: Sequence[int], shares: ArrayLike) -> float:
    """Return the score of one order (K,) for a group's shares (K,).

    Raises:
        DataError: ``order`` is not a permutation of 0..K-1, ``shares`` is no distribution over K
            options, or the metric is none of ``borda``, ``kendall``, ``binary``.
    """
    y = distribution(shares, "shares")
    if sorted(order) != list(range(len(y))):
        raise DataError(
            f"order {list(order)} is not a permutation of 0..{len(y) - 1} (one entry an option)."
        )
    return float(kernel(metric, np.asarray(order, dtype=np.int64), y))


def kernel(metric: str, orders: Orders, shares: Array) -> Array:
    """Return scores of orders (..., K) for shares (..., K), broadcast over the leading axes.

    No checks: callers outside this package use :func:`score`.
    """
    if metric == "borda":
        return borda(orders, shares)
    if metric == "kendall":
        return kendall(orders, shares)
    if metric == "binary":
        return binary(orders, shares)
    raise DataError(f"'{metric}' is not a score of an order. Use {', '.join(ORDER_METRICS)}.")


def borda(orders: Orders, shares: Array) -> Array:
    """Return the normalised agreement of Borda points, (...) in [0, 1]."""
    k = shares.shape[-1]
    if k == 1:
        return np.ones(np.broadcast_shapes(orders.shape, shares.shape)[:-1])
    ranks = np.arange(k)
    low, high = float(ranks @ ranks[::-1]), float(ranks @ ranks)
    agreement = (order_points(orders) * share_points(shares)).sum(-1)
    return np.asarray((agreement - low) / (high - low), dtype=np.float64)


def kendall(orders: Orders, shares: Array) -> Array:
    """Return (1 + tau) / 2, (...) in [0, 1]; tau-b where shares are equal, else tau-a."""
    i, j = np.triu_indices(shares.shape[-1], 1)
    points = order_points(orders)
    printed = np.sign(points[..., i] - points[..., j])
    wanted = np.sign(shares[..., i] - shares[..., j])
    agreement = (printed * wanted).sum(-1)  # concordant minus discordant pairs
    # Every pair is ordered in a printed order; in the group's those that are not equal.
    norm = np.sqrt(len(i) * np.abs(wanted).sum(-1))
    return np.asarray(0.5 + 0.5 * agreement / np.where(norm > 0, norm, 1.0), dtype=np.float64)


def binary(orders: Orders, shares: Array) -> Array:
    """Return 1 where the first option printed is one of the group's top options, else 0: (...)."""
    top = shares == shares.max(-1, keepdims=True)
    first = orders[..., :1]
    lead = np.broadcast_shapes(first.shape[:-1], top.shape[:-1])
    chosen = np.take_along_axis(
        np.broadcast_to(top, (*lead, top.shape[-1])), np.broadcast_to(first, (*lead, 1)), -1
    )
    return chosen[..., 0].astype(np.float64)


def chance(metric: str, shares: ArrayLike) -> float:
    """Return what an order drawn uniformly at random scores on average for shares (K,)."""
    y = distribution(shares, "shares")
    if metric not in ORDER_METRICS:
        raise DataError(f"'{metric}' is not a score of an order. Use {', '.join(ORDER_METRICS)}.")
    if metric == "binary":
        return float((y == y.max()).mean())
    return 0.5


def order_points(orders: Orders) -> Array:
    """Return Borda points by option (..., K): K-1 for the first option printed, 0 for the last."""
    k = orders.shape[-1]
    # The inverse permutation says at which place an option stands.
    return (k - 1 - np.argsort(orders, axis=-1)).astype(np.float64)


def share_points(shares: Array) -> Array:
    """Return Borda points by option (..., K): options with a smaller share, equal ones half."""
    a, b = shares[..., :, None], shares[..., None, :]
    return np.asarray((a > b).sum(-1) + 0.5 * ((a == b).sum(-1) - 1), dtype=np.float64)


def all_orders(k: int) -> Orders:
    """Return every permutation of 0..k-1, lexicographic: (k!, k)."""
    return np.array(list(itertools.permutations(range(k))), dtype=np.int64)
