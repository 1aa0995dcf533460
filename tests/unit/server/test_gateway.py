"""The gateway: what reaches the SuperLink, what does not, and what is written down."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fedalign.compat import (
    ACTIVATE_PATH,
    FLEET_PATHS,
    KEY_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    key_headers,
    public_key_to_bytes,
)
from server import connections
from server.connections import HEADER_BYTES, GuardedProtocol, counted_as
from server.gateway import AUDIT_LINES, Gateway, Limits

KEY = ec.generate_private_key(ec.SECP384R1())
ONE_SECOND = datetime.timedelta(seconds=1)
PUBLIC = public_key_to_bytes(KEY.public_key())
PULL = "/v1/fleet/pull-messages"


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Upstream:
    """Stands in for the SuperLink and keeps what reached it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.app = Starlette(
            routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "PUT"])]
        )

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.seen.append((request.method, request.url.path, dict(request.headers), body))

        async def pieces() -> AsyncIterator[bytes]:
            yield b"up:"
            yield body

        headers = {"flwr-note": "x", "set-cookie": "secret=1", "server": "internal"}
        return StreamingResponse(pieces(), headers=headers, media_type="application/x-protobuf")


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def append(self, event: str, **facts: str | int | float) -> None:
        self.events.append((event, facts))

    @property
    def reasons(self) -> list[str]:
        return [str(facts["reason"]) for _, facts in self.events]


