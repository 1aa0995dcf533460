"""Two ways to ask the SuperLink, with the same answers; the second only when it is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.compat import (
    KEY_IN_USE,
    ControlApi,
    ControlRefused,
    ControlUnreachable,
    FlowerMoved,
    NodeInfo,
    RunState,
    public_key_to_bytes,
)
from server import superlink_admin
from server.coordinator import Coordinator, init
from server.superlink_admin import (
    AdminRefused,
    AdminUnavailable,
    CliAdmin,
    HttpAdmin,
    KeyBurnt,
    RunAdmin,
    connect,
    flower_environment,
    write_connection,
)


def key() -> bytes:
    return public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())


class SuperLink:
    """A SuperLink's nodes and runs, behind both of its faces."""

    def __init__(self) -> None:
        self.nodes: list[NodeInfo] = []
        self.runs = {7: RunState("running", "")}
        self.down = False
        self.calls: list[str] = []

    def register(self, public_key: bytes, name: str) -> int:
        if any(n.public_key == public_key for n in self.nodes):
            raise ControlRefused(KEY_IN_USE, "Public key already in use.")
        node_id = 2**63 + len(self.nodes)
        self.nodes.append(
            NodeInfo(node_id=node_id, name=name, status="registered", public_key=public_key)
        )
        return node_id

    def unregister(self, node_id: int) -> None:
        (node,) = [n for n in self.nodes if n.node_id == node_id]
        if node.status == "unregistered":
            raise ControlRefused(28, "Node not found or you are not its owner.")
        node.status = "unregistered"

    def api(self, address: str, ca: bytes) -> FakeApi:
        return FakeApi(self)

    def flwr(self, environment: dict[str, str], *words: str, cwd: Path | None = None) -> Any:
        self.calls.append(" ".join(words[:2]))
        if self.down:
            return {"success": False, "error-message": "Connection refused"}
        try:
            return {"success": True} | self._command(words)
        except ControlRefused as error:
            return {"success": False, "error-message": f"\n[code: {error.code}] {error}"}

    def _command(self, words: tuple[str, ...]) -> dict[str, Any]:
        match words:
            case ("supernode", "register", path, "coordinator", "--name", name, *_):
                openssh = Path(path).read_bytes()
                from cryptography.hazmat.primitives.serialization import load_ssh_public_key

                public = load_ssh_public_key(openssh)
                assert isinstance(public, ec.EllipticCurvePublicKey)
                return {"node-id": self.register(public_key_to_bytes(public), name)}
            case ("supernode", "unregister", node_id, *_):
                self.unregister(int(node_id))
                return {}
            case ("supernode", "list", *_):
                rows = [{"node-id": str(n.node_id), "status": n.status} for n in self.nodes]
                return {"nodes": rows}
            case ("list", "coordinator", "--run-id", run_id, *_):
                state = self.runs.get(int(run_id))
                if state is None:
                    raise ControlRefused(16, "Run ID not found.")
                return {"runs": [{"status": state.status, "status-details": state.details}]}
            case ("stop", run_id, *_):
                return {"success": int(run_id) in self.runs}
        raise AssertionError(words)


class FakeApi:
    def __init__(self, superlink: SuperLink) -> None:
        self._link = superlink

    def _up(self) -> SuperLink:
        if self._link.down:
            raise ControlUnreachable("Connection refused")
        return self._link

    def close(self) -> None: ...

    def register_node(self, public_key: bytes, name: str) -> int:
        return self._up().register(public_key, name)

    def unregister_node(self, node_id: int) -> None:
        self._up().unregister(node_id)

    def list_nodes(self) -> list[NodeInfo]:
        return self._up().nodes

    def run_state(self, run_id: int) -> RunState | None:
        return self._up().runs.get(run_id)

    def stop_run(self, run_id: int) -> bool:
        return run_id in self._up().runs


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    found = SuperLink()
    monkeypatch.setattr(superlink_admin, "ControlApi", found.api)
    monkeypatch.setattr(superlink_admin, "flwr", found.flwr)
    return found


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return init(tmp_path / "c", ["localhost"], 23000)


@pytest.fixture(params=["http", "cli"])
def admin(
    request: pytest.FixtureRequest, superlink: SuperLink, coordinator: Coordinator
) -> RunAdmin:
    if request.param == "http":
        return HttpAdmin(coordinator.superlink_address, coordinator.root.read_bytes())
    return CliAdmin(coordinator)


def test_a_key_is_registered_once(admin: RunAdmin) -> None:
    first, second = key(), key()
    node = admin.register(first, "a@north")
    assert admin.register(first, "a@north") == node
    assert admin.register(second, "b@south") != node
    assert [n.status for n in admin.nodes()] == ["registered", "registered"]


