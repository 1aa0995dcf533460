"""The gateway: the only way from outside to the SuperLink, for registered SuperNodes alone.

Flower's SuperLink serves the Fleet API (sites), the Control API (whoever comes may register nodes
and start runs) and the Runtime API on one port, without authentication on the last two.  So the
SuperLink listens on loopback, and the gateway lets through ten Fleet paths and ``/health``.
Everything else is 404 and in the audit log.  What is checked where:

========================================  =====================================================
gateway: connections in all and of a peer  503, connection closed (``server/connections.py``)
gateway: rate of a peer                    503 with Retry-After
gateway: path and method                   404, 405
gateway: size of the headers               431
gateway: one way of saying a body's length 400 ``two-lengths``
gateway: one identity header of each kind  401 ``no-key``
gateway: registry says the key is active   401 ``unknown-key``, ``revoked-key``, ...
gateway: signature of the time             401 ``bad-proof``
gateway: the time is fresh                 401 ``clock-ahead``, ``clock-behind``
gateway: size of the body, told or counted 413 ``body-too-large``
SuperLink: the same key and signature, and 401
that the message is for this key's node
SuperLink: the node may do what it asks    4xx
========================================  =====================================================

The registry is asked at most once a second for a key, so a revoked key is out within a second, also
when Flower itself could not be told.  The signature covers the time only, not path or body (that is
Flower's protocol): TLS protects those.

What is not even HTTP is refused before it gets here (400, connection closed), as are connections
beyond the limits; both come back by :meth:`Gateway.note`, so they are in the audit log too.

Status codes are chosen for Flower's SuperNode: it stops on 401, tries again on 503 (and treats 429
as an error of the message), takes 403 as "this run is over", and shows the text of a refused
activation.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fedalign.compat import (
    ACTIVATE_PATH,
    ACTIVATION_FAILED,
    FLEET_PATHS,
    KEY_HEADER,
    MAX_AGE,
    MAX_AHEAD,
    SIGNATURE_HEADER,
    TIME_HEADER,
    claimed_key,
    proven_age,
)
from server.connections import HEADER_BYTES, counted_as
from server.limits import Refusals, TokenBuckets

log = logging.getLogger("fedalign.server")

IDENTITY = (KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER)
FORWARDED = frozenset((b"accept", b"accept-encoding", b"content-type", b"content-length"))
RETURNED = frozenset(("content-type", "content-length", "content-encoding"))
FLOWER = b"flwr-"
AUDIT_LINES = 120
"""Refusals a minute that are written down at most, whoever causes them."""
CACHE_SECONDS = 1.0
CACHE_KEYS = 4096


@dataclass(frozen=True)
class Limits:
    """What a peer may use.  Flower cuts arrays in pieces of 5 MB, so bodies stay small."""

    body: int = 32 * 2**20
    """Bytes of a request's body."""
    chunk_seconds: float = 30.0
    """Longest wait for the next piece of a body, and for the SuperLink's next piece."""
    body_seconds: float = 300.0
    """Longest time for a whole body."""
    rate: float = 100.0
    """Requests a second of one peer, over time."""
    burst: int = 400
    """Requests of one peer at once."""


class KeyStatus(Protocol):
    """What the gateway asks of the registry."""

    def __call__(self, public_key: bytes) -> str:
        """Return ``active``, ``pending``, ``revoked``, ``replaced`` or ``unknown``."""


class Audit(Protocol):
    """What the gateway asks of the audit log."""

    def append(self, event: str, **facts: str | int | float) -> object:
        """Store one event."""


