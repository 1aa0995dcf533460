"""Every private import of Flower, in one place (checked with flwr 1.41 and 1.42).

Flower's public modules (``flwr.app``, ``flwr.clientapp``, ``flwr.serverapp``) are imported where
they are used.  What is here may move in any release: this is the file to look at when it does.

Private interfaces that the coordinator needs:

* the Control API over HTTP (:class:`ControlApi`): register, unregister and list nodes, state and
  stop of a run.  Flower's command line offers the same more slowly and is the fallback
  (``server/superlink_admin.py``), so what moved is :class:`FlowerMoved`, not a crash;
* the headers by which a SuperNode proves its key in every request (:func:`claimed_key`,
  :func:`proven_age`): base64 of the PEM public key, a timestamp, and an ECDSA-SHA256 signature over
  the text of the timestamp.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of every Flower process we start: no telemetry, no update check, no installs.

The last one lets Ray's actors see the GPU that the process itself would take; else ``model.device =
"auto"`` would mean another device in this runner than in the others.
"""

FLEET_PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)
"""What a registered SuperNode calls.  ``register-node`` and ``unregister-node`` are left out: with
key authentication only the coordinator registers."""

ACTIVATE_PATH = "/v1/fleet/activate-node"
ACTIVATION_FAILED = 2004
KEY_IN_USE = 23
KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"
MAX_AGE, MAX_AHEAD = 305.0, 5.0
"""Seconds: how old a signed timestamp may be, and how far in the future (Flower's own values)."""

LINK_ERRORS = (ObjectPushError, httpx.HTTPError)
"""What the grid of a deployment raises when the SuperLink broke off in the middle of a call."""


class FlowerMoved(Exception):
    """A private part of Flower is not where, or not what, it was in the releases we know."""


class ControlRefused(Exception):
    """The SuperLink refused a Control call; ``code`` is Flower's (0 where it gave none)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class ControlUnreachable(Exception):
    """The SuperLink does not answer, or its certificate is not the coordinator's."""


def quiet_flower() -> None:
    """Set :data:`QUIET_FLOWER` where the user has not decided otherwise."""
    for key, value in QUIET_FLOWER.items():
        os.environ.setdefault(key, value)


def become_flower_process(run_id: int = 1, node_id: int = 1, task_id: int = 1) -> None:
    """Give this process the identity without which ``flwr.app.Message`` cannot be made (1.38+)."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = task_id


def node_info(node_id: int, name: str) -> NodeInfo:
    """Return what ``Grid.get_nodes()`` lists for one online node."""
    return NodeInfo(node_id=node_id, name=name, status="online")


@dataclass(frozen=True)
class RunState:
    """State of a run: ``status`` as ``flwr list`` says it, e.g. ``finished:failed``."""

    status: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run is over, however it ended."""
        return self.status.startswith("finished")


