"""Logits of a cohort over a small Llama, with each client's factors merged into the weights.

Small matrices waste a processor: thin LoRA products, dozens of element-wise passes, and a last
layer that is computed where nobody looks.  For a Llama small enough that a copy of its adapted
weights for every client fits in memory, the same function is computed differently:

* *Merged.*  W_c = W + s B_c A_c once a step, (C, out, in); queries, keys and values are one stacked
  product, gate and up another.  The step's passes collect dL/dW_c, and one backward through the
  merge gives dL/dA_c and dL/dB_c.  At width 64 and rank 8 this has about as many operations as the
  thin products, in a third of the calls.
* *Folded.*  The scale of the norm before a product, and the 1/sqrt(d) of attention, go into W_c.
* *Interleaved.*  Rows of W_q and W_k are permuted so that rotary positions are one complex product;
  scores do not change when queries and keys are permuted alike.
* *Pruned.*  In the last layer only the scored positions are asked: keys and values of all tokens,
  everything else of the last token of each prompt.

Held against the model's own forward in the tests, values and gradients.  :func:`supported` says for
which models it stands; everything else goes through ``cohort_forward.StackedLayers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedalign.models.base import ResidentModel
from fedalign.training.cohort_batch import CohortBatch
from fedalign.training.stack import AdapterStack

MOST_WEIGHTS = 2_000_000
"""Weights of the decoder layers up to which every client gets a copy (8 MB in float32)."""


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
        and config.rope_parameters["rope_type"] == "default"
        and resident.network.dtype == torch.float32
        and resident.device.type == "cpu"
        and not resident.checkpointing
        and layers <= MOST_WEIGHTS
    )


@dataclass(frozen=True)
class _Merged:
    """Weights of one decoder layer for each client, norms and scales folded in."""

    query: Tensor
    """(C, width, width), rows interleaved."""
    key_value: Tensor
    """(C, 2 width, width)."""
    output: Tensor
    gate_up: Tensor
    """(C, 2 inner, width)."""
    down: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return (self.query, self.key_value, self.output, self.gate_up, self.down)


class MergedLlama:
    """The forward described above; a :class:`fedalign.training.cohort_forward.CohortForward`."""

    def __init__(self, resident: ResidentModel) -> None:
        self._network: Any = resident.network
        config: Any = resident.network.config
        self._heads = int(config.num_attention_heads)
        self._width = int(config.hidden_size)
        self._size = int(config.head_dim)
        self._epsilon = float(config.rms_norm_eps)
        self._scale = resident.config.alpha / resident.config.rank
        half = self._size // 2
        theta = float(config.rope_parameters["rope_theta"])
        self._frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
        pairs = torch.arange(self._size).view(2, half).t().reshape(-1)
        self._interleaved = (torch.arange(self._heads)[:, None] * self._size + pairs).reshape(-1)
        self._stack: AdapterStack | None = None
        self._merged: list[_Merged] = []
        self._leaves: list[_Merged] = []

    def begin(self, stack: AdapterStack) -> None:
        """Merge the factors into the weights of every layer."""
        self._stack = stack
        self._merged = [self._merge(stack, k) for k in range(len(self._network.model.layers))]
        grown = torch.is_grad_enabled()
        self._leaves = [
            _Merged(*(w.detach().requires_grad_(grown and w.requires_grad) for w in m.all()))
            for m in self._merged
        ]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass to the merged weights'."""
        torch.autograd.backward(loss)

    def finish(self) -> None:
        """Carry the gradients of the merged weights back to the factors."""
        assert self._stack is not None
        pairs = [
            (merged, leaf.grad)
            for m, leaves in zip(self._merged, self._leaves, strict=True)
            for merged, leaf in zip(m.all(), leaves.all(), strict=True)
            if merged.requires_grad
        ]
        self._stack.add(
            torch.autograd.grad(
                [merged for merged, _ in pairs], self._stack.trainable(), [g for _, g in pairs]
            )
        )

    def logits(self, batch: CohortBatch) -> Tensor:
        """Return logits at the scored positions: (C S, vocabulary)."""
        rows, columns = batch.rows.shape
        position = torch.arange(columns, dtype=torch.float32)
        angles = torch.outer(position, self._frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)  # (T, d/2)
        future = torch.full((columns, columns), float("-inf")).triu(1)
        x = F.embedding(batch.rows, self._network.model.embed_tokens.weight)
        x = x.view(batch.clients, -1, self._width)  # (C, n T, width)
        for layer in self._leaves[:-1]:
            h = _Normed.apply(x, self._epsilon)
            x = x + torch.bmm(self._attend(layer, h, rows, turn, future), _t(layer.output))
            x = x + self._feed(layer, x)
        x = self._last(self._leaves[-1], x, batch, turn, future)
        x = self._network.model.norm(x.reshape(-1, self._width))
        logits: Tensor = self._network.lm_head(x)
        return logits

    def _attend(self, w: _Merged, h: Tensor, rows: int, turn: Tensor, future: Tensor) -> Tensor:
        """Return what attention reads, (C, n T, width), before the output product."""
        columns = len(future)
        weight = torch.cat([w.query, w.key_value], dim=1)
        three = torch.bmm(h, _t(weight)).view(rows, columns, 3, self._heads, self._size)
        three = three.permute(2, 0, 3, 1, 4).contiguous()  # (3, R, heads, T, d)
        both = _turned(three[:2], turn).view(2, -1, columns, self._size)
        scores = torch.baddbmm(future, both[0], _t(both[1]))
        read = torch.bmm(_Softmax.apply(scores), three[2].view(-1, columns, self._size))
        read = read.view(rows, self._heads, columns, self._size).transpose(1, 2)
        return read.reshape(h.shape)

    def _last(
        self, w: _Merged, x: Tensor, batch: CohortBatch, turn: Tensor, future: Tensor
    ) -> Tensor:
        """Return the last layer's output at the scored positions: (C, S, width)."""
        rows, columns = batch.rows.shape
        picked = (batch.clients, -1, self._width)
        h = _Normed.apply(x, self._epsilon)
        x = x.reshape(-1, self._width).index_select(0, batch.positions).view(picked)
        column = batch.positions % columns
        if not _one_a_row(batch):  # texts of several tokens: nearly every position is asked
            read = self._attend(w, h, rows, turn, future).reshape(-1, self._width)
            x = x + torch.bmm(read.index_select(0, batch.positions).view(picked), _t(w.output))
            return x + self._feed(w, x)
        two = torch.bmm(h, _t(w.key_value)).view(rows, columns, 2, self._heads, self._size)
        two = two.permute(2, 0, 3, 1, 4).contiguous()  # (2, R, heads, T, d)
        keys = _turned(two[0], turn).view(-1, columns, self._size)
        asked = h.reshape(-1, self._width).index_select(0, batch.positions).view(picked)
        query = torch.bmm(asked, _t(w.query)).view(-1, self._heads, 1, self._size)
        query = _turned(query, turn[column, None, None]).view(-1, 1, self._size)
        scores = torch.bmm(query, _t(keys)).view(rows, self._heads, columns)
        weights = _Softmax.apply(scores + future[column, None])
        values = two[1].view(-1, columns, self._size)
        read = torch.bmm(weights.view(-1, 1, columns), values)
        x = x + torch.bmm(read.view(picked), _t(w.output))
        return x + self._feed(w, x)

    def _feed(self, w: _Merged, x: Tensor) -> Tensor:
        inner = torch.bmm(_Normed.apply(x, self._epsilon), _t(w.gate_up))
        return torch.bmm(_Gated.apply(inner), _t(w.down))

    def _merge(self, stack: AdapterStack, k: int) -> _Merged:
        layer = self._network.model.layers[k]

        def weight(part: str, name: str) -> Tensor:
            module = layer.get_submodule(f"{part}.{name}")
            base = getattr(module, "base_layer", module).weight
            stem = f"base_model.model.model.layers.{k}.{part}.{name}"
            every = base.unsqueeze(0).expand(len(stack), -1, -1)
            if f"{stem}.lora_A.weight" not in stack.factors:
                return every
            a = stack.factors[f"{stem}.lora_A.weight"]
            b = stack.factors[f"{stem}.lora_B.weight"]
            return torch.baddbmm(every, b, a, alpha=self._scale)

        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        query = weight("self_attn", "q_proj").index_select(1, self._interleaved) * self._size**-0.5
        key = weight("self_attn", "k_proj").index_select(1, self._interleaved)
        value = weight("self_attn", "v_proj")
        gate, up = weight("mlp", "gate_proj"), weight("mlp", "up_proj")
        return _Merged(
            query * before,
            torch.cat([key, value], dim=1) * before,
            weight("self_attn", "o_proj"),
            torch.cat([gate, up], dim=1) * between,
            weight("mlp", "down_proj"),
        )


