"""A coordinator of real processes: what is reachable from outside, and what survives what."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.audit import verify
from fedalign.compat import ControlApi, ControlRefused, public_key_to_bytes
from server.coordinator import Coordinator, load
from server.superlink_admin import CliAdmin, KeyBurnt, RunAdmin, connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
READY_SECONDS = 180.0


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free ports."""
    for base in range(20000 + os.getpid() % 8000, 60000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


def wait(good: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Say whether a process runs; one that ended but was not collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ready(coordinator: Coordinator) -> bool:
    try:
        url = f"http://127.0.0.1:{coordinator.status.port}/ready"
        return httpx.get(url, timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def pids(coordinator: Coordinator) -> dict[str, int]:
    return dict(json.loads(coordinator.pids.read_text()))


def audited(coordinator: Coordinator, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in coordinator.audit.read_text().splitlines()]
    return [line["facts"] for line in lines if line["event"] == event]


@pytest.fixture
def server(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start one ``fedalign-server`` command, its output in a file beside the state."""

    def run(*words: str) -> subprocess.Popen[str]:
        with (tmp_path / f"{words[0]}.txt").open("a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "server.cli", *words],
                env={**os.environ, "FEDALIGN_STATE": str(tmp_path / "state")},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    return run


@pytest.fixture
def running(
    server: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> Iterator[tuple[Coordinator, subprocess.Popen[str]]]:
    """A new coordinator, started and ready."""
    base = free_ports(4)
    assert server("init", "--host", "localhost", "--port", str(base)).wait(60) == 0
    coordinator = load(tmp_path / "state")
    process = server("start")
    try:
        out = tmp_path / "start.txt"
        wait(lambda: "ready:" in out.read_text() or process.poll() is not None, "the start")
        assert process.poll() is None, out.read_text()
        yield coordinator, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def outside(coordinator: Coordinator) -> httpx.Client:
    """Return a client that stands where a stranger does: at the gateway's port."""
    trust = ssl.create_default_context(cafile=str(coordinator.root))
    url = f"https://{coordinator.gateway.public}"
    return httpx.Client(base_url=url, verify=trust, timeout=20, trust_env=False)


def new_key() -> bytes:
    return public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())


def check_outside(coordinator: Coordinator) -> None:
    with outside(coordinator) as stranger:
        assert stranger.get("/health").status_code == 200
        for path in (
            "/docs",
            "/openapi.json",
            "/v1/control/list-nodes",
            "/v1/control/register-node",
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/register-node",
        ):
            assert stranger.post(path, content=b"").status_code == 404, path
            assert stranger.get(path).status_code == 404, path
        assert stranger.post("/v1/fleet/pull-messages", content=b"").status_code == 401
    ca = coordinator.root.read_bytes()
    control = ControlApi(coordinator.gateway.public, ca)
    with pytest.raises(ControlRefused, match="404"):
        control.list_nodes()
    reasons = {facts["reason"] for facts in audited(coordinator, "gateway.refused")}
    expected = {"unknown-path", "control-path", "runtime-path", "fleet-path", "no-key"}
    assert reasons == expected
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((local_address(), coordinator.superlink.port), timeout=5)


def local_address() -> str:
    """Return an address of this host that is not the loopback's 127.0.0.1."""
    return "127.0.0.2"


def check_nodes(coordinator: Coordinator, admin: RunAdmin) -> None:
    kept, gone = new_key(), new_key()
    node = admin.register(kept, "north-clinic@north")
    assert admin.register(kept, "north-clinic@north") == node
    lost = admin.register(gone, "south-clinic@south")
    admin.unregister(lost)
    admin.unregister(lost)
    with pytest.raises(KeyBurnt):
        admin.register(gone, "south-clinic@south")
    command = CliAdmin(coordinator)
    seen = {n.node_id: n.status for n in command.nodes()}
    assert (seen[node], seen[lost]) == ("registered", "unregistered")


def test_coordinator_of_real_processes(
    running: tuple[Coordinator, subprocess.Popen[str]],
    server: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    coordinator, process = running
    admin = connect(coordinator)
    assert ready(coordinator)
    check_outside(coordinator)
    check_nodes(coordinator, admin)
    again = server("start")
    assert again.wait(60) == 2
    assert "runs already" in (tmp_path / "start.txt").read_text()

    before = pids(coordinator)
    assert set(before) == {"supervisor", "superlink", "superexec", "front"}
    known = {n.node_id: n.public_key for n in admin.nodes()}
    os.kill(before["superlink"], signal.SIGKILL)
    wait(lambda: pids(coordinator)["superlink"] != before["superlink"], "a new SuperLink")
    wait(lambda: ready(coordinator), "readiness")
    assert {n.node_id: n.public_key for n in admin.nodes()} == known
    assert pids(coordinator)["superexec"] == before["superexec"]
    ended = audited(coordinator, "coordinator.process-ended")
    assert ended == [{"process": "superlink", "code": -9}]

    all_pids = {*before.values(), *pids(coordinator).values()}
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    assert not [pid for pid in all_pids if alive(pid)]
    assert not coordinator.pids.exists()
    assert verify(coordinator.audit) > 5


def test_killed_supervisor_leaves_nothing_and_comes_back(
    running: tuple[Coordinator, subprocess.Popen[str]],
    server: Callable[..., subprocess.Popen[str]],
) -> None:
    coordinator, process = running
    children = pids(coordinator)
    process.kill()
    process.wait(10)
    wait(lambda: not any(alive(pid) for pid in children.values()), "the children's end", 10)
    fresh = server("start")
    try:
        wait(lambda: ready(coordinator), "readiness")
        os.kill(pids(coordinator)["front"], signal.SIGKILL)
        wait(lambda: not ready(coordinator), "the front's end", 10)
        wait(lambda: ready(coordinator), "a new front")
    finally:
        fresh.terminate()
        assert fresh.wait(30) == 0
