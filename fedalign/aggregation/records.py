"""The records a weight rule works on: settings, state, observation.  All frozen, all serialisable.

A weight rule is a pure function::

    update(settings: WeightSettings, state: RuleState, observation: Observation)
        -> tuple[RuleState, dict[str, float]]

It returns the new state and a point on the simplex over the groups that are *present*.  Scores are
"higher is better" in ``[score_low, 1]``; the shortfall of a group is ``1 - score``.  A group that
is absent keeps its history bit for bit and gets no weight in this round.  A group that *withholds*
its score is present and gets weight, but tells no history; what stands in for it is in
``history.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class WeightSettings:
    """Settings of all rules; each rule reads those it names.  Units: ``configuration.md``."""

    temperature: float = 0.05
    decay: float = 0.0
    floor: float = 0.2
    ceiling: float = 3.0
    step: float = 0.1
    q: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class GroupObservation:
    """What the server knows of one enrolled group in one round."""

    present: bool
    score: float | None
    """Score of the received adapter on validation, higher is better; None when absent or withheld.
    """
    size: int
    """Training examples of the group's enrolled clients (a claim, capped upstream)."""
    withheld: bool = False
    """Present, and none of its sites says how well it is served."""


@dataclass(frozen=True)
class Observation:
    """One round: every enrolled group, present or not."""

    round: int
    """1 for the first round; 0 for the cold start (scores of the untouched base)."""
    groups: Mapping[str, GroupObservation]
    score_low: float = 0.0
    """Lower end of the score's range."""

    def present(self) -> tuple[str, ...]:
        """Present groups, sorted."""
        return tuple(sorted(g for g, o in self.groups.items() if o.present))

    def scores(self) -> dict[str, float]:
        """Return the score of every present group that gives one, in sorted order."""
        return {
            g: o.score for g, o in sorted(self.groups.items()) if o.present and o.score is not None
        }


@dataclass(frozen=True)
class GroupHistory:
    """Running alignment of one group."""

    value: float
    """h_g, in the unit of the score."""
    observed: int
    """Rounds in which the group was scored."""
    rounds_since_seen: int


@dataclass(frozen=True)
class RuleState:
    """Everything a rule carries from round to round."""

    history: Mapping[str, GroupHistory] = field(default_factory=dict)
    iterate: Mapping[str, float] = field(default_factory=dict)
    """Current iterate of rules that have one (``afl``); empty otherwise."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "history": {g: asdict(h) for g, h in sorted(self.history.items())},
            "iterate": dict(sorted(self.iterate.items())),
        }

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> RuleState:
        """Inverse of :meth:`to_dict`."""
        return RuleState(
            history={g: GroupHistory(**h) for g, h in d["history"].items()},
            iterate={g: float(v) for g, v in d["iterate"].items()},
        )


def check_observation(observation: Observation) -> None:
    """Raise ``ValueError`` for an observation no rule may see: NaN, out of range, nobody there."""
    if not observation.present():
        raise ValueError("no group is present; a round without groups has no weights")
    for group, o in observation.groups.items():
        if o.withheld:
            if not o.present or o.score is not None:
                raise ValueError(f"group '{group}' withholds a score that it gives, or is absent")
        elif o.present:
            if o.score is None or not math.isfinite(o.score):
                raise ValueError(f"group '{group}' is present but its score is {o.score}")
            if not observation.score_low - 1e-6 <= o.score <= 1 + 1e-6:
                raise ValueError(
                    f"group '{group}' has score {o.score}, outside [{observation.score_low}, 1]"
                )
        if o.size < 0:
            raise ValueError(f"group '{group}' has size {o.size}; sizes are not negative")
