"""The spool of a round: each client's update in a file of its own until the round is committed.

Keeps the server's memory flat: replies are written as they come, and aggregation reads them back
one at a time in sorted client order, whatever order they arrived in.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fedalign import wire
from fedalign.storage import storing


class Spool:
    """Updates of one attempt at a round.  ``StorageError`` where one cannot be written."""

    def __init__(self, folder: Path) -> None:
        """Start empty: what an earlier, killed attempt left in ``folder`` is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        with storing(folder):
            folder.mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._written = 0

    def write(self, client: str, update: wire.F32) -> str:
        """Store one update (P,) float32; return the SHA-256 of its bytes."""
        path = self.folder / f"{self._written:06d}.safetensors"
        with storing(path):
            save_file({"update": np.ascontiguousarray(update)}, path)
        self._files[client] = path
        self._written += 1
        return hashlib.sha256(update.tobytes()).hexdigest()

    def drop(self, client: str) -> None:
        """Remove one client's update; it will not be read."""
        self._files.pop(client).unlink()

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, wire.F32]]:
        """Yield (client, update[start:stop]) in sorted client order, one in memory at a time."""
        for client in sorted(self._files):
            with safe_open(self._files[client], framework="numpy") as file:
                part = file.get_slice("update")[start:stop]
            yield client, np.asarray(part, dtype=np.float32)

    def delete(self) -> None:
        """Remove the folder; called after the commit."""
        shutil.rmtree(self.folder, ignore_errors=True)
