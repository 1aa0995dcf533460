"""The run folder: where it is, and when a run may write to it.

``run.out`` names it; empty means a new folder under the user's data directory
(``$XDG_DATA_HOME/fedalign/runs``, by default ``~/.local/share/fedalign/runs``).  A folder that
holds a run is never written to again unless the run is resumed.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from fedalign.config import Config
from fedalign.errors import ResumeError
from fedalign.ledger import Ledger, is_blank

LEDGER = "ledger.sqlite"
CHECKPOINT = "checkpoint.safetensors"
REPORT = "report.html"
SUMMARY = "summary.json"
ADAPTER = "adapter"
PERSONAL = "personal"
SPOOL = "spool"
NO_OPTION_MASS = "failed: option mass"
"""Status of a run that was done to its end with a model that does not answer."""


def data_directory() -> Path:
    """Return the user's data directory for fedalign (not created)."""
    root = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(root) / "fedalign"


def prepare(config: Config) -> Config:
    """Create or check the run folder; return the configuration with ``run.out`` filled in.

    Raises ``ResumeError`` for a folder that already holds a run when ``run.resume`` is off, and
    for one that holds none when it is on.
    """
    if config.run.out:
        folder = Path(config.run.out)
    else:
        if config.run.resume:
            raise ResumeError("run.resume is on but run.out is empty; name the folder to resume.")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        root = data_directory() / "runs"
        folder = root / f"{config.run.name}-{stamp}"
        for i in range(2, 1000):
            if not folder.exists():
                break
            folder = root / f"{config.run.name}-{stamp}-{i}"
    holds_run = _holds_run(folder)
    if holds_run and not config.run.resume:
        raise ResumeError(
            f"{folder} already holds a run. Choose another run.out, or resume it "
            f"(fedalign simulate --resume {folder}, or run.resume = true)."
        )
    if config.run.resume and not holds_run:
        raise ResumeError(f"{folder} holds no run to resume.")
    folder.mkdir(parents=True, exist_ok=True)
    return replace(config, run=replace(config.run, out=str(folder.resolve())))


def _holds_run(folder: Path) -> bool:
    """Say whether a run began here; a ledger without settings is what a failed start left."""
    if (folder / CHECKPOINT).exists():
        return True
    if not (folder / LEDGER).exists():
        return False
    if not is_blank(folder / LEDGER):
        with Ledger(folder / LEDGER, readonly=True) as ledger:
            if "config" in ledger.run():
                return True
    for path in folder.glob(f"{LEDGER}*"):
        path.unlink()
    return False
