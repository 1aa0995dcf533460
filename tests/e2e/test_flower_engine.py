"""The same two apps under Flower's simulation engine: same result bit for bit, honest exit codes.

Every command runs in a process of its own, so that Ray never enters the process of the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedalign.ledger import Ledger, canonical_rows
from fedalign.models.packaged import BESIDE_CODE, cache_folder
from fedalign.runfolder import CHECKPOINT, LEDGER, PERSONAL
from server.checkpoint import load

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"
    ),
]

CLIENTS = 8
SETTINGS = {
    "run.rounds": "2",
    "run.clients-per-message": "4",
    "local.steps": "3",
    "local.batch-size": "4",
    "data.questions": "40",
    "personal.steps": "2",
}

Command = Callable[..., subprocess.CompletedProcess[str]]


def fedalign(
    command: Command, cwd: Path, *arguments: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run ``fedalign simulate`` with small settings; ``section__key`` overrides one."""
    named = SETTINGS | {k.replace("__", ".").replace("_", "-"): v for k, v in settings.items()}
    options = [word for k, v in named.items() for word in ("--set", f"{k}={v}")]
    return command(
        sys.executable, "-m", "simulations.cli", "simulate", *options, *arguments, cwd=cwd
    )


def outcome(folder: Path) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Return the final adapter and the ledger's rows without times."""
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return load(folder / CHECKPOINT).adapter, canonical_rows(ledger)


def check_everyone_trained(folder: Path, rounds: int) -> None:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert str(ledger.run()["status"]) == "completed"
        names = {c.client for c in ledger.clients()}
        replies = [(r.round, r.client) for r in ledger.replies() if r.status == "ok"]
        personal = {s.client for s in ledger.scores("personal", "test")}
    assert len(names) == CLIENTS
    assert sorted(replies) == [(r, c) for r in range(1, rounds + 1) for c in sorted(names)]
    assert personal == names
    assert len(list((folder / PERSONAL).glob("*.safetensors"))) == CLIENTS


