"""The coordinator's state folder: what is in it, making it, reading its settings.

``init`` makes the whole folder under another name and renames it, so there is never half of one.
Everything in it belongs to the operator alone (0700; keys and secrets 0600).  Settings are in
``coordinator.toml``: where each server listens and under which name sites reach it.
"""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalign.errors import ConfigError
from fedalign.runfolder import data_directory
from server import ca

BASE_PORT = 9443
_SETTINGS = """\
# Settings of a fedalign coordinator.  Restart it after a change: fedalign-server start.
#
# host and port are where a server listens on this machine; public is the address that sites use
# (a name or IP address with a port), which differs behind a router or a proxy.  The name must be
# in the server certificate: fedalign-server renew-certificate --host NAME[,NAME...]

# Joining.  Sites reach it once, with their invite.  Open this port in the firewall.
[enrollment]
host = "0.0.0.0"
port = {enrollment}
public = "{name}:{enrollment}"

# Training.  Sites stay connected to it.  Open this port in the firewall.
[gateway]
host = "0.0.0.0"
port = {gateway}
public = "{name}:{gateway}"

# Flower's SuperLink.  It has no authentication of its own: it listens on 127.0.0.1 only.
[superlink]
port = {superlink}

# Status page and health checks, on 127.0.0.1 only.
[status]
port = {status}
"""
_KEYS: dict[str, dict[str, type]] = {
    "enrollment": {"host": str, "port": int, "public": str},
    "gateway": {"host": str, "port": int, "public": str},
    "superlink": {"port": int},
    "status": {"port": int},
}


class NotInitialised(ConfigError):
    """There is no coordinator in the folder.  Exit code 2."""


@dataclass(frozen=True)
class Service:
    """Where a server listens, and the ``name:port`` by which sites reach it (empty: not)."""

    host: str
    port: int
    public: str = ""


@dataclass(frozen=True)
class Coordinator:
    """A state folder and its settings."""

    state: Path
    enrollment: Service
    gateway: Service
    superlink: Service
    status: Service

    @property
    def services(self) -> dict[str, Service]:
        """The four servers by the name of their section."""
        return {name: getattr(self, name) for name in _KEYS}

    @property
    def superlink_address(self) -> str:
        """Where this machine reaches the SuperLink."""
        return f"127.0.0.1:{self.superlink.port}"

    @property
    def root_key(self) -> Path:
        """Private key of the certificate authority."""
        return self.state / "ca" / "ca.key"

    @property
    def root(self) -> Path:
        """Certificate of the authority: what every site trusts."""
        return self.state / "ca" / "ca.crt"

    @property
    def server_key(self) -> Path:
        """Private key of the servers."""
        return self.state / "tls" / "server.key"

    @property
    def server_certificate(self) -> Path:
        """Certificate of the servers."""
        return self.state / "tls" / "server.crt"

    @property
    def chain(self) -> Path:
        """Certificate of the servers, then that of the authority."""
        return self.state / "tls" / "chain.crt"

    @property
    def registry(self) -> Path:
        """Sites, keys and invites."""
        return self.state / "registry.sqlite"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.state / "audit.jsonl"

    @property
    def database(self) -> Path:
        """Flower's own state: nodes, runs, messages."""
        return self.state / "superlink" / "state.db"

    @property
    def secret(self) -> Path:
        """What only the SuperExec of this coordinator knows."""
        return self.state / "superlink" / "superexec.secret"

    @property
    def flower_home(self) -> Path:
        """``FLWR_HOME`` of every Flower process of this coordinator."""
        return self.state / "flwr"

    @property
    def runs(self) -> Path:
        """Run folders."""
        return self.state / "runs"

    @property
    def apps(self) -> Path:
        """App folders, one a run, and what was submitted."""
        return self.state / "apps"

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.state / "logs"

    @property
    def pids(self) -> Path:
        """Process ids of a coordinator that runs."""
        return self.state / "pids.json"

    @property
    def lock(self) -> Path:
        """Locked by the coordinator that runs."""
        return self.state / "start.lock"


def default_state() -> Path:
    """Return the state folder where none is named."""
    return data_directory() / "coordinator"


def init(state: Path, hosts: Sequence[str], base_port: int = BASE_PORT) -> Coordinator:
    """Make a state folder; ``hosts`` are the names or addresses by which sites reach this machine.

    The four servers get ``base_port`` and the three ports after it; sites are told the first host.
    Raises ``ConfigError`` when the folder exists or a host is none.
    """
    from fedalign.audit import AuditLog
    from server.registry import Registry

    names = [ca.host_name(host) for host in hosts]
    if not names:
        raise ConfigError("no host given. Write --host NAME, the name by which sites reach you.")
    if not 1024 <= base_port <= 65532:
        raise ConfigError(f"port {base_port}: choose one in 1024 to 65532; four are used.")
    state = state.expanduser().resolve()
    if state.exists():
        raise ConfigError(
            f"{state} exists already. Choose another folder (--state), or keep this coordinator; "
            "a new certificate alone: fedalign-server renew-certificate."
        )
    state.parent.mkdir(parents=True, exist_ok=True)
    draft = state.with_name(f".{state.name}.{secrets.token_hex(4)}")
    draft.mkdir(mode=0o700)
    try:
        _fill(draft, names, base_port)
        with Registry(draft / "registry.sqlite"):
            pass
        AuditLog(draft / "audit.jsonl").append("coordinator.init", hosts=",".join(names))
        os.rename(draft, state)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return load(state)