class ControlApi:
    """The Control API of a SuperLink at ``address`` (``host:port``), trusted by the CA in PEM.

    Raises ``FlowerMoved`` when the client or a message is not as expected, ``ControlRefused`` and
    ``ControlUnreachable`` for calls.  Use it as a context manager, or :meth:`close` it.
    """

    def __init__(self, address: str, ca: bytes) -> None:
        self._messages = _private("flwr.proto.control_pb2")
        client = _attribute(_private("flwr.supercore.control"), "ControlHttpClient")
        try:
            self._client: Any = client.from_server_address(
                server_address=address, insecure=False, root_certificates=ca, interceptors=()
            )
        except (AttributeError, TypeError) as error:
            raise FlowerMoved(f"ControlHttpClient: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def register_node(self, public_key: bytes, name: str) -> int:
        """Register a key in Flower's form; return the node id.  Code 23: the key was given."""
        return int(self._call("RegisterNode", "node_id", public_key=public_key, name=name))

    def unregister_node(self, node_id: int) -> None:
        """Unregister a node for ever; its key can never be registered again."""
        self._call("UnregisterNode", "", node_id=node_id)

    def list_nodes(self) -> list[NodeInfo]:
        """Return all nodes, also unregistered ones."""
        return list(self._call("ListNodes", "nodes_info"))

    def run_state(self, run_id: int) -> RunState | None:
        """Return the state of a run; None for one that the SuperLink does not know."""
        try:
            run = dict(self._call("ListRuns", "run_dict", run_id=run_id)).get(run_id)
        except ControlRefused:
            return None
        if run is None:
            return None
        parts = [part for part in (run.status.status, run.status.sub_status) if part]
        return RunState(":".join(parts), str(run.status.details))

    def stop_run(self, run_id: int) -> bool:
        """Ask for a run to be stopped; False when it was over already."""
        try:
            return bool(self._call("StopRun", "success", run_id=run_id))
        except ControlRefused:
            return False

    def _call(self, method: str, field: str, **values: Any) -> Any:
        """Call one method and return one field of the answer (all of it for no field)."""
        try:
            answer = getattr(self._client, method)(
                getattr(self._messages, f"{method}Request")(**values)
            )
            return getattr(answer, field) if field else answer
        except httpx.HTTPStatusError as error:
            code, text = _refusal(error.response)
            if error.response.status_code in (502, 503, 504):
                raise ControlUnreachable(text) from error
            raise ControlRefused(code, text) from error
        except (httpx.HTTPError, OSError) as error:
            raise ControlUnreachable(str(error) or type(error).__name__) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise FlowerMoved(f"{method}: {error}") from error


def claimed_key(headers: Mapping[str, str]) -> bytes | None:
    """Return the public key that a fleet request claims, in Flower's form; None without one."""
    try:
        return base64.b64decode(headers[KEY_HEADER], validate=True)
    except (KeyError, binascii.Error, ValueError):
        return None


def proven_age(
    headers: Mapping[str, str], public_key: bytes, now: datetime.datetime
) -> float | None:
    """Return how many seconds ago ``public_key`` signed a fleet request, by the signer's clock.

    Negative: in the future of ``now`` (aware).  None: this key did not sign it.  What is signed is
    the time alone, so this proves who speaks, not what is said: TLS alone protects the body.
    """
    try:
        stamp = headers[TIME_HEADER]
        age = (now - datetime.datetime.fromisoformat(stamp)).total_seconds()
        signature = base64.b64decode(headers[SIGNATURE_HEADER], validate=True)
        key = serialization.load_pem_public_key(public_key)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return None
        key.verify(signature, stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (KeyError, TypeError, ValueError, binascii.Error, InvalidSignature):
        return None
    return age


def key_headers(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> dict[str, str]:
    """Return the headers by which a SuperNode with this key signs a request at ``now`` (aware)."""
    stamp = now.isoformat()
    signature = key.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    return {
        KEY_HEADER: base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIME_HEADER: stamp,
        SIGNATURE_HEADER: base64.b64encode(signature).decode(),
    }


def _refusal(response: httpx.Response) -> tuple[int, str]:
    """Return Flower's code and public text of an error response."""
    try:
        body = response.json()
        return int(body["code"]), str(body["detail"])
    except (ValueError, KeyError, TypeError):
        return 0, f"HTTP status {response.status_code}"


def _private(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FlowerMoved(f"module {name}: {error}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise FlowerMoved(str(error)) from error


__all__ = [
    "ACTIVATE_PATH",
    "ACTIVATION_FAILED",
    "FLEET_PATHS",
    "KEY_HEADER",
    "KEY_IN_USE",
    "LINK_ERRORS",
    "QUIET_FLOWER",
    "SIGNATURE_HEADER",
    "TIME_HEADER",
    "ControlApi",
    "ControlRefused",
    "ControlUnreachable",
    "FlowerMoved",
    "NodeInfo",
    "RunState",
    "become_flower_process",
    "claimed_key",
    "key_headers",
    "node_info",
    "proven_age",
    "public_key_to_bytes",
    "quiet_flower",
]
