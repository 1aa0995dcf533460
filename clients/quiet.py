"""A limit on lines: whoever is refused again and again cannot fill this machine's disk.

Of each minute the first ``MOST`` lines are written; the next line that is written says how many
were left out before it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

MOST = 240
"""Lines a minute."""
MINUTE = 60.0


class Quiet:
    """Decides which lines are written.  ``clock``: seconds, never going back."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._end = 0.0
        self._written = 0
        self._left_out = 0

    def take(self) -> int | None:
        """Count one line; None when it is left out, else how many were since the last written."""
        now = self._clock()
        if now >= self._end:
            self._end, self._written = now + MINUTE, 0
        if self._written >= self._most:
            self._left_out += 1
            return None
        self._written += 1
        before, self._left_out = self._left_out, 0
        return before


class QuietLog(logging.Filter):
    """The same for a handler of ``logging``."""

    def __init__(self, quiet: Quiet) -> None:
        super().__init__()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the record is written; a number of those left out is put before it."""
        before = self._quiet.take()
        if before:
            record.msg = f"({before} lines left out) {record.msg}"
        return before is not None
