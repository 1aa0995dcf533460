"""What the coordinator asks of its SuperLink: register keys, list nodes, state and stop of a run.

Two ways, same answers:

* :class:`HttpAdmin`, Flower's own HTTP client for the Control API: milliseconds, but private;
* :class:`CliAdmin`, the public command ``flwr``: about two seconds a call.  Its list of nodes shows
  no keys, so it remembers which key got which id in ``FLWR_HOME/nodes.json``.

:class:`SwitchingAdmin` takes the first and, when a release of Flower has moved it, says so in the
log and takes the second.  A key that was unregistered can never be registered again
(:class:`KeyBurnt`).  The Control API has no authentication of its own, so it is reached over
loopback only.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cryptography.hazmat.primitives import serialization

from fedalign.compat import (
    KEY_IN_USE,
    QUIET_FLOWER,
    ControlApi,
    ControlRefused,
    ControlUnreachable,
    FlowerMoved,
    NodeInfo,
    RunState,
)
from fedalign.errors import FedalignError
from server.coordinator import Coordinator, write_private
from server.places import STATE

log = logging.getLogger("fedalign.server")
CONNECTION = "coordinator"
CLI_SECONDS = 60.0
Answer = TypeVar("Answer")


class AdminUnavailable(FedalignError):
    """The SuperLink cannot be asked now."""


class AdminRefused(FedalignError):
    """The SuperLink refused what was asked."""


class KeyBurnt(FedalignError):
    """The key was registered once and unregistered; Flower never takes it again."""


@dataclass(frozen=True)
class NodeEntry:
    """One node of the SuperLink; ``status``: registered, online, offline or unregistered.

    ``public_key`` is in Flower's form, and empty where the command line was asked.  ``last_seen``
    is in seconds since 1970, None while online or never online.
    """

    node_id: int
    name: str
    status: str
    public_key: bytes
    last_seen: float | None = None


class SuperLinkAdmin(Protocol):
    """What enrollment and revocation need."""

    def register(self, public_key: bytes, name: str) -> int:
        """Register a key in Flower's form; for a key it has, return the id that it has.

        Raises ``KeyBurnt``, ``AdminRefused`` or ``AdminUnavailable``.
        """

    def unregister(self, node_id: int) -> None:
        """Unregister a node for ever; nothing happens for one that is unregistered already."""

    def nodes(self) -> list[NodeEntry]:
        """Return all nodes, also unregistered ones."""


class RunAdmin(SuperLinkAdmin, Protocol):
    """What submitting a run needs besides."""

    def run_state(self, run_id: int) -> RunState | None:
        """Return the state of a run; None for one that the SuperLink does not know."""

    def stop_run(self, run_id: int) -> bool:
        """Ask for a run to be stopped; False when it was over already."""


class HttpAdmin:
    """Talks to the SuperLink at ``address`` over TLS, trusting the CA certificate ``ca`` (PEM).

    A connection for each call, so threads and forks need no care.  Raises ``FlowerMoved`` where
    Flower's private client is gone.
    """

    def __init__(self, address: str, ca: bytes) -> None:
        self._address = address
        self._ca = ca
        ControlApi(address, ca).close()

    def register(self, public_key: bytes, name: str) -> int:
        """See :class:`SuperLinkAdmin`."""

        def work(api: ControlApi) -> int:
            try:
                return api.register_node(public_key, name)
            except ControlRefused as error:
                if error.code != KEY_IN_USE:
                    raise
                for node in api.list_nodes():
                    if node.public_key == public_key and node.status != "unregistered":
                        return int(node.node_id)
                raise KeyBurnt(
                    f"the key of '{name}' was unregistered once, and Flower never takes a key "
                    "twice. The site must join with a new key."
                ) from error

        return self._ask(work)

    def unregister(self, node_id: int) -> None:
        """See :class:`SuperLinkAdmin`."""

        def work(api: ControlApi) -> None:
            known = {int(n.node_id): n.status for n in api.list_nodes()}
            if known.get(node_id, "unregistered") != "unregistered":
                api.unregister_node(node_id)

        self._ask(work)

    def nodes(self) -> list[NodeEntry]:
        """See :class:`SuperLinkAdmin`."""
        return self._ask(lambda api: [_entry(node) for node in api.list_nodes()])

    def run_state(self, run_id: int) -> RunState | None:
        """See :class:`RunAdmin`."""
        return self._ask(lambda api: api.run_state(run_id))

    def stop_run(self, run_id: int) -> bool:
        """See :class:`RunAdmin`."""
        return self._ask(lambda api: api.stop_run(run_id))

    def _ask(self, work: Callable[[ControlApi], Answer]) -> Answer:
        api = ControlApi(self._address, self._ca)
        try:
            return work(api)
        except ControlUnreachable as error:
            raise _unavailable(self._address, str(error)) from error
        except ControlRefused as error:
            raise AdminRefused(f"the SuperLink refused: {error} [{error.code}]") from error
        finally:
            api.close()


class CliAdmin:
    """The same through the public command ``flwr``, with ``FLWR_HOME`` in the state folder."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._address = coordinator.superlink_address
        self._home = coordinator.flower_home
        self._known = coordinator.flower_home / "nodes.json"
        self._environment = flower_environment(coordinator)
        write_connection(coordinator)

    def register(self, public_key: bytes, name: str) -> int:
        """See :class:`SuperLinkAdmin`; an id that this command did not itself get is not known."""
        digest = hashlib.sha256(public_key).hexdigest()
        known = self._ids().get(digest)
        if known is not None:
            if any(n.node_id == known and n.status != "unregistered" for n in self.nodes()):
                return known
            raise KeyBurnt(f"the key of '{name}' was unregistered. Join with a new key.")
        with tempfile.TemporaryDirectory(dir=self._home) as folder:
            path = Path(folder) / "key.pub"
            key = serialization.load_pem_public_key(public_key)
            openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            path.write_bytes(key.public_bytes(*openssh))
            words = ("supernode", "register", str(path), CONNECTION, "--name", name)
            try:
                node_id = int(self._run(*words)["node-id"])
            except AdminRefused as error:
                if f"code: {KEY_IN_USE}" in str(error):
                    raise KeyBurnt(
                        f"Flower was given the key of '{name}' before, and its command line does "
                        "not tell for which node. The site must join with a new key."
                    ) from error
                raise
        table = self._ids() | {digest: node_id}
        write_private(self._known, json.dumps(table, sort_keys=True).encode())
        return node_id

    def unregister(self, node_id: int) -> None:
        """See :class:`SuperLinkAdmin`."""
        known = {n.node_id: n.status for n in self.nodes()}
        if known.get(node_id, "unregistered") != "unregistered":
            self._run("supernode", "unregister", str(node_id), CONNECTION)

    def nodes(self) -> list[NodeEntry]:
        """See :class:`SuperLinkAdmin`; names and keys are empty, the list does not show them."""
        rows = self._run("supernode", "list", CONNECTION, "--verbose")["nodes"]
        return [NodeEntry(int(r["node-id"]), "", str(r["status"]), b"") for r in rows]

    def run_state(self, run_id: int) -> RunState | None:
        """See :class:`RunAdmin`."""
        try:
            rows = self._run("list", CONNECTION, "--run-id", str(run_id))["runs"]
        except AdminRefused:
            return None
        return RunState(str(rows[0]["status"]), str(rows[0]["status-details"])) if rows else None

    def stop_run(self, run_id: int) -> bool:
        """See :class:`RunAdmin`."""
        try:
            return bool(self._run("stop", str(run_id), CONNECTION)["success"])
        except AdminRefused:
            return False

    def _ids(self) -> dict[str, int]:
        try:
            return dict(json.loads(self._known.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def _run(self, *words: str) -> dict[str, Any]:
        answer = flwr(self._environment, *words, "--format", "json")
        if answer.get("success"):
            return answer
        text = str(answer.get("error-message", "no answer"))
        if any(word in text.lower() for word in ("connect", "unavailable", "timed out", "refused")):
            raise _unavailable(self._address, text)
        raise AdminRefused(f"flwr {' '.join(words[:2])}: {text}")


class SwitchingAdmin:
    """Asks over HTTP, and from the first call on that Flower's client cannot make, the command."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._admin: RunAdmin | None = None

    def register(self, public_key: bytes, name: str) -> int:
        """See :class:`SuperLinkAdmin`."""
        return self._ask(lambda admin: admin.register(public_key, name))

    def unregister(self, node_id: int) -> None:
        """See :class:`SuperLinkAdmin`."""
        self._ask(lambda admin: admin.unregister(node_id))

    def nodes(self) -> list[NodeEntry]:
        """See :class:`SuperLinkAdmin`."""
        return self._ask(lambda admin: admin.nodes())

    def run_state(self, run_id: int) -> RunState | None:
        """See :class:`RunAdmin`."""
        return self._ask(lambda admin: admin.run_state(run_id))

    def stop_run(self, run_id: int) -> bool:
        """See :class:`RunAdmin`."""
        return self._ask(lambda admin: admin.stop_run(run_id))

    def _ask(self, work: Callable[[RunAdmin], Answer]) -> Answer:
        coordinator = self._coordinator
        try:
            if self._admin is None:
                ca = coordinator.root.read_bytes()
                self._admin = HttpAdmin(coordinator.superlink_address, ca)
            return work(self._admin)
        except FlowerMoved as error:
            log.warning("Flower's control client has moved (%s): using the flwr command", error)
            self._admin = CliAdmin(coordinator)
            return work(self._admin)


def connect(coordinator: Coordinator) -> RunAdmin:
    """Return the way to the coordinator's SuperLink; it is not asked anything yet."""
    return SwitchingAdmin(coordinator)


def write_connection(coordinator: Coordinator) -> None:
    """Tell the command ``flwr`` where the SuperLink is and whom to trust."""
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(coordinator.superlink_address)}\n"
        f"root-certificates = {json.dumps(str(coordinator.root), ensure_ascii=False)}\n"
    )
    coordinator.flower_home.mkdir(mode=0o700, exist_ok=True)
    write_private(coordinator.flower_home / "config.toml", text.encode())


