"""Keeping children alive, as the right user, and ending all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clients.check import check
from clients.separation import account, cannot_run, problems, readable_by_others
from clients.site import Home, load_settings
from clients.start import STATE, Part, Supervisor, node_part, prepare, start, trainer_part
from fedalign.errors import ConfigError, FedalignError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")
SHELL = "/bin/sh"

SUPERVISE = """
import sys
from pathlib import Path
from clients.site import Home
from clients.start import Part, Supervisor
home = Home(Path(sys.argv[1]))
path = {"PATH": "/usr/bin:/bin"}
parts = [
    Part("one", ("/bin/sh", "-c", sys.argv[2]), None, path),
    Part("two", ("/bin/sh", "-c", "echo started; sleep 0.2; exit 4"), None, path),
]
Supervisor(home, parts, home.logs, back_off=0.2).run()
"""


def eventually(condition, seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def supervise(home: Home, root: Path, command: str) -> subprocess.Popen[bytes]:
    home.logs.mkdir(parents=True)
    return subprocess.Popen([sys.executable, "-c", SUPERVISE, str(home.path), command], cwd=root)


def test_a_part_that_ends_is_started_again_and_all_end_with_us(tmp_path, root):
    home = Home(tmp_path)
    # A grandchild that outlives a polite end of its parent.
    command = "echo $$; (trap '' TERM; echo $$ > /dev/null; exec sleep 300) & echo $!; wait"
    process = supervise(home, root, command)
    try:
        log = home.logs / "one.log"
        eventually(lambda: log.exists() and len(log.read_text().split()) == 2)
        eventually(lambda: (home.logs / "two.log").read_text().count("started") >= 2)
        state = json.loads((home.logs / STATE).read_text())
        assert state["supervisor"] == process.pid
        pids = [int(p) for p in log.read_text().split()]
        assert all(alive(p) for p in pids)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0
    finally:
        process.kill()
    assert not any(alive(p) for p in pids)
    assert not (home.logs / STATE).exists()
    assert log.stat().st_mode & 0o777 == 0o600


def test_what_leaves_its_process_group_is_ended_too(tmp_path, root):
    """As code from the coordinator could do: away from its parent, its group and its session."""
    home = Home(tmp_path)
    leave = "(setsid sh -c 'echo $$; trap \"\" TERM HUP; while :; do sleep 1; done' &)"
    process = supervise(home, root, f"{leave}; sleep 0.3; exit 3")
    log = home.logs / "one.log"
    try:
        eventually(lambda: log.exists() and len(log.read_text().split()) >= 2)
        first = int(log.read_text().split()[0])
        eventually(lambda: not alive(first))  # when its part ended, not only at the end of all
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0
    finally:
        process.kill()
    assert not any(alive(int(p)) for p in log.read_text().split())


def test_children_end_when_the_supervisor_is_killed(tmp_path, root):
    home = Home(tmp_path)
    process = supervise(home, root, "echo $$; exec sleep 300")
    log = home.logs / "one.log"
    try:
        eventually(lambda: log.exists() and log.read_text().strip())
        pid = int(log.read_text())
    finally:
        process.kill()
        process.wait(10)
    eventually(lambda: not alive(pid))


def test_an_error_of_settings_ends_everything(tmp_path):
    home = Home(tmp_path)
    home.logs.mkdir()
    parts = [
        Part("trainer", (SHELL, "-c", "echo why; exit 2"), None, {}, fatal_codes=(2, 3)),
        Part("supernode", (SHELL, "-c", "sleep 300"), None, {}),
    ]
    with pytest.raises(FedalignError, match=r"trainer cannot run \(exit code 2\).*trainer\.log"):
        Supervisor(home, parts, home.logs).run()
    assert (home.logs / "trainer.log").read_text() == "why\n"
    assert not (home.logs / "supernode.log").exists()


@needs_root
def test_children_are_other_users(tmp_path, short_tmp):
    home = Home(short_tmp / "h")
    a, b = account("61001"), account("61002")
    prepare(home, b, a)
    code = "id -u; id -g; id -G; exit 3"
    parts = [Part("one", (SHELL, "-c", code), a, {"PATH": "/usr/bin:/bin"}, fatal_codes=(3,))]
    with pytest.raises(FedalignError, match="exit code 3"):
        Supervisor(home, parts, home.logs).run()
    assert (home.logs / "one.log").read_text().split() == ["61001"] * 3


@needs_root
def test_folders_belong_to_their_users(short_tmp, make_home):
    home = Home(make_home())
    outside = short_tmp / "outside"
    outside.write_text("x")
    (home.node / "link").symlink_to(outside)
    a, b = account("61001"), account("61002")
    prepare(home, b, a)
    found = {
        p.name: (p.stat().st_uid, oct(p.stat().st_mode & 0o7777))
        for p in (home.path, home.node, home.trainer, home.run, home.policy)
    }
    assert found["north-clinic"] == (0, "0o711")
    assert found["node"] == (61_001, "0o700")
    assert found["trainer"] == (61_002, "0o700")
    assert found["run"] == (61_002, "0o2710")
    assert found["policy.toml"][0] == 61_002
    assert home.run.stat().st_gid == 61_001
    assert outside.stat().st_uid == 0
    assert problems(home, load_settings(home.settings), 61_002, 61_001) == []
    os.link(home.trainer / "data.jsonl", home.node / "second")
    with pytest.raises(ConfigError, match="second name"):
        prepare(home, b, a)


@needs_root
def test_a_folder_that_changes_meanwhile_gives_away_nothing_else(short_tmp, make_home, monkeypatch):
    """What the node's user left running swaps a folder for a link while root goes through it."""
    home = Home(make_home())
    outside = short_tmp / "outside"
    outside.mkdir()
    (outside / "shadow").write_text("x")
    inner = home.node / "a"
    inner.mkdir()
    (inner / "shadow").write_text("x")
    plain, swapped = os.open, []

    def swap(path, *arguments, **more):
        if path == "shadow" and not swapped:
            swapped.append(inner.rename(home.node / "b"))
            inner.symlink_to(outside)
        return plain(path, *arguments, **more)

    monkeypatch.setattr(os, "open", swap)
    prepare(home, account("61002"), account("61001"))
    assert swapped
    assert (outside / "shadow").stat().st_uid == 0
    assert (home.node / "b" / "shadow").stat().st_uid == 61_001


