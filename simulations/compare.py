"""Several arms over several seeds on one scenario; every run a full run with a ledger of its own.

An *arm* is a weight rule, optionally with other settings varied
(``--vary local.reference=base|none`` crosses every rule with every value).  All arms share seeds,
and a seed fixes population, split, pairs, initial adapter and sampling, so differences between arms
are paired.

Resumable: a run is finished when its ledger says so under the same configuration hash; an
interrupted one goes on from its checkpoint.  The personal phase is off unless a setting turns it
on, since arms are compared by their shared adapter.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fedalign.config import (
    REWARD_RULES,
    WEIGHT_RULES,
    Config,
    Scalar,
    config_hash,
    from_flat,
    parse_override,
    to_flat,
)
from fedalign.errors import ConfigError, FedalignError
from fedalign.ledger import Ledger
from fedalign.runfolder import CHECKPOINT, LEDGER
from simulations import scenario as scenarios
from simulations.comparison_report import Run, write_comparison

RULES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "adapters": ("weights.rule", WEIGHT_RULES, ("uniform", "size", "adaptive", "placebo")),
    "rewards": ("rewards.rule", REWARD_RULES, ("mean", "reweighted", "min", "mean-over-n")),
}
"""Mode to the setting that rules are compared by, its values, and those compared unless named."""


@dataclass(frozen=True)
class Arm:
    """One column of the comparison."""

    name: str
    settings: tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True)
class Task:
    """One run of an arm."""

    arm: str
    seed: int
    config: Config


def arms(rules: Sequence[str], vary: Sequence[str], mode: str = "adapters") -> list[Arm]:
    """Return rules crossed with varied settings, named by what differs.

    Rules are weight rules, or in mode ``rewards`` rules for group rewards; none takes the usual.
    """
    key, known, usual = RULES[mode]
    rules = rules or usual
    for rule in rules:
        if rule not in known:
            raise ConfigError(
                f"rule '{rule}' is not one of {', '.join(known)} (run.mode = '{mode}')."
            )
    axes: list[list[tuple[str, Scalar]]] = []
    for text in vary:
        varied, separator, values = text.partition("=")
        if not separator or not values:
            raise ConfigError(f"'{text}' varies nothing. Write --vary section.key=a|b.")
        axes.append([parse_override(f"{varied}={v}") for v in values.split("|")])
    out = []
    for rule in rules:
        for choice in itertools.product(*axes):
            name = " ".join([rule, *(f"{k.split('.', 1)[1]}={v}" for k, v in choice)])
            out.append(Arm(name, ((key, rule), *choice)))
    return out


def compare(
    scenario: str,
    rules: Sequence[str],
    seeds: int,
    out: Path,
    settings: Sequence[str],
    vary: Sequence[str],
    baseline: str,
    workers: int,
) -> Path:
    """Do every run that is not finished, then write the comparison; return its Markdown page."""
    base = scenarios.load(scenario, ["personal.steps=0", *settings])
    chosen = arms(rules, vary, base.run.mode)
    baselines = [b.strip() for b in baseline.split(",") if b.strip()] or [chosen[0].name]
    for name in baselines:
        if name not in [a.name for a in chosen]:
            raise ConfigError(
                f"baseline '{name}' is not one of the arms: {', '.join(a.name for a in chosen)}."
            )
    tasks = [
        Task(arm.name, seed, _config(base, arm, seed, out))
        for seed in range(seeds)
        for arm in chosen
    ]
    console = Console(stderr=True, highlight=False)
    console.print(f"comparison  {out}: {len(chosen)} arms x {seeds} seeds", soft_wrap=True)
    todo = [t for t in tasks if not finished(t.config)]
    if len(todo) < len(tasks):
        console.print(f"{len(tasks) - len(todo)} of {len(tasks)} runs are finished already")
    run_all(todo, workers, console)
    runs = [Run(t.arm, t.seed, Path(t.config.run.out)) for t in tasks]
    return write_comparison(out, runs, baselines, base, scenario)


def finished(config: Config) -> bool:
    """Say whether this very configuration has completed in its folder."""
    path = Path(config.run.out) / LEDGER
    if not path.exists():
        return False
    with Ledger(path, readonly=True) as ledger:
        facts = ledger.run()
        compared = bool(ledger.references("closed_form"))
    done = str(facts.get("status", "")).startswith(("completed", "failed: option mass"))
    if config.run.mode == "rewards" and config.rewards.task != "shares":
        done = done and compared  # written after the run: a kill may come between the two
    return done and facts.get("config_hash") == config_hash(config)


def _config(base: Config, arm: Arm, seed: int, out: Path) -> Config:
    config = from_flat({**to_flat(base), **dict(arm.settings), "run.seed": seed})
    return in_folder(config, arm.name, out)


def in_folder(config: Config, name: str, out: Path) -> Config:
    """Return the configuration with a name and a run folder of its own under ``out``.

    The folder's name ends in the configuration's hash, so it never holds another configuration.
    """
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    folder = out / "runs" / f"{slug}-seed{config.run.seed}-{config_hash(config)[:8]}"
    return replace(config, run=replace(config.run, name=name, out=str(folder)))


def run_all(
    tasks: Sequence[Task], workers: int, console: Console, keep_going: bool = False
) -> None:
    """Do the tasks on ``workers`` processes, one line each with an estimate of the time left.

    A run that fails stops everything, unless ``keep_going``: then it is printed, its ledger holds
    the reason, and the others go on.
    """
    began = time.monotonic()

    def report(done: int, task: Task, work: Callable[[], float]) -> None:
        try:
            how = f"{work():.1f}s"
        except FedalignError as error:
            if not keep_going:
                raise
            how = f"[red]failed[/]: {escape(str(error))}"
        left = (time.monotonic() - began) / done * (len(tasks) - done)
        console.print(
            f"[dim]{done:>3}/{len(tasks)}[/]  {escape(task.arm)}, seed {task.seed}: {how}  "
            f"[dim]~{left / 60:.1f} min left[/]"
        )

    if workers == 1:
        for done, task in enumerate(tasks, 1):
            report(done, task, partial(run_task, task))
        return
    # Spawned, not forked: a forked torch may hang in its thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run_task, task): task for task in tasks}
        for done, future in enumerate(as_completed(waiting), 1):
            report(done, waiting[future], future.result)


def run_task(task: Task) -> float:
    """Do or resume one run; return its seconds.  The folder of another configuration is refused."""
    from simulations.display import QuietProgress
    from simulations.simulate import simulate

    began = time.perf_counter()
    config = task.config
    folder = Path(config.run.out)
    if (folder / LEDGER).exists():
        resume = (folder / CHECKPOINT).exists()
        if not resume:
            (folder / LEDGER).unlink()  # stopped before anything was committed
        config = replace(config, run=replace(config.run, resume=resume))
    # An arm that loses option mass is a result, and its mass stands in the table.
    simulate(config, QuietProgress())
    return time.perf_counter() - began
