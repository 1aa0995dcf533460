"""``fedalign-server start``: keeps the coordinator's three processes running until told to stop.

================  ==============================================================================
superlink         Flower's SuperLink, on 127.0.0.1 only: TLS, SuperNode keys required, its state in
                  a database file, ServerApps run by another process that knows a secret
superexec         Flower's SuperExec: starts the ServerApp of each run as its own child
front             gateway, enrollment and status page (``server/front.py``)
================  ==============================================================================

Each is started again when it dies.  The ServerApp is a child of the SuperExec, so a SuperLink that
is killed comes back while the run goes on; a SuperExec that dies takes its ServerApp along, and the
run is continued with ``fedalign-server resume``.  SIGTERM or SIGINT stops everything.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from fedalign.audit import AuditLog
from fedalign.errors import ConfigError, FedalignError
from server import ca
from server.coordinator import Coordinator, Service, load, write_private
from server.processes import Child, adopt_orphans, stop_all
from server.superlink_admin import flower_environment, write_connection

log = logging.getLogger("fedalign.server")
READY_SECONDS = 180.0
PORT_SECONDS = 8.0
TICK = 0.2
Say = Callable[[str], None]


class NotReady(FedalignError):
    """The coordinator did not come up; the message holds the end of a log."""


def start(state: Path, say: Say = print) -> None:
    """Run the coordinator in the foreground until SIGTERM or SIGINT.

    Raises ``ConfigError`` when it runs already or a port is taken, ``NotReady`` when a process does
    not come up.
    """
    coordinator = load(state)
    stop = _Stop()
    with _only_one(coordinator), stop.handled():
        _check_certificates(coordinator, say)
        for name, service in coordinator.services.items():
            _wait_for_port(name, service)
        write_connection(coordinator)
        audit = AuditLog(coordinator.audit)
        children = _children(coordinator)
        audit.append("coordinator.start")
        adopt_orphans()
        try:
            for child in children:
                child.start()
            _write_pids(coordinator, children)
            if _wait_until_ready(coordinator, children, stop):
                for line in _welcome(coordinator):
                    say(line)
                _watch(coordinator, children, stop, audit, say)
        finally:
            killed = stop_all(children)
            coordinator.pids.unlink(missing_ok=True)
            audit.append("coordinator.stop", killed=",".join(killed))
        say("stopped")


def _children(coordinator: Coordinator) -> list[Child]:
    environment = flower_environment(coordinator)
    programs = Path(sys.executable).parent
    address = coordinator.superlink_address
    secret = ("--superexec-auth-secret-file", str(coordinator.secret))
    words = {
        "superlink": [
            str(programs / "flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(coordinator.superlink.port)),
            *("--ssl-ca-certfile", str(coordinator.root)),
            *("--ssl-certfile", str(coordinator.server_certificate)),
            *("--ssl-keyfile", str(coordinator.server_key)),
            "--enable-supernode-auth",
            *("--database", str(coordinator.database)),
            *("--isolation", "process", *secret),
            "--disable-runtime-dependency-installation",
        ],
        "superexec": [
            str(programs / "flower-superexec"),
            *("--root-certificates", str(coordinator.root)),
            *("--runtime-api-address", address, *secret),
        ],
        # -P: a folder named like one of our packages in the working directory must not shadow it.
        "front": [sys.executable, "-P", "-m", "server.front", str(coordinator.state)],
    }
    return [
        Child(name, words[name], coordinator.logs / f"{name}.log", environment, coordinator.state)
        for name in words
    ]


class _Stop:
    """Whether a signal asked us to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _only_one(coordinator: Coordinator) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets it go when this process ends in any way."""
    descriptor = os.open(coordinator.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"the coordinator of {coordinator.state} runs already. Look at it: fedalign-server "
                "status; stop it with SIGTERM, then start again."
            ) from None
        yield
    finally:
        os.close(descriptor)


def running(coordinator: Coordinator) -> bool:
    """Say whether a coordinator runs in this folder, on this machine."""
    try:
        descriptor = os.open(coordinator.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _check_certificates(coordinator: Coordinator, say: Say) -> None:
    certificate = coordinator.server_certificate.read_bytes()
    names = {*ca.hosts_of(certificate), *ca.LOOPBACK}
    for section in ("enrollment", "gateway"):
        public = coordinator.services[section].public
        host = ca.host_name(public.rpartition(":")[0])
        if host not in names:
            raise ConfigError(
                f'{section}.public = "{public}" is not in the server certificate (it is for '
                f"{', '.join(sorted(names))}), so no site could connect. Run fedalign-server "
                f"renew-certificate --host {host}"
            )
    days = (ca.valid_until(certificate).timestamp() - time.time()) / 86400
    if days < 0:
        raise ConfigError(
            "the server certificate has expired. Run fedalign-server renew-certificate; sites need "
            "nothing."
        )
    if days < 30:
        say(f"the server certificate expires in {days:.0f} days: fedalign-server renew-certificate")


def _wait_for_port(name: str, service: Service) -> None:
    """Return when a port can be bound; a coordinator that was killed needs a moment to let go."""
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    end = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((service.host, service.port))
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"cannot listen on {service.host}:{service.port} ({error.strerror}). Stop "
                        f"what uses it, or change {name}.port in coordinator.toml."
                    ) from None
        time.sleep(TICK)


def _wait_until_ready(coordinator: Coordinator, children: list[Child], stop: _Stop) -> bool:
    """Return True when all parts answer, False when told to stop before that."""
    from server.status_probe import probe

    end = time.monotonic() + READY_SECONDS
    while not stop.asked:
        for child in children:
            child.look(time.monotonic())
            if child.starts > 3:
                raise NotReady(f"{child.name} does not start. {_tail(child)}")
        _write_pids(coordinator, children)
        answers = probe(coordinator.state)
        if all(answers.values()):
            return True
        if time.monotonic() > end:
            silent = [name for name, good in answers.items() if not good]
            raise NotReady(
                f"no answer from {', '.join(silent)} after {READY_SECONDS:.0f} s. "
                + " ".join(_tail(child) for child in children)
            )
        time.sleep(TICK)
    return False


def _watch(
    coordinator: Coordinator, children: list[Child], stop: _Stop, audit: AuditLog, say: Say
) -> None:
    while not stop.asked:
        for child in children:
            before = child.pid
            code = child.look(time.monotonic())
            if code is not None:
                say(f"{child.name} ended ({code}); it is started again. {_tail(child)}")
                audit.append("coordinator.process-ended", process=child.name, code=code)
            if child.pid != before:
                _write_pids(coordinator, children)
        time.sleep(TICK)


def _welcome(coordinator: Coordinator) -> list[str]:
    enrollment, gateway = coordinator.enrollment, coordinator.gateway
    return [
        f"ready: {coordinator.state}",
        f"  sites join at      {enrollment.public}",
        f"  sites train at     {gateway.public}",
        f"  status page        http://127.0.0.1:{coordinator.status.port}/  (this machine only)",
        f"  logs               {coordinator.logs}",
        f"the firewall must let in TCP {enrollment.port} and {gateway.port}, and nothing else.",
        "invite a site: fedalign-server invite --site NAME --group GROUP",
    ]


def _tail(child: Child, lines: int = 5) -> str:
    try:
        with child.log.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4000))
            last = f.read().decode(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        last = []
    return f"{child.log}:\n" + "\n".join(f"    {line}" for line in last)


def _write_pids(coordinator: Coordinator, children: list[Child]) -> None:
    # A process that is down keeps its last id here, so that status shows that it is gone.
    pids = {child.name: child.last_pid for child in children if child.last_pid is not None}
    text = json.dumps({"supervisor": os.getpid(), **pids}, sort_keys=True)
    if not coordinator.pids.exists() or coordinator.pids.read_text(encoding="utf-8") != text:
        write_private(coordinator.pids, text.encode())