def _fill(folder: Path, names: Sequence[str], base_port: int) -> None:
    for name in ("ca", "tls", "superlink", "flwr", "runs", "apps", "logs"):
        (folder / name).mkdir(mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    root = ca.make_root(now)
    write_private(folder / "ca" / "ca.key", root.key)
    write_private(folder / "ca" / "ca.crt", root.certificate, mode=0o644)
    _write_leaf(folder, ca.issue_leaf(root, names, now), root)
    write_private(folder / "superlink" / "superexec.secret", secrets.token_bytes(32))
    public = f"[{names[0]}]" if ":" in names[0] else names[0]
    ports = {name: base_port + i for i, name in enumerate(_KEYS)}
    write_private(folder / "coordinator.toml", _SETTINGS.format(name=public, **ports).encode())


def renew_certificate(coordinator: Coordinator, hosts: Sequence[str] = ()) -> list[str]:
    """Issue a new server certificate under the same authority; return the names it is for.

    Without ``hosts`` it is for those of the old one.  The running servers keep the old one until
    they are started again; sites need nothing.
    """
    from fedalign.audit import AuditLog

    try:
        root = ca.Issued(coordinator.root_key.read_bytes(), coordinator.root.read_bytes())
        names = [ca.host_name(h) for h in hosts] or ca.hosts_of(
            coordinator.server_certificate.read_bytes()
        )
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read. Restore it from a copy.") from None
    leaf = ca.issue_leaf(root, names, datetime.datetime.now(datetime.UTC))
    _write_leaf(coordinator.state, leaf, root)
    AuditLog(coordinator.audit).append("coordinator.certificate-renewed", hosts=",".join(names))
    return names


def _write_leaf(state: Path, leaf: ca.Issued, root: ca.Issued) -> None:
    write_private(state / "tls" / "server.key", leaf.key)
    write_private(state / "tls" / "server.crt", leaf.certificate, mode=0o644)
    write_private(state / "tls" / "chain.crt", leaf.certificate + root.certificate, mode=0o644)


def load(state: Path) -> Coordinator:
    """Return the coordinator of a folder.

    Raises ``NotInitialised`` where there is none, ``ConfigError`` for settings that cannot be.
    """
    state = state.expanduser().resolve()
    path = state / "coordinator.toml"
    try:
        with path.open("rb") as f:
            found = tomllib.load(f)
    except FileNotFoundError:
        raise NotInitialised(
            f"{state} holds no coordinator. Make one: fedalign-server init --host NAME; or name "
            "its folder with --state, or in FEDALIGN_STATE."
        ) from None
    except PermissionError:
        raise ConfigError(f"{path} belongs to another user. Run this as that user.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    values = {section: _section(path, found, section) for section in _KEYS}
    for section in found:
        if section not in _KEYS:
            raise ConfigError(f"{path}: unknown section [{section}]; known: {', '.join(_KEYS)}.")
    services = {
        section: Service(v.get("host", "127.0.0.1"), v["port"], v.get("public", ""))
        for section, v in values.items()
    }
    ports = [service.port for service in services.values()]
    if len(set(ports)) < len(ports):
        raise ConfigError(f"{path}: two servers have the same port ({ports}).")
    return Coordinator(state, **services)


def _section(path: Path, found: Mapping[str, Any], section: str) -> dict[str, Any]:
    given = found.get(section)
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: section [{section}] is missing.")
    for key, value in given.items():
        kind = _KEYS[section].get(key)
        if kind is None:
            raise ConfigError(
                f"{path}: unknown key {section}.{key}; known: {', '.join(_KEYS[section])}."
            )
        if type(value) is not kind:
            raise ConfigError(f"{path}: {section}.{key} = {value!r} must be a {kind.__name__}.")
    for key in _KEYS[section]:
        if key not in given:
            raise ConfigError(f"{path}: {section}.{key} is missing.")
    if not 1 <= given["port"] <= 65535:
        raise ConfigError(f"{path}: {section}.port = {given['port']} is not in 1 to 65535.")
    if "public" in given and not given["public"].rpartition(":")[2].isdigit():
        raise ConfigError(
            f'{path}: {section}.public = "{given["public"]}" must be name:port, as sites use it.'
        )
    return dict(given)


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file at once (temporary name, then rename), readable as ``mode`` says from birth."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
