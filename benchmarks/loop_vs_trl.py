"""Time of a training step on the pocket model: our loop, and TRL's DPOTrainer on the same rows.

    python benchmarks/loop_vs_trl.py [--rounds 5] [--threads 1]

Prints one JSON object.  Both engines run in this process, in turns, on the same jobs; compare the
ratios, not milliseconds of different machines.  ``survey`` is what a client of the default run
does: 16 questions a step, each with six pairs of options, which our loop scores in 16 rows.
``pairs`` is one pair a prompt with completions of several tokens: 16 pairs, 32 rows, for both.
Rounds of ten steps; the median over rounds is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import LocalConfig, ModelConfig
from fedalign.models.base import ResidentModel
from fedalign.models.layout import pack
from fedalign.training.batch import Prompt
from fedalign.training.examples import Label, TrainingSet
from fedalign.training.loop import TrainJob, TrainResult, train
from fedalign.training.reference import reference_logps
from fedalign.training.trl_engine import train_trl

STEPS, PROMPTS = 10, 64


def training_sets(vocabulary: int) -> dict[str, TrainingSet]:
    """Return random prompts of 30 to 45 tokens; what they say does not change the time."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocabulary, size=rng.integers(low, high)).tolist())

    prompts = [ids(30, 46) for _ in range(PROMPTS)]
    letters = ((10,), (11,), (12,), (13,))
    order = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    return {
        "survey": TrainingSet(
            tuple(Prompt(p, letters) for p in prompts),
            tuple(tuple(Label(i, j, float(rng.random() < 0.5)) for i, j in order) for _ in prompts),
        ),
        "pairs": TrainingSet(
            tuple(Prompt(p, (ids(5, 15), ids(5, 15))) for p in prompts),
            tuple((Label(0, 1, 1.0),) for _ in prompts),
        ),
    }


def timed(run: Callable[[], list[TrainResult]]) -> float:
    """Return milliseconds a step of one call."""
    start = time.perf_counter()
    failures = [r.failure for r in run() if r.failure]
    if failures:
        raise RuntimeError(f"a job failed: {failures}")
    return (time.perf_counter() - start) / STEPS * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="pocket")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = ResidentModel(ModelConfig(name=arguments.model))
    start = pack(initial_adapter(dict(model.layout), 0), model.layout)
    settings = LocalConfig(reference="base", labels="hard")
    out: dict[str, object] = {
        "model": arguments.model,
        "parameters": model.parameters,
        "device": str(model.device),
        "threads": arguments.threads,
        "steps_a_round": STEPS,
        "rounds": arguments.rounds,
    }
    for name, data in training_sets(model.network.config.vocab_size).items():
        values = reference_logps(model, data.prompts, "base")
        job = TrainJob("c", start, data, values, STEPS, 5e-3, (1, "c"))
        engines = {
            "torch": lambda job=job: train(model, [job], settings, 0),
            "trl": lambda job=job: train_trl(model, [job], settings, 0),
        }
        times: dict[str, list[float]] = {engine: [] for engine in engines}
        for run in engines.values():
            timed(run)
        for _ in range(arguments.rounds):
            for engine, run in engines.items():
                times[engine].append(timed(run))
        middle = {engine: statistics.median(values) for engine, values in times.items()}
        out[name] = {
            "torch_ms_a_step": round(middle["torch"], 2),
            "trl_ms_a_step": round(middle["trl"], 2),
            "trl_over_torch": round(middle["trl"] / middle["torch"], 2),
            "torch_spread_ms": [round(min(times["torch"]), 2), round(max(times["torch"]), 2)],
        }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
