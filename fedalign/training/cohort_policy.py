"""Measuring and improving the policies of a cohort at once (``policy_measure.py``, ``policy.py``).

Every client has its own texts, adapter, value head, KL coefficient, minibatches and AdamW; what
they share are the passes through the base.  Terms of the losses are those of ``ppo.py``, of all
tokens at once.  With n_c the tokens of client c's minibatch, the sum over all tokens of
``term / n_c`` is the sum of the clients' means, so its gradient in a client's factors is what the
client would get alone.  The reference (the base) is computed once for a text that several clients
wrote.

A client leaves an exchange when its minibatches are used up, when the share of clipped ratios is
above ``ppo.max-clip-fraction``, or when a number is not finite; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedalign.config import PpoConfig
from fedalign.models.base import ResidentModel
from fedalign.training import ppo
from fedalign.training.batch import Prompt, in_passes
from fedalign.training.cohort_forward import CohortForward, token_logps
from fedalign.training.cohort_texts import CohortTexts, Numbers, TextPass, hidden_and_logits
from fedalign.training.encode import Ids
from fedalign.training.policy_measure import by_length, collate, forward, vocabulary
from fedalign.training.prefix import worth_sharing
from fedalign.training.stack import AdamRows, AdapterStack

Flat = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class CohortMeasured:
    """What policies and reference say of N tokens: (N,) each, as ``policy_measure.Measured``."""

    old_logps: Flat
    ref_logps: Flat
    values: Flat

    def finite(self, texts: CohortTexts) -> list[bool]:
        """Return for each client whether all its numbers are finite."""
        fine = np.isfinite(self.old_logps) & np.isfinite(self.ref_logps) & np.isfinite(self.values)
        wrong = np.bincount(texts.owner, ~fine, len(texts.spans))
        return [bool(n == 0) for n in wrong]

    def kl(self, texts: CohortTexts) -> list[float]:
        """Return for each client its mean log pi(text) - log pi_ref(text), nats."""
        apart = self.old_logps.astype(np.float64) - self.ref_logps
        each = np.add.reduceat(apart, texts.starts[:-1])
        return [float(np.mean(each[span])) for span in texts.spans]


@dataclass
class Exchange:
    """What one client's updates of an exchange take and give."""

    settings: PpoConfig
    order: Sequence[Sequence[int]]
    """Prompts of each minibatch, in the order of the updates."""
    coefficient: float
    """Weight of the KL divergence."""
    rewards: np.ndarray[Any, Any]
    """(R,) of its texts."""
    history: dict[str, list[float]] = field(default_factory=dict)
    failed: bool = False

    @property
    def updates(self) -> int:
        """Optimiser steps taken."""
        return len(self.history.get("grad-norm", ()))

    def summary(self) -> dict[str, float]:
        """Return means over updates and their number, under the names of ``policy.improve``."""
        found = {name: float(np.mean(series)) for name, series in self.history.items()}
        return found | {"updates": float(self.updates)}


def measure(
    resident: ResidentModel,
    forward_: CohortForward,
    stack: AdapterStack,
    heads: AdamRows,
    texts: CohortTexts,
) -> CohortMeasured:
    """Return log-probabilities and values of all texts; row c of the stacks is client c's."""
    count = len(texts.owner)
    old, values = np.zeros(count, np.float32), np.zeros(count, np.float32)
    owner = torch.from_numpy(texts.owner).to(resident.device)
    with torch.no_grad():
        forward_.begin(stack)
        for part in texts.passes([(c, range(texts.prompts(c))) for c in range(len(stack))]):
            hidden, logits = hidden_and_logits(resident, forward_, part.batch)
            logps = token_logps(logits, part.batch.slot, part.batch.token)
            old[part.tokens] = logps.cpu().numpy()
            found = _values(hidden, part, owner[torch.from_numpy(part.tokens)], heads.weights)
            values[part.tokens] = found.cpu().numpy()
    return CohortMeasured(old, _reference(resident, texts), values)