def test_unregistering_twice_is_once_and_burns_the_key(admin: RunAdmin) -> None:
    public_key = key()
    node = admin.register(public_key, "a@north")
    admin.unregister(node)
    admin.unregister(node)
    admin.unregister(12345)
    assert [n.status for n in admin.nodes()] == ["unregistered"]
    with pytest.raises(KeyBurnt, match="new key"):
        admin.register(public_key, "a@north")


def test_runs_have_a_state_and_stop(admin: RunAdmin) -> None:
    state = admin.run_state(7)
    assert state is not None
    assert (state.status, state.finished) == ("running", False)
    assert admin.run_state(8) is None
    assert (admin.stop_run(7), admin.stop_run(8)) == (True, False)


def test_without_a_superlink_every_call_says_so(admin: RunAdmin, superlink: SuperLink) -> None:
    superlink.down = True
    calls: list[Callable[[], object]] = [
        lambda: admin.register(key(), "a@north"),
        lambda: admin.unregister(1),
        admin.nodes,
        lambda: admin.run_state(7),
    ]
    for call in calls:
        with pytest.raises(AdminUnavailable, match="fedalign-server start"):
            call()


def test_a_key_that_only_flower_knows_is_burnt_for_the_command(
    superlink: SuperLink, coordinator: Coordinator
) -> None:
    public_key = key()
    superlink.register(public_key, "a@north")
    with pytest.raises(KeyBurnt, match="does not tell"):
        CliAdmin(coordinator).register(public_key, "a@north")
    known = HttpAdmin("127.0.0.1:1", coordinator.root.read_bytes())
    assert known.register(public_key, "a@north") == superlink.nodes[0].node_id


def test_when_the_client_moved_the_command_is_used_and_it_is_said(
    coordinator: Coordinator,
    superlink: SuperLink,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def gone(address: str, ca: bytes) -> FakeApi:
        raise FlowerMoved("module flwr.supercore.control: no such module")

    monkeypatch.setattr(superlink_admin, "ControlApi", gone)
    admin = connect(coordinator)
    with caplog.at_level(logging.WARNING):
        assert admin.nodes() == []
    assert "flwr.supercore.control" in caplog.text
    assert superlink.calls == ["supernode list"]


def test_a_call_that_changed_its_shape_also_falls_back(
    coordinator: Coordinator, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(self: FakeApi) -> list[NodeInfo]:
        raise FlowerMoved("ListNodes: nodes_info")

    monkeypatch.setattr(FakeApi, "list_nodes", moved)
    admin = connect(coordinator)
    admin.register(key(), "a@north")
    assert superlink.calls == []
    assert len(admin.nodes()) == 1
    assert superlink.calls == ["supernode list"]


def test_compat_says_what_moved(monkeypatch: pytest.MonkeyPatch, coordinator: Coordinator) -> None:
    ca = coordinator.root.read_bytes()
    api = ControlApi("127.0.0.1:1", ca)
    with pytest.raises(ControlUnreachable):
        api.list_nodes()
    monkeypatch.delattr("flwr.supercore.control.ControlHttpClient.ListNodes")
    with pytest.raises(FlowerMoved, match="ListNodes"):
        api.list_nodes()
    monkeypatch.delattr("flwr.proto.control_pb2.RegisterNodeRequest")
    with pytest.raises(FlowerMoved, match="RegisterNode"):
        api.register_node(b"", "x")
    api.close()
    monkeypatch.delattr("flwr.supercore.control.ControlHttpClient")
    with pytest.raises(FlowerMoved, match="ControlHttpClient"):
        ControlApi("127.0.0.1:1", ca)


def test_refusals_keep_flower_s_words(
    superlink: SuperLink, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeApi, public_key: bytes, name: str) -> int:
        raise ControlRefused(22, "The provided public key is not valid.")

    monkeypatch.setattr(FakeApi, "register_node", refuse)
    with pytest.raises(AdminRefused, match=r"not valid.*22"):
        connect(coordinator).register(b"x", "a@north")


def test_the_command_is_told_where_and_whom_to_trust(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomllib

    write_connection(coordinator)
    found = tomllib.loads((coordinator.flower_home / "config.toml").read_text())["superlink"]
    assert found["default"] == "coordinator"
    assert found["coordinator"] == {
        "address": "127.0.0.1:23002",
        "root-certificates": str(coordinator.root),
    }
    monkeypatch.setenv("NO_PROXY", "example.org")
    environment = flower_environment(coordinator)
    assert environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == str(coordinator.flower_home)


def test_what_the_command_remembers_is_private(
    superlink: SuperLink, coordinator: Coordinator
) -> None:
    CliAdmin(coordinator).register(key(), "a@north")
    path = coordinator.flower_home / "nodes.json"
    assert path.stat().st_mode & 0o077 == 0
    assert list(json.loads(path.read_text()).values()) == [2**63]
