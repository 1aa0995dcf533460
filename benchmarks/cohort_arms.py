"""The clients, arms and checks of ``cohort.py``: what is timed, and what must come out equal.

Clients are the eight of the default scenario, repeated under other names: the same questions and
pairs, other batch orders, since those are keyed by the client's name.  Model, tokenised questions,
pairs and reference log-probabilities are made before any clock runs.  Every client starts from one
adapter that has taken a client's steps, as in a later round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from clients.resident import usable_clients
from clients.scores import Scorer
from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import Config, LocalConfig, resolve_metric
from fedalign.data.records import ClientData
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array, pack
from fedalign.models.resident import resident_model
from fedalign.training import cohort_llama, loop
from fedalign.training.batch import Prompt
from fedalign.training.cohort import train_cohort
from fedalign.training.examples import training_set
from fedalign.training.loop import TrainJob, TrainResult, train
from fedalign.training.reference import reference_kind, reference_logps
from simulations.scenario import load

TYPICAL_ERROR, WORST_ERROR, SCORE_ERROR = 2e-5, 2e-3, 1e-5
"""Tolerances of :func:`check`: mean error of the median client, of the worst client, of a score.

Set after looking at the differences; :func:`nudged` is what they are to be read against."""

Run = Callable[[], list[TrainResult]]


@dataclass(frozen=True)
class World:
    """What is prepared before the clock runs."""

    config: Config
    model: ResidentModel
    clients: Mapping[str, ClientData]
    start: Array


def world(settings: Sequence[str] = ()) -> World:
    """Load the default scenario with some settings changed."""
    config = load("default", list(settings))
    model = resident_model(config.model, False)
    clients, _ = usable_clients(config)
    fresh = pack(initial_adapter(dict(model.layout), config.run.seed), model.layout)
    made = World(config, model, clients, fresh)
    (first,) = train(model, jobs(made, 1, config.local), config.local, config.run.seed)
    assert first.adapter is not None
    return replace(made, start=first.adapter)


def jobs(made: World, count: int, local: LocalConfig) -> list[TrainJob]:
    """Return one job a client for ``count`` clients, their rows laid out."""
    names, seed = list(made.clients), made.config.run.seed
    kind = reference_kind(made.model, local)
    prepared = {}
    for name in names[:count]:
        data = training_set(made.model, made.clients[name], local, seed)
        assert data.rows  # laid out once, as a resident trainer keeps them
        prepared[name] = data, reference_logps(made.model, data.prompts, kind)
    out = []
    for k in range(count):
        data, known = prepared[names[k % len(names)]]
        own = f"{names[k % len(names)]}-{k}"
        out.append(
            TrainJob(own, made.start, data, known, local.steps, local.learning_rate, (1, own))
        )
    return out


# --- arms -------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lean(made: World, work: Sequence[TrainJob], local: LocalConfig, count: int) -> Run:
    """One client after another over the resident base."""

    def run() -> list[TrainResult]:
        with threads(count):
            return train(made.model, work, local, made.config.run.seed)

    return run


def bucketed(made: World, work: Sequence[TrainJob], local: LocalConfig, count: int) -> Run:
    """The same with each batch cut in two by length, so that less padding is computed."""

    def halves(prompts: Sequence[Prompt], vocabulary: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda k: -len(prompts[k].tokens))
        middle = (len(order) + 1) // 2
        return [part for part in (order[:middle], order[middle:]) if part]

    def run() -> list[TrainResult]:
        before, loop.in_passes = loop.in_passes, halves  # type: ignore[assignment]
        try:
            return lean(made, work, local, count)()
        finally:
            loop.in_passes = before

    return run


def together(
    made: World, work: Sequence[TrainJob], local: LocalConfig, count: int, stacked: bool = False
) -> Run:
    """The cohort; ``stacked`` leaves merging aside, as for a model that cannot be merged."""

    def run() -> list[TrainResult]:
        before = cohort_llama.supported
        if stacked:
            cohort_llama.supported = lambda _: False
        try:
            with threads(count):
                return train_cohort(made.model, work, local, made.config.run.seed)
        finally:
            cohort_llama.supported = before

    return run


def trl(made: World, work: Sequence[TrainJob], local: LocalConfig, count: int) -> Run:
    """TRL's DPOTrainer, one client after another in one trainer."""
    from fedalign.training.trl_engine import train_trl

    def run() -> list[TrainResult]:
        with threads(count):
            return train_trl(made.model, work, local, made.config.run.seed)

    return run


