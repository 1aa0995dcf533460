"""Many clients trained as one batch over one frozen base; what comes out is what each would get.

The base is frozen and a client's gradient depends on its own rows alone, so the clients of a
*cohort* can share every forward and backward pass: rows of all clients go through the base
together, each client's factors act on its own rows, and the sum of the clients' losses has each
client's own gradient in each client's own factors (``cohort_forward.py``).  Clipping, AdamW and
metrics are per client (``stack.py``).  Batches are those of ``loop.py``: the same keyed shuffles,
the same pairs, the same loss functions.

*Equal to separate runs* up to rounding: the gradient of a step agrees to 2e-5, and after a few
steps in float32 every entry of B A to 2e-3 of the largest and to 2e-5 on average
(tests/unit/training/test_cohort.py).  They cannot agree bit for bit, because sums run over other
shapes: padding, stacked products, merged weights.  The same jobs in the same cohort on one thread
give the same bits.

*Ragged.*  A client with fewer prompts than ``local.batch-size`` takes smaller batches.  One that
has taken its steps, or whose loss or gradient is not finite, leaves the cohort; the others go on.

*Size.*  A cohort is at most ``local.cohort-size`` jobs; 0 takes as many as fit ``MEMORY``, at most
64 on a processor, where more clients gain nothing.  1 trains one after another (``loop.py``).

*Threads.*  Where the layers are our own (``cohort_llama.py``), cohorts are small, and each is
trained on one thread, several side by side: calls are too short to be worth cutting, and no bit
depends on the number of threads.  Elsewhere the operations of one cohort are cut by torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from fedalign.config import LocalConfig
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.models.layout import size as layout_size
from fedalign.training import cohort_llama
from fedalign.training.cohort_batch import (
    CohortBatch,
    Question,
    collate,
    in_passes,
)
from fedalign.training.cohort_forward import CohortForward, StackedLayers, pass_tokens, token_logps
from fedalign.training.dpo import differences, pair_losses, pair_values
from fedalign.training.loop import TrainJob, TrainResult, batches, check_job
from fedalign.training.stack import AdapterStack

MEMORY = 1 << 30
"""Bytes that the adapters of a cohort may take on a processor: weights, gradients, moments."""
DEVICE_SHARE = 0.25
"""Share of a GPU's memory for the same."""
MOST_ON_CPU = 64
PARTS = 4
"""Cohorts of a full 64 clients that are trained side by side."""
MEANS = ("loss", "margin", "chosen_logp")


def train_cohort(
    resident: ResidentModel, jobs: Sequence[TrainJob], settings: LocalConfig, seed: int
) -> list[TrainResult]:
    """Train all jobs, in cohorts; results in the order of the jobs, as ``loop.train`` gives them.

    Metrics are those of ``loop.train``; ``accuracy`` is over the decided pairs of a step.  Raises
    ``ConfigError`` or ``WireError`` for a job that cannot be run at all, before anything is done,
    and ``ConfigError`` for an architecture that cannot be cut by client.
    """
    for job in jobs:
        check_job(job, settings)
    merged = cohort_llama.supported(resident)
    size = cohort_size(resident, settings)
    if merged and not settings.cohort_size:
        size = side_by_side(size, len(jobs))
    # Similar numbers of steps together: a cohort is as slow as its longest job.
    order = sorted(range(len(jobs)), key=lambda k: -jobs[k].steps)
    cohorts = [order[start : start + size] for start in range(0, len(order), size)]

    def train_one(chosen: list[int]) -> list[TrainResult]:
        return _train(resident, [jobs[k] for k in chosen], settings, seed)

    threads = torch.get_num_threads()
    if merged and min(threads, len(cohorts)) > 1:
        made = _on_threads(train_one, cohorts, threads)
    else:
        made = [train_one(chosen) for chosen in cohorts]
    results = {
        k: result
        for chosen, found in zip(cohorts, made, strict=True)
        for k, result in zip(chosen, found, strict=True)
    }
    return [results[k] for k in range(len(jobs))]


