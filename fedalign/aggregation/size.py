"""Size: a group counts by its number of training examples, ``a_g = n_g / sum n`` (FedAvg).

Reference: arXiv 1602.05629.  When not to use it: when groups differ in size and disagree, the
minority pays; and sizes are claims of the clients.  Floor and ceiling are not applied, so that this
stays the rule people know.
"""

from __future__ import annotations

from fedalign.aggregation import history
from fedalign.aggregation.records import Observation, RuleState, WeightSettings


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's history, and weights proportional to size.

    Raises:
        ValueError: every present group has size 0.
    """
    state = history.observe(state, settings, observation)
    sizes = {g: observation.groups[g].size for g in observation.present()}
    total = sum(sizes.values())
    if total == 0:
        raise ValueError("every present group has size 0; use the rule 'uniform'")
    return state, {g: n / total for g, n in sizes.items()}
