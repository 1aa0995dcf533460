"""Run (or resume) a federation in this process and kill it with SIGKILL at a named point.

    python kill_run.py FOLDER POINT NTH [--real [--coarse] | --rewards]

POINT is where to die, at the NTH time it is reached; ``none`` lets the run finish.  ``--real`` uses
the real clients (pocket model, synthetic population, few steps), with ``--coarse`` under frozen A
and with int8 both ways and error feedback; ``--rewards`` uses them in mode ``rewards`` with a query
budget; without either, numpy clients.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clients.trainer
import server.checkpoint
import server.policy_trainer
import server.run
from clients.residuals import Residuals
from fedalign.config import Config, from_flat
from fedalign.errors import ResumeError, RunFailed
from fedalign.ledger import Ledger
from fedalign.runfolder import prepare
from server.progress import LogProgress
from server.recording import Recorder
from server.rlhf import RewardStrategy
from server.spool import Spool
from server.strategy import GroupStrategy
from simulations.grid import InProcessGrid

POINTS: dict[str, tuple[Any, str]] = {
    "before-spool": (Spool, "write"),
    "after-spool": (GroupStrategy, "_combine"),
    "before-ledger": (Recorder, "train_round"),
    "before-rename": (server.checkpoint, "rename"),
    "before-commit-row": (Ledger, "commit"),
    "scores": (GroupStrategy, "_score_rows"),
    "personal-scores": (GroupStrategy, "aggregate_personal"),
    "personal-adapter": (clients.trainer, "keep_personal_adapter"),
    "answer": (clients.trainer.ResidentTrainer, "exchange"),
    "answered": (RewardStrategy, "aggregate_exchange"),
    "update": (server.policy_trainer, "improve"),
    "before-exchange-rows": (RewardStrategy, "record_exchange"),
    "predictor": (server.run, "aggregate_predictor"),
    "residual": (Residuals, "keep"),
}

COARSE: dict[str, Any] = {
    "run.rounds": 3,
    "aggregation.method": "frozen-a",
    "wire.upload": "int8",
    "wire.download": "int8",
    "wire.feedback": True,
    "personal.steps": 0,
}


def arm(point: str, nth: int) -> None:
    """Replace the function at ``point`` by one that kills this process at its nth call."""
    if point == "none":
        return
    owner, name = POINTS[point]
    original: Callable[..., Any] = getattr(owner, name)
    count = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


REWARDS: dict[str, Any] = {
    "run.mode": "rewards",
    "run.rounds": 3,
    "data.questions": 60,
    "rewards.task": "order",
    "ppo.questions": 4,
    "ppo.minibatches": 2,
    "ppo.kl-target": 0.5,
    "site.answers": "both",
    "site.query-budget": 3,
    "predictor.rounds": 2,
    "predictor.steps": 2,
    "predictor.width": 8,
    "score.samples": 2,
    "score.min-option-mass": 0.0,
    "rewards.min-format-rate": 0.0,
    "personal.steps": 0,
}


def configuration(folder: Path, real: bool, rewards: bool) -> Config:
    """Return the small run, resumed when the folder holds one."""
    flat: dict[str, Any] = {"run.rounds": 3, "run.clients-per-message": 2, "weights.decay": 0.5}
    if rewards:
        flat |= REWARDS
    elif real:
        flat |= {
            "run.rounds": 2,
            "run.clients-per-message": 3,
            "data.questions": 60,
            "data.partition": "sizes",
            "data.clients-per-group": "coast=2,valley=1,hills=1,isles=1",
            "local.steps": 2,
            "personal.steps": 2,
        }
        if "--coarse" in sys.argv:
            flat |= COARSE
    else:
        flat |= {"model.rank": 2, "model.alpha": 4.0}
    flat["run.out"] = str(folder)
    try:
        return prepare(from_flat(flat | {"run.resume": True}))
    except ResumeError:  # it had not begun
        return prepare(from_flat(flat))


def main() -> None:
    """See the module's docstring."""
    folder, point, nth = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rewards = "--rewards" in sys.argv
    real = rewards or "--real" in sys.argv
    arm(point, nth)
    if real:
        from clients.app import app
    else:
        path = Path(__file__).parents[1] / "unit" / "server" / "conftest.py"
        spec = importlib.util.spec_from_file_location("numpy_clients", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        app = module.numpy_app()
        server.run.build_report = lambda f: f / "report.html"  # not what is tested here
    config = configuration(folder, real, rewards)
    try:
        server.run.execute(InProcessGrid(app, 1), config, LogProgress(), 0.01)
    except RunFailed as error:  # as the commands do
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
