"""The checkpoint of a run: one safetensors file, replaced by a rename: the commit.

It holds the global adapter (in mode ``rewards`` also value head, optimiser moments and the
preference predictor) and, as JSON in the file's header, everything else a run needs to go on
as if nothing had happened: the rule's state, counters, the committed (phase, round, attempt)
triples, the configuration and its hash, library versions and the number of clients in a message.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedalign import wire
from fedalign.aggregation.records import RuleState
from fedalign.config import Config, config_hash, differing_keys, from_json
from fedalign.errors import ResumeError
from fedalign.storage import storing

VERSION = 2
PHASES = ("base", "predictor", "train", "final", "personal")
EXTRA = "extra/"


@dataclass(frozen=True)
class Checkpoint:
    """State after the last committed phase or round."""

    config_json: str
    config_hash: str
    manifest_json: str
    versions: Mapping[str, str]
    phase: str
    """Last committed phase, one of ``PHASES``."""
    round: int
    """Rounds of training that are committed."""
    training_done: bool
    """All rounds are done, or early stop ended them."""
    best: float | None
    """Best validation value seen by early stop."""
    rounds_since_best: int
    rule_state: RuleState
    commits: tuple[tuple[str, int, int], ...]
    """Committed (phase, round, attempt), in order."""
    adapter: wire.F32
    """Global adapter (P,) float32."""
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Mode ``rewards``: value head, optimiser moments and predictor, by name."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary name, flush to disk, rename.  The rename is the commit.

    Raises ``StorageError``; the checkpoint before is then still in place.
    """
    meta = {
        "version": VERSION,
        "config": checkpoint.config_json,
        "config_hash": checkpoint.config_hash,
        "manifest": checkpoint.manifest_json,
        "versions": dict(checkpoint.versions),
        "phase": checkpoint.phase,
        "round": checkpoint.round,
        "training_done": checkpoint.training_done,
        "best": checkpoint.best,
        "rounds_since_best": checkpoint.rounds_since_best,
        "rule_state": checkpoint.rule_state.to_dict(),
        "commits": [list(c) for c in checkpoint.commits],
    }
    temporary = path.with_suffix(".tmp")
    tensors = {"adapter": checkpoint.adapter} | {
        EXTRA + name: np.ascontiguousarray(value) for name, value in checkpoint.arrays.items()
    }
    with storing(path):
        save_file(tensors, temporary, metadata={"fedalign": json.dumps(meta)})
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        rename(temporary, path)


def rename(temporary: Path, path: Path) -> None:
    """Replace ``path`` by ``temporary`` and flush the folder entry."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; ``ResumeError`` when it is damaged or of another version."""
    try:
        with safe_open(path, framework="numpy") as f:
            meta = json.loads(f.metadata()["fedalign"])
            adapter = f.get_tensor("adapter")
            extra = {n: f.get_tensor(n) for n in f.keys() if n.startswith(EXTRA)}  # noqa: SIM118
        if meta["version"] != VERSION:
            raise ResumeError(
                f"{path}: checkpoint version {meta['version']}, this fedalign reads {VERSION}."
            )
        return Checkpoint(
            config_json=meta["config"],
            config_hash=meta["config_hash"],
            manifest_json=meta["manifest"],
            versions=meta["versions"],
            phase=meta["phase"],
            round=int(meta["round"]),
            training_done=bool(meta["training_done"]),
            best=meta["best"],
            rounds_since_best=int(meta["rounds_since_best"]),
            rule_state=RuleState.from_dict(meta["rule_state"]),
            commits=tuple((str(p), int(r), int(a)) for p, r, a in meta["commits"]),
            adapter=np.asarray(adapter, dtype=np.float32),
            arrays={name.removeprefix(EXTRA): value for name, value in extra.items()},
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"{path}: not a readable checkpoint ({type(error).__name__}). "
            "Start the run again in a new folder."
        ) from None


def check_resumable(
    checkpoint: Checkpoint, config: Config, manifest: wire.Manifest, versions: Mapping[str, str]
) -> list[str]:
    """Raise ``ResumeError`` naming every setting that differs; return warnings about versions."""
    if checkpoint.config_hash != config_hash(config):
        keys = differing_keys(from_json(checkpoint.config_json), config)
        raise ResumeError(
            f"the run was started with other settings: {', '.join(keys)}. "
            "Resume with the settings it has, or start a new run."
        )
    if checkpoint.manifest_json != manifest.to_json():
        raise ResumeError("the base model or adapter shape differs from the run's. Start anew.")
    return [
        f"{name} was {old}, now {versions.get(name, 'absent')}: results may differ in the last bits"
        for name, old in sorted(checkpoint.versions.items())
        if versions.get(name) != old
    ]
