"""How much of the enrollment service one peer may use, before anybody knows who it is.

Each address has a bucket of requests, and there is one bucket for all (``limits.py``).  An address
is asked first, so a single one cannot empty the bucket of all others.  Ports do not count, and an
IPv6 peer is its /64 network, because one host has all of it.  Besides, an address may only have a
few requests under way, each has to arrive within seconds, and connections are few and short.
"""

from __future__ import annotations

import ipaddress
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from server.limits import TokenBuckets

_PEER = re.compile(r"ipv[46]:(?:\[([^\]%]+)(?:%[^\]]*)?\]|([^:]+)):[0-9]+")


@dataclass(frozen=True)
class Limits:
    """What the service allows.  Rates are per second, sizes in bytes, times in seconds."""

    peer_rate: float = 0.2
    peer_burst: int = 20
    total_rate: float = 5.0
    total_burst: int = 100
    peer_requests: int = 4
    """Requests of one address at the same time."""
    threads: int = 16
    requests: int = 64
    """Requests at the same time, also those that wait for a thread."""
    connections: int = 256
    message_bytes: int = 64 * 1024
    metadata_bytes: int = 8 * 1024
    message_seconds: float = 10.0
    """In which the whole request has to be here; a connection without one is closed as well."""
    connection_seconds: float = 60.0
    """A connection is closed after this and ten seconds more, whatever it does."""
    handshake_seconds: float = 10.0


class Gate:
    """Decides who comes in.  ``clock`` never goes back.  Safe for threads."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._peers = TokenBuckets(limits.peer_rate, limits.peer_burst)
        self._total = TokenBuckets(limits.total_rate, limits.total_burst)
        self._lock = threading.Lock()
        self._inside: Counter[str] = Counter()

    @contextmanager
    def enter(self, address: str) -> Iterator[str]:
        """Give the reason for refusing a request: ``busy``, ``rate``, or empty for let in."""
        address = network(address)
        with self._lock:
            busy = self._inside[address] >= self._limits.peer_requests
            self._inside[address] += not busy
        if busy:
            yield "busy"
            return
        try:
            now = self._clock()
            taken = self._peers.take(address, now) and self._total.take("", now)
            yield "" if taken else "rate"
        finally:
            with self._lock:
                self._inside[address] -= 1
                if not self._inside[address]:
                    del self._inside[address]


def peer_address(peer: str) -> str:
    """Return a peer's IP address without port; a name that holds none as it is, cut.

    ``peer`` is as gRPC names it: ``ipv4:192.0.2.7:51234`` or ``ipv6:%5B2001:db8::7%5D:51234``.
    """
    text = unquote(peer)
    match = _PEER.fullmatch(text)
    try:
        ip = ipaddress.ip_address((match[1] or match[2]) if match else "")
    except ValueError:
        return text[:100]
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


def network(address: str) -> str:
    """Return what an address is counted under: its /64 network for IPv6, else itself."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))
