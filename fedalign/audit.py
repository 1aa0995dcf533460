"""The audit log: one JSON line an event, each bound to the one before by a hash.

::

    {"n": 7, "time": "2026-10-24T09:30:00.000Z", "event": "enrollment.enrolled",
     "facts": {"site": "north-clinic"}, "previous": HEX, "hash": HEX}

``hash`` is the SHA-256 of the canonical JSON (sorted keys, no spaces, ASCII) of the other five
entries, and ``previous`` the hash of the line before (64 zeros in line 1).  So a line that was
changed, left out, put in or moved is found by :func:`verify`.  Two things the chain alone cannot
show: lines cut off at the end, and a log that was written anew as a whole by somebody who may write
the file.  Against these, keep the last hash (:func:`last_hash`) somewhere else from time to time.

An append takes a lock on the file and waits for the disk, so threads and processes may share a log
and what was logged survives a crash.  A line that a crash cut off was never confirmed to anybody;
the next append takes it away and says so in the log.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from fedalign.errors import DataError

FIRST = "0" * 64
"""What line 1 names as the hash before it."""
MAX_CHARACTERS = 200
"""A text longer than this is cut; characters that do not print become ``?``."""
_EVENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEYS = ("n", "time", "event", "facts", "previous", "hash")
_BLOCK = 4096


class AuditLog:
    """A log at ``path``, made with mode 0600 at the first append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: str | int | float) -> None:
        """Add one event and wait until it is on disk.

        ``event`` is of ``[a-z0-9._-]``.  Raises ``ValueError`` for an event or fact that is none
        (a mistake in the program) and ``DataError`` when the log's last line is damaged.
        """
        if not _EVENT.fullmatch(event):
            raise ValueError(f"'{event}' is not the name of an event")
        clean = {name: _clean(name, value) for name, value in facts.items()}
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            n, previous, torn = _tail(descriptor, self.path)
            lines = b""
            if torn:
                lines, previous = _line(n + 1, "audit.torn-line", {"bytes": torn}, previous)
                n += 1
            line, _ = _line(n + 1, event, clean, previous)
            lines += line
            os.lseek(descriptor, 0, os.SEEK_END)
            # One write of whole lines; if the disk fills in its midst, the rest is a torn line.
            view = memoryview(lines)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def verify(path: Path) -> int:
    """Check the whole chain; return the number of lines (0: no file).

    Raises ``DataError`` naming the first line that does not fit.
    """
    return _walk(path)[0]


def last_hash(path: Path) -> str:
    """Check the whole chain; return the hash of its last line (64 zeros for an empty log)."""
    return _walk(path)[1]


def _walk(path: Path) -> tuple[int, str]:
    try:
        source = path.open("rb")
    except FileNotFoundError:
        return 0, FIRST
    count, previous = 0, FIRST
    with source:
        fcntl.flock(source.fileno(), fcntl.LOCK_SH)
        for number, raw in enumerate(source, 1):
            where = f"{path}, line {number}"
            if not raw.endswith(b"\n"):
                raise DataError(f"{where}: cut off (a crash while writing, or the file was cut).")
            record = _parse(raw, where)
            if raw != _render(record):
                raise DataError(f"{where}: not as it was written; somebody changed it.")
            if record["n"] != number:
                raise DataError(
                    f"{where}: holds event {record['n']}; lines are missing, added or moved."
                )
            if record["previous"] != previous:
                raise DataError(f"{where}: does not follow the line before; the log was changed.")
            if record["hash"] != _hash(record):
                raise DataError(f"{where}: its hash is wrong; somebody changed it.")
            count, previous = number, record["hash"]
    return count, previous


def _tail(descriptor: int, path: Path) -> tuple[int, str, int]:
    """Return number and hash of the last whole line, and the size of a torn one, now cut off."""
    size = os.fstat(descriptor).st_size
    data, start = b"", size
    while start > 0 and data.count(b"\n") < 2:
        step = min(_BLOCK, start)
        start -= step
        data = os.pread(descriptor, step, start) + data
    whole, _, rest = data.rpartition(b"\n")
    if rest:
        os.ftruncate(descriptor, size - len(rest))
        # The line before may begin further up than was read for the torn one.
        return (*_tail(descriptor, path)[:2], len(rest))
    if size == 0:
        return 0, FIRST, 0
    last = whole.rpartition(b"\n")[2] + b"\n"
    record = _parse(last, f"{path}, last line")
    if last != _render(record) or record["hash"] != _hash(record):
        raise DataError(
            f"{path}: its last line was changed, so nothing can be added. Keep the file, find out "
            "who changed it, and move it away; a new log begins."
        )
    return record["n"], record["hash"], 0


def _line(n: int, event: str, facts: dict[str, Any], previous: str) -> tuple[bytes, str]:
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    record: dict[str, Any] = {
        "n": n,
        "time": moment.replace("+00:00", "Z"),
        "event": event,
        "facts": facts,
        "previous": previous,
    }
    record["hash"] = _hash(record)
    return _render(record), record["hash"]


def _hash(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _render(record: dict[str, Any]) -> bytes:
    ordered = {key: record[key] for key in _KEYS}
    try:
        return json.dumps(ordered, allow_nan=False).encode() + b"\n"
    except ValueError:  # NaN or infinity in a file that we did not write
        return b""


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON; somebody changed it.") from None
    if not isinstance(record, dict) or set(record) != set(_KEYS):
        raise DataError(f"{where}: not an entry of this log; somebody changed it.")
    if type(record["n"]) is not int or not isinstance(record["hash"], str):
        raise DataError(f"{where}: not an entry of this log; somebody changed it.")
    return record


def _clean(name: str, value: str | int | float) -> str | int | float:
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value[:MAX_CHARACTERS])
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"fact '{name}' must be a text or a finite number, not {value!r}")
    return value
