"""Logits of a cohort over a small Llama, with each client's factors merged into the weights.

Small matrices waste a processor: thin LoRA products, dozens of element-wise passes, and a last
layer that is computed where nobody looks.  For a Llama small enough that a copy of its adapted
weights for every client fits in memory, the same function is computed differently:

* *Merged.*  W_c = W + s B_c A_c once a step, (C, out, in).  The passes of a step collect dL/dW_c,
  and dL/dB_c = s dL/dW_c A_c^T, dL/dA_c = s B_c^T dL/dW_c once at its end.  At width 64 and rank 8
  this has about as many operations as the thin products, but they run at the core's own rate.
* *Folded.*  The scale of the norm before a product, and the 1/sqrt(d) of attention, go into W_c:
  with D_o and D_i the diagonal matrices, D_o W D_i once and for all, D_o B_c and A_c D_i each step.
* *Interleaved.*  Rows of W_q and W_k are permuted so that rotary positions are one complex product;
  scores do not change when queries and keys are permuted alike.
* *Pruned.*  In the last layer only the scored positions are asked: keys and values of all tokens,
  everything else of the last token of each prompt.
* *Packed.*  Products see no padding and no token twice: prompts that begin alike share their
  beginning (``llama_pass.py``).  Attention sees little padding.
* *Written out.*  The layer's gradient is not left to autograd (``llama_layer.py``).

Held against the model's own forward in the tests, values and gradients.  :func:`supported` says for
which models it stands; everything else goes through ``cohort_forward.StackedLayers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedalign.models.base import ResidentModel
from fedalign.training.cohort_batch import CohortBatch
from fedalign.training.llama_layer import Ask, Attend, Finish, Layer, Weight
from fedalign.training.llama_pass import Heads, lay_out
from fedalign.training.stack import AdapterStack

MOST_WEIGHTS = 2_000_000
"""Weights of the decoder layers up to which every client gets a copy (8 MB in float32)."""


MOST_THREADS = 8
"""Cohorts that are computed at once, each on a thread (``cohort_plan.py``)."""


def supported(resident: ResidentModel) -> bool:
    """Return whether the model is a plain Llama in float32 on a CPU that is small enough."""
    from transformers import LlamaForCausalLM

    if type(resident.network) is not LlamaForCausalLM:
        return False
    config: Any = resident.network.config
    layers = sum(p.numel() for p in resident.network.model.layers.parameters())
    return (
        config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and config.num_key_value_heads == config.num_attention_heads
        and config.num_attention_heads * config.head_dim == config.hidden_size
        and config.rope_parameters["rope_type"] == "default"
        and resident.network.dtype == torch.float32
        and resident.device.type == "cpu"
        and not resident.checkpointing
        and layers <= MOST_WEIGHTS
    )


@dataclass(frozen=True)
class _Part:
    """One projection of the model inside a merged weight."""

    stem: str
    """Of its factors' keys in the layout."""
    base: Tensor
    """(out, in), folded."""
    outputs: Tensor | None
    """(out,): the place of each row in the model's own order; None is the same order."""
    scale: float
    """What the rows are multiplied with."""
    inputs: Tensor
    """(in,): what the columns are multiplied with."""
    inputs_scaled: Tensor
    """The same times the adapter's scale."""

    def b(self, stack: AdapterStack) -> Tensor:
        """Return the folded B of every client: (C, out, rank)."""
        b = stack.factors[f"{self.stem}.lora_B.weight"]
        if self.outputs is not None:
            b = b.index_select(1, self.outputs)
        return b if self.scale == 1.0 else b * self.scale

    def a(self, stack: AdapterStack) -> Tensor:
        """Return the folded A of every client: (C, rank, in)."""
        return stack.factors[f"{self.stem}.lora_A.weight"] * self.inputs


