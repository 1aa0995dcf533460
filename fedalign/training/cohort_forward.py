"""Logits of a cohort: rows of several clients through one frozen base, each with its own adapter.

For a LoRA layer with frozen weight W and client c's factors A_c (r, in), B_c (out, r),

    y_c = x_c W^T + s (x_c A_c^T) B_c^T,

x W^T is one product over everybody's rows, and the two thin products are stacked over clients.
Since a client's factors meet its own rows alone, the gradient of the *sum* of the clients' losses
holds each client's own gradient, as if it had been trained alone.

:class:`StackedLayers` does this inside any Hugging Face model: within :meth:`layers` the forward of
every adapted PEFT layer is replaced by the line above.  The rest of the model (attention, norms,
embedding, head) treats rows one by one and needs no change.  The thin products run in the
activations' precision; PEFT runs them in float32, which is the same thing on a float32 base.

An architecture that regroups tokens before an adapted layer (experts with routing) cannot be cut by
client there; it is refused with what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch

from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.training import cohort_llama
from fedalign.training.batch import HEAD_VALUES, ROW_TOKENS, logits_of, output_head
from fedalign.training.cohort_batch import PASS_TOKENS, CohortBatch
from fedalign.training.stack import AdapterStack


class CohortForward(Protocol):
    """How a cohort's logits and gradients are computed."""

    def begin(self, stack: AdapterStack) -> None:
        """Take the factors as they stand; called before the passes of a step."""

    def logits(self, batch: CohortBatch) -> torch.Tensor:
        """Return logits at the scored positions: (C S, vocabulary)."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a pass."""

    def finish(self) -> None:
        """See that the stack's gradient is complete; called after the passes of a step."""


class StackedLayers:
    """The model's own forward, with stacked factors in its adapted layers."""

    def __init__(self, resident: ResidentModel) -> None:
        self._resident = resident
        self._adapted = adapted_layers(resident)
        self._stack: AdapterStack | None = None

    def begin(self, stack: AdapterStack) -> None:
        """Use this stack's factors from now on."""
        self._stack = stack

    def logits(self, batch: CohortBatch) -> torch.Tensor:
        """Return logits at the scored positions: (C S, vocabulary)."""
        with self.layers():
            _, logits = logits_of(
                self._resident.network, batch.positions, input_ids=batch.rows, use_cache=False
            )
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a pass to the stack's."""
        assert self._stack is not None
        with self.layers():  # activations may be recomputed
            self._stack.add(torch.autograd.grad(loss, self._stack.trainable()))

    def finish(self) -> None:
        """Do nothing: the stack's gradient is complete."""

    @contextlib.contextmanager
    def layers(self) -> Iterator[None]:
        """Within the context, rows given to the network belong to the stack's clients in turn."""
        assert self._stack is not None
        try:
            for name, layer in self._adapted.items():
                a = self._stack.factors[f"{name}.lora_A.weight"]
                b = self._stack.factors[f"{name}.lora_B.weight"]
                layer.forward = _stacked(name, layer, a, b)
            yield
        finally:
            for layer in self._adapted.values():
                layer.__dict__.pop("forward", None)


def token_logps(logits: torch.Tensor, slot: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each scored token: (N,) float32, nats.

    ``logits`` (S, vocabulary); ``slot`` (N,) into S; ``token`` (N,).
    """
    every = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    # ``index_select``: the gradient of x[index] is summed in no order.
    return every.view(-1).index_select(0, slot * every.shape[1] + token)


def pass_tokens(resident: ResidentModel, dense: float) -> int:
    """Return how many padded tokens a pass may hold.

    ``dense`` is the largest number of scored positions a token of any prompt; it bounds the logits.
    """
    most = PASS_TOKENS if resident.device.type == "cpu" else ROW_TOKENS
    vocabulary = output_head(resident.network).weight.shape[0]
    at_once = cohort_llama.MOST_THREADS if cohort_llama.supported(resident) else 1
    return min(most, max(1, int(HEAD_VALUES / (at_once * vocabulary * dense))))


def adapted_layers(resident: ResidentModel) -> dict[str, Any]:
    """Return PEFT's LoRA layers by the stem of their keys in the layout."""
    from peft.tuners.lora import LoraLayer

    found = {
        name: module
        for name, module in resident.peft.named_modules()
        if isinstance(module, LoraLayer)
    }
    stems = {name.removesuffix(".lora_A.weight") for name, _ in resident.layout if "lora_A" in name}
    if set(found) != stems:
        raise RuntimeError("PEFT's layers and the adapter's layout differ; this is a defect.")
    return found


def _stacked(name: str, layer: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
    """Return a forward for one LoRA layer with factors (C, r, in) and (C, out, r)."""
    scale = float(layer.scaling["default"])
    clients = a.shape[0]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = cast(torch.Tensor, layer.base_layer(x, *args, **kwargs))
        if x.numel() % (clients * x.shape[-1]):
            raise ConfigError(
                f"{name}: {tuple(x.shape)} values cannot be cut by {clients} clients; this "
                "architecture regroups its tokens. Train one after another: local.cohort-size = 1."
            )
        own = x.reshape(clients, -1, x.shape[-1])
        thin = torch.bmm(own, a.to(x.dtype).transpose(1, 2))
        out = torch.baddbmm(
            y.reshape(clients, -1, y.shape[-1]), thin, b.to(x.dtype).transpose(1, 2), alpha=scale
        )
        return out.view(y.shape)

    return forward