def test_commands(make_home):
    home = Home(make_home())
    me = account(str(os.geteuid()))
    part = trainer_part(home, None, me, advisory=True)
    assert part.command[1:4] == ("-P", "-m", "clients.daemon")
    assert part.command[-1] == "--advisory"
    node = node_part(home, account("61001"), {"gateway": "example.org:9444", "name": "n"})
    text = " ".join(node.command)
    assert f'--node-config socket="{home.socket}" site="n"' in text
    assert "--superlink example.org:9444" in text
    assert node.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert node.environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert (node.environment["HOME"], node.environment["USER"]) == (str(home.node), "61001")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": "node"}, "not one of"),
        ({"trainer_user": "61002"}, "both|need root"),
        ({"trainer_user": "no-such-user-here", "node_user": "61001"}, "no user|need root"),
    ],
)
def test_a_start_that_cannot_be_meant(make_home, arguments, message):
    with pytest.raises(ConfigError, match=message):
        start(Home(make_home()), **arguments)


# --- separation ---------------------------------------------------------------------------------


def test_readable_by_others_looks_at_the_whole_path(short_tmp):
    closed = short_tmp / "closed"
    closed.mkdir(mode=0o700)
    inside, outside = closed / "x", short_tmp / "x"
    for path in (inside, outside):
        path.write_text("x")
        path.chmod(0o644)
    assert not readable_by_others(inside)
    assert readable_by_others(outside)
    outside.chmod(0o640)
    assert readable_by_others(outside)
    outside.chmod(0o600)
    assert not readable_by_others(outside)


@needs_root
def test_a_user_who_cannot_run_this_python_is_named(make_home, short_tmp, monkeypatch):
    """As a virtual environment whose Python lies in somebody's home."""
    user = account("61001")
    closed = short_tmp / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python3").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(closed / "python3"))
    assert cannot_run(user).startswith("user 61001 cannot run ")
    home = Home(make_home())
    owner = home.trainer.stat().st_uid
    with pytest.raises(ConfigError, match=r"cannot run .* /opt/fedalign"):
        start(home, trainer_user="61001", node_user="61002")
    assert home.trainer.stat().st_uid == owner  # nothing was given away
    found = check(home, trainer_user="61001", node_user="61002")
    assert not found.healthy
    assert any(line.startswith("FAIL  user 61001 cannot run") for line in found.lines)


def test_one_user_is_advisory(make_home):
    home = Home(make_home())
    found = problems(home, load_settings(home.settings), os.geteuid(), os.geteuid())
    assert any("same user" in p for p in found)


@needs_root
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: None, None),
        (lambda h: os.chown(h.trainer / "data.jsonl", 61_001, 0), "data.jsonl belongs to 61001"),
        (lambda h: os.chown(h.policy, 61_001, 0), "policy.toml belongs to 61001"),
        (lambda h: h.trainer.chmod(0o755), "trainer can be read by others"),
        (lambda h: os.chown(h.path, 61_001, 0), "can be changed by the node's user"),
        (lambda h: h.path.chmod(0o777), "can be changed by the node's user"),
    ],
)
def test_each_gap_is_named(make_home, change, said):
    home = Home(make_home())
    change(home)
    found = problems(home, load_settings(home.settings), 0, 61_001)
    assert (found == []) if said is None else any(said in p for p in found), found