def side_by_side(most: int, jobs: int) -> int:
    """Return the size of cohorts that are trained side by side, where ``most`` fit in memory.

    Two of them at least, so that two threads have work, but of no less than 4 clients: below that,
    calls cost more than they compute.  ``PARTS`` fill the memory.  It does not depend on the number
    of threads, so bits do not.
    """
    return min(max(1, most // PARTS), max(4, math.ceil(jobs / 2)))


def _on_threads(
    work: Callable[[list[int]], list[TrainResult]], cohorts: list[list[int]], threads: int
) -> list[list[TrainResult]]:
    """Return ``work`` of every cohort, each on one thread of its own."""
    pool = ThreadPoolExecutor(
        min(threads, len(cohorts)), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        return list(pool.map(work, cohorts))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a number set in any thread holds for those that follow


def cohort_size(resident: ResidentModel, settings: LocalConfig) -> int:
    """Return how many clients are trained as one: ``local.cohort-size``, or what fits."""
    if settings.cohort_size:
        return settings.cohort_size
    each = 4 * 5 * layout_size(resident.layout)
    if resident.device.type == "cuda":
        memory = torch.cuda.get_device_properties(resident.device).total_memory
        return max(1, int(DEVICE_SHARE * memory) // each)
    if cohort_llama.supported(resident):
        each += 4 * 3 * sum(p.numel() for p in resident.network.model.layers.parameters())
    return max(1, min(MOST_ON_CPU, MEMORY // each))


def forward_of(resident: ResidentModel) -> CohortForward:
    """Return how this model's cohorts are computed."""
    if cohort_llama.supported(resident):
        return cohort_llama.MergedLlama(resident)
    return StackedLayers(resident)


@dataclass
class _Client:
    """One job under way."""

    job: TrainJob
    offsets: np.ndarray
    """(prompts + 1,): where each prompt's completions begin."""
    order: Iterator[list[int]]
    history: dict[str, list[float]] = field(default_factory=dict)
    snapshots: dict[int, Array] = field(default_factory=dict)
    done: int = 0
    failure: str = ""
    adapter: Array | None = None

    def questions(self, chosen: Sequence[int], owner: int) -> list[Question]:
        """Return the prompts of a step."""
        job, at = self.job, self.offsets
        known = job.reference_logps
        return [
            Question(
                owner,
                job.data.rows[k],
                job.data.pairs[k],
                None if known is None else known[at[k] : at[k + 1]],
            )
            for k in chosen
        ]

    def result(self, frozen: np.ndarray) -> TrainResult:
        """Return what came of the job."""
        adapter, failure = self.adapter, self.failure
        if not failure and (adapter is None or not np.isfinite(adapter).all()):
            failure = "adapter"
        if failure:
            return TrainResult(self.job.client, None, {}, self.done, f"{failure}_not_finite")
        assert adapter is not None
        if not np.array_equal(adapter[frozen], self.job.adapter[frozen]):
            raise RuntimeError("frozen factors changed in training; this is a defect of the loop")
        summary = {name: float(np.mean(series)) for name, series in self.history.items()}
        summary |= {"loss_first": self.history["loss"][0], "loss_last": self.history["loss"][-1]}
        summary["tokens"] = sum(self.history["tokens"])
        return TrainResult(self.job.client, adapter, summary, self.done, snapshots=self.snapshots)


def _train(
    resident: ResidentModel, jobs: Sequence[TrainJob], settings: LocalConfig, seed: int
) -> list[TrainResult]:
    clients = [
        _Client(
            job,
            np.cumsum([0, *(len(p.completions) for p in job.data.prompts)]),
            batches(len(job.data.prompts), settings.batch_size, seed, job.key),
        )
        for job in jobs
    ]
    stack = AdapterStack(
        [job.adapter for job in jobs],
        [job.learning_rate for job in jobs],
        resident.layout,
        resident.device,
        resident.frozen_a,
    )
    forward = forward_of(resident)
    active = list(clients)
    with resident.training(), torch.enable_grad():
        while active:
            _step(resident, forward, stack, active, settings)
            for row, client in enumerate(active):
                if not client.failure and client.done in client.job.snapshots:
                    client.snapshots[client.done] = stack.read(row)
                if not client.failure and client.done == client.job.steps:
                    client.adapter = stack.read(row)
            left = [r for r, c in enumerate(active) if c.adapter is None and not c.failure]
            if len(left) < len(active):
                active = [active[r] for r in left]
                stack = stack.take(left) if left else stack
    frozen = resident.frozen_mask()
    return [client.result(frozen) for client in clients]


def _step(
    resident: ResidentModel,
    forward: CohortForward,
    stack: AdapterStack,
    active: Sequence[_Client],
    settings: LocalConfig,
) -> None:
    """Take one step for every active client and record its metrics."""
    chosen = [next(c.order) for c in active]
    step = [c.questions(own, row) for row, (c, own) in enumerate(zip(active, chosen, strict=True))]
    pairs = np.array([sum(len(x.pairs.i) for x in own) for own in step], dtype=np.float64)
    totals: dict[str, np.ndarray] = {}
    stack.gradient.zero_()
    forward.begin(stack)
    # Scored positions of one prompt over its tokens, at most, bounds the logits of a pass.
    dense = max(len(x.rows.row) / x.rows.tokens for own in step for x in own)
    for part in in_passes(step, pass_tokens(resident, dense)):
        batch = collate(part, resident.device)
        for name, value in _pass(forward, batch, pairs, settings).items():
            totals[name] = totals.get(name, 0.0) + value
    forward.finish()
    norms = stack.norms()
    measured = norms.cpu().numpy()
    for row, client in enumerate(active):
        values = {name: float(totals[name][row] / pairs[row]) for name in MEANS}
        if totals["decided"][row]:
            values["accuracy"] = float(totals["right"][row] / totals["decided"][row])
        values["grad_norm"] = norm = float(measured[row])
        values["tokens"] = float(sum(client.job.data.rows[k].tokens for k in set(chosen[row])))
        if not math.isfinite(values["loss"]) or not math.isfinite(norm):
            client.failure = "gradient" if math.isfinite(values["loss"]) else "loss"
            continue
        client.done += 1
        for name, number in values.items():
            client.history.setdefault(name, []).append(number)
    stack.clip(norms, settings.max_grad_norm)
    stack.update()


def _pass(
    forward: CohortForward, batch: CohortBatch, pairs: np.ndarray, settings: LocalConfig
) -> dict[str, np.ndarray]:
    """Add the gradients of one pass; return sums over the pairs of each client: (C,) each."""
    logps = token_logps(forward.logits(batch), batch.slot, batch.token)
    if not batch.single:
        logps = torch.segment_reduce(logps, "sum", lengths=batch.lengths)
    delta = differences(logps, batch.reference, batch.lengths, batch.i, batch.j, settings)
    losses = pair_losses(delta, batch.q, settings)
    # Each client's loss is the mean over its own pairs.
    each = torch.from_numpy((1.0 / pairs[batch.owner]).astype(np.float32)).to(losses.device)
    forward.backward((losses * each).sum())
    values = pair_values(delta, batch.q, logps, batch.i, batch.j, settings)
    values["loss"] = losses.detach()
    values["right"] = torch.where(values["decided"], values["right"], 0.0)
    return {
        name: np.bincount(batch.owner, value.double().cpu().numpy(), len(pairs))
        for name, value in values.items()
    }
