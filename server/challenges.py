"""Values that a renewal must sign: fresh, from this coordinator, good once.

A challenge is the time it was made (8 bytes, ms of a clock that never goes back), 16 random bytes,
and an HMAC-SHA256 over both under a key that lives as long as this process.  So the coordinator
remembers nothing for a stranger who asks for many; it remembers a challenge only after a signature
over it was found good, and only until it would be stale anyway.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable

LIFETIME = 120.0
"""Seconds."""
SIZE = 8 + 16 + 32


class Challenges:
    """Makes challenges and spends them.  Safe for threads; a restart makes all older ones stale."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._spent: dict[bytes, float] = {}

    def new(self) -> bytes:
        """Return a new challenge of ``SIZE`` bytes."""
        body = int(self._clock() * 1000).to_bytes(8, "big") + secrets.token_bytes(16)
        return body + self._mac(body)

    def is_fresh(self, challenge: bytes) -> bool:
        """Say whether this process made the challenge in the last ``LIFETIME`` seconds."""
        if len(challenge) != SIZE or not hmac.compare_digest(
            challenge[24:], self._mac(challenge[:24])
        ):
            return False
        return self._clock() - int.from_bytes(challenge[:8], "big") / 1000 <= LIFETIME

    def spend(self, challenge: bytes) -> bool:
        """Use a challenge up; False when it is stale or was used before."""
        with self._lock:
            if not self.is_fresh(challenge) or challenge in self._spent:
                return False
            now = self._clock()
            self._spent = {c: t for c, t in self._spent.items() if now - t <= LIFETIME + 1}
            self._spent[challenge] = now
            return True

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)
