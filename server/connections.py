"""Connections of the gateway: how many in all and of one peer, and how long one may be silent.

uvicorn closes connections that are idle after an answer; it lets a peer that never finishes its
request line sit for ever.  This protocol closes any connection on which no request began or was in
work between two looks, and refuses connections beyond the limits before anything is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from h11 import LocalProtocolError
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1024
MAX_OF_PEER = 128
SILENT_SECONDS = 30.0
"""Time between two looks; a silent connection lives at most twice as long."""
HEADER_BYTES = 16 * 1024


def counted_as(host: str) -> str:
    """Return what a peer is counted under: its IPv4 address, or its IPv6 /64, all of one host."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:100]
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 over one connection, within the limits above."""

    of_peer: ClassVar[Counter[str]] = Counter()
    refused: ClassVar[Callable[[str, str], object] | None] = None
    """Told peer and reason of what is refused here: ``connections``, ``not-http``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or close it when there are too many."""
        super().connection_made(transport)
        self._peer = counted_as(self.client[0] if self.client else "")
        self._look: asyncio.TimerHandle | None = None
        self._last_cycle: Any = None
        self.of_peer[self._peer] += 1
        if self.of_peer[self._peer] > MAX_OF_PEER or len(self.connections) > MAX_CONNECTIONS:
            self._tell("connections")
            transport.abort()
            return
        self._look = self.loop.call_later(SILENT_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._look is not None:
            self._look.cancel()
        self.of_peer[self._peer] -= 1
        if self.of_peer[self._peer] <= 0:
            del self.of_peer[self._peer]
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, if an answer is still possible, and close."""
        self._tell("not-http")
        try:
            super().send_400_response(msg)
        except LocalProtocolError:  # in the midst of another answer
            self.transport.abort()

    def _tell(self, reason: str) -> None:
        told = type(self).refused
        if told is not None:
            told(self._peer, reason)

    def _close_if_silent(self) -> None:
        cycle = self.cycle
        if cycle is self._last_cycle and (cycle is None or cycle.response_complete):
            self.transport.abort()
            return
        self._last_cycle = cycle
        self._look = self.loop.call_later(SILENT_SECONDS, self._close_if_silent)
