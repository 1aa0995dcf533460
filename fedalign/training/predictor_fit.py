"""Local training of the preference predictor on one client's answers, and its error.

A step draws ``predictor.context`` of the client's training questions as context and
``predictor.targets`` others as targets, keyed by (seed, "predictor", client, round, step), and
takes one AdamW step on the loss of the targets.  The optimiser starts fresh in every round, as in
``loop.py``.  The learning rate falls along one half cosine over all steps of all rounds: a schedule
that starts over, or swings, within a run is not used (the published code's does).

The error is measured as predictions are used later: one fixed context, drawn by key from the
training questions, and questions that no training step saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedalign.config import PredictorConfig
from fedalign.errors import DataError
from fedalign.metrics.alignment import score_questions
from fedalign.models.layout import Array, Layout
from fedalign.randomness import Key, generator
from fedalign.rewards.predictor import LOSSES, predict, unpack

MAX_NORM = 1.0
"""Gradients are clipped to this global norm."""


@dataclass(frozen=True)
class Answered:
    """One question, embedded, and what a group answered."""

    key: str
    options: Array
    """(K, D) float32 embeddings."""
    shares: Array
    """(K,) float32."""


@dataclass(frozen=True)
class Fitted:
    """What came of a round of local training."""

    flat: Array | None
    """(P,) float32; None when a loss or gradient was not finite."""
    loss_first: float
    loss_last: float
    tokens: int
    """Option tokens over all steps."""


def fit(
    flat: Array,
    layout: Layout,
    answered: Sequence[Answered],
    settings: PredictorConfig,
    seed: int,
    client: str,
    round_: int,
) -> Fitted:
    """Train from ``flat`` (P,) for ``predictor.steps`` steps; round 1 is the first.

    Raises ``DataError`` for fewer than two questions: one to see, one to predict.
    """
    check_enough(answered, client)
    weights = torch.nn.Parameter(torch.from_numpy(flat.copy()))
    optimiser = torch.optim.AdamW([weights], lr=0.0, weight_decay=0.0, fused=True)
    losses: list[float] = []
    tokens = 0
    for step in range(settings.steps):
        context, targets = draw(answered, settings, seed, (client, round_, step))
        x, y, mask = _targets(targets)
        optimiser.zero_grad(set_to_none=True)
        prediction = predict(unpack(weights, layout), settings, context_of(context), x, mask)
        loss = LOSSES[settings.loss](prediction, y, mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weights], MAX_NORM)
        losses.append(float(loss.detach()))
        if not (math.isfinite(losses[-1]) and math.isfinite(float(norm))):
            return Fitted(None, losses[0], losses[-1], tokens)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, (round_ - 1) * settings.steps + step)
        optimiser.step()
        tokens += int(mask.sum())
    return Fitted(weights.detach().numpy().copy(), losses[0], losses[-1], tokens)


def learning_rate(settings: PredictorConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0 over all rounds."""
    total = settings.rounds * settings.steps
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total))


def draw(
    answered: Sequence[Answered], settings: PredictorConfig, seed: int, key: tuple[Key, ...]
) -> tuple[list[Answered], list[Answered]]:
    """Return context and target questions, disjoint; a client with few gives half to each."""
    order = generator(seed, "predictor", *key).permutation(len(answered)).tolist()
    cut = min(settings.context, len(answered) // 2)
    chosen = [answered[i] for i in order]
    return chosen[:cut], chosen[cut : cut + settings.targets]


def fixed_context(
    answered: Sequence[Answered], settings: PredictorConfig, seed: int, client: str, asked: str = ""
) -> list[Answered]:
    """Return the questions that predictions are made from, never the question ``asked`` itself.

    The first ``predictor.context`` of one keyed order, so it does not change between calls.
    """
    order = generator(seed, "predictor-context", client).permutation(len(answered)).tolist()
    usable = [answered[i] for i in order if answered[i].key != asked]
    if not usable:
        raise DataError(f"client '{client}' has no training question to predict from.")
    return usable[: settings.context]


def predicted_shares(
    flat: Array,
    layout: Layout,
    settings: PredictorConfig,
    context: Sequence[Answered],
    questions: Sequence[Array],
) -> list[np.ndarray]:
    """Return the shares (K,) float64 for each question's embeddings (K, D), from one context."""
    x, mask = _padded(questions)
    with torch.inference_mode():
        weights = unpack(torch.from_numpy(flat), layout)
        found = predict(weights, settings, context_of(context), x, mask).shares.double().numpy()
    return [row[: len(q)] / row[: len(q)].sum() for row, q in zip(found, questions, strict=True)]


def js_error(predicted: Sequence[np.ndarray], truth: Sequence[Array]) -> float:
    """Return the mean Jensen-Shannon distance (natural logarithm), in [0, sqrt(ln 2)]."""
    scores = score_questions("js_distance", predicted, [t.astype(np.float64) for t in truth])
    return float(np.mean([1.0 - s for s in scores if s is not None]))


def check_enough(answered: Sequence[Answered], client: str) -> None:
    """Raise ``DataError`` unless there are questions for a context and for targets."""
    if len(answered) < 2:
        raise DataError(
            f"client '{client}' has {len(answered)} training questions; the predictor needs at "
            "least 2. Use site.answers = 'shares', or fewer clients a group."
        )


def context_of(context: Sequence[Answered]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the context's embeddings (M, D) and shares (M,)."""
    x = np.concatenate([q.options for q in context])
    y = np.concatenate([q.shares for q in context])
    return torch.from_numpy(x), torch.from_numpy(y)


def _targets(targets: Sequence[Answered]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, mask = _padded([q.options for q in targets])
    y = torch.zeros(mask.shape)
    y[mask] = torch.from_numpy(np.concatenate([q.shares for q in targets]))
    return x, y, mask


def _padded(questions: Sequence[Array]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings (Q, K, D), padded with zeros, and the mask (Q, K) of real options."""
    width = max(len(q) for q in questions)
    x = np.zeros((len(questions), width, questions[0].shape[1]), dtype=np.float32)
    mask = np.zeros((len(questions), width), dtype=bool)
    for i, q in enumerate(questions):
        x[i, : len(q)], mask[i, : len(q)] = q, True
    return torch.from_numpy(x), torch.from_numpy(mask)
