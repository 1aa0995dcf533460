"""``fedalign reproduce``: the published comparison of reward rules with its controls, run here.

Every run is a full run of scenario ``rewards`` with a ledger of its own.  All arms share seeds, and
a seed fixes population, split, sampled questions and initial adapter, so differences are paired.
Resumable: a run is finished when its ledger says so under the same configuration hash, one that was
interrupted goes on from its checkpoint, and one that failed is tried again.  A run that fails does
not stop the others; its reason stands in its ledger and in the report.

With every run finished the command writes nothing but the report, from the ledgers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fedalign.config import Config, Scalar, from_flat
from fedalign.errors import ConfigError
from simulations import scenario as scenarios
from simulations.compare import Task, finished, in_folder, run_all
from simulations.reproduce_arms import FIRST_SEED, SCENARIO, Part, arm_config, arms_of
from simulations.reproduce_parts import PARTS

OF_THE_STUDY = ("run.rounds", "personal.steps", "score.seen")
"""Settings of the study of real data that belong to adapter federation and are not taken over."""


@dataclass(frozen=True)
class Planned:
    """One run, and the part, task and arm it stands for."""

    part: str
    task: str
    arm: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Its run folder; runs with the same settings share one."""
        return Path(self.config.run.out)


def reproduce(
    out: Path,
    parts: Sequence[str],
    seeds: int,
    workers: int,
    settings: Sequence[str] = (),
    countries: Path | None = None,
) -> Path:
    """Do every run that is not finished, then write the report; return its page.

    Args:
        out: folder for runs and report.
        parts: names of ``PARTS``.
        seeds: how many, from ``FIRST_SEED`` on; fewer than 3 give no interval.
        workers: runs done at a time.
        settings: ``section.key=value``, for all runs; an arm's own settings win.
        countries: folder that holds ``globalopinionqa/goqa.jsonl``, for part ``countries``.
    """
    console = Console(stderr=True, highlight=False)
    base = scenarios.load(SCENARIO, ["personal.steps=0", *settings])
    if base.run.mode != "rewards":
        raise ConfigError("run.mode cannot be set here; part 'adapters' has arms of mode adapters.")
    skipped = [p for p in parts if PARTS[p].needs_countries and countries is None]
    for name in skipped:
        console.print(f"[yellow]part {name} is left out[/]: give its data with --countries PATH")
    chosen = [p for p in parts if p not in skipped]
    if not chosen:
        raise ConfigError("no part is left to run; give the data with --countries PATH.")
    found = [p for p in chosen if PARTS[p].needs_countries]
    data = country_settings(countries, out, seeds) if found and countries is not None else {}
    runs = plan(base, chosen, seeds, out, data)
    tasks = list({r.folder: Task(f"{r.task} {r.arm}", r.seed, r.config) for r in runs}.values())
    todo = [t for t in tasks if not finished(t.config)]
    console.print(
        f"reproduction  {escape(str(out))}: parts {', '.join(chosen)}; {len(tasks)} runs, "
        f"{len(tasks) - len(todo)} finished already",
        soft_wrap=True,
    )
    run_all(todo, workers, console, keep_going=True)

    from simulations.reproduction_report import write_reproduction

    return write_reproduction(out, base, runs, skipped)


def plan(
    base: Config,
    parts: Sequence[str],
    seeds: int,
    out: Path,
    countries: Mapping[int, Mapping[str, Scalar]],
) -> list[Planned]:
    """Return all runs, part by part and seed by seed; ``countries`` is seed to data and model."""
    runs = []
    for name in parts:
        part = PARTS[name]
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            data = countries[seed] if part.needs_countries else {}
            runs += _of_seed(base, name, part, seed, out, data)
    return runs


def _of_seed(
    base: Config, name: str, part: Part, seed: int, out: Path, data: Mapping[str, Scalar]
) -> list[Planned]:
    made = []
    for task in part.tasks:
        for arm in arms_of(part, task):
            config = arm_config(base, part, task, arm, {**data, "run.seed": seed})
            placed = in_folder(config, f"{task}-{_rule(config)}", out)
            made.append(Planned(name, task, arm.name, seed, placed))
    return made


def _rule(config: Config) -> str:
    """Name a run's folder by its settings and not by its arm: arms of two parts may be one run."""
    if config.run.mode == "rewards":
        return config.rewards.rule
    return f"{config.local.objective}-{config.weights.rule}"


def country_settings(folder: Path, out: Path, seeds: int) -> dict[int, dict[str, Scalar]]:
    """Return data and model of part ``countries``, by seed: a pocket trained for each seed.

    The pocket of a seed sees that seed's training questions only (``simulations/real_data.py``).
    """
    from simulations.real_data import base_model, prepare_goqa

    prepared = prepare_goqa(folder, out / "countries")
    settings = {k: v for k, v in prepared.settings.items() if k not in OF_THE_STUDY}
    data = from_flat(settings).data
    return {
        seed: {**settings, "model.name": str(base_model(prepared, data, seed, out / "countries"))}
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    }
