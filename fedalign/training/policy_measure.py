"""What PPO knows of sampled texts before its updates: log-probabilities, values, entropy.

*Policy*: the resident model with the adapter on.  *Reference*: the same model with the adapter
off, so it can never drift.  *Value head*: one linear map from what enters the output head, at the
position that predicts a token, to the value before that token, in units of reward.  Its input is
divided by the root of its width, so that a learning rate means about the same in narrow and wide
models.

Measuring and updating (``policy.py``) lay texts out the same way, so the first ratio is exactly 1.
Texts of a prompt that share their row (all one-letter answers) cost one row; longer texts stand on
the cache of a prompt that is computed once (``prefix.py``), except where activations are
recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.training import batch as plain
from fedalign.training import prefix
from fedalign.training.batch import Prompt, in_passes, output_head
from fedalign.training.encode import Ids
from fedalign.training.policy_state import PolicyState

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
    groups, members = by_prompt(episodes)
    mask = _mask(episodes)
    shared = not resident.checkpointing and prefix.worth_sharing(groups)
    tables = {name: np.zeros(mask.shape, np.float32) for name in ("old", "ref", "value", "entropy")}
    for part in in_passes(groups, vocabulary(resident), by_length(groups)):
        batch = collate(resident, [groups[g] for g in part], shared)
        found: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            hidden, logits = forward(resident, batch)
            found["value"] = token_values(hidden, head)[batch.slot]
            logps = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            found["old"] = logps[batch.slot, batch.token]
            found["entropy"] = -(logps.exp() * logps).sum(dim=-1)[batch.slot]
            del hidden, logits, logps
            with resident.reference("base"):
                logits = forward(resident, batch)[1]
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


def collate(
    resident: ResidentModel, prompts: Sequence[Prompt], shared: bool
) -> plain.Batch | prefix.PrefixBatch:
    """Return the batch of all texts of all prompts: on shared prompts, or in rows of their own."""
    return (prefix.collate if shared else plain.collate)(prompts, resident.device)


def forward(
    resident: ResidentModel, batch: plain.Batch | prefix.PrefixBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states (S, H) and logits (S, V) at the scored positions."""
    if isinstance(batch, prefix.PrefixBatch):
        return prefix.hidden_and_logits(resident.network, batch)
    return plain.hidden_and_logits(resident.network, batch)


def token_values(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return values (S,) of hidden states (S, H) under a head (H + 1,)."""
    scaled = hidden.float() / math.sqrt(hidden.shape[-1])
    return scaled @ head[:-1] + head[-1]


def by_prompt(
    episodes: Episodes, used: Sequence[int] | None = None
) -> tuple[list[Prompt], list[list[int]]]:
    """Return the distinct prompts with their texts, and the numbers of these texts."""
    members: dict[Ids, list[int]] = {}
    for k in range(len(episodes.prompts)) if used is None else used:
        members.setdefault(episodes.prompts[k], []).append(k)
    groups = [Prompt(p, tuple(episodes.responses[k] for k in ks)) for p, ks in members.items()]
    return groups, list(members.values())


def by_length(prompts: Sequence[Prompt]) -> list[int]:
    """Return the order in which passes hold prompts of similar length."""
    return sorted(range(len(prompts)), key=lambda k: len(prompts[k].tokens))


def _mask(episodes: Episodes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    lengths = np.array([len(r) for r in episodes.responses])
    return np.arange(lengths.max()) < lengths[:, None]


def vocabulary(resident: ResidentModel) -> int:
    """Return how many tokens the output head tells apart."""
    return int(output_head(resident.network).weight.shape[0])
