"""How many clients are computed as one, in which way, and on how many threads.

*Size.*  A cohort is at most ``local.cohort-size`` clients; 0 takes as many as fit ``MEMORY``, at
most 64 on a processor, where more gain nothing.

*Threads.*  Where the layers are our own (``cohort_llama.py``) cohorts are small, each is computed
on one thread, and up to ``MOST_THREADS`` of them stand side by side: calls are too short to be
worth cutting, and no bit depends on the number of threads.  Elsewhere torch cuts the operations of
one cohort, and cohorts follow each other; other models' layers are changed in place while a cohort
runs (``cohort_forward.py``), so two at a time would meet each other's clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from fedalign.config import LocalConfig
from fedalign.models.base import ResidentModel
from fedalign.models.layout import size as layout_size
from fedalign.training import cohort_llama
from fedalign.training.cohort_forward import CohortForward, StackedLayers
from fedalign.training.cohort_llama import MOST_THREADS

MEMORY = 1 << 30
"""Bytes that the adapters of cohorts may take on a processor: weights, gradients, moments."""
DEVICE_SHARE = 0.25
"""Share of a GPU's memory for the same."""
MOST_ON_CPU = 64
LARGEST, LEAST = 16, 4
"""Clients of a cohort that stands beside others: more gain nothing, and with fewer calls cost more
than they compute."""

Result = TypeVar("Result")


def cohort_size(resident: ResidentModel, settings: LocalConfig) -> int:
    """Return how many clients are computed as one: ``local.cohort-size``, or what fits."""
    if settings.cohort_size:
        return settings.cohort_size
    each = _bytes(resident)
    if resident.device.type == "cuda":
        memory = torch.cuda.get_device_properties(resident.device).total_memory
        return max(1, int(DEVICE_SHARE * memory) // each)
    return max(1, min(MOST_ON_CPU, MEMORY // each))


def _bytes(resident: ResidentModel) -> int:
    """Return what a client takes: adapter, gradient, moments, merged weights and their gradient."""
    values = 5 * layout_size(resident.layout)
    if cohort_llama.supported(resident):
        values += 3 * sum(p.numel() for p in resident.network.model.layers.parameters())
    return 4 * values


def forward_of(resident: ResidentModel) -> CohortForward:
    """Return how this model's cohorts are computed."""
    if cohort_llama.supported(resident):
        return cohort_llama.MergedLlama(resident)
    return StackedLayers(resident)


def side_by_side(resident: ResidentModel, clients: int) -> int:
    """Return the size of cohorts with merged weights that are computed side by side.

    Two cohorts at least, so that two threads have work, but of no less than ``LEAST`` clients; so
    many that ``MOST_THREADS`` cohorts fit ``MEMORY``.  The number of threads plays no part, so that
    bits do not depend on it.
    """
    fit = max(1, MEMORY // (MOST_THREADS * _bytes(resident)))
    return min(LARGEST, fit, max(LEAST, math.ceil(clients / 2)))


def in_cohorts(
    resident: ResidentModel,
    settings: LocalConfig,
    order: Sequence[int],
    work: Callable[[list[int]], Sequence[Result]],
) -> dict[int, Result]:
    """Cut ``order`` into cohorts, call ``work`` on each, and return its results by index.

    ``work`` gets indices and returns one result for each.  Where :func:`forward_of` is a
    ``MergedLlama`` it is called on several threads at once: as many as torch has, at most
    ``MOST_THREADS``.  An error is raised when the cohorts under way have ended; no other begins.
    """
    merged = cohort_llama.supported(resident)
    if merged and not settings.cohort_size:
        size = side_by_side(resident, len(order))
    else:
        size = cohort_size(resident, settings)
    cohorts = [list(order[start : start + size]) for start in range(0, len(order), size)]
    if merged and torch.get_num_threads() > 1:
        made = _on_threads(work, cohorts, torch.get_num_threads())
    else:
        made = [work(cohort) for cohort in cohorts]
    return {
        k: result
        for cohort, found in zip(cohorts, made, strict=True)
        for k, result in zip(cohort, found, strict=True)
    }


def _on_threads(
    work: Callable[[list[int]], Sequence[Result]], cohorts: Sequence[list[int]], threads: int
) -> list[Sequence[Result]]:
    """Also a single cohort is computed on a thread of its own, which torch does not cut."""
    pool = ThreadPoolExecutor(
        min(threads, MOST_THREADS), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        made = [pool.submit(work, cohort) for cohort in cohorts]
        wait(made, return_when=FIRST_EXCEPTION)
        return [one.result() for one in made if one.done()]
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            # A number that is set in any thread holds for the threads that follow.
            torch.set_num_threads(threads)