class _Normed(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in four passes each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        """Return the normed values; keep them and 1 / root."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        out = x * inverse
        ctx.save_for_backward(out, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return (g - y mean(g y)) / root."""
        out, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, out).unsqueeze(-1).div_(-out.shape[-1])
        return torch.addcmul(gradient, out, along).mul_(inverse), None


class _Softmax(torch.autograd.Function):
    """Softmax over the last dimension; torch's own gradient depends on the number of threads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the softmax and keep it."""
        out = x.softmax(dim=-1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return p (g - sum(p g))."""
        (out,) = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, out).unsqueeze(-1)
        return (gradient - along).mul_(out)


class _Gated(torch.autograd.Function):
    """silu(gate) up, of (..., 2 inner) to (..., inner); keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """Return the gated values."""
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient of both halves."""
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        out_gate, out_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), gradient, out=out_up)
        torch.ops.aten.silu_backward.grad_input(up * gradient, gate, grad_input=out_gate)
        return out


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Return (..., T, d) rotated by position: adjacent pairs are complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def _one_a_row(batch: CohortBatch) -> bool:
    """Return whether the k-th scored position is in the k-th row, for every row."""
    rows, columns = batch.rows.shape
    if len(batch.positions) != rows:
        return False
    return bool((batch.positions // columns == torch.arange(rows)).all())
