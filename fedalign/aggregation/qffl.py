"""q-FFL weights: ``a_g = p_g (1 - h_g)^q / sum``, with p uniform over the present groups.

Reference: the weight form of q-fair federated learning, arXiv 1905.10497.  It is **not** q-FedAvg:
the published update also lets the denominator set the step size of the server; here weights are
normalised and the step is that of the aggregation.  h is the history (decay 0: the score of this
round).  The power is taken of the shortfall plus 1e-10, as in released code, so that a group with
score 1 keeps a finite logarithm.  Floor and ceiling are applied last (``bounds.py``).

q = 0 is uniform; q = 1 is proportional to the shortfall.  Only ratios of shortfalls count, so the
rule does not depend on the unit of the score.  A present group that never gave a score has the
mean shortfall of the others (``history.py``).  When not to use it: near score 1, where ratios of
tiny shortfalls are noise.
"""

from __future__ import annotations

import math

from fedalign.aggregation import bounds, history
from fedalign.aggregation.records import Observation, RuleState, WeightSettings

EPSILON = 1e-10


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's history, and the q-FFL weights of the present groups."""
    state = history.observe(state, settings, observation)
    return state, qffl_weights(history.shortfalls(state, observation), settings)


def qffl_weights(shortfalls: dict[str, float], settings: WeightSettings) -> dict[str, float]:
    """Return weights proportional to ``shortfall ** q``, within floor and ceiling.

    Raises:
        ValueError: q below 0.
    """
    if not settings.q >= 0:
        raise ValueError(f"q = {settings.q} must be 0 or above")
    logs = {g: settings.q * math.log(s + EPSILON) for g, s in shortfalls.items()}
    return bounds.bound(logs, settings.floor, settings.ceiling)