class MergedLlama:
    """The forward described above; a :class:`fedalign.training.cohort_forward.CohortForward`."""

    def __init__(self, resident: ResidentModel) -> None:
        self._network: Any = resident.network
        config: Any = resident.network.config
        count, size = int(config.num_attention_heads), int(config.head_dim)
        theta = float(config.rope_parameters["rope_theta"])
        frequencies = theta ** (-torch.arange(size // 2, dtype=torch.float32) / (size // 2))
        self._heads = Heads(count, size, frequencies)
        self._width = int(config.hidden_size)
        self._epsilon = float(config.rms_norm_eps)
        self._scale = resident.config.alpha / resident.config.rank
        self._parts = [self._fold(k) for k in range(len(self._network.model.layers))]
        self._stack: AdapterStack | None = None
        self._layers: list[Layer] = []
        self._rooms: list[tuple[_Part, Weight]] = []
        """Every projection with its rows of the merged weights."""
        self._merged: list[tuple[_Part, Tensor, Tensor, Tensor]] = []
        """Every adapted one with the gradient of its rows, and its folded A and B of this step."""

    def begin(self, stack: AdapterStack) -> None:
        """Merge the factors into the weights of every layer."""
        if self._stack is None or len(self._stack) != len(stack):
            self._make_room(len(stack))
        self._stack = stack
        self._merged = []
        with torch.no_grad():
            for part, weight in self._rooms:
                base = part.base.expand(len(stack), -1, -1)
                if f"{part.stem}.lora_A.weight" in stack.factors:
                    a, b = part.a(stack), part.b(stack)
                    torch.baddbmm(base, b, a, alpha=self._scale, out=weight.value)
                    self._merged.append((part, weight.gradient, a, b))
                else:
                    weight.value.copy_(base)
        if torch.is_grad_enabled():
            for layer in self._layers:
                for whole in (layer.qkv, layer.output, layer.gate_up, layer.down):
                    whole.gradient.zero_()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass to the merged weights'."""
        torch.autograd.backward(loss)

    def finish(self) -> None:
        """Carry the gradients of the merged weights back to the factors."""
        assert self._stack is not None
        stack = self._stack
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for part, gradient, a, b in self._merged:
                if not stack.frozen_a:
                    d_a = torch.bmm(b.transpose(1, 2), gradient).mul_(part.inputs_scaled)
                    found[f"{part.stem}.lora_A.weight"] = d_a
                d_b = torch.bmm(gradient, a.transpose(1, 2)).mul_(part.scale * self._scale)
                if part.outputs is not None:
                    d_b = torch.empty_like(d_b).index_copy_(1, part.outputs, d_b)
                found[f"{part.stem}.lora_B.weight"] = d_b
        stack.add([found[n] for n, factor in stack.factors.items() if factor.requires_grad])

    def logits(self, batch: CohortBatch) -> Tensor:
        """Return logits at the scored positions: (C S, vocabulary)."""
        lengths = np.maximum(batch.row_lengths, 1)  # a row that only fills up is a token
        at = lay_out(batch.nodes, lengths, batch.clients, self._heads, self._epsilon)
        row = batch.positions // batch.rows.shape[1]
        tokens = at.token.view(-1)[batch.positions]
        words = batch.rows.view(-1)[at.first]
        x = F.embedding(words, self._network.model.embed_tokens.weight).detach()
        # A leaf that wants a gradient lets the functions of the layers take part in the backward.
        x.requires_grad_(torch.is_grad_enabled())
        first = True
        for layer in self._layers[:-1]:
            read = Attend.apply(x, layer, at, first)
            x = Finish.apply(x, read, layer, at.sizes, self._epsilon)
            first = False
        layer = self._layers[-1]
        if len(row) == len(lengths) and bool((row == torch.arange(len(row))).all()):
            read = Ask.apply(x, tokens, layer, at, first)
        else:  # texts of several tokens: a row is asked at many positions
            read = Attend.apply(x, layer, at, first).index_select(0, tokens)
        each = [len(tokens) // batch.clients] * batch.clients
        x = Finish.apply(x.index_select(0, tokens), read, layer, each, self._epsilon)
        logits: Tensor = self._network.lm_head(self._network.model.norm(x))
        return logits

    # --- weights ------------------------------------------------------------------------------

    def _fold(self, k: int) -> list[list[_Part]]:
        """Return the parts of the four merged weights of the k-th layer, in order."""
        layer = self._network.model.layers[k]
        heads, size = self._heads.count, self._heads.size
        pairs = torch.arange(size).view(2, -1).t().reshape(-1)
        turned = (torch.arange(heads)[:, None] * size + pairs).reshape(-1)

        def part(
            name: str,
            norm: Any = None,
            outputs: Tensor | None = None,
            scale: float = 1.0,
        ) -> _Part:
            module = layer.get_submodule(name)
            base = getattr(module, "base_layer", module).weight.detach()
            inputs: Any = torch.ones(base.shape[1]) if norm is None else norm.weight.detach()
            if outputs is not None:
                base = base.index_select(0, outputs)
            return _Part(
                f"base_model.model.model.layers.{k}.{name}",
                base * scale * inputs,
                outputs,
                scale,
                inputs,
                inputs * self._scale,
            )

        before, between = layer.input_layernorm, layer.post_attention_layernorm
        return [
            [
                part("self_attn.q_proj", before, turned, size**-0.5),
                part("self_attn.k_proj", before, turned),
                part("self_attn.v_proj", before),
            ],
            [part("self_attn.o_proj")],
            [part("mlp.gate_proj", between), part("mlp.up_proj", between)],
            [part("mlp.down_proj")],
        ]

    def _make_room(self, clients: int) -> None:
        """Make the merged weights' memory, and note which rows of it each projection has."""
        self._layers, self._rooms = [], []
        for parts in self._parts:
            wholes = []
            for own in parts:
                shape = (clients, sum(len(p.base) for p in own), own[0].base.shape[1])
                whole = Weight(torch.empty(shape), torch.empty(shape))
                wholes.append(whole)
                start = 0
                for part in own:
                    stop = start + len(part.base)
                    self._rooms.append((part, whole.rows(start, stop)))
                    start = stop
            qkv, output, gate_up, down = wholes
            query, key_value = qkv.rows(0, self._width), qkv.rows(self._width, 3 * self._width)
            self._layers.append(Layer(qkv, query, key_value, output, gate_up, down))
