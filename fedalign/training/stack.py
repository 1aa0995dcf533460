"""The adapters of several clients as one tensor, with their gradients and AdamW's moments.

Row c of ``weights`` (C, P) is client c's flat adapter, in the layout of the resident model.  Each
LoRA factor is a *view* of all rows, of shape (C, rank, width) or (C, width, rank), and gradients
are added into ``gradient`` (C, P), so clipping and the optimiser work on two dimensions instead of
on dozens of small tensors for every client.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) without weight decay, moments .9 and .999, as
``loop.py`` takes it from torch:

    m <- .9 m + .1 g,   v <- .999 v + .001 g^2,
    w <- w - rate_c / (1 - .9^t)  m / (sqrt(v) / sqrt(1 - .999^t) + 1e-8)

with a learning rate and a number of steps t for each client.  It is written out because torch's
optimisers know one rate a tensor, and a tensor a client would bring the dozens of small tensors
back.  A client that has finished is taken out (:meth:`AdamRows.take`); one that pauses is taken out
and put back (:meth:`AdamRows.put`).

:class:`AdamRows` is the arithmetic on (C, N), whatever the columns mean; :class:`AdapterStack` adds
what they mean for an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from fedalign.models.layout import Array, Layout, offsets

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8


class AdamRows:
    """C rows of N weights, each with AdamW's moments, a learning rate and a number of steps.

    Attributes:
        weights: (C, N) float32.
        gradient: (C, N) float32, zero at first.
        rates: learning rate of each row.
        steps: updates that each row has taken.
    """

    def __init__(self, weights: torch.Tensor, rates: Sequence[float]) -> None:
        self.weights = weights
        self.rates = list(rates)
        self.steps = [0] * len(self.rates)
        self.gradient = torch.zeros_like(weights)
        self.first = torch.zeros_like(weights)
        self.second = torch.zeros_like(weights)

    def __len__(self) -> int:
        return len(self.rates)

    def norms(self) -> torch.Tensor:
        """Return the norm of each row's gradient: (C,)."""
        return self.gradient.norm(dim=1)

    def clip(self, norms: torch.Tensor, most: float) -> None:
        """Scale the gradients of rows whose norm is above ``most``; 0 clips nothing."""
        if most:
            scale = torch.where(norms > most, most / (norms + 1e-6), torch.ones_like(norms))
            self.gradient.mul_(scale.unsqueeze(1))

    def update(self) -> None:
        """Take one AdamW step for every row."""
        self.steps = [t + 1 for t in self.steps]
        self.first.lerp_(self.gradient, 1 - FIRST_DECAY)
        self.second.mul_(SECOND_DECAY).addcmul_(
            self.gradient, self.gradient, value=1 - SECOND_DECAY
        )
        root = self.second.sqrt()
        if len(set(self.steps)) == 1:
            root.div_(math.sqrt(1 - SECOND_DECAY ** self.steps[0]))
        else:
            root.div_(self._column([math.sqrt(1 - SECOND_DECAY**t) for t in self.steps]))
        change = root.add_(EPSILON).reciprocal_().mul_(self.first)
        sizes = [
            rate / (1 - FIRST_DECAY**t) for rate, t in zip(self.rates, self.steps, strict=True)
        ]
        if len(set(sizes)) == 1:
            self.weights.sub_(change, alpha=sizes[0])
        else:
            self.weights.sub_(change.mul_(self._column(sizes)))

    def take(self, rows: Sequence[int]) -> Self:
        """Return a copy of some of the rows, their moments and steps kept; no gradient."""
        index = self._index(rows)
        new = self._like(self.weights[index], [self.rates[r] for r in rows])
        new.first, new.second = self.first[index], self.second[index]
        new.steps = [self.steps[r] for r in rows]
        return new

    def put(self, rows: Sequence[int], other: AdamRows) -> None:
        """Write rows that :meth:`take` gave back to where they were taken."""
        index = self._index(rows)
        with torch.no_grad():
            self.weights[index] = other.weights
        self.first[index], self.second[index] = other.first, other.second
        for row, steps in zip(rows, other.steps, strict=True):
            self.steps[row] = steps

    def read(self, row: int) -> Array:
        """Return one row (N,), a fresh copy."""
        return self.weights[row].detach().cpu().numpy().copy()

    def _like(self, weights: torch.Tensor, rates: Sequence[float]) -> Self:
        return type(self)(weights, rates)

    def _index(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(rows), dtype=torch.int64, device=self.weights.device)

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self.weights.device).unsqueeze(1)


class AdapterStack(AdamRows):
    """Adapters of C clients in training: rows of P weights.

    Attributes:
        factors: ``{PEFT key: tensor of shape (C, *shape)}``, views of ``weights``; those that train
            require gradients.
    """

    def __init__(
        self,
        adapters: Sequence[Array] | torch.Tensor,
        rates: Sequence[float],
        layout: Layout,
        device: torch.device,
        frozen_a: bool,
    ) -> None:
        """Copy the adapters (C arrays of shape (P,)); ``rates`` are their learning rates."""
        if not isinstance(adapters, torch.Tensor):
            adapters = torch.from_numpy(np.stack(adapters)).to(device)
        super().__init__(adapters, rates)
        self.layout, self.device, self.frozen_a = layout, device, frozen_a
        self.factors, self._places = stacked_factors(self.weights, layout), list[torch.Tensor]()
        held = stacked_factors(self.gradient, layout)
        for name, factor in self.factors.items():
            trains = not (frozen_a and ".lora_A." in name)
            factor.requires_grad_(trains)
            if trains:
                self._places.append(held[name])

    def trainable(self) -> list[torch.Tensor]:
        """Return the factors that train, in the order of the layout."""
        return [f for f in self.factors.values() if f.requires_grad]

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add gradients of :meth:`trainable`, in that order."""
        for place, found in zip(self._places, gradients, strict=True):
            place.add_(found)

    def _like(self, weights: torch.Tensor, rates: Sequence[float]) -> Self:
        return type(self)(weights, rates, self.layout, self.device, self.frozen_a)


def stacked_factors(weights: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return views of ``weights`` (C, P): ``{PEFT key: (C, *shape)}``, cut off from any graph."""
    spans = offsets(layout)
    return {
        name: weights[:, slice(*spans[name])].view(len(weights), *shape).detach()
        for name, shape in layout
    }