class _Refused(Exception):
    def __init__(self, status: int, reason: str, key: bytes = b"", hint: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.key = key
        self.hint = hint
        """What the site's operator should do, where the reason does not say it."""


class Gateway:
    """The gateway as an ASGI application in front of ``upstream`` (``https://127.0.0.1:port``).

    ``trust`` verifies the SuperLink's certificate.  ``clock`` counts seconds for limits and caches.
    """

    def __init__(
        self,
        upstream: str,
        trust: ssl.SSLContext,
        key_status: KeyStatus,
        audit: Audit,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._upstream = upstream
        self._key_status = key_status
        self._audit = audit
        self._clock = clock
        self._buckets = TokenBuckets(self.limits.rate, self.limits.burst)
        self._refusals = Refusals()
        self._lines = TokenBuckets(AUDIT_LINES / 60, AUDIT_LINES)
        self._notes: set[asyncio.Task[None]] = set()
        self._known: dict[bytes, tuple[float, str]] = {}
        self._client = httpx.AsyncClient(
            verify=trust,
            timeout=httpx.Timeout(self.limits.chunk_seconds, connect=5.0),
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=64),
            trust_env=False,
            headers={"accept-encoding": "identity"},
            transport=transport,
        )

    async def close(self) -> None:
        """Close the connections to the SuperLink."""
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway serves http, not {scope['type']}")
        request = Request(scope, receive)
        peer = counted_as(request.client.host if request.client else "")
        try:
            response = await self._answer(request, peer)
        except _Refused as refused:
            await self._write(peer, refused, _path(request))
            response = _refusal(_path(request), refused)
        except ClientDisconnect:
            return
        with contextlib.suppress(httpx.HTTPError):
            # The SuperLink broke off in the middle: the peer sees a short body and asks again.
            await response(scope, receive, send)

    async def _answer(self, request: Request, peer: str) -> Response:
        if not self._buckets.take(peer, self._clock()):
            raise _Refused(503, "rate")
        path = _path(request)
        fleet = path in FLEET_PATHS
        if not fleet and path != "/health":
            raise _Refused(404, _kind(path))
        if request.method != ("POST" if fleet else "GET"):
            raise _Refused(405, "method")
        if sum(len(name) + len(value) for name, value in request.headers.raw) > HEADER_BYTES:
            raise _Refused(431, "headers-too-large")
        if fleet:
            self._check_identity(request)
        told = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            raise _Refused(400, "two-lengths")  # which one the SuperLink believes is a guess
        if (
            not (told.isascii() and told.isdigit() and len(told) < 16)
            or int(told) > self.limits.body
        ):
            raise _Refused(413, "body-too-large")
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name in FORWARDED or name.startswith(FLOWER)
        ]
        outgoing = self._client.build_request(
            request.method,
            self._upstream + path,
            headers=headers,
            content=self._body(request) if fleet else None,
        )
        try:
            answer = await self._client.send(outgoing, stream=True)
        except httpx.HTTPError as error:
            log.warning("the SuperLink gave no answer: %s", type(error).__name__)
            return PlainTextResponse(
                "the SuperLink does not answer\n", 503, headers={"retry-after": "2"}
            )
        return StreamingResponse(
            _pieces(answer),
            answer.status_code,
            headers={
                name: value
                for name, value in answer.headers.items()
                if name in RETURNED or name.startswith(FLOWER.decode())
            },
        )

    def _check_identity(self, request: Request) -> None:
        if any(len(request.headers.getlist(name)) != 1 for name in IDENTITY):
            raise _Refused(401, "no-key")
        key = claimed_key(request.headers)
        if key is None:
            raise _Refused(401, "no-key")
        status = self._status(key)
        if status != "active":
            raise _Refused(401, f"{status}-key", key)
        age = proven_age(request.headers, key, datetime.datetime.now(datetime.UTC))
        if age is None:
            raise _Refused(401, "bad-proof", key)
        if not -MAX_AHEAD < age < MAX_AGE:
            raise _Refused(401, "clock-behind" if age > 0 else "clock-ahead", key, _clocks(age))

    def _status(self, key: bytes) -> str:
        now = self._clock()
        until, status = self._known.get(key, (0.0, ""))
        if not status or until < now:
            status = self._key_status(key)
            if len(self._known) >= CACHE_KEYS:
                self._known.clear()
            self._known[key] = (now + CACHE_SECONDS, status)
        return status

    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """Pass on the body; more than the limit, or slower than allowed, is a refusal."""
        size, end = 0, self._clock() + self.limits.body_seconds
        stream = request.stream()
        while True:
            left = min(self.limits.chunk_seconds, end - self._clock())
            try:
                piece = await asyncio.wait_for(anext(stream), max(left, 0.001))
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _Refused(408, "body-too-slow") from None
            size += len(piece)
            if size > self.limits.body:
                raise _Refused(413, "body-too-large")
            if piece:
                yield piece

    def note(self, peer: str, reason: str) -> None:
        """Write down what was refused before it was a request; for the connections' protocol."""
        task = asyncio.get_running_loop().create_task(self._write(peer, _Refused(400, reason)))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _write(self, peer: str, refused: _Refused, path: str = "") -> None:
        digest = hashlib.sha256(refused.key).hexdigest() if refused.key else ""
        repeated = self._refusals.count((digest or peer, refused.reason), self._clock())
        if repeated is None or not self._lines.take("", self._clock()):
            return
        facts: Mapping[str, str | int] = {
            "reason": refused.reason,
            "peer": peer,
            "path": path,
            "key": digest[:16],
            "repeated": repeated,
        }
        await asyncio.to_thread(self._audit.append, "gateway.refused", **facts)


def _path(request: Request) -> str:
    """Return the path that was asked for.  ``request.url`` is put together with the Host header."""
    return str(request.scope["path"])


def _kind(path: str) -> str:
    """Name what was tried, from a short list, so that the audit log cannot be flooded."""
    for kind in ("control", "runtime", "fleet"):
        if path.startswith(f"/v1/{kind}/"):
            return f"{kind}-path"
    return "unknown-path"


def _clocks(age: float) -> str:
    where = "behind" if age > 0 else "ahead of"
    return (
        f" The clock of this site is {abs(age):.0f} s {where} the coordinator's; {MAX_AHEAD:.0f} s "
        f"ahead and {MAX_AGE:.0f} s behind are allowed. Set the clock that is wrong (NTP keeps it "
        "right); the node is tried again by itself."
    )


def _refusal(path: str, refused: _Refused) -> Response:
    if refused.status == 401 and path == ACTIVATE_PATH:
        # Flower shows the text of a refused activation and exits; on 401 it only stops.
        text = f"The coordinator does not accept this key ({refused.reason}).{refused.hint}"
        return JSONResponse({"code": ACTIVATION_FAILED, "detail": text}, 412)
    headers = {"connection": "close"}
    if refused.status == 503:
        headers["retry-after"] = "1"
    if refused.status == 404:
        return PlainTextResponse("not found\n", 404, headers=headers)
    return PlainTextResponse(f"refused: {refused.reason}\n", refused.status, headers=headers)


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
