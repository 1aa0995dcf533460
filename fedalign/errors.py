"""The errors a person can act on.  Each message says what was given, what is allowed, what to do.

Exit codes of the three commands follow from the class, so that a script can tell them apart.
"""

from __future__ import annotations


class FedalignError(Exception):
    """Base of every error that is shown without a traceback.  Exit code 1."""

    exit_code = 1


class ConfigError(FedalignError):
    """A setting is unknown, of the wrong type or out of range.  Exit code 2."""

    exit_code = 2


class DataError(FedalignError):
    """Private or reference data cannot be used as given; names file and line.  Exit code 3."""

    exit_code = 3


class WireError(FedalignError):
    """A message broke the wire contract; ``reason`` is a short code that is safe to record.

    Exit code 4.  The reason never holds text that came from the other side.
    """

    exit_code = 4

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class RunFailed(FedalignError):
    """The run could not go on (quorum missed, nothing usable came back).  Exit code 5."""

    exit_code = 5


class StorageError(RunFailed):
    """A file of the run could not be written: disk full, quota, broken medium.  Exit code 5."""


class ResumeError(FedalignError):
    """A run folder cannot be resumed as asked; names the key that differs.  Exit code 6."""

    exit_code = 6