def in_turns(
    arms: Mapping[str, Run], repeats: int, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, list[TrainResult]]]:
    """Run every arm ``repeats`` times in turns; return seconds and the last results of each.

    ``warm``: once more before that, untimed.  Raises ``RuntimeError`` for a client that failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, list[TrainResult]] = {}
    for turn in range(repeats + warm):
        for name, run in arms.items():
            began = time.perf_counter()
            results[name] = run()
            took = time.perf_counter() - began
            failed = [r.client for r in results[name] if r.failure]
            if failed:
                raise RuntimeError(f"{name}: {len(failed)} clients failed, first {failed[0]}")
            if turn or not warm:
                seconds[name].append(took)
    return seconds, results


def summary(seconds: Mapping[str, Sequence[float]], clients: int, steps: int) -> dict[str, Any]:
    """Return raw seconds and the median milliseconds of a client's step, arm by arm."""
    return {
        name: {
            "seconds": list(times),
            "ms_a_client_step": 1000 * statistics.median(times) / (clients * steps),
        }
        for name, times in seconds.items()
    }


# --- equality ---------------------------------------------------------------------------------


def compare(
    made: World, got: Sequence[TrainResult], expected: Sequence[TrainResult]
) -> dict[str, Any]:
    """Return how far B A of all modules are apart.

    In units of the largest entry of the module's B A *change* from the received adapter, so that
    the received part hides nothing.  A client's error is the largest mean over a module's entries:
    ``typical`` of the median client, ``worst`` of the worst one; ``largest`` is a single entry.
    """
    before = _products(made.model, made.start)
    largest, means = 0.0, []
    for one, other in zip(got, expected, strict=True):
        if one.client != other.client or one.adapter is None or other.adapter is None:
            raise RuntimeError(f"{one.client} and {other.client} cannot be compared")
        a, b = _products(made.model, one.adapter), _products(made.model, other.adapter)
        errors = [np.abs(a[n] - b[n]) / np.abs(b[n] - before[n]).max() for n in b]
        largest = max(largest, *(float(e.max()) for e in errors))
        means.append(max(float(e.mean()) for e in errors))
    return {
        "clients": len(got),
        "typical": statistics.median(means),
        "worst": max(means),
        "largest": largest,
    }


def nudged(made: World, work: Sequence[TrainJob], local: LocalConfig) -> list[TrainResult]:
    """Run the lean loop from a start whose entries are moved by one rounding error, up or down.

    AdamW divides a gradient by its own size, so rounding grows: this is how far the lean loop ends
    from itself, and what an arm's differences are to be read against.
    """
    up = np.random.default_rng(0).choice([-np.inf, np.inf], made.start.shape)
    start = np.nextafter(made.start, up.astype(np.float32))
    moved = [replace(job, adapter=start) for job in work]
    return train(made.model, moved, local, made.config.run.seed)


def _products(model: ResidentModel, adapter: Array) -> dict[str, np.ndarray]:
    factors = model.unpack(adapter)
    return {
        name: factors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        for name, a in factors.items()
        if "lora_A" in name
    }


def scores(made: World, results: Sequence[TrainResult]) -> list[float]:
    """Return each final adapter's score on the validation questions of its own client."""
    metric = resolve_metric(made.config, "survey")
    kind = reference_kind(made.model, made.config.local)
    scorer = Scorer(made.model, made.config, made.clients, metric, kind)
    found = []
    for result in results:
        assert result.adapter is not None
        made.model.load(result.adapter)
        task = (result.client.rpartition("-")[0], "validation")
        score = scorer.scores([task])[task]
        assert score is not None
        found.append(score.score)
    return found


def check(
    made: World, results: Mapping[str, list[TrainResult]], against: str, scored: int
) -> dict[str, Any]:
    """Compare every arm with the arm ``against``; raise ``SystemExit`` beyond the tolerances."""
    expected = results[against]
    values = scores(made, expected[:scored])
    out = {}
    for name, got in results.items():
        if name == against:
            continue
        found = compare(made, got, expected)
        own = scores(made, got[:scored])
        found |= {
            "clients_scored": len(own),
            "score": max(abs(a - b) for a, b in zip(own, values, strict=True)),
        }
        if not (
            found["typical"] <= TYPICAL_ERROR
            and found["worst"] <= WORST_ERROR
            and found["score"] <= SCORE_ERROR
        ):
            raise SystemExit(f"{name} did not train the adapters of {against}: {found}")
        out[name] = found
    return out
