"""A decoder layer of a small Llama for many clients at once, gradients written out.

Tokens are packed (``llama_pass.py``): x (M, width), a slice for each client that meets its own
weights:

    h = x / rms(x)                                       (norms' scales stand in the weights)
    q, k, v = heads of h W_qkv^T,  q and k turned by position
    r = softmax(q k^T + mask) v                          (1 / sqrt(d) stands in W_q)
    x <- x + r W_o^T
    x <- x + (silu(g) u) W_d^T,    g, u = halves of (x / rms(x)) W_gu^T

Three functions of autograd: :class:`Attend` and :class:`Ask` give r, the latter for one position of
every row, :class:`Finish` the rest.  Autograd of the single operations would give the same
gradients in about twice the passes over memory.  Written out,

* a gradient of a weight is added to its sum by the product that makes it (:meth:`Weight.add`);
* with D = sum(dr r), the gradient of the scores is p (dp - D), D a sum over d and not over T
  (Dao et al., arXiv 2205.14135, B.2);
* a norm keeps what came out, y, and its divisor: dx = (dy - y mean(dy y)) / rms.

Held against the model's own layers in ``tests/unit/training/test_cohort.py``, values and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedalign.training.llama_pass import Bucket, Pass


class Weight:
    """One matrix for each client, and the sum of its gradients.

    Attributes:
        value: (C, out, in).
        gradient: (C, out, in).
    """

    def __init__(self, value: Tensor, gradient: Tensor) -> None:
        self.value, self.gradient = value, gradient
        # Views made once: a product is too short for many calls around it.
        self._values, self._gradients = value.unbind(), gradient.unbind()
        self._turned = value.transpose(1, 2).unbind()

    def rows(self, start: int, stop: int) -> Weight:
        """Return some of the outputs, as views."""
        return Weight(self.value[:, start:stop], self.gradient[:, start:stop])

    def of(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Return x W^T, (M, in) to (M, out): ``sizes`` rows of x for each client in turn."""
        out = x.new_empty((len(x), self.value.shape[1]))
        for own, weight, place in zip(_cut(x, sizes), self._turned, _cut(out, sizes), strict=True):
            torch.mm(own, weight, out=place)
        return out

    def on(self, total: Tensor, x: Tensor, sizes: list[int]) -> Tensor:
        """Return total + x W^T."""
        out = torch.empty_like(total)
        before, places = _cut(total, sizes), _cut(out, sizes)
        for base, own, weight, place in zip(
            before, _cut(x, sizes), self._turned, places, strict=True
        ):
            torch.addmm(base, own, weight, out=place)
        return out

    def back(self, gradient: Tensor, sizes: list[int]) -> Tensor:
        """Return the gradient of x from that of ``of(x)``: (M, out) to (M, in)."""
        out = gradient.new_empty((len(gradient), self.value.shape[2]))
        cuts = zip(_cut(gradient, sizes), self._values, _cut(out, sizes), strict=True)
        for own, weight, place in cuts:
            torch.mm(own, weight, out=place)
        return out

    def add(self, gradient: Tensor, x: Tensor, sizes: list[int]) -> None:
        """Add to the weights' gradients what ``of(x)`` contributes."""
        cuts = zip(gradient.t().split_with_sizes(sizes, 1), _cut(x, sizes), strict=True)
        for (own, inputs), total in zip(cuts, self._gradients, strict=True):
            torch.addmm(total, own, inputs, out=total)


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer, norms and scales folded in."""

    qkv: Weight
    """(C, 3 width, width); adjacent rows of a head in q and k are one complex number."""
    query: Weight
    """Its first rows."""
    key_value: Weight
    """Its other rows."""
    output: Weight
    gate_up: Weight
    """(C, 2 inner, width)."""
    down: Weight


class Attend(torch.autograd.Function):
    """What attention reads at every token: (M, width), before the output product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, at: Pass, first: bool) -> Tensor:
        """``first``: nobody wants the gradient of x."""
        h, inverse = normed(x, at.epsilon)
        qkv = layer.qkv.of(h, at.sizes)
        reads = at.room(x, x.shape[1])
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for bucket in at.buckets:
            three = bucket.split(qkv, 3)
            turn_(three[:2], bucket.turn)
            query, key, value = three
            p = torch.baddbmm(bucket.future, query, _t(key)).softmax(dim=-1)
            read = torch.bmm(p, value)
            bucket.join(read, reads)
            kept.append((three, p, read))
        ctx.kept, ctx.normed = kept, (h, inverse)
        ctx.layer, ctx.at, ctx.first = layer, at, first
        return at.own(reads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Add the gradients of q, k and v; return that of x."""
        at: Pass = ctx.at
        h, inverse = ctx.normed
        weight: Weight = ctx.layer.qkv
        places = at.room(h, 3 * h.shape[1])
        for bucket, (three, p, read) in zip(at.buckets, ctx.kept, strict=True):
            g = bucket.split_gradient(gradient)
            query, key, value = three
            d_three = torch.empty_like(three)
            torch.bmm(_t(p), g, out=d_three[2])
            d_scores = softmax_backward(torch.bmm(g, _t(value)), p, g, read)
            torch.bmm(d_scores, key, out=d_three[0])
            torch.bmm(_t(d_scores), query, out=d_three[1])
            turn_(d_three[:2], bucket.back)
            bucket.join(d_three, places)
        d_qkv = at.summed(places)
        weight.add(d_qkv, h, at.sizes)
        if ctx.first:
            return None, None, None, None
        d_h = weight.back(d_qkv, at.sizes)
        return normed_backward(d_h, h, inverse), None, None, None


class Ask(torch.autograd.Function):
    """The same at one token of every row: (R, width)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, layer: Layer, at: Pass, first: bool) -> Tensor:
        """``tokens`` (R,): the k-th is of the k-th row."""
        h, inverse = normed(x, at.epsilon)
        width = x.shape[1]
        asking, answering = layer.query, layer.key_value
        kv = answering.of(h, at.sizes)
        asked = h.index_select(0, tokens)
        each = [len(tokens) // len(at.sizes)] * len(at.sizes)
        queries = asking.of(asked, each)
        out = torch.empty_like(asked)
        kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for bucket in at.buckets:
            two = bucket.split(kv, 2)
            turn_(two[:1], bucket.turn)
            key, value = two
            column = at.column[tokens[bucket.rows]]
            query = _each_head(queries.index_select(0, bucket.rows), bucket)
            turn_(query, bucket.turn[column, None, None])
            query = query.view(-1, 1, bucket.heads.size)
            scores = torch.bmm(query, _t(key)).view(len(column), -1, bucket.columns)
            scores = scores + bucket.future[column, None]
            p = scores.softmax(dim=-1).view(-1, 1, bucket.columns)
            read = torch.bmm(p, value)
            out.index_copy_(0, bucket.rows, read.view(-1, width))
            kept.append((two, p, read, query))
        ctx.kept, ctx.normed, ctx.asked = kept, (h, inverse), (asked, tokens, each)
        ctx.weights, ctx.at, ctx.first = (asking, answering), at, first
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Add the gradients of q, k and v; return that of x."""
        at: Pass = ctx.at
        h, inverse = ctx.normed
        asked, tokens, each = ctx.asked
        asking, answering = ctx.weights
        places = at.room(h, 2 * h.shape[1])
        d_queries = torch.empty_like(asked)
        for bucket, (two, p, read, query) in zip(at.buckets, ctx.kept, strict=True):
            g = gradient.index_select(0, bucket.rows).view(-1, 1, bucket.heads.size)
            key, value = two
            d_two = torch.empty_like(two)
            torch.mul(_t(p), g, out=d_two[1])
            d_scores = softmax_backward(torch.bmm(g, _t(value)), p, g, read)
            torch.mul(_t(d_scores), query, out=d_two[0])
            d_query = _each_head(torch.bmm(d_scores, key), bucket)
            column = at.column[tokens[bucket.rows]]
            turn_(d_query, bucket.back[column, None, None])
            turn_(d_two[:1], bucket.back)
            d_queries.index_copy_(0, bucket.rows, d_query.view(len(column), -1))
            bucket.join(d_two, places)
        d_kv = at.summed(places)
        answering.add(d_kv, h, at.sizes)
        asking.add(d_queries, asked, each)
        if ctx.first:
            return None, None, None, None, None
        d_h = answering.back(d_kv, at.sizes)
        d_h.index_add_(0, tokens, asking.back(d_queries, each))
        return normed_backward(d_h, h, inverse), None, None, None, None


class Finish(torch.autograd.Function):
    """The rest of a layer: what was read, through the output product, and the feed-forward part."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Tensor, layer: Layer, sizes: list[int], epsilon: float
    ) -> Tensor:
        """Return the layer's output (N, width) for x and ``read`` of that shape."""
        x = layer.output.on(x, read, sizes)
        h, inverse = normed(x, epsilon)
        both = layer.gate_up.of(h, sizes)
        gate, up = both.chunk(2, dim=-1)
        opened = F.silu(gate)
        inner = opened * up
        ctx.kept = (read, h, inverse, both, opened, inner)
        ctx.layer, ctx.sizes = layer, sizes
        return layer.down.on(x, inner, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Add the gradients of the weights; return those of x and of ``read``."""
        read, h, inverse, both, opened, inner = ctx.kept
        layer: Layer = ctx.layer
        sizes: list[int] = ctx.sizes
        layer.down.add(gradient, inner, sizes)
        d_inner = layer.down.back(gradient, sizes)
        gate, up = both.chunk(2, dim=-1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, dim=-1)
        torch.mul(d_inner, opened, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_inner.mul_(up), gate, grad_input=d_gate)
        layer.gate_up.add(d_both, h, sizes)
        d_x = normed_backward(layer.gate_up.back(d_both, sizes), h, inverse).add_(gradient)
        layer.output.add(d_x, read, sizes)
        return d_x, layer.output.back(d_x, sizes), None, None, None


def normed(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + epsilon) over the last dimension, and 1 / that root."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return x * inverse, inverse


def normed_backward(gradient: Tensor, out: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of what was normed; ``gradient`` is written over.

    NaN where the sum of squares was beyond float32: there ``out`` and ``inverse`` are 0, and a
    gradient of 0 would pass for a client that has nothing left to learn.
    """
    along = torch.linalg.vecdot(gradient, out).unsqueeze(-1).div_(-out.shape[-1])
    return gradient.addcmul_(out, along).mul_(inverse / inverse * inverse)


def softmax_backward(d_p: Tensor, p: Tensor, d_read: Tensor, read: Tensor) -> Tensor:
    """Return p (dp - D), the gradient of the scores behind read = p v; ``d_p`` is written over."""
    return d_p.sub_(torch.linalg.vecdot(d_read, read).unsqueeze(-1)).mul_(p)


def turn_(x: Tensor, turn: Tensor) -> None:
    """Turn (..., T, d) by position, in place: adjacent pairs are complex numbers."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)


def _each_head(x: Tensor, bucket: Bucket) -> Tensor:
    """Return one token of every row, by head: (R_b, heads, 1, d)."""
    return x.view(len(bucket.rows), bucket.heads.count, 1, bucket.heads.size)


def _cut(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return each client's rows of x."""
    return x.split_with_sizes(sizes)


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)
