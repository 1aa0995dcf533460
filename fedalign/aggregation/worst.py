"""Worst: all weight on the worst-served present group; exact ties share it.

The limit of ``adaptive`` for temperature to 0 without bounds, as ``min`` aggregation of group
rewards is for rollouts.  When not to use it: the update then comes from one group only, is noisy,
and whoever reports the lowest score takes everything.  A reference point, not a default.  Floor and
ceiling are not applied.  A present group that never gave a score counts as an average one
(``history.py``), so it has weight only where all are served alike or nobody gives a score.
"""

from __future__ import annotations

from fedalign.aggregation import history
from fedalign.aggregation.records import Observation, RuleState, WeightSettings


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's history, and weight 1 on the lowest history."""
    state = history.observe(state, settings, observation)
    shortfalls = history.shortfalls(state, observation)
    largest = max(shortfalls.values())
    tied = [g for g, s in shortfalls.items() if s == largest]
    return state, {g: (1.0 / len(tied) if g in tied else 0.0) for g in shortfalls}
