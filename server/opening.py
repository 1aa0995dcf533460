"""Where a run starts from: a fresh state, or its last checkpoint; and what can be checked first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedalign.aggregation.adapters import initial_adapter
from fedalign.aggregation.records import RuleState
from fedalign.config import Config, config_hash, to_json
from fedalign.errors import ConfigError, ResumeError, RunFailed
from fedalign.ledger import ClientRow, Ledger
from fedalign.models.layout import pack
from fedalign.runfolder import CHECKPOINT
from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint
from server.directory import Directory
from server.progress import Progress


def open_run(
    folder: Path, config: Config, directory: Directory, ledger: Ledger, progress: Progress
) -> Checkpoint:
    """Return the checkpoint to go on from: the run's last, or a fresh start."""
    path = folder / CHECKPOINT
    if path.exists():
        if not config.run.resume:
            raise ResumeError(f"{folder} holds a run; set run.resume = true to go on with it.")
        found = checkpoints.load(path)
        for warning in checkpoints.check_resumable(
            found, config, directory.manifest, directory.versions
        ):
            progress.warn(warning)
            ledger.event("version-changed", warning)
        ledger.set_commits(found.commits)
        ledger.event("resumed", f"after {found.phase} {found.round}")
        return found
    manifest = directory.manifest
    adapter = pack(initial_adapter(dict(manifest.layout), config.run.seed), manifest.layout)
    return Checkpoint(
        config_json=to_json(config),
        config_hash=config_hash(config),
        manifest_json=manifest.to_json(),
        versions=dict(directory.versions),
        phase="",
        round=0,
        training_done=False,
        best=None,
        rounds_since_best=0,
        rule_state=RuleState(),
        commits=(),
        adapter=np.asarray(adapter, dtype=np.float32),
    )


def check_possible(config: Config, directory: Directory, metric: str) -> None:
    if config.run.clients_per_round > len(directory.members):
        raise ConfigError(
            f"run.clients-per-round = {config.run.clients_per_round}, but there are "
            f"{len(directory.members)} clients. Use at most that many, or 0 for all."
        )
    empty = [m.client for m in directory.members.values() if not (m.train and m.validation)]
    if empty:
        raise RunFailed(f"client '{empty[0]}' has no training or no validation questions.")


def option_mass(ledger: Ledger, stage: str) -> float | None:
    """Return the mean probability on the answer options over test questions; None for pairs."""
    rows = [(s.option_mass, s.n) for s in ledger.scores(stage, "test") if s.option_mass is not None]
    total = sum(n for _, n in rows)
    return sum(m * n for m, n in rows) / total if total else None


def client_rows(directory: Directory, ledger: Ledger) -> list[ClientRow]:
    """Return the rows of all clients of the run: those of the directory, and sites that left it."""
    rows = {
        m.client: ClientRow(
            m.client, m.group, directory.form, m.train, m.validation, m.test, m.size
        )
        for m in directory.members.values()
    }
    earlier = {r.client: r for r in ledger.clients()} if directory.enrolled else {}
    return list((earlier | rows).values())
