"""From group weights to client weights, and from client scores to a group score.

A group's weight goes to its clients as ``w_c = a_g * v_c`` with ``sum_c v_c = 1`` over the clients
whose reply is used.  Sizes are claims: one client that reports a thousand times its examples would
speak for its whole group, so every size is capped at 4 times the median size of its group (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

SIZE_CAP = 4.0
"""Largest size that counts, in medians of the group."""


def capped_sizes(sizes: Sequence[int]) -> list[float]:
    """Return ``min(n_c, 4 * median)`` for the clients of one group.

    Raises:
        ValueError: no client, a negative size, or a group whose capped sizes are all 0.
    """
    if not sizes:
        raise ValueError("a group without clients has no sizes")
    if min(sizes) < 0:
        raise ValueError(f"sizes {list(sizes)} hold a negative number")
    # The median of the non-empty clients: many empty ones must not cap everybody to nothing.
    positive = [n for n in sizes if n > 0]
    if not positive:
        raise ValueError("every client of the group has size 0; use within-group 'equal'")
    cap = SIZE_CAP * median(positive)
    return [min(float(n), cap) for n in sizes]


def client_weights(
    group_weights: Mapping[str, float],
    clients: Sequence[tuple[str, str, int]],
    how: str = "size",
) -> dict[str, float]:
    """Return the weight of each client; the weights of a group's clients sum to its weight.

    Args:
        group_weights: weight of each present group, summing to 1.
        clients: (client, group, size) of every client whose reply is used.
        how: ``size`` (capped, see above) or ``equal``.

    Raises:
        ValueError: a client of a group without weight, a group without clients, a client named
            twice, or an unknown ``how``.
    """
    if how not in ("size", "equal"):
        raise ValueError(f"within-group = '{how}' is not one of size, equal")
    members: dict[str, list[tuple[str, int]]] = {g: [] for g in group_weights}
    seen: set[str] = set()
    for client, group, size in clients:
        if group not in members:
            raise ValueError(f"client '{client}' is of group '{group}', which has no weight")
        if client in seen:
            raise ValueError(f"client '{client}' is listed twice")
        seen.add(client)
        members[group].append((client, size))
    weights: dict[str, float] = {}
    for group, share in group_weights.items():
        if not members[group]:
            raise ValueError(f"group '{group}' has weight {share:g} but no client")
        sizes = [n for _, n in members[group]]
        values = [1.0] * len(sizes) if how == "equal" else capped_sizes(sizes)
        total = math.fsum(values)
        for (client, _), v in zip(members[group], values, strict=True):
            weights[client] = share * (v / total)
    return weights


def group_score(scores: Sequence[float], sizes: Sequence[int]) -> float:
    """Return a group's score: the mean of its clients' scores, weighted by capped size.

    Args:
        scores: score of each client, in the range of the metric, higher is better.
        sizes: number of examples (or questions) behind each score.

    Raises:
        ValueError: lengths differ, a score is not finite, or no size is above 0.
    """
    if len(scores) != len(sizes):
        raise ValueError(f"{len(scores)} scores for {len(sizes)} sizes")
    for s in scores:
        if not math.isfinite(s):
            raise ValueError(f"a client's score is {s}; a failed score must be left out by name")
    weights = capped_sizes(sizes)
    mean = math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)
    return min(max(mean, min(scores)), max(scores))  # rounding must not leave the scores' range
