"""Uniform: every present group counts the same, ``a_g = 1 / n``.

The control every other rule is compared with.  When not to use it: when one group is served far
worse than the others and there is no reason to accept that.
"""

from __future__ import annotations

from fedalign.aggregation import history
from fedalign.aggregation.records import Observation, RuleState, WeightSettings


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's history, and equal weights over the present groups."""
    state = history.observe(state, settings, observation)
    present = observation.present()
    return state, {g: 1.0 / len(present) for g in present}
