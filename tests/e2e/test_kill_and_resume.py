"""Killed with SIGKILL anywhere, a resumed run is bit-equal to one that was never disturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from clients.residuals import FOLDER as RESIDUALS
from fedalign.ledger import Ledger, canonical_rows
from fedalign.runfolder import CHECKPOINT, LEDGER, PERSONAL, SPOOL
from server.checkpoint import load

SCRIPT = Path(__file__).with_name("kill_run.py")


def start(folder: Path, point: str, nth: int, *flags: str) -> int:
    command = [sys.executable, str(SCRIPT), str(folder), point, str(nth), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


def rows(folder: Path) -> list[tuple[Any, ...]]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return canonical_rows(ledger)


def check_equal(folder: Path, undisturbed: Path) -> None:
    a, b = load(folder / CHECKPOINT), load(undisturbed / CHECKPOINT)
    assert np.array_equal(a.adapter, b.adapter)
    assert a.rule_state == b.rule_state
    assert (a.phase, a.round, a.training_done) == (b.phase, b.round, b.training_done)
    assert rows(folder) == rows(undisturbed)
    assert not (folder / SPOOL).exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(folder, "none", 0) == 0
    return folder


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("scores", 1),  # base phase
        ("before-rename", 1),  # base scored, not committed
        ("before-spool", 7),  # second round, some replies spooled
        ("after-spool", 2),  # second round, all spooled, nothing aggregated
        ("before-ledger", 2),  # aggregated, no row written
        ("before-rename", 3),  # second round in the ledger, checkpoint not renamed
        ("before-commit-row", 3),  # renamed, the ledger does not know yet
        ("scores", 2),  # final phase
        ("personal-scores", 1),  # personal phase, nothing recorded
        ("before-rename", 6),  # personal recorded, not committed
    ],
)
def test_killed_once(tmp_path: Path, undisturbed: Path, point: str, nth: int) -> None:
    folder = tmp_path / "run"
    assert start(folder, point, nth) == -signal.SIGKILL
    assert start(folder, "none", 0) == 0
    check_equal(folder, undisturbed)


def test_killed_again_and_again(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    for point, nth in [("before-spool", 2), ("after-spool", 1), ("before-rename", 2)]:
        assert start(folder, point, nth) == -signal.SIGKILL
    assert start(folder, "none", 0) == 0
    check_equal(folder, undisturbed)


def test_real_clients_killed_in_training_and_in_the_personal_phase(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert start(whole, "none", 0, "--real") == 0
    folder = tmp_path / "run"
    assert start(folder, "before-spool", 7, "--real") == -signal.SIGKILL
    assert start(folder, "personal-adapter", 3, "--real") == -signal.SIGKILL
    assert start(folder, "none", 0, "--real") == 0
    check_equal(folder, whole)
    kept = sorted(p.name for p in (whole / PERSONAL).glob("*.safetensors"))
    assert kept == sorted(p.name for p in (folder / PERSONAL).glob("*.safetensors"))
    assert len(kept) == 5
    for name in kept:
        a, b = (load_file(f / PERSONAL / name)["adapter"] for f in (folder, whole))
        assert np.array_equal(a, b)


def test_killed_with_residuals_of_error_feedback_half_written(tmp_path: Path) -> None:
    """Five clients a round: killed with some residuals of a round written, and between rounds."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    flags = ("--real", "--coarse")
    assert start(whole, "none", 0, *flags) == 0
    assert start(folder, "residual", 9, *flags) == -signal.SIGKILL  # round 2, the fourth client
    assert start(folder, "after-spool", 1, *flags) == -signal.SIGKILL  # round 2, all written
    assert start(folder, "residual", 7, *flags) == -signal.SIGKILL  # round 3, the second client
    assert start(folder, "none", 0, *flags) == 0
    check_equal(folder, whole)
    names = sorted(p.name for p in (whole / RESIDUALS).iterdir())
    assert len(names) == 2 * 5
    assert names == sorted(p.name for p in (folder / RESIDUALS).iterdir())
    for name in names:
        a, b = (load_file(f / RESIDUALS / name)["residual"] for f in (folder, whole))
        assert np.array_equal(a, b)
        assert np.abs(a).max() > 0


@pytest.fixture(scope="module")
def undisturbed_rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "run"
    assert start(folder, "none", 0, "--rewards") == 0
    return folder


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("predictor", 2),
        ("answer", 2),  # a client in the middle of an exchange, its budget perhaps written
        ("answered", 2),  # every answer is out and charged, none is recorded
        ("update", 3),
        ("before-exchange-rows", 2),
        ("before-rename", 6),
    ],
)
def test_a_reward_run_killed_once(
    tmp_path: Path, undisturbed_rewards: Path, point: str, nth: int
) -> None:
    folder = tmp_path / "run"
    assert start(folder, point, nth, "--rewards") == -signal.SIGKILL
    assert start(folder, "none", 0, "--rewards") == 0
    check_equal(folder, undisturbed_rewards)
    mine, whole = load(folder / CHECKPOINT), load(undisturbed_rewards / CHECKPOINT)
    assert mine.arrays.keys() == whole.arrays.keys()
    for name, value in mine.arrays.items():
        assert np.array_equal(value, whole.arrays[name]), name
    refused = [r for r in rows(folder) if "refused" in r]
    assert refused == [r for r in rows(undisturbed_rewards) if "refused" in r]
    assert any(float(str(r[-1])) > 0 for r in refused)  # the budget did bite
