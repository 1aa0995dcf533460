"""Ledgers of finished reproduction runs, written by hand; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedalign.config import config_hash, to_flat
from fedalign.ledger import (
    ClientRow,
    CurveRow,
    ItemRow,
    Ledger,
    ReferenceRow,
    ReplyRow,
    ScoreRow,
    WeightRow,
)
from fedalign.runfolder import LEDGER
from simulations import scenario
from simulations.reproduce import Planned, plan
from simulations.reproduce_arms import FIRST_SEED

BASE_CONFIG = scenario.load("rewards", ["personal.steps=0"])
GROUPS = ("big", "small")
QUESTIONS = 4
"""Too few for a bootstrap over questions, which nothing here reads."""
Scores = Callable[[str, int], tuple[float, float]]
"""(arm, seed) to the scores of the big and the small group."""


def write_run(
    run: Planned,
    scores: Scores,
    kl: float = 0.2,
    mass: float = 0.98,
    error: float | None = None,
    index: bool = True,
    refused: int = 0,
    shared: bool = True,
) -> None:
    """Write the ledger of a finished run: base (.7, .5), final scores as given, one exchange.

    ``error`` is the predictor's; ``index`` says whether the exchange has a fairness index;
    ``refused`` counts rewards beside the 100 that came; ``shared``: groups share test questions.
    """
    seed = run.seed - FIRST_SEED
    final = dict(zip(GROUPS, scores(run.arm, seed), strict=True))
    base = {"big": 0.7 + 0.01 * seed, "small": 0.5 + 0.01 * seed}

    def rows(stage: str, split: str, of: Mapping[str, float], m: float) -> list[ScoreRow]:
        return [
            ScoreRow(stage, g, g, split, "js_divergence", QUESTIONS, x, m, 0.6)
            for g, x in of.items()
        ]

    def items(stage: str, of: Mapping[str, float]) -> list[ItemRow]:
        shift = np.linspace(-0.05, 0.05, QUESTIONS)
        return [
            ItemRow(stage, g, g, "test", f"q{i}{'' if shared else g}", float(x + shift[i]))
            for g, x in of.items()
            for i in range(QUESTIONS)
        ]

    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / LEDGER).unlink(missing_ok=True)
    with Ledger(run.folder / LEDGER) as ledger:
        ledger.put_run(
            config=to_flat(run.config),
            config_hash=config_hash(run.config),
            metric="js_divergence",
            form="survey",
            status="completed" if mass >= 0.9 else "failed: option mass",
        )
        ledger.put_clients([ClientRow(g, g, "survey", 20, 6, 6, 20) for g in GROUPS])
        references = [
            ReferenceRow(name, g, x)
            for name, x in (
                ("uniform", 0.6),
                ("mean_of_groups", 0.85),
                ("optimum_average", 0.9),
                ("optimum_worst", 0.88),
            )
            for g in GROUPS
        ]
        references += [
            ReferenceRow("closed_form", "", x, quantity=q)
            for q, x in (
                ("jsd_base", 0.2),
                ("jsd_model", 0.02),
                ("closed", 0.9),
                ("kl_model", kl),
                ("kl_optimum", 0.3),
                ("mass", 0.99),
            )
        ]
        ledger.put_references(references)
        ledger.write(
            "base",
            0,
            1,
            scores=[*rows("base", "test", base, 0.99), *rows("base", "validation", base, 0.99)],
            items=items("base", base),
        )
        server = {
            "kl": 0.1,
            "reward-scale": 1.0,
            "adaptive-branch": 1.0,
            "format-rate": 1.0,
            "policy-tokens": 1000.0,
            "tokens": 2000.0,
            "reward-mean": 0.5,
            "malformed": 0.0,
            "refused": float(refused),
        }
        if index:
            server["fairness-index"] = 0.9
        ledger.write(
            "train",
            1,
            1,
            weights=[WeightRow(g, 0.5, 0.5, 0.5) for g in GROUPS],
            curves=[CurveRow(client="", name=n, value=v) for n, v in server.items()],
            replies=[ReplyRow(g, g, examples=50) for g in GROUPS],
        )
        if error is not None:
            ledger.write(
                "predictor", 1, 1, curves=[CurveRow(g, "predictor-error", error) for g in GROUPS]
            )
        ledger.write(
            "final", 1, 1, scores=rows("shared", "test", final, mass), items=items("shared", final)
        )
        for triple in ledger.attempts():
            ledger.commit(*triple)


def noise(arm: str, seed: int) -> float:
    """Return a small, fixed number for an arm and a seed."""
    return 0.002 * float(np.sin(1 + 7 * seed + sum(map(ord, arm))))


def world(worst: Mapping[str, float], average_cost: float = 0.0) -> Scores:
    """Return scores whose worst group gains ``worst[arm]`` over mean, the big one pays."""

    def scores(arm: str, seed: int) -> tuple[float, float]:
        gain = worst.get(arm, 0.0)
        small = 0.60 + 0.01 * seed + gain + noise(arm, seed)
        return 0.80 + 0.01 * seed - (gain + average_cost * (gain > 0)) + noise(arm, seed), small

    return scores


HELPS = {"literal": 0.06, "scaled": 0.06, "reweighted": 0.06, "min": 0.08, "max": -0.06}
ARTEFACT = {"literal": 0.04, "mean-over-n": 0.04, "mean-kl-n": 0.04, "placebo": 0.04}


def made(
    out: Path,
    scores: Scores,
    parts: tuple[str, ...] = ("core",),
    seeds: int = 5,
    tasks: tuple[str, ...] = ("letter",),
) -> list[Planned]:
    runs = [r for r in plan(BASE_CONFIG, parts, seeds, out, {}) if r.task in tasks]
    for run in {r.folder: r for r in runs}.values():
        write_run(run, scores)
    return runs


@pytest.fixture
def fake() -> SimpleNamespace:
    """Return what writes ledgers of runs: ``made``, ``write_run``, ``world``, ``noise``."""
    return SimpleNamespace(
        made=made,
        write_run=write_run,
        world=world,
        noise=noise,
        base=BASE_CONFIG,
        helps=HELPS,
        artefact=ARTEFACT,
    )
