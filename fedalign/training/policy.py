"""The policy that PPO trains: one LoRA adapter over a frozen base, and a value head on its trunk.

One exchange: :func:`measure` (``policy_measure.py``) runs the policy once and the reference once
over the sampled texts; these log-probabilities and values are the old ones of every update.
:func:`improve` turns scores into advantages (``ppo.py``) and takes ``epochs`` passes over keyed
minibatches that keep the texts of one prompt together.  The value head reads the hidden state
detached, so learning values does not bend the policy, and it is no part of the adapter.

AdamW without weight decay works on the flat buffer of the adapter and on the value head, with a
learning rate for each; its moments go from exchange to exchange in the state
(``policy_state.py``), as the KL coefficient does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign.config import PpoConfig
from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.randomness import Key, generator
from fedalign.training import ppo, prefix
from fedalign.training.batch import Prompt, in_passes
from fedalign.training.policy_measure import (
    Episodes,
    Measured,
    by_length,
    by_prompt,
    collate,
    forward,
    measure,
    token_values,
    vocabulary,
)
from fedalign.training.policy_state import (
    PolicyState,
    controlled_kl,
    moments,
    optimiser_of,
    start,
)


def improve(
    resident: ResidentModel,
    state: PolicyState,
    episodes: Episodes,
    measured: Measured,
    scores: np.ndarray[Any, Any],
    settings: PpoConfig,
    seed: int,
    key: tuple[Key, ...],
    learning_rate: float | None = None,
    kl_factor: float = 1.0,
) -> tuple[PolicyState, dict[str, float]]:
    """Take the updates of one exchange; return the new state and what happened.

    Args:
        resident: holds the adapter meanwhile, and the new one afterwards.
        state: the state that ``measured`` was measured with.
        episodes: the sampled texts.
        measured: their log-probabilities and values.
        scores: (R,) score of each text; NaN where nobody scored it: it takes no part in the
            updates, and is counted.
        settings: of PPO.
        seed, key: of the order of minibatches.
        learning_rate: of the adapter; None takes ``settings.learning_rate``.
        kl_factor: multiplies the coefficient, in this exchange alone.

    Metrics: ``kl`` (nats a text, before the updates), ``kl-coefficient`` (as used), ``reward``
    (mean score), ``policy-loss``, ``value-loss``, ``grad-norm`` and ``clip-fraction`` (means over
    updates), ``value-loss-first``, ``clip-fraction-max``, ``staleness`` (nats a token: estimate of
    KL(old || new) at the last update), ``entropy`` (nats a token), ``updates``,
    ``updated-tokens``, ``unscored`` (texts), ``learning-rate``, and ``explained-variance`` of the
    returns by the old values, which is left out where the returns do not vary.

    Raises ``RunFailed`` when no text was scored, or a score, loss, gradient or the adapter is not
    finite.
    """
    rate = settings.learning_rate if learning_rate is None else learning_rate
    coefficient = state.kl * kl_factor
    used = _used(episodes, scores)
    plan = _Plan.of(resident, measured, scores, used, settings, coefficient)
    groups, members = by_prompt(episodes, used)
    resident.load(state.adapter)
    resident.set_trainable()
    resident.attach_gradients()
    weights = torch.nn.Parameter(resident.parameters_flat)
    weights.grad = resident.gradient_flat
    head = torch.nn.Parameter(torch.from_numpy(state.value_head.copy()).to(resident.device))
    head.grad = torch.zeros_like(head)
    optimiser = optimiser_of(state, weights, head, rate, settings.value_learning_rate)
    history: dict[str, list[float]] = {}
    tokens = 0
    with resident.training(), torch.enable_grad():
        for chosen in minibatches(len(groups), settings, seed, key):
            resident.gradient_flat.zero_()
            head.grad.zero_()
            values = _accumulate(resident, plan, groups, members, chosen, head, settings)
            norm = float(resident.gradient_flat.norm())
            if not all(map(math.isfinite, (*values.values(), norm, float(head.grad.norm())))):
                raise RunFailed(
                    f"PPO update {len(history.get('grad-norm', ())) + 1} of this exchange: loss "
                    f"{values['policy-loss']:.3g}, value loss {values['value-loss']:.3g}, gradient "
                    f"norm {norm:.3g}. Lower ppo.learning-rate or raise ppo.kl."
                )
            if settings.max_grad_norm and norm > settings.max_grad_norm:
                resident.gradient_flat.mul_(settings.max_grad_norm / (norm + 1e-6))
            optimiser.step()
            tokens += sum(int(measured.mask[k].sum()) for g in chosen for k in members[g])
            for name, value in {**values, "grad-norm": norm}.items():
                history.setdefault(name, []).append(value)
            if values["clip-fraction"] > settings.max_clip_fraction:
                break
    adapter = resident.read()
    if not np.isfinite(adapter).all():
        raise RunFailed("the adapter is not finite after PPO. Lower ppo.learning-rate.")
    frozen = resident.frozen_mask()
    if not np.array_equal(adapter[frozen], state.adapter[frozen]):
        raise RuntimeError("frozen factors changed in training; this is a defect of the loop")
    kl = float(measured.kl.mean())
    new = PolicyState(
        adapter,
        head.detach().cpu().numpy().copy(),
        moments(optimiser, weights, head),
        controlled_kl(state.kl, kl, settings),
    )
    summary = {name: float(np.mean(series)) for name, series in history.items()}
    summary |= {
        "kl": kl,
        "kl-coefficient": coefficient,
        "reward": float(np.mean(scores[used], dtype=np.float64)),
        "value-loss-first": history["value-loss"][0],
        "clip-fraction-max": max(history["clip-fraction"]),
        "staleness": history["staleness"][-1],
        "entropy": float(measured.entropy[measured.mask].mean(dtype=np.float64)),
        "updates": float(len(history["grad-norm"])),
        "updated-tokens": float(tokens),
        "unscored": float(len(scores) - len(used)),
        "learning-rate": rate,
    }
    if plan.explained_variance is not None:
        summary["explained-variance"] = plan.explained_variance
    return new, summary


@dataclass(frozen=True)
class _Plan:
    """Targets of an exchange, on the device; rows are texts, (R, T)."""

    old_logps: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mask: torch.Tensor
    explained_variance: float | None

    @classmethod
    def of(
        cls,
        resident: ResidentModel,
        measured: Measured,
        scores: np.ndarray[Any, Any],
        used: Sequence[int],
        settings: PpoConfig,
        coefficient: float,
    ) -> _Plan:
        old, ref, values, mask = (
            torch.from_numpy(x).to(resident.device)
            for x in (measured.old_logps, measured.ref_logps, measured.values, measured.mask)
        )
        scored = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        scored[list(used)] = True
        clean = torch.from_numpy(np.nan_to_num(scores, nan=0.0).astype(np.float32)).to(mask.device)
        rewards = ppo.token_rewards(clean, old, ref, mask, coefficient)
        mask = mask & scored.unsqueeze(1)
        advantages, returns = ppo.gae(rewards, values, mask, settings.gamma, settings.lam)
        spread = float(returns[mask].var(correction=0))
        unexplained = float((returns - values)[mask].var(correction=0))
        if settings.whiten:
            advantages = ppo.whiten(advantages, mask)
        explained = 1.0 - unexplained / spread if spread > 0.0 else None
        return cls(old, values, advantages, returns, mask, explained)


def _accumulate(
    resident: ResidentModel,
    plan: _Plan,
    groups: Sequence[Prompt],
    members: Sequence[Sequence[int]],
    chosen: Sequence[int],
    head: torch.Tensor,
    settings: PpoConfig,
) -> dict[str, float]:
    """Add the gradients of one minibatch of prompts; return its losses (means over tokens)."""
    everyone = [k for g in chosen for k in members[g]]
    tokens = plan.mask[everyone].sum()
    totals: dict[str, torch.Tensor] = {}
    prompts = [groups[g] for g in chosen]
    shared = not resident.checkpointing and prefix.worth_sharing(groups)
    for part in in_passes(prompts, vocabulary(resident), by_length(prompts)):
        batch = collate(resident, [prompts[i] for i in part], shared)
        hidden, logits = forward(resident, batch)
        logps = torch.log_softmax(logits, dim=-1, dtype=torch.float32)[batch.slot, batch.token]
        texts = torch.tensor([k for i in part for k in members[chosen[i]]], device=logps.device)
        mask, old = plan.mask[texts], plan.old_logps[texts]
        new = torch.zeros_like(old).masked_scatter(mask, logps)  # row by row, as the tokens stand
        values = torch.zeros_like(old).masked_scatter(
            mask, token_values(hidden.detach(), head)[batch.slot]
        )
        loss, clipped = ppo.policy_loss(new, old, plan.advantages[texts], mask, settings.clip)
        error = ppo.value_loss(
            values, plan.old_values[texts], plan.returns[texts], mask, settings.value_clip
        )
        share = mask.sum() / tokens
        torch.autograd.backward(share * (loss + error))
        drift = torch.where(mask, new.detach() - old, 0.0)
        parts = {
            "policy-loss": loss.detach(),
            "value-loss": error.detach(),
            "clip-fraction": clipped,
            # exp(d) - 1 - d is at least 0 and, under the old policy, unbiased for KL(old || new).
            "staleness": ppo.masked_mean(torch.expm1(drift) - drift, mask),
        }
        for name, value in parts.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + share * value
    return {name: float(value) for name, value in totals.items()}


def minibatches(
    count: int, settings: PpoConfig, seed: int, key: tuple[Key, ...]
) -> list[list[int]]:
    """Return minibatches of prompts, epoch after epoch: keyed shuffles in nearly equal parts."""
    parts = math.ceil(count / settings.questions)
    return [
        sorted(part.tolist())  # the order within a minibatch changes nothing but rounding
        for epoch in range(settings.epochs)
        for part in np.array_split(
            generator(seed, "minibatches", *key, epoch).permutation(count), parts
        )
    ]


def _used(episodes: Episodes, scores: np.ndarray[Any, Any]) -> list[int]:
    """Return the texts that somebody scored."""
    if scores.shape != (len(episodes.responses),):
        raise DataError(f"scores have shape {scores.shape} for {len(episodes.responses)} texts.")
    if np.isinf(scores).any():
        raise RunFailed(f"{int(np.isinf(scores).sum())} scores are infinite.")
    used = np.flatnonzero(~np.isnan(scores)).tolist()
    if not used:
        raise RunFailed(f"none of the {len(scores)} texts was scored by anybody.")
    return used


__all__ = [
    "Episodes",
    "Measured",
    "PolicyState",
    "controlled_kl",
    "improve",
    "measure",
    "start",
]
