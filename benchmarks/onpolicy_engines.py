"""Sampling objectives of a client on the pocket model: our PPO, and TRL's RLOO and GRPO.

    python benchmarks/onpolicy_engines.py time    [--rounds 5]
    python benchmarks/onpolicy_engines.py closed  [--seeds 5] [--steps 64] [--arms "ppo;rloo"]
    python benchmarks/onpolicy_engines.py optimum [--seeds 3] [--arms "grpo, plain KL estimate"]

``time``: seconds an update at equal texts (letters of one client's questions), all three in this
process, in turns; compare the ratios.  ``closed``: a whole client's training questions, equal
updates and texts; how much of the way from the base to pi_base exp(r / kl) was gone on test
questions, where a seed draws population, split, start and texts.  ``optimum``: six questions until
nothing moves, so that an arm with another optimum stays away from this one.

Prints one JSON object a line; the last one holds means and 95 % intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.store import population
from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import Config, DataConfig, LocalConfig, ModelConfig, PpoConfig, RunConfig
from fedalign.data.records import ClientData, SurveyItem
from fedalign.models.base import ResidentModel
from fedalign.models.layout import pack
from fedalign.rewards.optimum import closed_share, divergence, kl_divergence, optimum, with_rest
from fedalign.rewards.text import reward_of_answer
from fedalign.training.local_ppo import PolicyJob, train_ppo
from fedalign.training.loop import TrainResult
from fedalign.training.tasks import answer_logps
from fedalign.training.trl_onpolicy import train_onpolicy

GROUP = "isles"
KL = PpoConfig().kl
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {}),
    "rloo": ("rloo", {}),
    "grpo": ("grpo", {}),
    "grpo, beta = kl": ("grpo", {"beta": KL}),
    "grpo, plain KL estimate": ("grpo", {"use_bias_correction_kl": False}),
    "grpo, rewards over their std": ("grpo", {"scale_rewards": "group"}),
    "grpo, beta = 0": ("grpo", {"beta": 0.0}),
}
"""Name: objective, and TRL arguments in place of ours."""


def config_of(objective: str, seed: int, ppo: PpoConfig) -> Config:
    """Return the run's settings: one client a group, letters, log rewards."""
    engine = "torch" if objective == "ppo" else "trl"
    return Config(
        run=RunConfig(seed=seed),
        data=DataConfig(partition="group", clients_per_group="1"),
        local=LocalConfig(objective=objective, engine=engine),
        ppo=ppo,
    )


def client_of(config: Config) -> ClientData:
    """Return the group's only client."""
    return next(c for c in population(config) if c.group == GROUP)


def survey(items: Sequence[Any]) -> tuple[SurveyItem, ...]:
    """Return the items as what they are here."""
    return tuple(i for i in items if isinstance(i, SurveyItem))


def train(
    model: ResidentModel, job: PolicyJob, config: Config, replaced: Mapping[str, Any]
) -> TrainResult:
    """Train one job; a failure ends the benchmark."""
    seed = config.run.seed
    if config.local.objective == "ppo":
        result = train_ppo(model, [job], config, seed)[0]
    else:
        result = train_onpolicy(model, [job], config, seed, replaced)[0]
    if result.adapter is None:
        raise RuntimeError(f"{config.local.objective}: {result.failure}")
    return result


def distances(
    model: ResidentModel, result: TrainResult, items: Sequence[SurveyItem], config: Config
) -> dict[str, float]:
    """Return the closed share over items, and the divergence (nats) of model and optimum."""
    before, after, far, best = [], [], [], []
    for item in items:
        with model.reference("base"):
            answers, ref = answer_logps(model, "letter", item.question, item.options)
        model.load(result.adapter)
        now = answer_logps(model, "letter", item.question, item.options)[1]
        shares = item.shares[GROUP]
        rewards = [reward_of_answer(config.rewards, "log", a, shares, None) for a in answers]
        aim = optimum(ref, rewards, config.ppo.kl, malformed=config.rewards.malformed)
        base, found = with_rest(ref), with_rest(now)
        before.append(divergence(base, aim))
        after.append(divergence(found, aim))
        far.append(kl_divergence(found, base))
        best.append(kl_divergence(aim, base))
    closed = closed_share(float(np.mean(before)), float(np.mean(after)))
    if closed is None:
        raise RuntimeError("base and optimum are the same; nothing can be measured")
    return {"closed": closed, "kl": float(np.mean(far)), "kl_optimum": float(np.mean(best))}


