"""What strangers may cost: requests of one peer over time, and lines in the audit log.

A *token bucket* holds up to ``burst`` requests and gains ``rate`` a second; a request takes one or
is refused.  Repeated refusals for the same reason are logged once a minute, with their number, so
that nobody can fill the disk by being refused.  Times are in seconds by a clock that never goes
back; the caller gives them.  Safe for threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

MAX_ENTRIES = 4096
"""Entries kept; the one that was not used for longest goes first."""
QUIET_SECONDS = 60.0
"""Refusals of one kind are logged once in this time."""


class TokenBuckets:
    """One bucket for each peer."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, peer: str, now: float) -> bool:
        """Take one request from the peer's bucket; False when it is empty."""
        with self._lock:
            level, last = self._buckets.pop(peer, (self._burst, now))
            level = min(self._burst, level + max(0.0, now - last) * self._rate)
            taken = level >= 1.0
            self._buckets[peer] = (level - 1.0 if taken else level, now)
            while len(self._buckets) > MAX_ENTRIES:
                self._buckets.popitem(last=False)
            return taken


class Refusals:
    """Decides which refusals are logged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def count(self, kind: Hashable, now: float) -> int | None:
        """Count one refusal; None when it is not to be logged.

        Else the number of refusals of this kind that were not logged since the last one that was.
        """
        with self._lock:
            logged, silent = self._seen.pop(kind, (-QUIET_SECONDS + now, 0))
            if now - logged < QUIET_SECONDS:
                self._seen[kind] = (logged, silent + 1)
                return None
            self._seen[kind] = (now, 0)
            while len(self._seen) > MAX_ENTRIES:
                self._seen.popitem(last=False)
            return silent
