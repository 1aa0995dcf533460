"""The training loop of a client, written once for every loss.

For each job: load the received adapter, start a fresh AdamW, take k steps, read the adapter.  A
step takes a batch of prompts, each with all its pairs, and minimises the mean loss over the pairs.
Batches are keyed shuffles of the prompts, one epoch after another.

The optimiser starts fresh in every job (moments 0.9 and 0.999, no weight decay, constant learning
rate within the job), because its state belongs to a client and the adapter does not.  Jobs run one
after another here; each depends on nothing but itself.  ``cohort.py`` trains many as one batch.

The optimiser works on the flat buffer of the resident model: one tensor in place of dozens.  Under
frozen A the gradient of A is exactly zero there, so A stays bit for bit; this is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedalign.config import LocalConfig
from fedalign.errors import ConfigError, WireError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.randomness import Key, generator
from fedalign.training.batch import collate, completion_logps, in_passes, output_head, row_tokens
from fedalign.training.dpo import differences, metrics, pair_losses
from fedalign.training.examples import TrainingSet


@dataclass(frozen=True)
class TrainJob:
    """Work for one client in one round."""

    client: str
    adapter: Array
    """(P,) float32, the received adapter."""
    data: TrainingSet
    reference_logps: Array | None
    """(C,) over the training set's completions; None exactly when ``local.reference`` is none."""
    steps: int
    learning_rate: float
    key: tuple[Key, ...]
    """Key of the batch order, for instance (round, client)."""
    snapshots: tuple[int, ...] = ()
    """Step counts after which a copy of the adapter is kept, each in 1..steps."""


@dataclass(frozen=True)
class TrainResult:
    """What came of a job."""

    client: str
    adapter: Array | None
    """(P,) float32; None when the job failed."""
    metrics: dict[str, float]
    """``loss``, ``margin``, ``chosen_logp``, ``grad_norm``: means over steps; ``loss_first``,
    ``loss_last``; ``accuracy`` where a pair has a preferred side; ``tokens``, the sum of those that
    the steps computed.  Other objectives have metrics of their own."""
    steps: int
    """Optimiser steps taken."""
    failure: str = ""
    """Empty, or a code: ``loss_not_finite``, ``gradient_not_finite``, ``adapter_not_finite``."""
    snapshots: dict[int, Array] = field(default_factory=dict)


def train(
    resident: ResidentModel, jobs: Sequence[TrainJob], settings: LocalConfig, seed: int
) -> list[TrainResult]:
    """Train each job from its own adapter; results in the order of the jobs.

    A loss, gradient or adapter that is not finite makes that result a recorded failure; the other
    jobs go on.  Raises ``ConfigError`` or ``WireError`` for a job that cannot be run at all.
    """
    return [_train_one(resident, job, settings, seed) for job in jobs]


def round_learning_rate(settings: LocalConfig, round_number: int, rounds: int) -> float:
    """Return the learning rate of a round, 1 to ``rounds``.

    ``cosine`` falls from ``learning_rate`` in round 1 to a tenth of it in the last round.
    """
    if settings.schedule == "constant" or rounds <= 1:
        return settings.learning_rate
    done = (round_number - 1) / (rounds - 1)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def batches(count: int, batch_size: int, seed: int, key: tuple[Key, ...]) -> Iterator[list[int]]:
    """Yield batches of indices without end: keyed permutations of ``range(count)`` joined.

    A batch holds ``min(batch_size, count)`` indices; one that spans two epochs may hold an index
    twice.
    """
    size = min(batch_size, count)
    waiting: list[int] = []
    epoch = 0
    while True:
        while len(waiting) < size:
            waiting += generator(seed, "batches", *key, epoch).permutation(count).tolist()
            epoch += 1
        yield waiting[:size]
        del waiting[:size]


def check_job(job: TrainJob, settings: LocalConfig) -> None:
    """Raise unless the job's reference, snapshots and adapter can be trained on."""
    if (job.reference_logps is None) != (settings.reference == "none"):
        given = "no" if job.reference_logps is None else "some"
        raise ConfigError(
            f"client '{job.client}': {given} reference log-probabilities were given, but "
            f"local.reference = '{settings.reference}'."
        )
    if job.reference_logps is not None and len(job.reference_logps) != job.data.completions:
        raise ConfigError(
            f"client '{job.client}': {len(job.reference_logps)} reference log-probabilities for "
            f"{job.data.completions} completions."
        )
    if job.steps < 1 or any(not 1 <= s <= job.steps for s in job.snapshots):
        raise ConfigError(
            f"client '{job.client}': {job.steps} steps with snapshots {job.snapshots}; steps must "
            "be at least 1 and snapshots within 1..steps."
        )
    if not job.adapter.any():
        raise WireError("adapter_all_zero", "with A and B both zero no gradient ever arises")


