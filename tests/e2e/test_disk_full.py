"""A disk that is full, or refuses: the run fails and says so, and goes on when there is room.

Two disks: a small file system of its own (needs root), and a limit on the size of every file
(``RLIMIT_FSIZE``, which makes writes fail with another error).  What was committed stays, and the
resumed run is bit-equal to one that was never disturbed.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedalign.ledger import Ledger, canonical_rows, is_blank
from fedalign.runfolder import ADAPTER, CHECKPOINT, LEDGER, SPOOL
from server.checkpoint import load

SCRIPT = Path(__file__).with_name("kill_run.py")
DISK = 4 * 2**20
"""Bytes of the small file system; a whole run takes about a tenth."""


def start(
    folder: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "none", "0"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=before,
    )


def whole(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


def failed(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that a run ended as one that failed, with words that say what to do."""
    assert done.returncode == 5, done.stderr[-3000:]
    assert "Make room" in done.stderr
    assert "Traceback" not in done.stderr


def intact(folder: Path) -> None:
    """Assert that the ledger is whole, and holds no round beyond those of the checkpoint."""
    if not (folder / LEDGER).exists() or is_blank(folder / LEDGER):
        return  # not even the tables had room
    db = sqlite3.connect(folder / LEDGER)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()
    saved = load(folder / CHECKPOINT).commits if (folder / CHECKPOINT).exists() else ()
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert set(ledger.commits()) <= set(saved)
        assert ledger.run().get("status") != "completed"


def equal(folder: Path, undisturbed: Path) -> None:
    a, b = load(folder / CHECKPOINT), load(undisturbed / CHECKPOINT)
    assert np.array_equal(a.adapter, b.adapter)
    assert a.rule_state == b.rule_state
    with (
        Ledger(folder / LEDGER, readonly=True) as mine,
        Ledger(undisturbed / LEDGER, readonly=True) as other,
    ):
        assert canonical_rows(mine) == canonical_rows(other)
        assert mine.run()["status"] == "completed"
    assert (folder / ADAPTER).is_dir()
    assert not (folder / SPOOL).exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    whole(start(folder))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("room", [80_000, 200_000, 320_000])
def test_a_full_disk_and_room_again(disk: Path, undisturbed: Path, room: int) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * (DISK - room))
    folder = disk / "run"
    failed(start(folder))
    intact(folder)
    ballast.unlink()
    whole(start(folder))
    equal(folder, undisturbed)


@pytest.mark.parametrize("most", [8_000, 80_000, 160_000])
def test_a_disk_that_refuses_and_takes_again(tmp_path: Path, undisturbed: Path, most: int) -> None:
    folder = tmp_path / "run"
    failed(start(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))
    intact(folder)
    whole(start(folder))
    equal(folder, undisturbed)
