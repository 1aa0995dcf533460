"""Processes that a child left behind: found, and ended.

Flower's node runs the coordinator's code, which can start a process that leaves its group and
outlives the node.  The supervisor therefore asks the kernel to become the parent of whatever its
children leave behind (``PR_SET_CHILD_SUBREAPER``), and kills what it then finds among its own
children without having started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SECONDS = 10.0
"""Longest time for ending them; killing one makes its children ours."""


def adopt(yes: bool = True) -> None:
    """Become, or stop being, the parent of what our children leave behind (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def children() -> dict[int, int]:
    """Return the processes whose parent this one is, and the user of each."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            lines = (entry / "status").read_text(errors="replace").splitlines()
        except OSError:
            continue
        facts = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        if int(facts["PPid"][0]) == os.getpid():
            found[int(entry.name)] = int(facts["Uid"][0])
    return found


def end_strays(known: Collection[int], users: Collection[int]) -> int:
    """Kill all our children of these users that are not ``known``; return how many there were."""
    ended: set[int] = set()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        strays = [p for p, user in children().items() if p not in known and user in users]
        if not strays:
            break
        for pid in strays:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            ended.add(pid)
        time.sleep(0.02)
    return len(ended)
