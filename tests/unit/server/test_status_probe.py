"""Readiness against real sockets: a part counts only when it answers as itself."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server import status_probe
from server.coordinator import Coordinator, Service, init, renew_certificate
from server.status_probe import PARTS, probe


@contextlib.contextmanager
def listening(chain: Path | None = None, key: Path | None = None) -> Iterator[int]:
    """Accept connections on a free port, with TLS where a certificate is given."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    stop = threading.Event()
    context = None
    if chain is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, key)

    def work() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(2)
                    if context is not None:
                        context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        stop.set()
        thread.join(5)
        server.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    made = init(tmp_path / "state", ["localhost"])
    (made.state / "pids.json").write_text(json.dumps({"superexec": os.getpid()}))
    return made


def answers(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, **ports: int
) -> dict[str, bool]:
    """What the probe says when the parts are expected at these ports."""
    services = {name: Service("0.0.0.0", port) for name, port in ports.items()}
    monkeypatch.setattr(status_probe, "load", lambda _: replace(coordinator, **services))
    return dict(probe(coordinator.state))


def closed() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def test_every_part_answers(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = (coordinator.chain, coordinator.server_key)
    with listening() as superlink, listening(*tls) as gateway, listening(*tls) as enrollment:
        ports = {"superlink": superlink, "gateway": gateway, "enrollment": enrollment}
        assert answers(coordinator, monkeypatch, **ports) == dict.fromkeys(PARTS, True)
        for name in ports:
            found = answers(coordinator, monkeypatch, **{**ports, name: closed()})
            assert found == {p: p != name for p in PARTS}
        (coordinator.state / "pids.json").unlink()
        found = answers(coordinator, monkeypatch, **ports)
        assert found == {p: p != "superexec" for p in PARTS}


def test_a_stranger_on_the_port_is_no_answer(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = init(tmp_path / "other", ["localhost"])
    with listening() as plain, listening(other.chain, other.server_key) as stranger:
        found = answers(
            coordinator, monkeypatch, superlink=plain, gateway=stranger, enrollment=plain
        )
    assert found == {"superlink": True, "superexec": True, "gateway": False, "enrollment": False}


def test_a_renewed_certificate_answers(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew_certificate(coordinator, ["coordinator.example"])
    with listening(coordinator.chain, coordinator.server_key) as port:
        found = answers(coordinator, monkeypatch, superlink=port, gateway=port, enrollment=port)
    assert found == dict.fromkeys(PARTS, True)