def flower_environment(coordinator: Coordinator) -> dict[str, str]:
    """Return the environment of every Flower process and command of this coordinator."""
    programs = str(Path(sys.executable).parent)
    direct = [n for n in os.environ.get("NO_PROXY", "").split(",") if n]
    return {
        **os.environ,
        **QUIET_FLOWER,
        "FLWR_HOME": str(coordinator.flower_home),
        STATE: str(coordinator.state),
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        # A proxy for the internet must not be asked for the SuperLink beside us.
        "NO_PROXY": ",".join(dict.fromkeys([*direct, "127.0.0.1", "localhost"])),
        "no_proxy": ",".join(dict.fromkeys([*direct, "127.0.0.1", "localhost"])),
    }


def flwr(environment: dict[str, str], *words: str, cwd: Path | None = None) -> dict[str, Any]:
    """Run one ``flwr`` command that answers in JSON; return the answer."""
    program = Path(sys.executable).parent / "flwr"
    try:
        done = subprocess.run(
            [str(program), *words],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=CLI_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AdminUnavailable(f"flwr {words[0]}: no answer within {CLI_SECONDS:.0f} s.") from None
    except OSError as error:
        raise AdminUnavailable(f"{program}: {error.strerror}. Install fedalign again.") from None
    start = done.stdout.find("{")
    try:
        return dict(json.JSONDecoder().raw_decode(done.stdout[start:])[0]) if start >= 0 else {}
    except ValueError:
        return {"success": False, "error-message": (done.stderr or done.stdout)[-400:].strip()}


def _entry(node: NodeInfo) -> NodeEntry:
    seen: float | None = None
    if node.status == "offline":
        seen = float(node.online_until)
        if node.last_deactivated_at:
            left = datetime.datetime.fromisoformat(node.last_deactivated_at).timestamp()
            seen = min(seen, left) if seen else left
    return NodeEntry(int(node.node_id), node.name, node.status, node.public_key, seen)


def _unavailable(address: str, why: str) -> AdminUnavailable:
    return AdminUnavailable(
        f"the SuperLink at {address} does not answer ({why}). Is the coordinator running? "
        "fedalign-server start"
    )
