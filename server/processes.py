"""Child processes that never outlive us: start, restart with back-off, stop, all in groups.

A child leads its own session, so stopping signals it and what it started, and a Ctrl-C in the
terminal reaches only the supervisor.  On Linux the kernel kills a child when the supervisor dies
in any way (``PR_SET_PDEATHSIG``), and gives us what a dead child left running
(:func:`adopt_orphans`).  A child that dies is started again after 1, 2, 4, ... 30 s; one that lived
for a minute starts over at 1 s.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STOP_SECONDS = 8.0
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
LIVED = 60.0
LOG_BYTES = 20 * 2**20
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass
class Child:
    """One kept process: what to run, and the run that is going on."""

    name: str
    words: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait: float = FIRST_WAIT
    not_before: float = 0.0
    starts: int = 0
    last_pid: int | None = None
    """Process id of the last start, also after its end."""
    groups: set[int] = field(default_factory=set)

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self.process.pid if self.process is not None else None

    def start(self) -> None:
        """Start the process; its output goes to the end of the log, what it left before ends."""
        _signal(self, signal.SIGKILL)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            os.replace(self.log, self.log.with_suffix(".log.1"))
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                list(self.words),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        self.started = time.monotonic()
        self.starts += 1
        self.last_pid = self.process.pid
        self.groups.add(self.process.pid)

    def look(self, now: float) -> int | None:
        """Start it again when it is time; return the exit code when it has just died."""
        for group in self.groups - {self.pid or 0}:
            _collect(group)
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return None
            if now - self.started > LIVED:
                self.wait = FIRST_WAIT
            self.not_before = now + self.wait
            self.wait = min(2 * self.wait, LONGEST_WAIT)
            self.process = None
            return code
        if now >= self.not_before:
            self.start()
        return None


def adopt_orphans() -> None:
    """Become the parent of what dead children leave behind, so that it can be collected."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def stop_all(children: Sequence[Child], seconds: float = STOP_SECONDS) -> list[str]:
    """End every child and all of its groups; return the names of those that had to be killed."""
    for child in children:
        _signal(child, signal.SIGTERM)
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(_alive(child) for child in children):
        time.sleep(0.05)
    stubborn = [child.name for child in children if _alive(child)]
    for child in children:
        _signal(child, signal.SIGKILL)
        if child.process is not None:
            child.process.wait(timeout=5.0)
            child.process = None
    return stubborn


def _signal(child: Child, number: signal.Signals) -> None:
    for group in child.groups:
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            continue


def _alive(child: Child) -> bool:
    if child.process is not None:
        child.process.poll()  # collect it, or its group would seem alive
    for group in list(child.groups):
        _collect(group)
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            child.groups.discard(group)
    return bool(child.groups)


def _collect(group: int) -> None:
    """Wait for what has ended in a group; a process nobody waited for keeps its group alive."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return what a child does before it becomes its program; None where the kernel cannot."""
    if _LIBC is None:
        return None

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the supervisor died in between
            os._exit(1)

    return prepare
