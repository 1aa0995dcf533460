"""The preference predictor: a group's answers to new questions from a few of its answers.

Group preference optimisation (GPO, arXiv 2310.11523), trained federatedly as in PluralLLM (arXiv
2503.09925).  One token stands for one option of one question.  With x the embedding of "question +
option" by the frozen base (``embedding.py``) and y the share of the group that chose the option,

- a *context* token is (x, y), a *target* token is (x, 0);
- every token attends to the context tokens and to nothing else, without positional encoding: the
  order of the context does not matter and targets do not see each other;
- the head gives each target token a raw mean and a raw logarithm of a standard deviation.  The
  shares of a question are the softmax of the raw means over its options; std = exp(raw).

The loss is the mean over all real target tokens of the Gaussian negative log-likelihood

    1/2 log(2 pi) + log std + (y - share)^2 / (2 std^2).

Where we deviate from the published code: padding is an explicit mask and does not count in the
mean; normalisation stands before attention and feed-forward instead of after; the embedding is
normalised on entry (layer normalisation without parameters), because the width of a base's hidden
states differs by orders of magnitude between models; y enters times SHARE_SCALE; std is held in
[exp(-4), exp(2)], since without noise in the answers the likelihood has no bound; the MLPs have two
linear maps; query and key maps start equal (``predictor_parameters.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import layer_norm, linear, relu, scaled_dot_product_attention

from fedalign.config import PredictorConfig
from fedalign.models.layout import Layout

LOG_STD = (-4.0, 2.0)
"""Range of the logarithm of the standard deviation; shares lie in [0, 1]."""

SHARE_SCALE = 10.0
"""A share enters the token times this; beside D numbers of size 1 it would be lost."""

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Prediction:
    """What the network says of Q questions with up to K options."""

    shares: torch.Tensor
    """(Q, K), each row sums to 1; 0 where there is no option."""
    log_std: torch.Tensor
    """(Q, K), logarithm of the standard deviation of each share."""


def unpack(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors of a flat array (P,) as views; gradients reach ``flat``."""
    parts = flat.split([math.prod(shape) for _, shape in layout])
    return {name: p.view(shape) for (name, shape), p in zip(layout, parts, strict=True)}


def predict(
    weights: Weights,
    settings: PredictorConfig,
    context: tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor,
    mask: torch.Tensor,
) -> Prediction:
    """Return the predicted shares of the target questions.

    Args:
        weights: tensors of ``predictor_parameters.layout``.
        settings: shape of the network.
        context: embeddings (M, D) and shares (M,) of the context's options, M >= 1.
        targets: embeddings (Q, K, D), padded.
        mask: (Q, K), True where there is an option.
    """
    x, y = context
    flat = targets.reshape(-1, targets.shape[-1])
    seen = _embed(weights, x, y)
    asked = _embed(weights, flat, flat.new_zeros(len(flat)))
    for k in range(settings.layers):
        layer = f"layer.{k:02d}"
        attended = _norm(weights, f"{layer}.attention-norm", seen)
        key, value = (_heads(weights, f"{layer}.{n}", attended, settings) for n in ("key", "value"))
        seen, asked = (
            _layer(weights, layer, tokens, key, value, settings) for tokens in (seen, asked)
        )
    hidden = relu(_linear(weights, "head.0", _norm(weights, "norm", asked)))
    out = _linear(weights, "head.1", hidden).view(*mask.shape, 2)
    raw = out[..., 0].masked_fill(~mask, float("-inf"))
    return Prediction(torch.softmax(raw, dim=-1), out[..., 1].clamp(*LOG_STD))


def gaussian_loss(prediction: Prediction, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood (nats) of shares y (Q, K) over the real tokens."""
    error = (y - prediction.shares) * torch.exp(-prediction.log_std)
    nll = 0.5 * math.log(2 * math.pi) + prediction.log_std + 0.5 * error.square()
    return nll[mask].mean()


def cross_entropy_loss(prediction: Prediction, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over questions of -sum_k y_k log share_k (ours, not the published loss)."""
    logs = torch.log(prediction.shares.clamp_min(1e-12))
    return -(y * logs)[mask].sum() / len(y)


Loss = Callable[[Prediction, torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy_loss, "gaussian": gaussian_loss}
"""What training minimises, by ``predictor.loss``; docs/predictor.md compares the two."""


def _embed(weights: Weights, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(tokens, D) and (tokens,) to (tokens, width)."""
    token = torch.cat([layer_norm(x, x.shape[-1:]), SHARE_SCALE * y.unsqueeze(-1)], dim=-1)
    return _linear(weights, "embed.1", relu(_linear(weights, "embed.0", token)))


def _layer(
    weights: Weights,
    layer: str,
    tokens: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: PredictorConfig,
) -> torch.Tensor:
    query = _heads(
        weights, f"{layer}.query", _norm(weights, f"{layer}.attention-norm", tokens), settings
    )
    found = scaled_dot_product_attention(query, key, value)  # (heads, tokens, width / heads)
    joined = found.transpose(0, 1).reshape(len(tokens), settings.width)
    tokens = tokens + _linear(weights, f"{layer}.mix", joined)
    normed = _norm(weights, f"{layer}.feed-norm", tokens)
    return tokens + _linear(
        weights, f"{layer}.narrow", relu(_linear(weights, f"{layer}.wide", normed))
    )


def _heads(
    weights: Weights, name: str, tokens: torch.Tensor, settings: PredictorConfig
) -> torch.Tensor:
    """(tokens, width) to (heads, tokens, width / heads)."""
    return _linear(weights, name, tokens).view(len(tokens), settings.heads, -1).transpose(0, 1)


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])
