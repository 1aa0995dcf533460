"""Bytes that no HTTP library would send: refused, in the audit log, and the gateway goes on."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedalign.compat import FLEET_PATHS, KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER, key_headers
from server import connections
from server.connections import GuardedProtocol

_spec = importlib.util.spec_from_file_location(
    "gateway_setup", Path(__file__).with_name("test_gateway.py")
)
assert _spec is not None
assert _spec.loader is not None
base = sys.modules["gateway_setup"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(base)

PULL = base.PULL
START = "POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\n\r\n"


class Raw:
    """A gateway and a SuperLink's stand-in on real connections."""

    def __init__(self) -> None:
        self.setup = base.Setup()
        self.servers: list[tuple[uvicorn.Server, threading.Thread]] = []
        self.setup.gateway._client = httpx.AsyncClient()
        upstream = self._serve(self.setup.upstream.app, uvicorn.protocols.http.h11_impl.H11Protocol)
        self.setup.gateway._upstream = f"http://127.0.0.1:{upstream}"
        GuardedProtocol.refused = self.setup.gateway.note
        self.port = self._serve(self.setup.gateway, GuardedProtocol)

    def _serve(self, app: Any, protocol: Any) -> int:
        config = uvicorn.Config(
            app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False,
            h11_max_incomplete_event_size=connections.HEADER_BYTES, port=0,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        end = time.monotonic() + 10
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        self.servers.append((server, thread))
        return int(server.servers[0].sockets[0].getsockname()[1])

    def send(self, data: str | bytes) -> bytes:
        """Send bytes; return what comes back until the end, or until half a second of silence."""
        found = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as peer:
            peer.sendall(data.encode("latin-1") if isinstance(data, str) else data)
            peer.settimeout(0.5)
            while True:
                try:
                    piece = peer.recv(65536)
                except (ConnectionError, TimeoutError):
                    return found
                if not piece:
                    return found
                found += piece

    def stop(self) -> None:
        GuardedProtocol.refused = None
        for server, thread in self.servers:
            server.should_exit = True
            thread.join(10)


@pytest.fixture
def raw() -> Iterator[Raw]:
    made = Raw()
    yield made
    made.stop()


def signed(line: str, *headers: str, body: str = "") -> str:
    """Return a request of an enrolled site as text."""
    own = [f"{k}: {v}" for k, v in key_headers(base.KEY, base.now()).items()]
    return "\r\n".join([line, "Host: x", *own, *headers, "", body])


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def test_a_body_with_two_lengths_hides_no_second_request(raw: Raw) -> None:
    both = ("Content-Length: 4", "Transfer-Encoding: chunked")
    for headers in (both, both[::-1]):
        answer = raw.send(signed(f"POST {PULL} HTTP/1.1", *headers, body=f"0\r\n\r\n{START}"))
        assert statuses(answer)[0] == 400
        assert 200 not in statuses(answer)
    assert raw.setup.upstream.seen == []
    assert raw.setup.log.reasons[0] == "two-lengths"


@pytest.mark.parametrize(
    "target",
    [
        "http://localhost/v1/control/start-run",
        f"http://localhost{PULL}",
        "//v1/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        f"{PULL}%3f/../../control/start-run",
        f"{PULL}%00",
        f"{PULL}%0d%0aX:1",
        f"{PULL}#/../control",
        "/%ff%fe",
        "*",
    ],
)
def test_no_spelling_leads_elsewhere(raw: Raw, target: str) -> None:
    answer = raw.send(signed(f"POST {target} HTTP/1.1", "Content-Length: 0"))
    assert statuses(answer) == [404]
    assert raw.setup.upstream.seen == []
    assert len(raw.setup.log.reasons) == 1


def test_the_host_header_is_no_part_of_the_path(raw: Raw) -> None:
    for host in (f"e{PULL}?", "[", "e/health?", "\xff"):
        head = f"POST /v1/control/start-run HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n"
        assert statuses(raw.send(head))[0] in (400, 404)
    assert raw.setup.upstream.seen == []
    assert raw.setup.log.reasons[0] == "control-path"
    assert raw.setup.log.events[0][1]["path"] == "/v1/control/start-run"


@pytest.mark.parametrize(
    "data",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET /docs HTTP/1.1\r\n\r\n",
        b"GET /docs HTTP/1.1\r\nHost: x\r\na: b\x00c\r\n\r\n",
        b"G" * 40_000,
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        bytes(range(256)) * 10,
    ],
)
def test_what_is_no_http_is_written_down(raw: Raw, data: bytes) -> None:
    for _ in range(3):
        assert set(statuses(raw.send(data))) <= {400, 404}
    end = time.monotonic() + 5
    while not raw.setup.log.reasons and time.monotonic() < end:
        time.sleep(0.02)
    assert raw.setup.log.reasons[0] in ("not-http", "unknown-path")
    assert raw.setup.upstream.seen == []
    assert httpx.get(f"http://127.0.0.1:{raw.port}/health").status_code == 200


def test_a_broken_chunk_after_a_good_start_ends_that_connection_alone(raw: Raw) -> None:
    head = signed(f"POST {PULL} HTTP/1.1", "Transfer-Encoding: chunked", body="5\r\nabcde\r\n")
    for rest in ("-1\r\n\r\n", "zz\r\n", "ffffffffffffffffffffffff\r\n", "5\r\nab"):
        assert 200 not in statuses(raw.send(head + rest))
    answer = raw.send(signed(f"POST {PULL} HTTP/1.1", "Content-Length: 2", body="ok"))
    assert statuses(answer) == [200]


def test_connections_beyond_the_limit_are_written_down(
    raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_OF_PEER", 0)
    with socket.create_connection(("127.0.0.1", raw.port), timeout=5) as peer:
        assert base.closed(peer, 5.0)
    end = time.monotonic() + 5
    while not raw.setup.log.reasons and time.monotonic() < end:
        time.sleep(0.02)
    assert raw.setup.log.reasons == ["connections"]


NAMES = st.sampled_from(
    [KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER, "content-length", "transfer-encoding", "host", "x"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(
        [*sorted(FLEET_PATHS), "/health", "/v1/control/x", "//", "", "\udcff?", "[::1"]
    ),
    st.sampled_from(["GET", "POST", "", "\xff"]),
    st.lists(st.tuples(NAMES, st.binary(max_size=300)), max_size=6),
    st.booleans(),
)
def test_any_head_gets_an_answer(
    path: str, method: str, headers: list[tuple[str, bytes]], signs: bool
) -> None:
    setup = base.Setup()
    own = key_headers(base.KEY, base.now()) if signs else {}
    scope = {
        "type": "http", "http_version": "1.1", "scheme": "https", "method": method, "path": path,
        "raw_path": b"/", "query_string": b"\xff", "root_path": "", "client": ("192.0.2.7", 5),
        "server": ("x", 1),
        "headers": [(k.lower().encode(), v) for k, v in headers]
        + [(k.lower().encode(), v.encode()) for k, v in own.items()],
    }  # fmt: skip
    sent: list[Any] = []

    pieces = [None]

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.sleep(60)
        pieces.clear()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(setup.gateway(scope, receive, send))
    assert sent[0]["status"] in (200, 400, 401, 404, 405, 412, 413, 431)
