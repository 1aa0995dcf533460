"""The policy that PPO trains: one LoRA adapter over a frozen base, and a value head on its trunk.

*Policy*: the resident model with the adapter on.  *Reference*: the same model with the adapter
off, so it can never drift.  *Value head*: one linear map from what enters the output head, at the
position that predicts a token, to the value before that token, in units of reward.  It reads the
hidden state detached, so learning values does not bend the policy, and it is no part of the
adapter.  Its input is divided by the root of its width, so that a learning rate means about the
same in narrow and wide models.

One exchange: :func:`measure` runs the policy once and the reference once over the sampled texts;
these log-probabilities and values are the old ones of every update.  :func:`improve` turns scores
into advantages (``ppo.py``) and takes ``epochs`` passes over keyed minibatches that keep the texts
of one prompt together.  Both lay texts out the same way, so the first ratio is exactly 1.  Texts of
a prompt that share their row (all one-letter answers) cost one row; longer texts stand on the cache
of a prompt that is computed once (``prefix.py``), except where activations are recomputed.

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
from fedalign.training import batch as plain
from fedalign.training import ppo, prefix
from fedalign.training.batch import Prompt, in_passes, output_head
from fedalign.training.encode import Ids
from fedalign.training.policy_state import (
    PolicyState,
    controlled_kl,
    moments,
    optimiser_of,
    start,
)

Table = np.ndarray[Any, np.dtype[np.float32]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Episodes:
    """R sampled texts and the prompts they answer, as token ids."""

    prompts: tuple[Ids, ...]
    """One for each text."""
    responses: tuple[Ids, ...]
    """At least one token each, the end-of-sequence token included where the text ended."""

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.responses):
            raise DataError(
                f"{len(self.prompts)} prompts for {len(self.responses)} texts; each text needs "
                "its prompt, and there must be at least one."
            )
        if not all(map(len, self.prompts)) or not all(map(len, self.responses)):
            raise DataError("a prompt or a text has no tokens.")


@dataclass(frozen=True)
class Measured:
    """What policy and reference say of R texts of at most T tokens; zero in the padding."""

    old_logps: Table
    """(R, T) nats, under the adapter."""
    ref_logps: Table
    """(R, T) nats, under the base."""
    values: Table
    """(R, T) units of reward."""
    entropy: Table
    """(R, T) nats, of the policy's next-token distribution."""
    mask: np.ndarray[Any, np.dtype[np.bool_]]
    """(R, T) True on the tokens of the text."""

    @property
    def kl(self) -> Floats:
        """(R,) log pi(text) - log pi_ref(text) in nats; its mean estimates KL(pi || pi_ref)."""
        return (self.old_logps.astype(np.float64) - self.ref_logps).sum(axis=1)

    @property
    def ref_text_logps(self) -> Floats:
        """(R,) log-probability of each text under the base, nats."""
        return self.ref_logps.astype(np.float64).sum(axis=1)


def measure(resident: ResidentModel, state: PolicyState, episodes: Episodes) -> Measured:
    """Return log-probabilities, values and entropy of the texts, each from one forward pass.

    Raises ``RunFailed`` when a log-probability or value is not finite.
    """
    resident.load(state.adapter)
    head = torch.from_numpy(state.value_head).to(resident.device)
    groups, members = _by_prompt(episodes)
    mask = _mask(episodes)
    shared = not resident.checkpointing and prefix.worth_sharing(groups)
    tables = {name: np.zeros(mask.shape, np.float32) for name in ("old", "ref", "value", "entropy")}
    for part in in_passes(groups, _vocabulary(resident), _by_length(groups)):
        batch = _collate(resident, [groups[g] for g in part], shared)
        found: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            hidden, logits = _forward(resident, batch)
            found["value"] = _values(hidden, head)[batch.slot]
            logps = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            found["old"] = logps[batch.slot, batch.token]
            found["entropy"] = -(logps.exp() * logps).sum(dim=-1)[batch.slot]
            del hidden, logits, logps
            with resident.reference("base"):
                logits = _forward(resident, batch)[1]
            logps = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            found["ref"] = logps[batch.slot, batch.token]
        texts = [k for g in part for k in members[g]]
        rows, columns = np.nonzero(mask[texts])  # row by row, as the batch's tokens stand
        for name, values in found.items():
            tables[name][np.asarray(texts)[rows], columns] = values.cpu().numpy()
    for name, table in tables.items():
        if not np.isfinite(table).all():
            raise RunFailed(
                f"{int((~np.isfinite(table)).sum())} of {int(mask.sum())} measured numbers "
                f"({name}) are not finite. Lower ppo.learning-rate, or run with float32."
            )
    return Measured(tables["old"], tables["ref"], tables["value"], tables["entropy"], mask)


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
    groups, members = _by_prompt(episodes, used)
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
        for chosen in _minibatches(len(groups), settings, seed, key):
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
    for part in in_passes(prompts, _vocabulary(resident), _by_length(prompts)):
        batch = _collate(resident, [prompts[i] for i in part], shared)
        hidden, logits = _forward(resident, batch)
        logps = torch.log_softmax(logits, dim=-1, dtype=torch.float32)[batch.slot, batch.token]
        texts = torch.tensor([k for i in part for k in members[chosen[i]]], device=logps.device)
        mask, old = plan.mask[texts], plan.old_logps[texts]
        new = torch.zeros_like(old).masked_scatter(mask, logps)  # row by row, as the tokens stand
        values = torch.zeros_like(old).masked_scatter(
            mask, _values(hidden.detach(), head)[batch.slot]
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


def _collate(
    resident: ResidentModel, prompts: Sequence[Prompt], shared: bool
) -> plain.Batch | prefix.PrefixBatch:
    """Return the batch of all texts of all prompts: on shared prompts, or in rows of their own."""
    return (prefix.collate if shared else plain.collate)(prompts, resident.device)


def _forward(
    resident: ResidentModel, batch: plain.Batch | prefix.PrefixBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states (S, H) and logits (S, V) at the scored positions."""
    if isinstance(batch, prefix.PrefixBatch):
        return prefix.hidden_and_logits(resident.network, batch)
    return plain.hidden_and_logits(resident.network, batch)


def _minibatches(
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


def _values(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return values (S,) of hidden states (S, H) under a head (H + 1,)."""
    scaled = hidden.float() / math.sqrt(hidden.shape[-1])
    return scaled @ head[:-1] + head[-1]


def _by_prompt(
    episodes: Episodes, used: Sequence[int] | None = None
) -> tuple[list[Prompt], list[list[int]]]:
    """Return the distinct prompts with their texts, and the numbers of these texts."""
    members: dict[Ids, list[int]] = {}
    for k in range(len(episodes.prompts)) if used is None else used:
        members.setdefault(episodes.prompts[k], []).append(k)
    groups = [Prompt(p, tuple(episodes.responses[k] for k in ks)) for p, ks in members.items()]
    return groups, list(members.values())


def _by_length(prompts: Sequence[Prompt]) -> list[int]:
    """Return the order in which passes hold prompts of similar length."""
    return sorted(range(len(prompts)), key=lambda k: len(prompts[k].tokens))


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


def _mask(episodes: Episodes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    lengths = np.array([len(r) for r in episodes.responses])
    return np.arange(lengths.max()) < lengths[:, None]


def _vocabulary(resident: ResidentModel) -> int:
    return int(output_head(resident.network).weight.shape[0])


__all__ = [
    "Episodes",
    "Measured",
    "PolicyState",
    "controlled_kl",
    "improve",
    "measure",
    "start",
]
