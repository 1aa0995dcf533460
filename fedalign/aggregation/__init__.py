"""Weight rules over groups, from group to client, and the aggregation of LoRA adapters.

Numpy only.  A weight rule is a pure function (see :mod:`fedalign.aggregation.records`); adding one
is one file and one line in :data:`WEIGHT_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

from fedalign.aggregation import adaptive, afl, placebo, qffl, size, uniform, worst
from fedalign.aggregation.records import Observation, RuleState, WeightSettings

WeightRule = Callable[[WeightSettings, RuleState, Observation], tuple[RuleState, dict[str, float]]]

WEIGHT_RULES: dict[str, WeightRule] = {
    "uniform": uniform.update,
    "size": size.update,
    "adaptive": adaptive.update,
    "worst": worst.update,
    "afl": afl.update,
    "qffl": qffl.update,
    "placebo": placebo.update,
}

__all__ = ["WEIGHT_RULES", "WeightRule"]