def improve(
    resident: ResidentModel,
    forward_: CohortForward,
    stack: AdapterStack,
    heads: AdamRows,
    texts: CohortTexts,
    measured: CohortMeasured,
    exchanges: Sequence[Exchange],
) -> None:
    """Take the updates of one exchange; stacks and the histories of the exchanges change.

    Exchanges that are ``failed`` already take no part.  Settings may differ in ``epochs`` and
    ``minibatches`` alone.
    """
    plan = _Plan.of(resident, texts, measured, exchanges)
    live = [c for c, x in enumerate(exchanges) if not x.failed and x.order]
    own, own_heads = _some(stack, heads, live)
    with resident.training(), torch.enable_grad():
        while live:
            chosen = [exchanges[c].order[exchanges[c].updates] for c in live]
            values = _accumulate(resident, forward_, own, own_heads, texts, plan, live, chosen)
            norms = own.norms()
            measured_norms, head_norms = norms.cpu().numpy(), own_heads.norms().cpu().numpy()
            for place, c in enumerate(live):
                x = exchanges[c]
                found = {name: float(series[place]) for name, series in values.items()}
                found["grad-norm"] = float(measured_norms[place])
                if not all(map(math.isfinite, (*found.values(), float(head_norms[place])))):
                    x.failed = True
                    continue
                for name, value in found.items():
                    x.history.setdefault(name, []).append(value)
            own.clip(norms, plan.settings.max_grad_norm)
            own.update()
            own_heads.update()
            left = [c for c in live if not _over(exchanges[c])]
            if len(left) < len(live):
                if own is not stack:
                    stack.put(live, own)
                    heads.put(live, own_heads)
                live = left
                own, own_heads = _some(stack, heads, live)


@dataclass(frozen=True)
class _Plan:
    """Targets of an exchange, on the device: (N,) each."""

    settings: PpoConfig
    old_logps: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    owner: torch.Tensor

    @classmethod
    def of(
        cls,
        resident: ResidentModel,
        texts: CohortTexts,
        measured: CohortMeasured,
        exchanges: Sequence[Exchange],
    ) -> _Plan:
        device, settings = resident.device, exchanges[0].settings
        mask = torch.from_numpy(texts.mask).to(device)
        old, ref, values = (
            torch.from_numpy(x).to(device)
            for x in (measured.old_logps, measured.ref_logps, measured.values)
        )

        def table(flat: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask.shape, device=device).masked_scatter(mask, flat)

        scores = np.concatenate([x.rewards for x in exchanges]).astype(np.float32)
        coefficient = np.concatenate([np.full(len(x.rewards), x.coefficient) for x in exchanges])
        kl = torch.from_numpy(coefficient.astype(np.float32)).to(device).unsqueeze(1)
        rewards = ppo.token_rewards(
            torch.from_numpy(scores).to(device), table(old), table(ref), mask, kl
        )
        advantages, returns = ppo.gae(rewards, table(values), mask, settings.gamma, settings.lam)
        if settings.whiten:
            advantages = torch.cat(
                [ppo.whiten(advantages[span], mask[span]) for span in texts.spans]
            )
        owner = torch.from_numpy(texts.owner).to(device)
        return cls(settings, old, values, advantages[mask], returns[mask], owner)


