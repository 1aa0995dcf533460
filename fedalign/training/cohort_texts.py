"""Sampled texts of a cohort, laid out so that every pass holds as many rows of every client.

Texts are numbered client by client, tokens text by text: flat arrays over all N tokens hold what is
known of them, and tables (R, T) of all texts are made where a text must be read as a whole.

As one client's texts are (``policy_measure.py``), those of a prompt that share their row cost one,
and longer ones stand on the cache of a prompt that is computed once (``prefix.py``), unless
activations are recomputed.  A pass takes the k-th few prompts of every client, longest first; a
client with fewer gets rows that are computed and never scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign.models.base import ResidentModel
from fedalign.training import prefix
from fedalign.training.batch import Prompt, output_head
from fedalign.training.cohort_batch import CohortBatch, Question, collate
from fedalign.training.cohort_forward import CohortForward, StackedLayers, pass_tokens
from fedalign.training.policy_measure import Episodes, by_prompt
from fedalign.training.prefix import PrefixBatch
from fedalign.training.rows import NO_PAIRS, PromptRows, lay_out

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class _Own:
    """Texts of one client."""

    first: int
    """Number of its first text among all."""
    groups: list[Prompt]
    """Its distinct prompts with their texts."""
    members: list[list[int]]
    """Numbers of these texts among its own."""
    rows: tuple[PromptRows, ...]
    """Of each prompt; empty where prompts are shared."""


@dataclass(frozen=True)
class TextPass:
    """Some prompts of every client, and all their texts, as tensors."""

    batch: CohortBatch | PrefixBatch
    tokens: Numbers
    """(n,) number of each scored token of the pass, as they stand in the batch."""


class CohortTexts:
    """R texts of C clients with N tokens in all.

    Attributes:
        episodes: of each client.
        mask: (R, T) True on the tokens of a text.
        lengths: (R,) tokens of each text.
        starts: (R + 1,) number of each text's first token.
        owner: (N,) client of each token.
        spans: of each client, the numbers of its texts.
        shared: prompts are computed once for all their texts.
    """

    def __init__(self, resident: ResidentModel, episodes: Sequence[Episodes]) -> None:
        self.episodes = list(episodes)
        groups = [by_prompt(e) for e in episodes]
        self.shared = not resident.checkpointing and any(
            prefix.worth_sharing(prompts) for prompts, _ in groups
        )
        counts = [len(e.responses) for e in episodes]
        ends = np.cumsum([0, *counts]).tolist()
        self.spans = [slice(*pair) for pair in itertools.pairwise(ends)]
        self.lengths = np.array([len(r) for e in episodes for r in e.responses], dtype=np.int64)
        self.starts = np.cumsum([0, *self.lengths])
        self.mask = np.arange(self.lengths.max()) < self.lengths[:, None]
        self.owner = np.repeat(np.repeat(np.arange(len(episodes)), counts), self.lengths)
        self._resident = resident
        self._own = [
            _Own(first, prompts, members, () if self.shared else lay_out(prompts))
            for first, (prompts, members) in zip(ends, groups, strict=False)
        ]

    def prompts(self, client: int) -> int:
        """Return how many distinct prompts a client has."""
        return len(self._own[client].groups)

    def tokens_of(self, client: int, prompts: Sequence[int]) -> Numbers:
        """Return the numbers of all tokens of some prompts' texts, prompt by prompt."""
        own = self._own[client]
        texts = [own.first + k for g in prompts for k in own.members[g]]
        parts = [np.arange(self.starts[t], self.starts[t + 1]) for t in texts]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def passes(self, chosen: Sequence[tuple[int, Sequence[int]]]) -> list[TextPass]:
        """Return passes over some prompts of some clients: (client, its prompts), in order.

        Rows of the passes belong to the clients in the order given.
        """
        ordered = [
            (c, sorted(prompts, key=lambda g: -self._longest(self._own[c].groups[g])))
            for c, prompts in chosen
        ]
        sizes = [[self._size(c, g) for g in prompts] for c, prompts in ordered]
        dense = max(self._dense(c, g) for c, prompts in ordered for g in prompts)
        return [
            self._pass([(c, prompts[part]) for c, prompts in ordered])
            for part in cut(sizes, pass_tokens(self._resident, dense))
        ]

    def _pass(self, part: Sequence[tuple[int, Sequence[int]]]) -> TextPass:
        device = self._resident.device
        tokens = np.concatenate([self.tokens_of(c, prompts) for c, prompts in part])
        batch: CohortBatch | PrefixBatch
        if self.shared:
            batch = prefix.collate_each(
                [[self._own[c].groups[g] for g in prompts] for c, prompts in part], device
            )
        else:
            batch = collate(
                [
                    [Question(place, self._own[c].rows[g], NO_PAIRS, None) for g in prompts]
                    for place, (c, prompts) in enumerate(part)
                ],
                device,
            )
        return TextPass(batch, tokens)

    def _size(self, client: int, prompt: int) -> int:
        own = self._own[client]
        if not self.shared:
            return len(own.rows[prompt].rows) * own.rows[prompt].longest
        group = own.groups[prompt]
        return len(group.tokens) + sum(len(c) - 1 for c in set(group.completions))

    def _dense(self, client: int, prompt: int) -> float:
        scored = sum(map(len, self._own[client].groups[prompt].completions))
        return scored / self._size(client, prompt)

    @staticmethod
    def _longest(prompt: Prompt) -> int:
        return len(prompt.tokens) + max(map(len, prompt.completions))


def cut(sizes: Sequence[Sequence[int]], most: int) -> list[slice]:
    """Cut prompts into passes of about ``most`` tokens: slices of every client's own list.

    ``sizes`` holds the tokens of each client's prompts; a place costs the largest one there, times
    the clients.  A single place that is larger than ``most`` is a pass of its own.
    """
    deepest = max(map(len, sizes))
    costs = [len(sizes) * max(own[k] for own in sizes if k < len(own)) for k in range(deepest)]
    passes: list[slice] = []
    at = held = 0
    for k, cost in enumerate(costs):
        if k > at and held + cost > most:
            passes.append(slice(at, k))
            at, held = k, 0
        held += cost
    return [*passes, slice(at, deepest)]


def hidden_and_logits(
    resident: ResidentModel, forward: CohortForward, batch: CohortBatch | PrefixBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the output head, (S, width), and the logits, (S, vocabulary)."""
    if isinstance(batch, PrefixBatch):
        if not isinstance(forward, StackedLayers):
            raise TypeError("shared prompts go through the model's own layers")
        with forward.layers():
            return prefix.hidden_and_logits(resident.network, batch)
    kept: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...], __: Any) -> None:
        kept.append(args[0])

    handle = output_head(resident.network).register_forward_hook(keep)
    try:
        logits = forward.logits(batch)
    finally:
        handle.remove()
    return kept[0].reshape(len(logits), -1), logits
