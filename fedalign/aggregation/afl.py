"""AFL: agnostic federated learning, weights that climb towards the worst mixture.

Reference: arXiv 1902.00146.  The server plays against the model: projected gradient ascent on the
group weights ::

    l  <-  Proj( l + step * f ),      f_g = 1 - score_g of the received adapter

with Proj the Euclidean projection onto the simplex.  The published method deploys the *running
average* of the models; here the weights of a round are the **current iterate**, and no average of
models is kept.

Where we differ:

- Proj goes onto the simplex with floor and ceiling (``bounds.project``); floor 0 and a ceiling of n
  give the published projection up to our cap of (1 + 1/n) / 2.  A plain projection reaches exact
  zeros, and a group at zero no longer counts.
- Only present groups have a gradient; an absent group's iterate moves through the projection alone.
- A present group that withholds its score has the shortfall of its last history as gradient, and
  the mean of the others' where it never gave one (``history.py``).  Where nobody gives a score the
  iterate stays.
- A new group enters at 1 / n and the others shrink to make room; a group that left is dropped.
- Over the present groups the iterate is renormalised and projected once more, so that floor and
  ceiling hold for the weights that are used.

The iterate remembers, so ``decay`` has no effect on the weights.  When not to use it: with few
rounds (8 rounds of step .1 move little), or when scores change unit (step is in 1 / score).
"""

from __future__ import annotations

import math
from dataclasses import replace

from fedalign.aggregation import bounds, history
from fedalign.aggregation.records import Observation, RuleState, WeightSettings


def update(
    settings: WeightSettings, state: RuleState, observation: Observation
) -> tuple[RuleState, dict[str, float]]:
    """Return the state with this round's history and iterate, and the weights of present groups."""
    if not settings.step > 0:
        raise ValueError(f"step = {settings.step} must be above 0")
    state = history.observe(state, settings, observation)
    iterate = _enrolled(state, observation)
    scores = observation.scores()
    for g, shortfall in history.shortfalls(state, observation).items():
        gradient = max(0.0, 1.0 - scores[g]) if g in scores else shortfall
        iterate[g] += settings.step * gradient
    iterate = bounds.project(iterate, settings.floor, settings.ceiling)
    here = {g: iterate[g] for g in observation.present()}
    total = math.fsum(here.values())
    # With floor 0 the present groups may all stand at zero; then nothing tells them apart.
    shares = {g: (x / total if total > 0 else 1.0 / len(here)) for g, x in here.items()}
    weights = bounds.project(shares, settings.floor, settings.ceiling)
    return replace(state, iterate=iterate), weights


def _enrolled(state: RuleState, observation: Observation) -> dict[str, float]:
    """Return the iterate over exactly the enrolled groups, summing to 1."""
    groups = sorted(observation.groups)
    known = {g: state.iterate[g] for g in groups if g in state.iterate}
    room = len(known) / len(groups)
    total = math.fsum(known.values())
    iterate = dict.fromkeys(groups, 1.0 / len(groups))
    if total > 0:
        iterate |= {g: room * x / total for g, x in known.items()}
    return iterate
