"""Weights of groups in reward federation: the worse a group was rewarded, the more it counts.

The weights of round t come from the history h of round t - 1 (``history.py``), an average of the
mean reward of each group::

    literal, scaled, reweighted   a_g = softmax_g((1 - h_g) / T)            arXiv 2512.08786
    placebo                       the same over shuffled histories          ``placebo.py``
    multiplicative                a_g <- a_g exp(step (1 - rbar_g)) / sum   arXiv 2405.20304
    all other rules               a_g = 1 / n; they read no weights

In adapter federation the score of the received adapter is known before aggregation; here the
rewards of a round are what is weighed, so weights must not read them.  Round 1 is the exception:
its texts come from the untouched base, and its own mean rewards are the cold start.

Where we differ from the published forms:

- Floor and ceiling (``bounds.py``): no group vanishes and none takes over.  With floor 0 and a
  large ceiling the softmax is the published one up to the cap of (1 + 1/n) / 2.
- The start, and which factor the decay multiplies, are not published: see ``history.py``.
- A group without history (enrolled since) has weight 1/n until its first reward.  A site that
  withholds its scores still gives rewards, so no present group is without one here.
- multiplicative: the published step is multiplied by N / N_g, the inverse share of examples, and
  its loss is that of DPO; here every group counts once and the loss is 1 - mean reward.  A group
  that did not answer neither gains nor loses: the others share out what they had together.

Weights here are over the groups named by the caller.  ``group_rewards.combine`` restricts them
rollout by rollout to the groups that answered, which keeps their ratios, so that a weight may then
exceed the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedalign.aggregation import bounds, history
from fedalign.aggregation.adaptive import softmax_weights
from fedalign.aggregation.records import (
    GroupObservation,
    Observation,
    RuleState,
    WeightSettings,
)
from fedalign.config_rules import REWARD_RULES
from fedalign.randomness import generator

BY_HISTORY = ("literal", "scaled", "reweighted", "placebo")
"""Rules whose weights are a softmax of the shortfall."""

LEAST = 1e-300
"""An iterate below this is taken as this, so that its logarithm is finite and it can return."""


def cold_start(
    settings: WeightSettings, scores: Mapping[str, float], enrolled: Sequence[str]
) -> RuleState:
    """Return the state before round 1, from each group's mean reward for texts of the base.

    Args:
        scores: group to mean reward in [0, 1]; a group that did not answer is left out.
        enrolled: every group of the federation.
    """
    return history.cold_start(settings, _observation(scores, enrolled, 0))


def group_weights(
    rule: str, settings: WeightSettings, state: RuleState, groups: Sequence[str], round_: int
) -> tuple[RuleState, dict[str, float]]:
    """Return the state and the weight of each of ``groups`` in round ``round_``, summing to 1.

    No rule changes the state here; it is returned so that a rule may.

    Args:
        rule: one of ``rewards.rule``.
        state: from :func:`cold_start` in round 1, else from :func:`observe` of the round before.
        groups: distinct names; their order does not matter.
        round_: counted from 1; keys the shuffle of ``placebo``.

    Raises:
        ValueError: an unknown rule, no group, or a group named twice.
    """
    _check_rule(rule)
    names = sorted(groups)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"groups {list(groups)} must be at least one, each named once")
    if rule == "multiplicative":
        iterate = _logs(_enrolled(state.iterate, names))
        return state, bounds.bound(iterate, settings.floor, settings.ceiling)
    weights = dict.fromkeys(names, 1.0 / len(names))
    if rule not in BY_HISTORY:
        return state, weights
    known = [g for g in names if g in state.history]
    if known:
        owners = known
        if rule == "placebo":
            order = generator(settings.seed, "placebo", round_).permutation(len(known))
            owners = [known[int(i)] for i in order]
        shortfalls = {
            g: history.shortfall(state, owner) for g, owner in zip(known, owners, strict=True)
        }
        room = len(known) / len(names)
        weights |= {g: room * a for g, a in softmax_weights(shortfalls, settings).items()}
    return state, weights


def observe(
    rule: str,
    settings: WeightSettings,
    state: RuleState,
    scores: Mapping[str, float],
    enrolled: Sequence[str],
    round_: int,
) -> RuleState:
    """Return the state after round ``round_``: history, and for ``multiplicative`` the iterate.

    Args:
        scores: group to mean reward of this round in [0, 1]; a group that did not answer is left
            out, and keeps its history bit for bit.
        enrolled: every group of the federation.

    Raises:
        ValueError: no score, a score that is not finite or out of range, or of a group that is not
            enrolled; ``step`` not above 0 for ``multiplicative``.
    """
    _check_rule(rule)
    state = history.observe(state, settings, _observation(scores, enrolled, round_))
    if rule != "multiplicative":
        return state
    if not settings.step > 0:
        raise ValueError(f"step = {settings.step} must be above 0")
    logs = _logs(_enrolled(state.iterate, sorted(enrolled)))
    moved = {g: logs[g] + settings.step * max(0.0, 1.0 - s) for g, s in scores.items()}
    # Those that answered keep the weight they had together; an absent group keeps its own.
    shift = _log_sum(logs[g] for g in scores) - _log_sum(moved.values())
    logs |= {g: x + shift for g, x in moved.items()}
    return replace(state, iterate=bounds.bound(logs, settings.floor, settings.ceiling))


def _observation(scores: Mapping[str, float], enrolled: Sequence[str], round_: int) -> Observation:
    stranger = sorted(set(scores) - set(enrolled))
    if stranger:
        raise ValueError(f"group '{stranger[0]}' has a reward but is not enrolled")
    groups = {g: GroupObservation(g in scores, scores.get(g), 0) for g in enrolled}
    return Observation(round_, groups)


def _enrolled(iterate: Mapping[str, float], groups: Sequence[str]) -> dict[str, float]:
    """Return the iterate over exactly these groups, summing to 1; a new group enters at 1/n."""
    known = {g: iterate[g] for g in groups if g in iterate}
    total = math.fsum(known.values())
    room = len(known) / len(groups)
    fresh = dict.fromkeys(groups, 1.0 / len(groups))
    if total > 0:
        fresh |= {g: room * x / total for g, x in known.items()}
    return fresh


def _logs(weights: Mapping[str, float]) -> dict[str, float]:
    return {g: math.log(max(a, LEAST)) for g, a in weights.items()}


def _log_sum(logs: Iterable[float]) -> float:
    """Return the logarithm of the sum of exponentials."""
    values = list(logs)
    top = max(values)
    return top + math.log(math.fsum(math.exp(x - top) for x in values))


def _check_rule(rule: str) -> None:
    if rule not in REWARD_RULES:
        raise ValueError(f"rule '{rule}' is not one of {', '.join(REWARD_RULES)}")
