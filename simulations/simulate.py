"""One simulated run: population, references, server and clients on this machine.

The in-process grid is the default; ``flower`` runs the same two apps under Flower's simulation
engine (Ray).  Here the researcher holds all data, so the attainable optimum and other reference
answerers are computed from the population and written to the ledger before training starts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from clients.app import app as client_app
from clients.resident import usable_clients
from clients.store import dataset, fingerprint, population
from fedalign.compat import become_flower_process, quiet_flower
from fedalign.config import Config, resolve_metric
from fedalign.data.describe import LITTLE_CONFLICT, describe
from fedalign.data.records import BadRow, Dataset
from fedalign.errors import ConfigError, ResumeError, RunFailed
from fedalign.ledger import Ledger
from fedalign.report.html import build_report
from fedalign.runfolder import LEDGER, prepare
from server.app import make_app
from server.progress import Progress
from server.run import Outcome
from simulations.grid import InProcessGrid
from simulations.references import references

ENGINES = ("inprocess", "flower")
LARGE_RATE = 1e-3
MOST_THREADS = 8
"""More gain nothing on the pocket's small matrices."""


def simulate(
    config: Config, progress: Progress, engine: str = "inprocess", nodes: int = 1
) -> Outcome:
    """Run the whole federation; return where the results are.

    Args:
        config: the run; ``run.out`` may be empty (a new folder is made).
        progress: receives what happens.
        engine: ``inprocess`` or ``flower`` (needs the extra ``fedalign[ray]``).
        nodes: virtual nodes the clients are dealt over.

    A run that finishes with too little option mass is returned, with ``option_mass_ok`` false.
    Raises ``DataError``, ``ConfigError``, ``RunFailed`` and ``ResumeError``.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine '{engine}' is not one of {', '.join(ENGINES)}.")
    if engine == "flower":
        _check_flower_engine()
    elif not config.local.threads and multiprocessing.parent_process() is None:
        # One run has the machine for itself; the workers of a comparison share it.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        config = replace(config, local=replace(config.local, threads=min(cores, MOST_THREADS)))
    quiet_flower()
    progress.phase("population", "reading preferences")
    population(config)
    progress.phase("model", "loading the base, checking that it can take every row")
    usable, unusable = usable_clients(config)
    clients = tuple(usable.values())
    if config.run.mode == "rewards" and clients[0].form != "survey":
        raise ConfigError(
            "run.mode = 'rewards' needs survey data: pairs have no answers to score. Use "
            "run.mode = 'adapters' for pairs."
        )
    resolve_metric(config, clients[0].form)
    for warning in _doubtful(config, clients[0].form):
        progress.warn(warning)
    config = prepare(config)
    folder = Path(config.run.out)
    data = dataset(config)
    left_out = (*data.bad_rows, *unusable)
    _show_data(data, left_out, folder, progress)
    with Ledger(folder / LEDGER) as ledger:
        before, now = ledger.run().get("population"), fingerprint(clients)
        if before not in (None, now):
            raise ResumeError(
                f"the data of {folder} have changed since the run began. Restore them, or start a "
                "new run."
            )
        ledger.put_references(references(config, clients))
        ledger.put_run(
            population=now,
            data_name=data.name,
            data_licence=data.licence,
            left_out=len(left_out),
        )
    outcomes: list[Outcome] = []
    app = make_app(config, progress, outcomes.append)
    try:
        if engine == "inprocess":
            become_flower_process()
            context = Context(1, 0, {}, RecordDict(), {})
            app(InProcessGrid(client_app, nodes), context)
        else:
            _run_flower(app, nodes)
    except RunFailed:
        if not outcomes:
            raise
        # The run finished and lost its option mass: the outcome says so, and has a report.
    if config.run.mode == "rewards" and config.rewards.task != "shares":
        from simulations.oracle import add_closed_form

        progress.phase("optimum", "distance to the closed-form optimum")
        add_closed_form(folder)
        build_report(folder)
    return outcomes[0]


def _doubtful(config: Config, form: str) -> list[str]:
    """Name settings that are meant for the pocket and surveys, and hurt elsewhere."""
    found = []
    pretrained, rewards = config.model.name != "pocket", config.run.mode == "rewards"
    if pretrained and not rewards and config.local.learning_rate >= LARGE_RATE:
        found.append(
            f"local.learning-rate = {config.local.learning_rate:g} is meant for the pocket and "
            "would ruin a pretrained model; 1e-4 is usual (and personal.learning-rate 5e-5)."
        )
    uses_ppo = rewards or config.local.objective == "ppo"
    if pretrained and uses_ppo and config.ppo.learning_rate >= LARGE_RATE:
        found.append(
            f"ppo.learning-rate = {config.ppo.learning_rate:g} is meant for the pocket; 1e-5 is "
            "usual for a pretrained model."
        )
    if form == "pairs" and config.local.reference == "none":
        found.append(
            "pairs without a reference favour short responses and may learn nothing; usual are "
            "local.reference = 'base' and local.beta = 0.1."
        )
    return found


def _show_data(data: Dataset, left_out: Sequence[BadRow], folder: Path, progress: Progress) -> None:
    """Say how much the groups disagree, and list every row that was left out in a file."""
    conflict = describe(data).conflict
    if conflict is not None and conflict < LITTLE_CONFLICT:
        progress.warn(
            f"groups reverse each other's order on only {100 * conflict:.1f} % of shared "
            "questions; expect no difference between weight rules."
        )
    if left_out:
        path = folder / "left_out.jsonl"
        lines = [json.dumps({"source": r.source, "reason": r.reason}) for r in left_out]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        progress.warn(f"{len(left_out)} rows or cells were left out; listed in {path}")


def _check_flower_engine() -> None:
    """Raise ``ConfigError``, before a run folder is made, where Flower's engine cannot start."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine 'flower' needs Ray. Install it with: pip install -e '.[ray]'")
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("engine 'flower' must be started from the main thread.")


def _run_flower(app: ServerApp, nodes: int) -> None:
    """Run under Flower's simulation engine; an exception of the server app reaches the caller.

    Flower announces that this function will be removed for ``flwr run``.  That command is no
    substitute: it exits 0 when the run failed, and takes no app built here.
    """
    from flwr.simulation import run_simulation

    become_flower_process()
    logging.getLogger("flwr").addFilter(lambda record: "is deprecated" not in record.getMessage())
    run_simulation(
        app,
        client_app,
        nodes,
        # Flower starts an actor on every CPU that Ray counts, and each loads the base model.
        backend_config={
            "init_args": {"num_cpus": min(nodes, os.cpu_count() or 1)},
            "client_resources": {"num_cpus": 1, "num_gpus": _gpus_per_client()},
        },
    )


def _gpus_per_client() -> float:
    """One whole GPU for a client app where there is one: each loads the base model."""
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0
