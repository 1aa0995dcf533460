"""Several texts after one prompt: the prompt is computed once, the texts stand on its cache.

A table of rows ``prompt + text`` (``batch.py``) computes a prompt of 40 tokens again for each of
its texts.  Here every prompt goes through the model once, its keys and values are repeated for its
texts, and the texts alone go through the model on top of them.  Gradients flow through the cache
into the prompt, so losses and gradients are those of the rows, up to rounding.

Prompts are padded on the left, so that texts follow them without a gap, with an attention mask and
explicit positions; texts are padded on the right, where no attention mask is needed, since under
causal attention nothing sees what comes after it.  The logits after a prompt's last token predict
the first token of all its texts.

Not for models that recompute activations in training: they keep no cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedalign.training.batch import Prompt, logits_of
from fedalign.training.encode import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prefixes:
    """G prompts of at most W tokens, padded on the left."""

    tokens: torch.Tensor
    """(G, W) int64."""
    attention: torch.Tensor
    """(G, W) int64, 0 on the padding."""
    positions: torch.Tensor
    """(G, W) int64, 0 on the first token of a prompt."""

    @property
    def last(self) -> torch.Tensor:
        """(G,) int64 into the flattened tokens: the last token of each prompt."""
        rows, width = self.tokens.shape
        return torch.arange(1, rows + 1, device=self.tokens.device) * width - 1


@dataclass(frozen=True)
class PrefixBatch:
    """G prompts, R rows of their texts of at most T tokens, S scored positions, N scored tokens."""

    prefixes: Prefixes
    rows: torch.Tensor
    """(R, T) int64, texts without their last token, padded on the right; R may be 0."""
    owner: torch.Tensor
    """(R,) int64, the prompt of each row."""
    positions: torch.Tensor
    """(S - G,) int64 into the flattened rows; the first G scored positions end the prompts."""
    slot: torch.Tensor
    """(N,) int64 into the S scored positions: where each scored token is predicted."""
    token: torch.Tensor
    """(N,) int64, the scored token; tokens stand in the order of prompts and completions."""


def left_padded(prompts: Sequence[Ids], device: torch.device | str) -> Prefixes:
    """Return prompts of at least one token as one table."""
    width = max(map(len, prompts))
    table = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(table)
    for row, ids in enumerate(prompts):
        table[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = 1
    attention = torch.from_numpy(mask).to(device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    return Prefixes(torch.from_numpy(table).to(device), attention, positions)


def worth_sharing(prompts: Sequence[Prompt]) -> bool:
    """Return whether some prompt has two different rows; one-letter answers share theirs anyway."""
    return any(len({c[:-1] for c in p.completions if len(c) > 1}) > 1 for p in prompts)


def collate(prompts: Sequence[Prompt], device: torch.device | str) -> PrefixBatch:
    """Return the batch of all completions of all prompts, in order; equal texts share a row."""
    return collate_each([prompts], device)


def collate_each(clients: Sequence[Sequence[Prompt]], device: torch.device | str) -> PrefixBatch:
    """Return one batch of several clients, each with as many prompts and as many rows.

    Prompts and rows stand client by client.  A client with fewer than others gets prompts of one
    token and empty rows, which are computed and never scored.
    """
    most = max(map(len, clients))
    heads: list[Ids] = []
    rows: list[list[tuple[int, Ids]]] = []  # of each client: (prompt, text)
    slot: list[tuple[int, int, int]] = []  # (-1, 0, prompt) or (client, its row, column)
    token: list[int] = []
    for c, prompts in enumerate(clients):
        own: dict[tuple[int, Ids], int] = {}
        for owner, prompt in enumerate(prompts, start=c * most):
            for completion in prompt.completions:
                slot.append((-1, 0, owner))
                token += completion
                if len(completion) > 1:
                    row = own.setdefault((owner, completion[:-1]), len(own))
                    slot += [(c, row, column) for column in range(len(completion) - 1)]
        heads += [*(p.tokens for p in prompts), *[(0,)] * (most - len(prompts))]
        rows.append(list(own))
    each = max(map(len, rows))
    every = list(
        itertools.chain.from_iterable(
            [*own, *[(c * most, ())] * (each - len(own))] for c, own in enumerate(rows)
        )
    )
    width = max((len(ids) for _, ids in every), default=0)
    table = np.zeros((len(every), width), dtype=np.int64)
    for row, (_, ids) in enumerate(every):
        table[row, : len(ids)] = ids
    places: dict[tuple[int, int], int] = {}
    slots: list[int] = []
    for c, row, column in slot:
        if c < 0:
            slots.append(column)
        else:
            place = (c * each + row, column)
            slots.append(len(heads) + places.setdefault(place, len(places)))

    def indices(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PrefixBatch(
        prefixes=left_padded(heads, device),
        rows=torch.from_numpy(table).to(device),
        owner=indices([owner for owner, _ in every]),
        positions=indices([row * width + column for row, column in places]),
        slot=indices(slots),
        token=indices(token),
    )


def hidden_and_logits(
    network: PreTrainedModel, batch: PrefixBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the output head, and the logits, at the scored positions.

    (S, width) and (S, vocabulary), both in the model's dtype.  Raises ``ConfigError`` as
    ``batch.logits_of`` does.
    """
    hidden, logits, cache = prefill(network, batch.prefixes)
    if not len(batch.rows):
        return hidden, logits
    for layer in cache.layers:
        # As ``cache.batch_select_indices``, whose gradient threads would sum in no order.
        layer.keys = layer.keys.index_select(0, batch.owner)
        layer.values = layer.values.index_select(0, batch.owner)
    before = batch.prefixes.attention[batch.owner]
    columns = torch.arange(batch.rows.shape[1], device=batch.rows.device)
    more_hidden, more_logits = logits_of(
        network,
        batch.positions,
        input_ids=batch.rows,
        attention_mask=torch.cat([before, torch.ones_like(batch.rows)], dim=1),
        position_ids=before.sum(1, keepdim=True) + columns,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([hidden, more_hidden]), torch.cat([logits, more_logits])


def prefill(network: PreTrainedModel, prefixes: Prefixes) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return hidden states (G, width) and logits (G, vocabulary) after each prompt, and the cache.

    The cache holds a row for each prompt; ``batch_select_indices`` repeats them.
    """
    from transformers import DynamicCache

    # Given the configuration, the cache has the layers the model asks for (sliding windows).
    cache = DynamicCache(config=network.config)
    hidden, logits = logits_of(
        network,
        prefixes.last,
        input_ids=prefixes.tokens,
        attention_mask=prefixes.attention,
        position_ids=prefixes.positions,
        past_key_values=cache,
        use_cache=True,
    )
    return hidden, logits, cache
