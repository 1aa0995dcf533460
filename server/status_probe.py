"""Does the coordinator answer?  What ``/ready`` asks: a connection to each part that sites need.

Enrollment and gateway must complete a TLS handshake under the coordinator's own CA, so a
certificate that ended is "not ready".  SuperLink must accept a connection; the SuperExec listens on
nothing, so its process must be alive.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from server.coordinator import load
from server.status_host import read_processes

PARTS = ("superlink", "superexec", "gateway", "enrollment")
SECONDS = 2.0
"""Longest wait for one part."""
ANY = ("", "0.0.0.0", "::")


def probe(state: Path) -> Mapping[str, bool]:
    """Return each part of ``PARTS`` and whether it answers now.

    Raises ``ConfigError`` when the folder's settings cannot be read.
    """
    coordinator = load(state)
    alive = {p.name for p in read_processes(state) if p.alive}
    enrollment, gateway = coordinator.enrollment, coordinator.gateway
    return {
        "superlink": _accepts("127.0.0.1", coordinator.superlink.port),
        "superexec": "superexec" in alive,
        "gateway": _greets(_host(gateway.host), gateway.port, coordinator.root),
        "enrollment": _greets(_host(enrollment.host), enrollment.port, coordinator.root),
    }


def _host(host: str) -> str:
    """Return where to knock: a part that listens everywhere is asked on this host."""
    return "127.0.0.1" if host in ANY else host


def _accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=SECONDS):
            return True
    except OSError:
        return False


def _greets(host: str, port: int, ca: Path) -> bool:
    """Say whether a TLS handshake for ``localhost`` succeeds; every server certificate has it."""
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            socket.create_connection((host, port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    except OSError:  # ssl.SSLError is one
        return False
