"""Placebo: weights as uneven as those of ``adaptive``, but not tied to need.

A control for every claim that adaptive weights help: the histories of the present groups are
shuffled over them before the softmax, so the set of weights is the one ``adaptive`` would give, and
only their owners differ.  The shuffle is a uniformly random permutation, drawn anew each round and
keyed by (seed, "placebo", round).  It may be the identity: a permutation without fixed points
would, with two groups, always favour the better served one, which is a treatment and no placebo.
Under the uniform permutation the expected weight of every group is 1/n.

The history that is kept is the true one; a present group that never gave a score puts the neutral
value (``history.py``) into the shuffle.  When not to use it: anywhere but in a comparison.
"""

from __future__ import annotations

from fedalign.aggregation import history
from fedalign.aggregation.adaptive import softmax_weights
from fedalign.aggregation.records import Observation, RuleState, WeightSettings
from fedalign.randomness import generator


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's true history, and adaptive weights of shuffled history."""
    state = history.observe(state, settings, observation)
    present = observation.present()
    shortfalls = history.shortfalls(state, observation)
    order = generator(settings.seed, "placebo", observation.round).permutation(len(present))
    shuffled = {g: shortfalls[present[int(i)]] for g, i in zip(present, order, strict=True)}
    return state, softmax_weights(shuffled, settings)
