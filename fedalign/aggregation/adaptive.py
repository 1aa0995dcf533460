"""Adaptive: the worse a group is served, the more it counts.

Reference: the history-based "reverse softmax" of fairness-weighted reward aggregation (arXiv
2512.08786), carried over from the weighting of rewards to the weighting of adapters::

    a_g = exp((1 - h_g) / T) / sum_g' exp((1 - h_g') / T)

with h the history (``history.py``) and T the temperature in units of the score.  The ratio between
two groups is exp(dh / T): at T = .05 a difference of .05 in score is a factor of 2.7.

Where we differ:

- In log space, then floor and ceiling (``bounds.py``).
- The softmax runs over all enrolled groups; restricted to the present ones and renormalised it is
  the softmax over the present ones, whatever the absent groups hold.  Floor and ceiling are
  therefore applied once, last, in units of 1 / (number of present groups), so that they hold for
  the weights that are used.  :func:`coverage` tells how much of the enrolled weight was present.
- A present group that never gave a score counts as an average one (``history.py``).

When not to use it: when groups cannot be served equally well (a group with diffuse answers always
looks worst served), or with a high ceiling when you do not trust the parties that report scores.
"""

from __future__ import annotations

import math

from fedalign.aggregation import bounds, history
from fedalign.aggregation.records import Observation, RuleState, WeightSettings


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's history, and the adaptive weights of present groups.

    Raises:
        ValueError: temperature not above 0, or an observation no rule may see.
    """
    state = history.observe(state, settings, observation)
    return state, softmax_weights(history.shortfalls(state, observation), settings)


def softmax_weights(shortfalls: dict[str, float], settings: WeightSettings) -> dict[str, float]:
    """Return ``softmax(shortfall / T)`` within floor and ceiling."""
    if not settings.temperature > 0:
        raise ValueError(f"temperature = {settings.temperature} must be above 0")
    logits = {g: s / settings.temperature for g, s in shortfalls.items()}
    return bounds.bound(logits, settings.floor, settings.ceiling)


def coverage(settings: WeightSettings, state: RuleState, observation: Observation) -> float:
    """Return the share of the enrolled groups' softmax weight that is present, in (0, 1].

    Absent groups without history (never scored) do not count.  ``state`` is the one that
    :func:`update` returned for the same observation.
    """
    shortfalls = history.shortfalls(state, observation) | {
        g: history.shortfall(state, g) for g in observation.groups if g in state.history
    }
    logits = {g: s / settings.temperature for g, s in shortfalls.items()}
    top = max(logits.values())
    mass = {g: math.exp(x - top) for g, x in logits.items()}
    return math.fsum(mass[g] for g in observation.present()) / math.fsum(mass.values())
