"""Write the adapter of a run's last checkpoint for plain PEFT.  Loads no torch."""

from __future__ import annotations

from pathlib import Path

from fedalign import wire
from fedalign.config import from_json
from fedalign.errors import FedalignError
from fedalign.export import export_adapter
from fedalign.ledger import Ledger
from fedalign.models.layout import unpack
from fedalign.report.card import model_card
from fedalign.runfolder import CHECKPOINT, LEDGER
from server.checkpoint import Checkpoint, load


def write_adapter(state: Checkpoint, ledger: Ledger, to: Path) -> Path:
    """Write the checkpoint's adapter with its model card into ``to``."""
    manifest = wire.Manifest.from_json(state.manifest_json)
    export_adapter(
        to,
        unpack(state.adapter, manifest.layout),
        base_name=from_json(state.config_json).model.name,
        rank=manifest.rank,
        alpha=manifest.alpha,
        targets=manifest.targets,
        card=model_card(ledger),
    )
    return to


def export_run(folder: Path, to: Path) -> Path:
    """Export from a run folder, finished or not; ``FedalignError`` when it holds no checkpoint."""
    if not (folder / CHECKPOINT).exists():
        raise FedalignError(f"{folder} holds no checkpoint; nothing was committed yet.")
    if to.exists() and any(to.iterdir()):
        raise FedalignError(f"{to} is not empty; name a new folder.")
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return write_adapter(load(folder / CHECKPOINT), ledger, to)
