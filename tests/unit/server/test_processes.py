"""Children: started again, stopped with all they started, killed when the supervisor dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.processes import FIRST_WAIT, Child, stop_all


def child(tmp_path: Path, code: str, name: str = "c") -> Child:
    return Child(
        name, [sys.executable, "-c", code], tmp_path / f"{name}.log", dict(os.environ), tmp_path
    )


def alive(pid: int) -> bool:
    """Say whether a process runs; one that ended but was not collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait(good: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
# Starts a grandchild, and both ignore SIGTERM.
STUBBORN = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
p = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
print(p.pid, flush=True); time.sleep(60)
"""


def test_a_child_writes_its_log_and_stops(tmp_path: Path) -> None:
    one = child(tmp_path, SLEEP)
    one.start()
    wait(lambda: "up" in one.log.read_text())
    pid = one.pid
    assert pid is not None
    assert os.getpgid(pid) == pid
    assert stop_all([one]) == []
    assert not alive(pid)


def test_what_a_child_started_is_stopped_too(tmp_path: Path) -> None:
    one = child(tmp_path, STUBBORN)
    one.start()
    wait(lambda: "up" in one.log.read_text())
    grandchild = int(one.log.read_text().split()[0])
    before = time.monotonic()
    assert stop_all([one], seconds=0.5) == ["c"]
    assert time.monotonic() - before < 3.0
    wait(lambda: not alive(grandchild))


def test_a_child_that_dies_is_started_again_ever_later(tmp_path: Path) -> None:
    one = child(tmp_path, "raise SystemExit(3)")
    one.start()
    waits = []
    now = time.monotonic()
    for _ in range(3):
        process = one.process
        assert process is not None
        process.wait(10)
        assert one.look(now) == 3
        waits.append(one.not_before - now)
        assert one.look(one.not_before - 0.01) is None
        assert one.pid is None
        one.look(one.not_before)
        now = one.not_before
    assert waits == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
    assert one.starts == 4
    stop_all([one])


def test_a_child_that_lived_is_started_again_at_once(tmp_path: Path) -> None:
    one = child(tmp_path, SLEEP)
    one.start()
    one.wait = 30.0
    assert one.pid is not None
    os.kill(one.pid, signal.SIGKILL)
    assert one.process is not None
    one.process.wait(10)
    now = one.started + 61.0
    assert one.look(now) == -9
    assert one.not_before - now == FIRST_WAIT
    stop_all([one])


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from server.processes import Child
one = Child("c", [sys.executable, "-c", {SLEEP!r}], Path("c.log"), dict(os.environ), Path("."))
one.start()
print(one.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        wait(lambda: (tmp_path / "c.log").read_text())
        supervisor.kill()
    wait(lambda: not alive(pid))
