"""Where a round's time goes, and what is left in a cohort, for ``cohort.py``.

``rounds`` runs the default scenario (no personal phase, no report) through the in-process grid,
as ``fedalign simulate`` does, records the batches of every cohort of every round, and replays them:
forward, backward and optimiser steps alone.  ``profiled`` is torch's profiler over one cohort.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cohort_arms import Run, World, threads, world
from cohort_replay import Calls, recorded, replay

import clients.trainer
import server.run
from clients.app import app
from clients.scores import Scorer
from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER, prepare
from simulations.display import QuietProgress
from simulations.grid import InProcessGrid


@contextmanager
def clocked(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of every call of a function, under its name."""
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*given, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def rounds(each: str, count: int, cores: int) -> dict[str, Any]:
    """Run ``count`` rounds with ``data.clients-per-group`` = ``each``; return seconds by part."""
    made = world(
        [
            "personal.steps=0",
            f"run.rounds={count}",
            f"local.threads={cores}",
            f"data.clients-per-group={each}",
        ]
    )
    report = server.run.build_report
    server.run.build_report = lambda folder: folder / "report.html"
    try:
        _execute(made)  # warm: questions tokenised, pairs drawn, memory taken
        seconds, ledger = _execute(made)
        calls: Calls = []
        with recorded(calls):
            _execute(made)
    finally:
        server.run.build_report = report
    alone = min(replay(made, calls, made.config.local, cores) for _ in range(2))
    rest = seconds["total"] - seconds["train_cohort"] - seconds["scores"]
    rest -= ledger.get("aggregate", 0.0)
    return {
        "clients": len(made.clients),
        "rounds": count,
        "total_s": seconds["total"],
        "train_cohort_s": seconds["train_cohort"],
        "scores_s": seconds["scores"],
        "aggregate_s": ledger.get("aggregate", 0.0),
        "rest_s": rest,
        "replay_s": alone,
        "train_over_replay": seconds["train_cohort"] / alone,
        "total_over_replay": seconds["total"] / alone,
        "ledger_timings_s": ledger,
    }


def _execute(made: World) -> tuple[dict[str, float], dict[str, float]]:
    """Run once; return seconds of parts, and the ledger's own timings summed over rounds."""
    seconds: dict[str, float] = {}
    ledger: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        out = str(Path(root) / "run")
        config = prepare(replace(made.config, run=replace(made.config.run, out=out)))
        # The trainer is of this run folder; its data are prepared before the clock runs.
        trainer = clients.trainer.resident_trainer(config)
        for name in trainer.clients:
            trainer._prepare(name)
        began = time.perf_counter()
        with (
            clocked(clients.trainer, "train_cohort", seconds),
            clocked(Scorer, "scores", seconds),
        ):
            server.run.execute(InProcessGrid(app), config, QuietProgress())
        seconds["total"] = time.perf_counter() - began
        with Ledger(Path(out) / LEDGER, readonly=True) as kept:
            for row in kept.timings():
                ledger[row.name] = ledger.get(row.name, 0.0) + row.seconds
        clients.trainer.forget()
    return seconds, ledger


# --- profile ----------------------------------------------------------------------------------

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stacked matrix products", ("aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm")),
    ("copies to another order", ("aten::copy_", "aten::cat", "aten::_reshape_copy")),
    (
        "element by element",
        (
            "aten::mul",
            "aten::add",
            "aten::add_",
            "aten::mul_",
            "aten::sub_",
            "aten::silu",
            "aten::silu_backward",
            "aten::addcmul",
            "aten::neg",
            "aten::div",
            "aten::div_",
            "aten::lerp_",
            "aten::addcmul_",
        ),
    ),
    (
        "softmax",
        (
            "aten::_softmax",
            "aten::softmax",
            "aten::_log_softmax",
            "aten::_log_softmax_backward_data",
        ),
    ),
    ("sums along a row", ("aten::linalg_vector_norm", "aten::linalg_vecdot", "aten::sum")),
)


def profiled(run: Run, count: int) -> dict[str, Any]:
    """Return where one warm call's time goes: by kind, and the largest single operations."""
    from torch.profiler import ProfilerActivity, profile

    run()
    began = time.perf_counter()
    run()
    plain = time.perf_counter() - began
    with threads(count), profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        run()
        traced = time.perf_counter() - began
    events = {e.key: (e.self_cpu_time_total / 1e6, e.count) for e in seen.key_averages()}
    known = {name for _, names in KINDS for name in names}
    kinds = {kind: sum(events.get(n, (0.0, 0))[0] for n in names) for kind, names in KINDS}
    kinds["other operations of torch"] = sum(
        s for n, (s, _) in events.items() if n.startswith("aten::") and n not in known
    )
    kinds["Python, autograd, batches"] = traced - sum(kinds.values())
    largest = sorted(events.items(), key=lambda item: -item[1][0])[:15]
    return {
        "threads": count,
        "seconds": plain,
        "seconds_traced": traced,
        "kinds": kinds,
        "operations": [{"name": n, "seconds": s, "calls": k} for n, (s, k) in largest],
    }


def profile_table(found: dict[str, Any]) -> list[str]:
    """Return the kinds as a table, largest first."""
    lines = ["| kind | share |", "|---|---:|"]
    total = found["seconds_traced"]
    ordered: Sequence[tuple[str, float]] = sorted(found["kinds"].items(), key=lambda x: -x[1])
    return [*lines, *(f"| {name} | {100 * s / total:.0f} % |" for name, s in ordered)]