@pytest.fixture(scope="module")
def in_process(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the in-process grid over two nodes."""
    home = tmp_path_factory.mktemp("grid")
    done = fedalign(command, home, "--nodes", "2", "--out", str(home / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "run"


def test_engine_gives_the_same_bits_as_the_grid(
    command: Command, in_process: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = fedalign(command, tmp_path, "--engine", "flower", "--nodes", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    check_everyone_trained(out, rounds=2)
    adapter, rows = outcome(out)
    expected, expected_rows = outcome(in_process)
    assert np.array_equal(adapter, expected)
    assert rows == expected_rows


def test_a_virtual_node_hosts_a_cohort(command: Command, tmp_path: Path) -> None:
    """Two virtual nodes on two workers, each trains its six clients as one batch."""
    settings = {
        "data__clients_per_group": "3",
        "run__clients_per_message": "6",
        "local__cohort_size": "0",
        # ``fedalign simulate`` gives a cohort all cores, a worker of the engine has one thread.
        "local__threads": "1",
        "personal__steps": "0",
    }
    for engine in ("inprocess", "flower"):
        arguments = ("--engine", engine, "--nodes", "2", "--out", str(tmp_path / engine))
        done = fedalign(command, tmp_path, *arguments, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
    adapter, rows = outcome(tmp_path / "flower")
    expected, expected_rows = outcome(tmp_path / "inprocess")
    assert np.array_equal(adapter, expected)
    assert rows == expected_rows
    with Ledger(tmp_path / "flower" / LEDGER, readonly=True) as ledger:
        replies = [r for r in ledger.replies() if r.status == "ok"]
        seconds = {(c.round, c.client): c.value for c in ledger.curves("tokens")}
    assert len(replies) == 2 * 12
    assert set(seconds) == {(r.round, r.client) for r in replies}


def test_a_reward_run_gives_the_same_bits(command: Command, tmp_path: Path) -> None:
    settings = {
        "run__mode": "rewards",
        "rewards__task": "order",
        "ppo__questions": "4",
        "ppo__minibatches": "2",
        "site__answers": "both",
        "predictor__rounds": "2",
        "predictor__width": "8",
        "score__samples": "2",
        "personal__steps": "0",
    }
    for engine in ("inprocess", "flower"):
        arguments = ("--engine", engine, "--nodes", "2", "--out", str(tmp_path / engine))
        done = fedalign(command, tmp_path, *arguments, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
    adapter, rows = outcome(tmp_path / "flower")
    expected, expected_rows = outcome(tmp_path / "inprocess")
    assert np.array_equal(adapter, expected)
    assert rows == expected_rows


def test_failed_run_exits_5_and_says_why(command: Command, tmp_path: Path) -> None:
    arguments = ("--engine", "flower", "--nodes", "2", "--out", str(tmp_path / "run"))
    done = fedalign(command, tmp_path, *arguments, run__round_timeout="0.5")
    assert done.returncode == 5, done.stderr[-3000:]
    assert "error: hello: 2 of 2 nodes could not start (no-reply)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"run__quorum": "2.0"}, 2), ({"data__source": "survey", "data__path": "/none.csv"}, 3)],
)
def test_bad_settings_and_data_stop_before_ray_starts(
    command: Command, tmp_path: Path, settings: dict[str, str], code: int
) -> None:
    arguments = ("--engine", "flower", "--nodes", "2", "--out", str(tmp_path / "run"))
    done = fedalign(command, tmp_path, *arguments, **settings)
    assert done.returncode == code, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()


# --- flwr run --------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(home: Path) -> list[int]:
    """Return the processes whose environment names this FLWR_HOME, the SuperLink first."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if f"FLWR_HOME={home}".encode() in environment and int(entry.name) != os.getpid():
            found.append((b"flower-superlink" not in words, int(entry.name)))
    return [pid for _, pid in sorted(found)]


@pytest.fixture
def flwr(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Run ``flwr`` from another folder with a home and a port of its own; stop what it started."""
    if not Path("/proc").is_dir():
        pytest.skip("finds the SuperLink that flwr leaves behind through /proc")
    home, elsewhere = tmp_path / "flwr", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(BESIDE_CODE, cache_folder())  # a bundle carries no weights
    environment = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }
    yield lambda *words: command("flwr", *words, cwd=elsewhere, **environment)
    end = time.monotonic() + 30
    while (left := processes_of(home)) and time.monotonic() < end:
        os.kill(left[0], signal.SIGTERM if time.monotonic() < end - 10 else signal.SIGKILL)
        time.sleep(1.0)
    assert not left


def test_flwr_run_from_another_folder(
    flwr: Command, command: Command, root: Path, in_process: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    overrides = " ".join(f"{k}={v}" for k, v in SETTINGS.items())
    done = flwr("run", root, "--stream", "--run-config", f'{overrides} run.out="{out}"')
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(flwr) == ["finished:completed"]
    check_everyone_trained(out, rounds=2)
    # The server of ``flwr run`` never holds the data; the reference rows are added afterwards.
    report = command(
        sys.executable, "-m", "simulations.cli", "report", out, "--references", cwd=tmp_path
    )
    assert report.returncode == 0, report.stderr[-2000:]
    adapter, rows = outcome(out)
    expected, expected_rows = outcome(in_process)
    assert np.array_equal(adapter, expected)
    assert rows == expected_rows
    for line in (f"fedalign: run folder {out}: {CLIENTS} clients", f"{out}/report.html"):
        assert line in done.stdout

    # The folder holds a run now.  The run fails, and Flower says so in its list, not in the exit
    # code: docs/runners.md tells people to look there.
    again = flwr("run", root, "--stream", "--run-config", f'run.out="{out}"')
    assert again.returncode == 0
    assert sorted(status(flwr)) == ["finished:completed", "finished:failed"]
    assert "already holds a run" in again.stdout


def status(flwr: Command) -> list[str]:
    """Return the status of every run of the SuperLink."""
    listed = flwr("list", "--format", "json")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    return [run["status"] for run in json.loads(listed.stdout)["runs"]]
