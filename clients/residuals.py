"""What rounding took from a client's updates, kept in files until its next round.

One file for each client and round that it answered, ``<run.out>/residuals/<client>-<round>``: in a
simulation the run folder, on an enrolled site the trainer's own store.  Nothing of it travels.

Round t starts from the newest file of a round *before* t, whatever lies there of t or later.  So a
round that is repeated, after a kill or below quorum, starts from the same numbers as the first
time and sends the same bytes.  Two files a client are kept, the newest two: the round in work may
come again, the one before it is committed.

A file that is missing or damaged is a residual of zero: the client's log says so, and what is lost
is that much precision of one round, nothing more.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedalign.storage import storing
from fedalign.wire import F32

log = logging.getLogger("fedalign.client")

FOLDER = "residuals"
SUFFIX = ".safetensors"
DIGITS = 7
"""Of a round's number in a file name; ``run.rounds`` is at most a million."""


class Residuals:
    """The residuals of one client."""

    def __init__(self, out: Path, client: str) -> None:
        self._folder = out / FOLDER
        self._client = client
        self._name = hashlib.sha256(client.encode()).hexdigest()[:24]

    def before(self, round_: int, size: int) -> F32:
        """Return the residual that round ``round_`` (from 1) starts from, (size,) float32."""
        earlier = [r for r in self._rounds() if r < round_]
        if not earlier:
            if round_ > 1:
                # Not a warning: a client that is sampled for the first time has none either.
                log.info("client %s: no residual before round %d: zero", self._client, round_)
            return np.zeros(size, dtype=np.float32)
        path = self._path(max(earlier))
        try:
            residual = np.asarray(load_file(path)["residual"], dtype=np.float32)
            if residual.shape == (size,) and np.isfinite(residual).all():
                return residual
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        log.warning("client %s: %s is damaged; its residual is zero", self._client, path.name)
        return np.zeros(size, dtype=np.float32)

    def keep(self, round_: int, residual: F32) -> None:
        """Store what round ``round_`` left (size,); ``StorageError`` where that fails."""
        path = self._path(round_)
        with storing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({"residual": np.ascontiguousarray(residual)}, temporary)
            temporary.replace(path)
        # Later files are of a future that was given up; of the earlier ones only the last counts.
        others = [r for r in self._rounds() if r != round_]
        last = max((r for r in others if r < round_), default=None)
        for r in others:
            if r != last:
                self._path(r).unlink(missing_ok=True)

    def _path(self, round_: int) -> Path:
        return self._folder / f"{self._name}-{round_:0{DIGITS}d}{SUFFIX}"

    def _rounds(self) -> list[int]:
        found = self._folder.glob(f"{self._name}-*{SUFFIX}")
        return [int(p.stem.rsplit("-", 1)[1]) for p in found]
