"""A cohort's bare work: its forward, backward and optimiser steps over batches recorded before.

``recorded`` keeps the batches of every pass of every step of every cohort; ``replay`` computes on
them what training computes, cohorts side by side on as many threads, and leaves out the rest:
choosing and laying out batches, metrics, jobs, results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from cohort_arms import World

from fedalign.config import LocalConfig
from fedalign.training import cohort
from fedalign.training.cohort_batch import CohortBatch
from fedalign.training.cohort_forward import token_logps
from fedalign.training.dpo import differences, pair_losses
from fedalign.training.stack import AdapterStack

Steps = list[list[CohortBatch]]
"""The passes of each step of one cohort."""
Calls = list[list[Steps]]
"""The cohorts of each call of ``train_cohort``."""


@contextmanager
def recorded(calls: Calls) -> Iterator[None]:
    """Keep the batches of every call of ``train_cohort``."""
    names = ("in_cohorts", "_train", "in_passes", "collate")
    before = {name: getattr(cohort, name) for name in names}
    own = threading.local()

    def new_call(*given: Any) -> Any:
        calls.append([])
        return before["in_cohorts"](*given)

    def new_cohort(*given: Any) -> Any:
        own.steps = []
        calls[-1].append(own.steps)
        return before["_train"](*given)

    def new_step(*given: Any) -> Any:
        own.steps.append([])
        return before["in_passes"](*given)

    def keep(*given: Any) -> CohortBatch:
        batch: CohortBatch = before["collate"](*given)
        own.steps[-1].append(batch)
        return batch

    for name, function in zip(names, (new_call, new_cohort, new_step, keep), strict=True):
        setattr(cohort, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(cohort, name, function)


def replay(made: World, calls: Calls, local: LocalConfig, cores: int) -> float:
    """Return seconds of forward, backward and optimiser steps alone, on ``cores`` threads."""
    total = 0.0
    for cohorts in calls:
        work = [_Prepared(made, steps, local) for steps in cohorts]
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(len, [()] * cores))  # threads are up before the clock runs
            began = time.perf_counter()
            list(pool.map(_Prepared.run, work))
            total += time.perf_counter() - began
    return total


class _Prepared:
    """One cohort, everything made that no forward, backward or update computes."""

    def __init__(self, made: World, steps: Steps, local: LocalConfig) -> None:
        self.made, self.steps, self.local = made, steps, local
        self.forward = cohort.forward_of(made.model)
        self.stacks: dict[int, AdapterStack] = {}
        self.shares: list[list[torch.Tensor]] = []
        for passes in steps:
            clients = passes[0].clients
            if clients not in self.stacks:  # a cohort shrinks as its clients finish
                self.stacks[clients] = AdapterStack(
                    [made.start] * clients,
                    [local.learning_rate] * clients,
                    made.model.layout,
                    made.model.device,
                    made.model.frozen_a,
                )
            owners = np.concatenate([batch.owner for batch in passes])
            each = (1.0 / np.bincount(owners, minlength=clients)).astype(np.float32)
            self.shares.append([torch.from_numpy(each[b.owner]) for b in passes])

    def run(self) -> None:
        """Take every step."""
        with torch.enable_grad():
            for passes, shares in zip(self.steps, self.shares, strict=True):
                self._step(self.stacks[passes[0].clients], passes, shares)

    def _step(
        self, stack: AdapterStack, passes: Sequence[CohortBatch], shares: Sequence[torch.Tensor]
    ) -> None:
        local = self.local
        stack.gradient.zero_()
        self.forward.begin(stack)
        for batch, share in zip(passes, shares, strict=True):
            logps = token_logps(self.forward.logits(batch), batch.slot, batch.token)
            if not batch.single:
                logps = torch.segment_reduce(logps, "sum", lengths=batch.lengths)
            delta = differences(logps, batch.reference, batch.lengths, batch.i, batch.j, local)
            self.forward.backward((pair_losses(delta, batch.q, local) * share).sum())
        self.forward.finish()
        stack.clip(stack.norms(), local.max_grad_norm)
        stack.update()
