"""Parts of a real deployment die, hang or are revoked in the middle of a round.

A disturbed round is repeated with the same keyed draws: where the quorum is everybody, the adapter
is that of an undisturbed run.  Where it is less, the round closes without the site, and says so.
Each test proves first that its disturbance was felt.  The last test revokes a site for good.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
SITE = "coast-b"
"""Whom it happens to."""
ENDS = 600.0
"""Seconds for a disturbed run to end."""


def said(federation: Any, name: str) -> str:
    """Return what the command of a run printed."""
    return str((federation.folder / f"{name}.txt").read_text())


def server_apps(federation: Any, loopback: ModuleType) -> list[int]:
    """Return the processes of the run that goes on."""
    return [
        pid
        for pid in loopback.descendants(federation.pids()["superexec"])
        if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def resumed(federation: Any, name: str) -> None:
    done = federation.command("server.cli", "resume", name, timeout=ENDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_site_killed_and_restarted_in_mid_round(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType
) -> None:
    process, folder = deployed.begin_round(federation, loopback, "killed", SITE)
    federation.kill_site(SITE)
    federation.start_site(SITE)
    assert process.wait(ENDS) == 0, said(federation, "killed")
    assert ("train", 1, "offline") in deployed.lost(folder, SITE)
    assert deployed.repeated(folder, "train", 1)
    deployed.same(undisturbed, folder)


@pytest.mark.parametrize("when", ["sending", "training"])
def test_superlink_killed_in_mid_round(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType, when: str
) -> None:
    name = f"superlink-{when}"
    if when == "training":
        process, folder = deployed.begin_round(federation, loopback, name, SITE)
    else:  # the base is committed, and messages of round 1 are on their way
        process, folder = federation.begin(name, *deployed.SETTINGS), federation.result(name)
        deployed.until(
            loopback, process, lambda: ("base", 0, 1) in deployed.commits(folder), "the base"
        )
    before = federation.pids()["superlink"]
    os.kill(before, signal.SIGKILL)
    assert not any(phase == "train" for phase, _, _ in deployed.commits(folder))
    assert process.wait(ENDS) == 0, said(federation, name)
    assert federation.pids()["superlink"] != before
    assert deployed.trained(folder, 1) == set(federation.sites)
    deployed.same(undisturbed, folder)


@pytest.mark.parametrize("which", ["serverapp", "superexec"])
def test_serverapp_killed_and_resumed(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType, which: str
) -> None:
    name = f"killed-{which}"
    process, folder = deployed.begin_round(federation, loopback, name, SITE)
    apps = server_apps(federation, loopback)
    assert apps
    # The ServerApp is a child of the SuperExec and does not outlive it.
    for pid in apps if which == "serverapp" else [federation.pids()["superexec"]]:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(ENDS) == 5, said(federation, name)
    assert f"fedalign-server resume {name}" in said(federation, name)
    assert not any(phase == "train" for phase, _, _ in deployed.commits(folder))
    resumed(federation, name)
    deployed.same(undisturbed, folder)


def test_disk_refuses_what_the_serverapp_writes(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType
) -> None:
    process, folder = deployed.begin_round(federation, loopback, "full", SITE)
    apps = server_apps(federation, loopback)
    assert apps
    for pid in apps:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
    assert process.wait(ENDS) == 5, said(federation, "full")
    assert "Make room" in said(federation, "full")
    assert deployed.commits(folder) == {("base", 0, 1)}
    resumed(federation, "full")
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"] == "completed"
    deployed.same(undisturbed, folder)


@pytest.mark.parametrize("part", ["trainer", "supernode"])
def test_site_hangs_for_a_round(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType, part: str
) -> None:
    name = f"hangs-{part}"
    process, folder = deployed.begin_round(
        federation, loopback, name, SITE, "run.round-timeout=45", "run.max-attempts=3"
    )
    with deployed.Stopped(deployed.parts(federation.home(SITE))[part]):
        deployed.until(
            loopback, process, lambda: "round-void" in deployed.events(folder), "the void round"
        )
    assert process.wait(ENDS) == 0, said(federation, name)
    assert ("train", 1, "no-reply") in deployed.lost(folder, SITE)
    assert deployed.repeated(folder, "train", 1)
    deployed.same(undisturbed, folder)


def test_site_hangs_and_the_rest_goes_on(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType
) -> None:
    process, folder = deployed.begin_round(
        federation, loopback, "goes-on", SITE, "run.round-timeout=45", "run.quorum=0.5"
    )
    with deployed.Stopped(deployed.parts(federation.home(SITE))["trainer"]):
        assert process.wait(ENDS) == 0, said(federation, "goes-on")
    rest = set(federation.sites) - {SITE}
    assert deployed.lost(folder, SITE) == {
        ("train", 1, "no-reply"),
        ("train", 2, "no-reply"),
        ("final", 2, "no-reply"),
    }
    assert not deployed.repeated(folder, "train", 1)
    assert deployed.trained(folder, 1) == deployed.trained(folder, 2) == rest
    assert {client for stage, _, client in deployed.scores(folder) if stage == "shared"} == rest
    deployed.differ(undisturbed, folder)


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """Return a maker of environments in which the clock is that many seconds off."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a clock that is off needs a C compiler (cc)")
    library = tmp_path_factory.mktemp("clock") / "clock_offset.so"
    source = Path(__file__).with_name("clock_offset.c")
    words = [compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(words, check=True, timeout=60)
    return lambda seconds: {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(seconds)}


def test_clock_a_little_behind(
    federation: Any,
    undisturbed: Path,
    deployed: ModuleType,
    wrong_clock: Callable[[int], dict[str, str]],
) -> None:
    federation.stop_site(SITE)
    federation.start_site(SITE, **wrong_clock(-240))
    try:
        done = federation.run("behind", *deployed.SETTINGS)
        assert done.returncode == 0, done.stdout + done.stderr
        deployed.same(undisturbed, federation.result("behind"))
        assert -300 < deployed.last_job(federation.home(SITE)) - time.time() < -200
    finally:
        federation.stop_site(SITE)
        federation.start_site(SITE)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (60, "60 s ahead of the coordinator's"),
        (7200, "7200 s ahead of the coordinator's"),
        (-360, "360 s behind the coordinator's"),
        (-7200, "This machine's clock says"),
        (-2 * 86400, "This machine's clock says"),
    ],
)
def test_clock_too_far_off_is_said(
    federation: Any,
    loopback: ModuleType,
    wrong_clock: Callable[[int], dict[str, str]],
    seconds: int,
    words: str,
) -> None:
    federation.stop_site(SITE)
    out = federation.launch_site(SITE, **wrong_clock(seconds))
    before = out.stat().st_size
    try:
        loopback.wait(
            lambda: words in out.read_bytes()[before:].decode(), f"'{words}' in {out}", 60.0
        )
        assert not federation.online(SITE)
    finally:
        federation.stop_site(SITE)
        federation.start_site(SITE)


def test_revoked_in_mid_round_and_the_rest_goes_on(
    federation: Any, undisturbed: Path, loopback: ModuleType, deployed: ModuleType
) -> None:
    process, folder = deployed.begin_round(
        federation, loopback, "revoked", SITE, "run.quorum=0.5", "run.rounds=3"
    )
    federation.check("server.cli", "revoke", SITE)
    assert process.wait(ENDS) == 0, said(federation, "revoked")
    assert "site-revoked" in deployed.events(folder)
    rest = set(federation.sites) - {SITE}
    for round_ in (1, 2, 3):
        assert deployed.trained(folder, round_) == rest
    assert {client for stage, _, client in deployed.scores(folder) if stage == "shared"} == rest