class Setup:
    """A gateway in front of an upstream, both in this process."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.upstream, self.log = Upstream(), Log()
        self.status = {PUBLIC: "active"}
        self.asked = 0
        self.time = 1000.0
        self.gateway = Gateway(
            "https://127.0.0.1:1",
            ssl.create_default_context(),
            self.key_status,
            self.log,
            limits,
            clock=lambda: self.time,
            transport=httpx.ASGITransport(self.upstream.app),
        )

    def key_status(self, public_key: bytes) -> str:
        self.asked += 1
        return self.status.get(public_key, "unknown")

    def ask(self, path: str = PULL, method: str = "POST", **more: Any) -> httpx.Response:
        """Send one request as a signed SuperNode, unless ``headers`` say otherwise."""
        more.setdefault("headers", key_headers(KEY, now()))

        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.gateway, client=("192.0.2.7", 5))
            async with httpx.AsyncClient(transport=transport, base_url="https://gw") as client:
                return await client.request(method, path, **more)

        return asyncio.run(go())


@pytest.fixture
def setup() -> Setup:
    return Setup()


@pytest.mark.parametrize("path", sorted(FLEET_PATHS))
def test_fleet_calls_pass_unchanged_both_ways(setup: Setup, path: str) -> None:
    headers = key_headers(KEY, now()) | {
        "content-type": "application/x-protobuf",
        "flwr-package-version": "1.41.0",
        "cookie": "a=b",
        "x-forwarded-for": "127.0.0.1",
    }
    answer = setup.ask(path + "?q=1", headers=headers, content=b"\0message")
    assert (answer.status_code, answer.content) == (200, b"up:\0message")
    assert answer.headers["content-type"] == "application/x-protobuf"
    assert answer.headers["flwr-note"] == "x"
    assert "set-cookie" not in answer.headers
    ((method, seen_path, seen, body),) = setup.upstream.seen
    assert (method, seen_path, body) == ("POST", path, b"\0message")
    assert seen[KEY_HEADER] == headers[KEY_HEADER]
    assert seen["flwr-package-version"] == "1.41.0"
    assert not {"cookie", "x-forwarded-for"} & set(seen)
    assert setup.log.events == []


def test_health_passes_without_a_key(setup: Setup) -> None:
    assert setup.ask("/health", "GET", headers={}).status_code == 200
    assert setup.ask("/health", "POST", headers={}).status_code == 405


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/v1/control/list-nodes", "control-path"),
        ("/v1/control/start-run", "control-path"),
        ("/v1/runtime/acquire-task", "runtime-path"),
        ("/v1/fleet/register-node", "fleet-path"),
        ("/v1/fleet/unregister-node", "fleet-path"),
        ("/v1/fleet/pull-messages/", "fleet-path"),
        ("/v1/fleet/pull-messages/../../control/list-nodes", "control-path"),
        ("/v1/fleet/%2e%2e/control/list-nodes", "fleet-path"),
        ("/v1/fleet/Pull-Messages", "fleet-path"),
        ("//v1/fleet/pull-messages", "unknown-path"),
        ("/docs", "unknown-path"),
        ("/openapi.json", "unknown-path"),
        ("/", "unknown-path"),
    ],
)
def test_everything_else_is_not_found_and_written_down(
    setup: Setup, path: str, reason: str
) -> None:
    for method in ("GET", "POST"):
        assert setup.ask(path, method).status_code == 404
    assert setup.upstream.seen == []
    assert setup.log.reasons == [reason]
    assert setup.log.events[0][1]["peer"] == "192.0.2.7"


def test_other_methods_are_refused(setup: Setup) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "CONNECT"):
        assert setup.ask(method=method).status_code == 405
    assert setup.upstream.seen == []


@pytest.mark.parametrize("status", ["unknown", "pending", "revoked", "replaced"])
def test_only_an_active_key_passes(setup: Setup, status: str) -> None:
    setup.status[PUBLIC] = status
    assert setup.ask().status_code == 401
    activation = setup.ask(ACTIVATE_PATH)
    assert activation.status_code == 412
    assert activation.json()["code"] == 2004
    assert status in activation.json()["detail"]
    assert setup.upstream.seen == []
    assert setup.log.reasons == [f"{status}-key"]
    assert len(str(setup.log.events[0][1]["key"])) == 16


@pytest.mark.parametrize("name", [KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER])
def test_each_identity_header_is_needed_exactly_once(setup: Setup, name: str) -> None:
    headers = key_headers(KEY, now())
    assert setup.ask(headers={k: v for k, v in headers.items() if k != name}).status_code == 401
    twice = [*headers.items(), (name, headers[name])]
    assert setup.ask(headers=twice).status_code == 401
    assert setup.upstream.seen == []
    assert setup.log.reasons == ["no-key"]


def test_a_key_must_be_proved_freshly(setup: Setup) -> None:
    other = key_headers(ec.generate_private_key(ec.SECP384R1()), now())
    good = key_headers(KEY, now())
    for wrong in (
        good | {SIGNATURE_HEADER: other[SIGNATURE_HEADER]},
        good | {TIME_HEADER: now().isoformat()},
        good | {TIME_HEADER: "yesterday"},
        good | {TIME_HEADER: datetime.datetime.now().isoformat()},
        good | {SIGNATURE_HEADER: "***"},
    ):
        assert setup.ask(headers=wrong).status_code == 401, wrong
    for right in (good, key_headers(KEY, now() - datetime.timedelta(seconds=290))):
        assert setup.ask(headers=right).status_code == 200
    assert setup.log.reasons == ["bad-proof"]


@pytest.mark.parametrize(
    ("seconds", "reason", "hint"),
    [
        (-306, "clock-behind", "306 s behind the coordinator's"),
        (-2 * 86400, "clock-behind", "172800 s behind the coordinator's"),
        (10, "clock-ahead", "s ahead of the coordinator's"),
        (7200, "clock-ahead", "5 s ahead and 305 s behind are allowed"),
    ],
)
def test_a_clock_that_is_wrong_is_said(setup: Setup, seconds: int, reason: str, hint: str) -> None:
    stamp = now() + datetime.timedelta(seconds=seconds)
    assert setup.ask(headers=key_headers(KEY, stamp)).status_code == 401
    refused = setup.ask(ACTIVATE_PATH, headers=key_headers(KEY, stamp))
    assert refused.status_code == 412
    assert reason in refused.json()["detail"]
    assert hint in refused.json()["detail"]
    # Who does not hold the key is told nothing about clocks.
    forged = key_headers(KEY, stamp) | {TIME_HEADER: (stamp + ONE_SECOND).isoformat()}
    assert "clock" not in setup.ask(ACTIVATE_PATH, headers=forged).text
    assert setup.upstream.seen == []
    assert setup.log.reasons == [reason, "bad-proof"]


@pytest.mark.parametrize("claim", ["", "!!", "AAAA", "A" * 5000])
def test_nonsense_for_a_key_is_refused(setup: Setup, claim: str) -> None:
    assert setup.ask(headers=key_headers(KEY, now()) | {KEY_HEADER: claim}).status_code == 401
    assert setup.upstream.seen == []


def test_a_revoked_key_is_out_within_a_second(setup: Setup) -> None:
    for _ in range(5):
        assert setup.ask().status_code == 200
    assert setup.asked == 1
    setup.status[PUBLIC] = "revoked"
    setup.time += 1.01
    assert setup.ask().status_code == 401


def test_refusals_are_written_once_a_minute(setup: Setup) -> None:
    setup.status[PUBLIC] = "revoked"
    for _ in range(10):
        setup.ask()
        setup.time += 1.0
    assert len(setup.log.events) == 1
    setup.time += 60.0
    setup.ask()
    assert [facts["repeated"] for _, facts in setup.log.events] == [0, 9]


def test_bodies_are_limited_told_and_counted() -> None:
    setup = Setup(Limits(body=1000))
    assert setup.ask(content=b"x" * 1000).status_code == 200
    assert setup.ask(content=b"x" * 1001).status_code == 413

    async def untold() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    assert setup.ask(content=untold()).status_code == 413
    for wrong in ("-1", "1e3", "abc"):
        headers = key_headers(KEY, now()) | {"content-length": wrong}
        assert setup.ask(headers=headers, content=b"x").status_code == 413
    assert len(setup.upstream.seen) == 1
    assert setup.log.reasons == ["body-too-large"]


def test_headers_are_limited(setup: Setup) -> None:
    headers = key_headers(KEY, now()) | {"flwr-note": "x" * HEADER_BYTES}
    assert setup.ask(headers=headers).status_code == 431
    assert setup.upstream.seen == []


def test_a_peer_s_rate_is_limited_so_that_flower_tries_again() -> None:
    setup = Setup(Limits(rate=1.0, burst=3))
    assert [setup.ask().status_code for _ in range(5)] == [200, 200, 200, 503, 503]
    setup.time += 1.0
    assert [setup.ask().status_code for _ in range(2)] == [200, 503]


def test_without_the_superlink_flower_is_told_to_try_again() -> None:
    setup = Setup()

    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("internal address 10.0.0.1")

    setup.gateway._client = httpx.AsyncClient(transport=httpx.MockTransport(down))
    answer = setup.ask()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert "10.0.0.1" not in answer.text


def test_many_strangers_cannot_fill_the_audit_log(setup: Setup) -> None:
    async def go() -> None:
        for i in range(1000):
            address = (f"10.0.{i // 250}.{i % 250}", 5)
            transport = httpx.ASGITransport(setup.gateway, client=address)
            async with httpx.AsyncClient(transport=transport, base_url="https://gw") as client:
                assert (await client.get("/docs")).status_code == 404

    asyncio.run(go())
    assert len(setup.log.events) == AUDIT_LINES


def test_a_host_is_one_peer() -> None:
    assert counted_as("192.0.2.7") == counted_as("::ffff:192.0.2.7") == "192.0.2.7"
    assert counted_as("2001:db8::1") == counted_as("2001:db8::ffff:2")
    assert counted_as("fe80::1%eth0") == "fe80::/64"
    assert counted_as("") == ""


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Serve an application over real connections in a thread; give back its port."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(app: Any) -> int:
        config = uvicorn.Config(
            app, http=GuardedProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
            h11_max_incomplete_event_size=connections.HEADER_BYTES, port=0,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        end = time.monotonic() + 10
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        running.append((server, thread))
        return int(server.servers[0].sockets[0].getsockname()[1])

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


def closed(connection: socket.socket, seconds: float) -> bool:
    """Say whether the other side closes within ``seconds``."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_silent_connections_are_closed(
    listening: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SILENT_SECONDS", 0.2)
    port = listening(Upstream().app)
    with socket.create_connection(("127.0.0.1", port)) as nothing:
        assert closed(nothing, 3.0)
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nx-slow: ")
        assert closed(half, 3.0)
    assert not GuardedProtocol.of_peer