def _accumulate(
    resident: ResidentModel,
    forward_: CohortForward,
    stack: AdapterStack,
    heads: AdamRows,
    texts: CohortTexts,
    plan: _Plan,
    live: Sequence[int],
    chosen: Sequence[Sequence[int]],
) -> dict[str, Flat]:
    """Add the gradients of a minibatch of every live client; return means over its tokens."""
    counts = np.array([len(texts.tokens_of(c, own)) for c, own in zip(live, chosen, strict=True)])
    places = np.zeros(len(texts.spans), dtype=np.int64)
    places[list(live)] = np.arange(len(live))
    names = ("policy-loss", "value-loss", "clip-fraction", "staleness")
    totals = np.zeros((len(names), len(live)))
    stack.gradient.zero_()
    heads.gradient.zero_()
    weights = heads.weights.detach().requires_grad_()
    forward_.begin(stack)
    for part in texts.passes(list(zip(live, chosen, strict=True))):
        tokens = torch.from_numpy(part.tokens).to(resident.device)
        old = plan.old_logps[tokens]
        every = torch.ones_like(old, dtype=torch.bool)
        place = places[texts.owner[part.tokens]]
        share = torch.from_numpy((1.0 / counts[place]).astype(np.float32)).to(old.device)
        hidden, logits = hidden_and_logits(resident, forward_, part.batch)
        logps = token_logps(logits, part.batch.slot, part.batch.token)
        values = _values(
            hidden.detach(), part, torch.from_numpy(place).to(resident.device), weights
        )
        losses, outside = ppo.policy_terms(
            logps, old, plan.advantages[tokens], every, plan.settings.clip
        )
        errors = 0.5 * ppo.value_terms(
            values, plan.old_values[tokens], plan.returns[tokens], every, plan.settings.value_clip
        )
        forward_.backward((losses * share).sum())
        heads.gradient.add_(torch.autograd.grad((errors * share).sum(), weights)[0])
        drift = logps.detach() - old
        terms = torch.stack([losses.detach(), errors.detach(), outside, drift.expm1() - drift])
        for row, term in enumerate((terms * share).double().cpu().numpy()):
            totals[row] += np.bincount(place, term, len(live))
    forward_.finish()
    return dict(zip(names, totals, strict=True))


def _over(x: Exchange) -> bool:
    """Return whether a client takes no further update on this exchange."""
    if x.failed or x.updates == len(x.order):
        return True
    return x.history["clip-fraction"][-1] > x.settings.max_clip_fraction


def _some(
    stack: AdapterStack, heads: AdamRows, rows: Sequence[int]
) -> tuple[AdapterStack, AdamRows]:
    """Return the stacks themselves where all rows are meant, else copies of some."""
    if len(rows) in (0, len(stack)):
        return stack, heads
    return stack.take(rows), heads.take(rows)


def _values(
    hidden: torch.Tensor, part: TextPass, owner: torch.Tensor, heads: torch.Tensor
) -> torch.Tensor:
    """Return the value before each token (n,) under its owner's head; ``heads`` (C, H + 1)."""
    scaled = hidden.float().index_select(0, part.batch.slot) / math.sqrt(hidden.shape[-1])
    own = heads.index_select(0, owner)
    return (scaled * own[:, :-1]).sum(dim=1) + own[:, -1]


def _reference(resident: ResidentModel, texts: CohortTexts) -> Flat:
    """Return the base's log-probability of each token: (N,), a text computed once for all."""
    known: dict[Ids, dict[Ids, list[int]]] = {}  # the texts that are this response to this prompt
    number = 0
    for episodes in texts.episodes:
        for prompt, response in zip(episodes.prompts, episodes.responses, strict=True):
            known.setdefault(prompt, {}).setdefault(response, []).append(number)
            number += 1
    prompts = [Prompt(p, tuple(responses)) for p, responses in known.items()]
    shared = not resident.checkpointing and worth_sharing(prompts)
    out = np.zeros(len(texts.owner), np.float32)
    with torch.inference_mode(), resident.reference("base"):
        for part in in_passes(prompts, vocabulary(resident), by_length(prompts)):
            batch = collate(resident, [prompts[k] for k in part], shared)
            logits = forward(resident, batch)[1]
            logps = token_logps(logits, batch.slot, batch.token).cpu().numpy()
            source, target = _copies([known[prompts[k].tokens] for k in part], texts.starts)
            out[target] = logps[source]
    return out


def _copies(responses: Sequence[dict[Ids, list[int]]], starts: Numbers) -> tuple[Numbers, Numbers]:
    """Return where each token of each text stands in a pass, and its number among all."""
    source: list[Numbers] = []
    target: list[Numbers] = []
    at = 0
    for own in responses:
        for response, numbers in own.items():
            span = np.arange(len(response))
            for number in numbers:
                source.append(at + span)
                target.append(starts[number] + span)
            at += len(response)
    return np.concatenate(source), np.concatenate(target)
