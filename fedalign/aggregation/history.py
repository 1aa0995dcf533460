"""History: how well each group has been served so far.

An exponential moving average of the score of the shared model::

    h_g  <-  decay * h_g + (1 - decay) * score_g          for every group that is present

as in fairness-weighted reward aggregation (arXiv 2512.08786 names a history with decay 0.8; which
factor the 0.8 multiplies, and the start value, are not stated there, so both are ours).  Where we
differ, and why:

- *Cold start.*  The untouched base is scored for every group before round 1 (round 0) and that
  score is h.  A zero start would read as "everybody is served badly" for several rounds.
- *Absent group.*  Its value stays bit for bit; only ``rounds_since_seen`` counts up.  A missing
  reply is never a score of zero, which would take over the softmax.
- *New group mid-run.*  Its first score becomes its history.
- *Withheld score.*  A present group that keeps its score to itself is not observed: its history
  stays as it is.  One that never gave a score has none, and :func:`shortfalls` puts the neutral
  value in its place: the mean of the histories of the enrolled groups that have one, so that
  withholding neither gains nor costs weight against an average group.  Where no group has a
  history, all shortfalls are 0 and every rule gives what it gives to groups served alike.
- *Default decay 0.*  A run of 8 rounds hardly moves an average with decay 0.8 (half-life 3.1
  rounds); with decay 0 the history is the score of the adapter of this round.

In adapter federation the score of the received adapter arrives with the reply, before aggregation,
so the weights of round t use the history of round t.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fedalign.aggregation.records import (
    GroupHistory,
    Observation,
    RuleState,
    WeightSettings,
    check_observation,
)


def observe(state: RuleState, settings: WeightSettings, observation: Observation) -> RuleState:
    """Return the state with the history of every group brought up to this round.

    Every weight rule calls this, and nothing else writes history.  A group that is in the state but
    no longer enrolled keeps its history like an absent one, and so does one that withholds.

    Raises:
        ValueError: the observation holds a NaN, a score out of range or no present group, or
            ``settings.decay`` is outside [0, 1).
    """
    check_observation(observation)
    decay = settings.decay
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay = {decay} is outside [0, 1); 0 keeps the latest score only")
    history = {
        group: replace(h, rounds_since_seen=h.rounds_since_seen + 1)
        for group, h in state.history.items()
    }
    for group, score in observation.scores().items():
        before = state.history.get(group)
        if before is None:
            history[group] = GroupHistory(value=score, observed=1, rounds_since_seen=0)
        else:
            history[group] = GroupHistory(
                value=decay * before.value + (1.0 - decay) * score,
                observed=before.observed + 1,
                rounds_since_seen=0,
            )
    return replace(state, history=history)


def cold_start(settings: WeightSettings, observation: Observation) -> RuleState:
    """Return the state before round 1, from the scores of the untouched base (round 0)."""
    if observation.round != 0:
        raise ValueError(f"a cold start is round 0, not round {observation.round}")
    return observe(RuleState(), settings, observation)


def shortfall(state: RuleState, group: str) -> float:
    """Return ``1 - h_g``, at least 0 (a score may exceed 1 by rounding, up to 1e-6)."""
    return max(0.0, 1.0 - state.history[group].value)


def shortfalls(state: RuleState, observation: Observation) -> dict[str, float]:
    """Return the shortfall of every present group; the neutral value where it has no history.

    ``state`` is the one that :func:`observe` returned for the same observation.
    """
    known = {g: shortfall(state, g) for g in sorted(observation.groups) if g in state.history}
    neutral = math.fsum(known.values()) / len(known) if known else 0.0
    if known:  # rounding must not make an average group of equals the worst served
        neutral = min(max(neutral, min(known.values())), max(known.values()))
    return {g: known.get(g, neutral) for g in observation.present()}
