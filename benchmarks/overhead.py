"""What federating costs: a run in process against a plain loop with the same work.

    python benchmarks/overhead.py [--repeats 5] [--out overhead.json]

Both arms do, on the default scenario without the personal phase: score the base on validation and
test, 8 rounds of (score the received adapter on validation, 12 steps, for 8 clients), adaptive
weights, exact aggregation, score the final adapter.  Model, tokenised data and drawn pairs are warm
in both.  The plain loop has no Flower messages, no wire encoding, no spool, no ledger and no
checkpoint.  Arms alternate within one process; the ratio is of medians.  Drawing the report is not
part of either arm and is timed apart.  The final adapters of both arms are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import server.run
from clients.app import app
from clients.trainer import ResidentTrainer, resident_trainer
from fedalign.aggregation import WEIGHT_RULES, adapters, history
from fedalign.aggregation.clients import client_weights, group_score
from fedalign.aggregation.records import GroupObservation, Observation, WeightSettings
from fedalign.config import Config
from fedalign.models.layout import pack, unpack
from fedalign.report.html import build_report
from fedalign.runfolder import CHECKPOINT, prepare
from server.checkpoint import load
from simulations.display import QuietProgress
from simulations.grid import InProcessGrid
from simulations.scenario import load as scenario


def observe(trainer: ResidentTrainer, found: dict[str, tuple[float, int]], t: int) -> Observation:
    """Return group scores from client scores, as the strategy does."""
    groups = {}
    for group in sorted({c.group for c in trainer.clients.values()}):
        members = [n for n, c in sorted(trainer.clients.items()) if c.group == group]
        value = group_score([found[n][0] for n in members], [found[n][1] for n in members])
        size = sum(trainer.clients[n].size for n in members)
        groups[group] = GroupObservation(True, value, size)
    return Observation(t, groups)


def plain(config: Config, trainer: ResidentTrainer) -> np.ndarray:
    """Train without Flower, ledger or checkpoint; return the final adapter (P,)."""
    names, layout = list(trainer.clients), trainer.manifest.layout
    w = config.weights
    settings = WeightSettings(
        w.temperature, w.decay, w.floor, w.ceiling, w.step, w.q, config.run.seed
    )
    adapter = pack(adapters.initial_adapter(dict(layout), config.run.seed), layout)
    replies = trainer.score(names, adapter, ("validation", "test"))
    found = {r.client: (r.scores["validation"].score, r.scores["validation"].n) for r in replies}
    state = history.cold_start(settings, observe(trainer, found, 0))
    for t in range(1, config.run.rounds + 1):
        rows, updates = trainer.train(names, adapter, t)
        found = {r.client: (r.score.score, r.score.n) for r in rows if r.score is not None}
        state, weights = WEIGHT_RULES[w.rule](settings, state, observe(trainer, found, t))
        sized = [(n, trainer.clients[n].group, trainer.clients[n].size) for n in names]
        shares = client_weights(weights, sized, w.within_group)
        contributions = (
            adapters.Contribution(
                n, trainer.clients[n].group, shares[n], unpack(updates[i], layout)
            )
            for i, n in enumerate(names)
        )
        combined = adapters.aggregate(
            config.aggregation.method, contributions, unpack(adapter, layout)
        )
        adapter = pack(combined.tensors, layout)
    trainer.score(names, adapter, ("validation", "test"))
    return adapter


def federated(config: Config, folder: Path) -> np.ndarray:
    """Run through Flower's messages with ledger and checkpoint; return the final adapter (P,)."""
    settings = prepare(replace(config, run=replace(config.run, out=str(folder))))
    server.run.execute(InProcessGrid(app), settings, QuietProgress())
    return load(folder / CHECKPOINT).adapter


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = scenario("default", ["personal.steps=0"])
    server.run.build_report = lambda folder: folder / "report.html"
    times: dict[str, list[float]] = {"federated": [], "plain": []}
    with tempfile.TemporaryDirectory() as root:
        for i in range(arguments.repeats + 1):
            folder = Path(root) / f"run{i}"
            trainer = resident_trainer(replace(config, run=replace(config.run, out=str(folder))))
            plain(replace(config, run=replace(config.run, rounds=1)), trainer)  # draws the pairs
            arms = {
                "plain": lambda t=trainer: plain(config, t),
                "federated": lambda f=folder: federated(config, f),
            }
            adapters_found = {}
            for name in sorted(arms, reverse=bool(i % 2)):
                began = time.perf_counter()
                adapters_found[name] = arms[name]()
                if i:  # the first pair warms everything up
                    times[name].append(time.perf_counter() - began)
            if not np.array_equal(adapters_found["plain"], adapters_found["federated"]):
                raise SystemExit("the two arms did not train the same adapter")
        began = time.perf_counter()
        build_report(folder)
        report = time.perf_counter() - began
    result = {
        "seconds": times,
        "ratio_of_medians": statistics.median(times["federated"])
        / statistics.median(times["plain"]),
        "report_seconds": report,
        "adapters": "bit-equal",
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
