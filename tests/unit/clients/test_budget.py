"""The site's budget survives restarts and kills."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from clients.budget import Budget
from clients.site_policy import Spent
from fedalign import wire
from fedalign.errors import DataError

NOON = 1_800_000_000.0  # 2027-01-15 08:00 UTC
DAY = 86_400.0


def test_jobs_rounds_and_seconds_of_a_day(tmp_path):
    path = tmp_path / "budget.sqlite"
    budget = Budget(path)
    assert budget.spent(NOON) == Spent()
    first = budget.begin(wire.TRAIN, NOON)
    budget.worked(first, 1.5)
    budget.worked(first, 2.5)
    budget.begin(wire.SCORE, NOON + 60)
    assert budget.spent(NOON) == Spent(2, 1, 2.5)
    assert Budget(path).spent(NOON) == Spent(2, 1, 2.5)
    assert budget.spent(NOON + DAY) == Spent()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_days_are_of_utc(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        budget = Budget(tmp_path / "b")
        budget.begin(wire.TRAIN, NOON)  # 08:00 UTC
        assert budget.spent(NOON + 15 * 3600).jobs == 1  # 23:00 UTC
        assert budget.spent(NOON + 17 * 3600).jobs == 0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_killed_job_is_spent(tmp_path, root):
    path = tmp_path / "budget.sqlite"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom clients.budget import Budget\n"
        f"b = Budget(Path(sys.argv[1]))\njob = b.begin({wire.TRAIN!r}, {NOON})\n"
        "b.worked(job, 4.0)\nprint('working', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=root
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"working\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    assert Budget(path).spent(NOON) == Spent(1, 1, 4.0)


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
def test_a_damaged_file_is_no_fresh_budget(tmp_path, content):
    path = tmp_path / "budget.sqlite"
    path.write_bytes(content)
    with pytest.raises(DataError):
        Budget(path)


def test_reading_makes_no_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Budget(tmp_path / "b", readonly=True)
    assert not (tmp_path / "b").exists()