def test_a_peer_has_so_many_connections(
    listening: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_OF_PEER", 3)
    port = listening(Upstream().app)
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as fourth:
        assert closed(fourth, 3.0)
    held.pop().close()
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as again:
        assert not closed(again, 0.2)
    for connection in held:
        connection.close()


def test_large_bodies_stream_through(listening: Callable[..., int]) -> None:
    setup = Setup(Limits(body=4 * 2**20))
    setup.gateway._client = httpx.AsyncClient()
    upstream = listening(setup.upstream.app)
    setup.gateway._upstream = f"http://127.0.0.1:{upstream}"
    port = listening(setup.gateway)
    body = bytes(range(256)) * (4 * 2**20 // 256)
    with httpx.Client() as client:
        url = f"http://127.0.0.1:{port}{PULL}"
        for content in (body, iter([body[: 2**20], body[2**20 :]])):
            answer = client.post(url, headers=key_headers(KEY, now()), content=content)
            assert (answer.status_code, answer.content) == (200, b"up:" + body)
        too_much = client.post(url, headers=key_headers(KEY, now()), content=body + b"x")
        assert too_much.status_code == 413


def test_limits_are_what_the_docs_say() -> None:
    assert replace(Limits()) == Limits(32 * 2**20, 30.0, 300.0, 100.0, 400)
