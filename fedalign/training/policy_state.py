"""What PPO goes on from: adapter, value head, the optimiser's moments, the KL coefficient.

The state is arrays and one number, so a run that is stopped and resumed goes on bit for bit.

KL controller, where ``ppo.kl-target`` is set: the proportional one of Ziegler et al. (arXiv
1909.08593), ``kl <- kl (1 + 0.1 clip(KL / target - 1, -0.2, 0.2))``, KL measured at the start of
the exchange.  The paper applies it once a batch; an exchange carries ``ppo.minibatches`` of those,
so it is applied that often: at most 8 % an exchange with four, a factor of 2 in nine exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign.config import PpoConfig
from fedalign.errors import DataError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array, check_flat
from fedalign.training.batch import output_head

CONTROLLER_GAIN, CONTROLLER_BOUND = 0.1, 0.2
PARTS, MOMENTS = ("adapter", "head"), ("first", "second", "steps")


@dataclass(frozen=True)
class PolicyState:
    """Everything that training goes on from."""

    adapter: Array
    """(P,) float32."""
    value_head: Array
    """(H + 1,) float32: weights, then bias."""
    moments: Mapping[str, np.ndarray[Any, Any]]
    """AdamW's ``<part>_first`` and ``<part>_second`` (float32) and ``<part>_steps`` (1,) int64, for
    the parts ``adapter`` and ``head``."""
    kl: float
    """Current weight of the KL divergence, in units of reward a nat."""

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the state as float32 and int64 arrays; inverse of :meth:`from_arrays`."""
        # The coefficient is a float64: its bits travel as an integer.
        kl = np.array([self.kl], dtype=np.float64).view(np.int64)
        return {"adapter": self.adapter, "value_head": self.value_head, "kl": kl, **self.moments}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]]) -> PolicyState:
        """Return the state that :meth:`arrays` wrote, bit for bit; ``DataError`` otherwise."""
        names = {f"{part}_{name}" for part in PARTS for name in MOMENTS}
        wanted = {"adapter", "value_head", "kl", *names}
        if set(arrays) != wanted:
            raise DataError(
                f"a policy state holds {', '.join(sorted(wanted))}; this one differs in "
                f"{', '.join(sorted(wanted ^ set(arrays)))}."
            )
        return cls(
            adapter=arrays["adapter"],
            value_head=arrays["value_head"],
            moments={name: arrays[name] for name in sorted(names)},
            kl=float(np.ascontiguousarray(arrays["kl"], dtype=np.int64).view(np.float64)[0]),
        )


def start(resident: ResidentModel, adapter: Array, settings: PpoConfig, kl: float) -> PolicyState:
    """Return the state before the first exchange: value head zero, no moments.

    ``adapter`` (P,) float32; ``kl`` is the coefficient to start from, at least 0.
    """
    check_flat(adapter, resident.layout)
    if not adapter.any():
        raise DataError("the adapter is all zeros: with A and B both zero no gradient ever arises.")
    if not kl >= 0.0:
        raise DataError(f"kl = {kl}; the weight of the divergence must be at least 0.")
    if settings.kl_target and kl == 0.0:
        raise DataError("kl = 0 cannot be controlled: the controller multiplies it.")
    width = output_head(resident.network).weight.shape[1]
    sizes = {"adapter": len(adapter), "head": width + 1}
    zero: dict[str, np.ndarray[Any, Any]] = {}
    for part, size in sizes.items():
        zero[f"{part}_first"] = np.zeros(size, dtype=np.float32)
        zero[f"{part}_second"] = np.zeros(size, dtype=np.float32)
        zero[f"{part}_steps"] = np.zeros(1, dtype=np.int64)
    return PolicyState(adapter.copy(), np.zeros(width + 1, dtype=np.float32), zero, kl)


def controlled_kl(coefficient: float, measured: float, settings: PpoConfig) -> float:
    """Return the coefficient after an exchange; unchanged where ``kl_target`` is 0."""
    if not settings.kl_target:
        return coefficient
    error = measured / settings.kl_target - 1.0
    error = min(max(error, -CONTROLLER_BOUND), CONTROLLER_BOUND)
    return float(coefficient * (1.0 + CONTROLLER_GAIN * error) ** settings.minibatches)


def optimiser_of(
    state: PolicyState,
    weights: torch.nn.Parameter,
    head: torch.nn.Parameter,
    rate: float,
    value_rate: float,
) -> torch.optim.AdamW:
    """Return AdamW on adapter and head, its moments as they stand in the state."""
    optimiser = torch.optim.AdamW(
        [{"params": [weights], "lr": rate}, {"params": [head], "lr": value_rate}],
        weight_decay=0.0,
        fused=True,
    )
    for part, parameter in (("adapter", weights), ("head", head)):
        first, second, steps = (state.moments[f"{part}_{name}"] for name in MOMENTS)
        optimiser.state[parameter] = {
            # A float32 counts exactly to 2^24 updates.
            "step": torch.tensor(float(steps[0]), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.from_numpy(first.copy()).to(parameter.device),
            "exp_avg_sq": torch.from_numpy(second.copy()).to(parameter.device),
        }
    return optimiser


def moments(
    optimiser: torch.optim.AdamW, weights: torch.nn.Parameter, head: torch.nn.Parameter
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the optimiser's moments as the state holds them."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for part, parameter in (("adapter", weights), ("head", head)):
        found = optimiser.state[parameter]
        out[f"{part}_first"] = found["exp_avg"].cpu().numpy().copy()
        out[f"{part}_second"] = found["exp_avg_sq"].cpu().numpy().copy()
        out[f"{part}_steps"] = np.array([int(found["step"])], dtype=np.int64)
    return out