def _train_one(
    resident: ResidentModel, job: TrainJob, settings: LocalConfig, seed: int
) -> TrainResult:
    check_job(job, settings)
    resident.load(job.adapter)
    resident.set_trainable()
    resident.attach_gradients()
    flat, gradient = resident.parameters_flat, resident.gradient_flat
    weights = torch.nn.Parameter(flat)
    weights.grad = gradient
    optimiser = torch.optim.AdamW([weights], lr=job.learning_rate, weight_decay=0.0, fused=True)
    offsets = np.cumsum([0, *(len(p.completions) for p in job.data.prompts)])
    history: dict[str, list[float]] = {}
    snapshots: dict[int, Array] = {}
    order = batches(len(job.data.prompts), settings.batch_size, seed, job.key)
    failure = ""
    done = 0
    with resident.training(), torch.enable_grad():
        for step in range(1, job.steps + 1):
            gradient.zero_()
            values = _accumulate(resident, job, settings, next(order), offsets)
            values["grad_norm"] = norm = float(gradient.norm())
            if not math.isfinite(values["loss"]) or not math.isfinite(norm):
                failure = "gradient" if math.isfinite(values["loss"]) else "loss"
                break
            if settings.max_grad_norm and norm > settings.max_grad_norm:
                gradient.mul_(settings.max_grad_norm / (norm + 1e-6))
            optimiser.step()
            done = step
            for name, value in values.items():
                history.setdefault(name, []).append(value)
            if step in job.snapshots:
                snapshots[step] = resident.read()
    adapter = resident.read()
    if not failure and not np.isfinite(adapter).all():
        failure = "adapter"
    if failure:
        return TrainResult(job.client, None, {}, done, f"{failure}_not_finite")
    frozen = resident.frozen_mask()
    if not np.array_equal(adapter[frozen], job.adapter[frozen]):
        raise RuntimeError("frozen factors changed in training; this is a defect of the loop")
    summary = {name: float(np.mean(series)) for name, series in history.items()}
    summary |= {"loss_first": history["loss"][0], "loss_last": history["loss"][-1]}
    summary["tokens"] = sum(history["tokens"])
    return TrainResult(job.client, adapter, summary, done, snapshots=snapshots)


def _accumulate(
    resident: ResidentModel,
    job: TrainJob,
    settings: LocalConfig,
    chosen: Sequence[int],
    offsets: np.ndarray,
) -> dict[str, float]:
    """Add the gradient of the mean pair loss over the chosen prompts; return step metrics."""
    prompts = [job.data.prompts[k] for k in chosen]
    pairs = sum(len(job.data.labels[k]) for k in chosen)
    vocabulary = output_head(resident.network).weight.shape[0]
    totals: dict[str, float] = {"tokens": float(row_tokens(prompts))}
    for part in in_passes(prompts, vocabulary):
        i, j, q, reference = _labels(resident, job, [chosen[k] for k in part], offsets)
        batch = collate([prompts[k] for k in part], resident.device)
        logps = completion_logps(resident.network, batch)
        delta = differences(logps, reference, batch.lengths, i, j, settings)
        loss = pair_losses(delta, q, settings).sum() / pairs
        torch.autograd.backward(loss)
        share = len(q) / pairs
        totals["loss"] = totals.get("loss", 0.0) + float(loss.detach())
        for name, value in metrics(delta, q, logps, i, j, settings).items():
            totals[name] = totals.get(name, 0.0) + share * float(value)
    return totals


def _labels(
    resident: ResidentModel, job: TrainJob, chosen: Sequence[int], offsets: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return i, j, q over the batch's completions, and the reference's log-probabilities."""
    i: list[int] = []
    j: list[int] = []
    q: list[float] = []
    where: list[np.ndarray] = []
    at = 0
    for k in chosen:
        for label in job.data.labels[k]:
            i.append(at + label.i)
            j.append(at + label.j)
            q.append(label.q)
        at += len(job.data.prompts[k].completions)
        if job.reference_logps is not None:
            where.append(job.reference_logps[offsets[k] : offsets[k + 1]])
    device = resident.device
    reference = torch.from_numpy(np.concatenate(where)).to(device) if where else None
    return (
        torch.tensor(i, device=device),
        torch.tensor(j, device=device),
        torch.tensor(q, dtype=torch.float32, device=device),
        reference,
    )
