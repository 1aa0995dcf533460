"""One shared answer to every question, as a reference that measured values are read beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedalign.metrics import fairness

Array = NDArray[np.float64]
Shares = Mapping[str, Mapping[str, Sequence[float]]]
"""Question to group to shares over its options."""
Ordinals = Mapping[str, Sequence[float] | None]
"""Question to ordinal value of each option."""
Order = tuple[int, ...]
"""A permutation of the options, most to least chosen."""


@dataclass(frozen=True)
class SharedAnswer:
    """One shared answer to every question, and how each group is served by it."""

    scores: dict[str, dict[str, float]]
    """Question to group to score, as the fairness index needs it."""
    answers: dict[str, tuple[float, ...]]
    """Question to shares over its options; empty for scores of an order."""
    is_bound: bool
    """Whether no shared answer exceeds the value by more than ``gap``."""
    gap: float | None
    """Certified distance to the optimum of its objective, in units of the score; None if none."""
    skipped: tuple[str, ...]
    """Questions on which the score is undefined."""
    orders: dict[str, dict[Order, float]] = field(default_factory=dict)
    """Scores of an order: question to the orders printed and the probability of each; empty for
    shares, and for the answerer that draws an order at random."""

    @property
    def group_scores(self) -> dict[str, float]:
        """Group to mean score over the questions it answered."""
        return fairness.group_means(self.scores)

    @property
    def average(self) -> float:
        """Mean over groups."""
        return fairness.average(self.group_scores)

    @property
    def worst(self) -> float:
        """Score of the worst-served group."""
        return fairness.worst(self.group_scores)
