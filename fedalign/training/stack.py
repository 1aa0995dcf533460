"""The adapters of several clients as one tensor, with their gradients and AdamW's moments.

Row c of ``weights`` (C, P) is client c's flat adapter, in the layout of the resident model.  Each
LoRA factor is a *view* of all rows, of shape (C, rank, width) or (C, width, rank), and gradients
are added into ``gradient`` (C, P), so clipping and the optimiser work on two dimensions instead of
on dozens of small tensors for every client.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) without weight decay, moments .9 and .999, as
``loop.py`` takes it from torch:

    m <- .9 m + .1 g,   v <- .999 v + .001 g^2,
    w <- w - rate_c / (1 - .9^t)  m / (sqrt(v) / sqrt(1 - .999^t) + 1e-8)

with a learning rate for each client.  It is written out because torch's optimisers know one rate a
tensor, and a tensor a client would bring the dozens of small tensors back.  All clients of a stack
have taken the same number of steps t; one that has finished is taken out (:meth:`take`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedalign.models.layout import Array, Layout, offsets

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8


class AdapterStack:
    """Adapters of C clients in training.

    Attributes:
        weights: (C, P) float32.
        gradient: (C, P) float32.
        factors: ``{PEFT key: tensor of shape (C, *shape)}``, views of ``weights``; those that train
            require gradients.
        steps: updates taken.
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
        self.weights = adapters
        self.rates = list(rates)
        self.layout, self.device, self.frozen_a = layout, device, frozen_a
        self.steps = 0
        self.first = torch.zeros_like(self.weights)
        self.second = torch.zeros_like(self.weights)
        self._attach()

    def __len__(self) -> int:
        return len(self.rates)

    def trainable(self) -> list[torch.Tensor]:
        """Return the factors that train, in the order of the layout."""
        return [f for f in self.factors.values() if f.requires_grad]

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add gradients of :meth:`trainable`, in that order."""
        for place, found in zip(self._places, gradients, strict=True):
            place.add_(found)

    def norms(self) -> torch.Tensor:
        """Return the norm of each client's gradient: (C,)."""
        return self.gradient.norm(dim=1)

    def clip(self, norms: torch.Tensor, most: float) -> None:
        """Scale the gradients of clients whose norm is above ``most``; 0 clips nothing."""
        if most:
            scale = torch.where(norms > most, most / (norms + 1e-6), torch.ones_like(norms))
            self.gradient.mul_(scale.unsqueeze(1))

    def update(self) -> None:
        """Take one AdamW step for every client."""
        self.steps += 1
        t = self.steps
        self.first.lerp_(self.gradient, 1 - FIRST_DECAY)
        self.second.mul_(SECOND_DECAY).addcmul_(
            self.gradient, self.gradient, value=1 - SECOND_DECAY
        )
        root = self.second.sqrt().div_(math.sqrt(1 - SECOND_DECAY**t)).add_(EPSILON)
        change = root.reciprocal_().mul_(self.first)
        if len(set(self.rates)) == 1:
            self.weights.sub_(change, alpha=self.rates[0] / (1 - FIRST_DECAY**t))
        else:
            each = torch.tensor(self.rates, device=self.device).unsqueeze(1)
            self.weights.sub_(change.mul_(each / (1 - FIRST_DECAY**t)))

    def take(self, rows: Sequence[int]) -> AdapterStack:
        """Return a stack of some of the clients, their moments kept."""
        index = torch.tensor(list(rows), device=self.device)
        new = AdapterStack(
            self.weights[index],
            [self.rates[r] for r in rows],
            self.layout,
            self.device,
            self.frozen_a,
        )
        new.first, new.second, new.steps = self.first[index], self.second[index], self.steps
        return new

    def read(self, row: int) -> Array:
        """Return one client's adapter (P,), a fresh copy."""
        return self.weights[row].detach().cpu().numpy().copy()

    def _attach(self) -> None:
        self.gradient = torch.zeros_like(self.weights)
        self.factors: dict[str, torch.Tensor] = {}
        self._places: list[torch.Tensor] = []
        count, spans = len(self.rates), offsets(self.layout)
        for name, shape in self.layout:
            start, stop = spans[name]
            trains = not (self.frozen_a and ".lora_A." in name)
            factor = self.weights[:, start:stop].view(count, *shape).detach()
            self.factors[name] = factor.requires_grad_(trains)
            if trains:
                self._places.append(self.gradient[:, start:stop].view(count, *shape))
