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
give the same bits, and with merged weights on any number of threads.

*Ragged.*  A client with fewer prompts than ``local.batch-size`` takes smaller batches.  One that
has taken its steps, or whose loss or gradient is not finite, leaves the cohort; the others go on.

*Size and threads.*  ``cohort_plan.py``; a size of 1 trains one after another (``loop.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedalign.config import LocalConfig
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array, check_flat
from fedalign.training.cohort_batch import (
    CohortBatch,
    Question,
    collate,
    in_passes,
)
from fedalign.training.cohort_forward import CohortForward, pass_tokens, token_logps
from fedalign.training.cohort_plan import forward_of, in_cohorts
from fedalign.training.dpo import differences, pair_losses, pair_values
from fedalign.training.loop import TrainJob, TrainResult, batches, check_job
from fedalign.training.stack import AdapterStack

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
        check_flat(job.adapter, resident.layout)
    # Similar numbers of steps together: a cohort is as slow as its longest job.
    order = sorted(range(len(jobs)), key=lambda k: -jobs[k].steps)

    def work(chosen: list[int]) -> list[TrainResult]:
        return _train(resident, [jobs[k] for k in chosen], settings, seed)

    results = in_cohorts(resident, settings, order, work)
    return [results[k] for k in range(len(jobs))]


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

    def tokens(self, chosen: Sequence[int]) -> int:
        """Return the tokens of the distinct rows of a step, as the plain loop computes them."""
        rows = (n for k in set(chosen) for n in self.job.data.rows[k].nodes)
        return sum({int(n[-1]): len(n) for n in rows}.values())

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
        values["tokens"] = float(client.tokens(chosen[row]))
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