def measure_time(model: ResidentModel, rounds: int) -> dict[str, Any]:
    """Return seconds an update of each objective at equal texts, and ratios to PPO."""
    steps = 16
    times: dict[str, list[float]] = {name: [] for name in ("ppo", "rloo", "grpo")}
    tokens: dict[str, float] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name in times:
            config = config_of(name, 0, PpoConfig(max_clip_fraction=1.0))
            client = client_of(config)
            items = survey(client.train)
            job = PolicyJob("c", GROUP, start_of(model, 0), items, steps, 0.003, (turn,))
            began = time.perf_counter()
            result = train(model, job, config, {})
            if turn:
                times[name].append((time.perf_counter() - began) / steps)
            tokens[name] = result.metrics["tokens"] / steps
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "texts_an_update": PpoConfig().questions * PpoConfig().samples,
        "epochs": PpoConfig().epochs,
        "seconds_an_update": {n: round(v, 4) for n, v in middle.items()},
        "spread": {n: [round(min(v), 4), round(max(v), 4)] for n, v in times.items()},
        "over_ppo": {n: round(v / middle["ppo"], 2) for n, v in middle.items()},
        "tokens_an_update": {n: round(v) for n, v in tokens.items()},
    }


def measure_closed(model: ResidentModel, arm: str, seed: int, steps: int) -> dict[str, float]:
    """Return what one client's training came to on its test questions."""
    objective, replaced = ARMS[arm]
    config = config_of(objective, seed, PpoConfig())
    client = client_of(config)
    items, rate = survey(client.train), config.ppo.learning_rate
    job = PolicyJob("c", GROUP, start_of(model, seed), items, steps, rate, (1,))
    result = train(model, job, config, replaced)
    found = distances(model, result, survey(client.test), config)
    return {**found, "tokens": result.metrics["tokens"], "reward": result.metrics["reward"]}


def measure_optimum(model: ResidentModel, arm: str, seed: int) -> dict[str, float]:
    """Return how near six questions come to the closed form, with a falling learning rate."""
    objective, replaced = ARMS[arm]
    ppo = PpoConfig(questions=12, samples=4, minibatches=1, epochs=1)
    if objective == "ppo":  # as many texts an update; TRL asks each question twice
        ppo = replace(ppo, questions=6, samples=8)
    config = config_of(objective, seed, ppo)
    items = survey(client_of(config).train)[:6]
    adapter = start_of(model, seed)
    for part, (steps, rate) in enumerate(((60, 0.003), (20, 0.001), (20, 0.0003))):
        job = PolicyJob("c", GROUP, adapter, items, steps, rate, (part,))
        result = train(model, job, config, replaced)
        assert result.adapter is not None
        adapter = result.adapter
    return distances(model, result, items, config)


def start_of(model: ResidentModel, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the adapter that a run with this seed starts from."""
    return pack(initial_adapter(dict(model.layout), seed), model.layout)


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return mean and half-width of the 95 % interval (Student's t) of each column."""
    from scipy.stats import t

    out: dict[str, Any] = {"seeds": len(rows)}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        half = None
        if len(values) > 1:
            spread = float(values.std(ddof=1)) / len(values) ** 0.5
            half = round(float(t.ppf(0.975, len(values) - 1)) * spread, 4)
        out[name] = [round(float(values.mean()), 4), half]
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("time", "closed", "optimum"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--arms", default=";".join(ARMS), help="names, with ; between them")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = ResidentModel(ModelConfig(device="cpu"))
    if arguments.what == "time":
        print(json.dumps(measure_time(model, arguments.rounds)))
        return
    table: dict[str, dict[str, Any]] = {}
    for arm in arguments.arms.split(";"):
        rows = []
        for seed in range(arguments.seeds):
            if arguments.what == "closed":
                rows.append(measure_closed(model, arm, seed, arguments.steps))
            else:
                rows.append(measure_optimum(model, arm, seed))
            print(json.dumps({"arm": arm, "seed": seed, **rows[-1]}), flush=True)
        table[arm] = summary(rows)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
