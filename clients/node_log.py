"""Why Flower's node ended, in the words of its own log, for the person at the terminal."""

from __future__ import annotations

import time
from pathlib import Path

NOT_CONNECTED = "Failed to initialize the connection to the SuperLink."
"""Flower's words before the line that says why its node could not connect."""


def why(log: Path, begin: int) -> str:
    """Say why a node could not connect, as its log has it from ``begin`` (bytes) on; else where."""
    with log.open("rb") as f:
        f.seek(begin)
        lines = f.read(100_000).decode(errors="replace").splitlines()
    at = next((i for i, line in enumerate(lines) if NOT_CONNECTED in line), len(lines))
    said = "".join(c for c in "".join(lines[at + 1 : at + 2]) if c.isprintable())
    if not said:
        return f"why is in {log}"
    if "certificate is not yet valid" in said or "certificate has expired" in said:
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        said += f". This machine's clock says {now} (UTC): set it if that is wrong"
    return f"{said} ({log})"
