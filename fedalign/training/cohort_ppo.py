"""PPO of many clients as one batch over one frozen base; what comes out is what each would get.

A cohort takes the batches of ``local_ppo.py`` side by side: every client draws its own questions,
samples from its own adapter (``cohort_sample.py``), rewards the texts by its own group's shares,
and takes its own updates (``cohort_policy.py``), but rows of all clients go through the base
together.  Questions, random numbers, minibatches, rewards, losses, clipping, the early stop, the
controller of the KL coefficient, the bound on the divergence and the metrics are the same code or
the same numbers as one client after another.

*Equal to separate runs* up to rounding, as in ``cohort.py``, with one more reservation: a draw that
falls on the border between two tokens may take the other one, and everything after it is then
another run of equal standing.  In the tests that does not happen, over a few batches; texts there
are the same, and adapters agree.

A client that has taken its steps, or has failed, leaves; the others go on.  Clients wait for each
other's batches, not for each other's updates: one that stopped its updates early begins its next
batch with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from fedalign.config import Config
from fedalign.models.base import ResidentModel
from fedalign.training import policy
from fedalign.training.cohort_forward import StackedLayers
from fedalign.training.cohort_plan import cohort_size, forward_of
from fedalign.training.cohort_policy import Exchange, improve, measure
from fedalign.training.cohort_sample import Request, sample_each
from fedalign.training.cohort_texts import CohortTexts
from fedalign.training.local_ppo import DIVERGED, NOT_FINITE, Course, PolicyJob
from fedalign.training.loop import TrainResult
from fedalign.training.stack import AdamRows, AdapterStack


def train_ppo_cohort(
    resident: ResidentModel, jobs: Sequence[PolicyJob], config: Config, seed: int
) -> list[TrainResult]:
    """Train all jobs, in cohorts; results in the order of the jobs, as ``train_ppo`` gives them.

    Raises ``ConfigError``, ``WireError`` or ``DataError`` for a job that cannot be run at all,
    before anything is done, and ``ConfigError`` for an architecture that cannot be cut by client.
    """
    courses = [Course(resident, job, config, seed) for job in jobs]
    states = [policy.start(resident, job.adapter, config.ppo, config.ppo.kl) for job in jobs]
    size = cohort_size(resident, config.local)
    order = sorted(range(len(jobs)), key=lambda k: -jobs[k].steps)
    results: dict[int, TrainResult] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        cohort = _Cohort(
            resident, [courses[k] for k in chosen], [states[k] for k in chosen], config
        )
        results |= dict(zip(chosen, cohort.train(seed), strict=True))
    return [results[k] for k in range(len(jobs))]


class _Cohort:
    """Clients under way; row k of the stacks belongs to the k-th of ``active``."""

    def __init__(
        self,
        resident: ResidentModel,
        courses: Sequence[Course],
        states: Sequence[policy.PolicyState],
        config: Config,
    ) -> None:
        self.resident, self.config = resident, config
        self.courses = list(courses)
        self.stack = AdapterStack(
            [s.adapter for s in states],
            [c.job.learning_rate for c in courses],
            resident.layout,
            resident.device,
            resident.frozen_a,
        )
        heads = torch.from_numpy(np.stack([s.value_head for s in states])).to(resident.device)
        self.heads = AdamRows(heads, [config.ppo.value_learning_rate] * len(courses))
        self.kl = [s.kl for s in states]
        self.active = list(range(len(courses)))
        self.results: dict[int, TrainResult] = {}
        self.plain, self.stacked = forward_of(resident), StackedLayers(resident)

    def train(self, seed: int) -> list[TrainResult]:
        """Train every client to its end."""
        while self.active:
            self._batch(seed)
        return [self.results[k] for k in range(len(self.courses))]

    def _batch(self, seed: int) -> None:
        resident, config = self.resident, self.config
        batches = [self.courses[k].next() for k in self.active]
        with torch.no_grad():
            self.plain.begin(self.stack)
            self.stacked.begin(self.stack)
        sampled = sample_each(
            resident,
            self.plain,
            self.stacked,
            [Request(b.prompts, b.longest, b.draws) for b in batches],
            config.ppo.samples,
        )
        broken = [row for row, texts in enumerate(sampled) if texts is None]
        kept = [(b, texts) for b, texts in zip(batches, sampled, strict=True) if texts is not None]
        self._fail(broken, NOT_FINITE)
        if not kept:
            return
        read = [
            self.courses[k].read(batch, texts)
            for k, (batch, texts) in zip(self.active, kept, strict=True)
        ]
        texts = CohortTexts(resident, [episodes for episodes, _ in read])
        forward = self.stacked if texts.shared else self.plain
        measured = measure(resident, forward, self.stack, self.heads, texts)
        kl, finite = measured.kl(texts), measured.finite(texts)
        far = [fine and nats > config.ppo.max_kl for fine, nats in zip(finite, kl, strict=True)]
        exchanges = [
            Exchange(
                batch.settings,
                policy.minibatches(texts.prompts(row), batch.settings, seed, batch.key),
                self.kl[self.active[row]],
                scored.rewards,
                failed=far[row] or not finite[row],
            )
            for row, ((batch, _), (_, scored)) in enumerate(zip(kept, read, strict=True))
        ]
        improve(resident, forward, self.stack, self.heads, texts, measured, exchanges)
        codes: dict[int, str] = {}
        for row, (k, (batch, _), (episodes, scored), x) in enumerate(
            zip(self.active, kept, read, exchanges, strict=True)
        ):
            if x.failed or not bool(torch.isfinite(self.stack.weights[row]).all()):
                codes[row] = DIVERGED if far[row] else NOT_FINITE
                continue
            self.kl[k] = policy.controlled_kl(self.kl[k], kl[row], batch.settings)
            self.courses[k].record(
                batch, episodes, scored, kl[row], x.summary(), partial(self.stack.read, row)
            )
        self._leave(codes)

    def _fail(self, rows: Sequence[int], code: str) -> None:
        for row in rows:
            k = self.active[row]
            self.results[k] = self.courses[k].failed(code)
        self._keep([row for row in range(len(self.active)) if row not in rows])

    def _leave(self, codes: dict[int, str]) -> None:
        """Take out the clients that have failed or finished."""
        for row, k in enumerate(self.active):
            course = self.courses[k]
            if row in codes:
                self.results[k] = course.failed(codes[row])
            elif course.done == course.job.steps:
                adapter = self.stack.read(row)
                frozen = self.resident.frozen_mask()
                if not np.array_equal(adapter[frozen], course.job.adapter[frozen]):
                    raise RuntimeError(
                        "frozen factors changed in training; this is a defect of the loop"
                    )
                self.results[k] = course.result(adapter)
        self._keep([row for row, k in enumerate(self.active) if k not in self.results])

    def _keep(self, rows: Sequence[int]) -> None:
        if 0 < len(rows) < len(self.active):
            self.stack, self.heads = self.stack.take(rows), self.heads.take(rows)
        self.active = [self.active[row] for row in rows]
