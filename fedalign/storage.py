"""Files of a run that cannot be written: one error that says what to do, whoever wrote them.

A full disk comes as ``OSError`` from Python, as ``SafetensorError`` from safetensors and as a code
of SQLite from the ledger (``fedalign/ledger.py``).  For a run they are the same thing: the round is
not committed, and it goes on after room was made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedalign.errors import StorageError

TO_DO = (
    "What was committed before is safe. Make room (or see to permissions and the medium), then "
    "resume the run, or start it again where it had not begun."
)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn a failed write to ``path`` into ``StorageError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(f"{path}: cannot be written ({why}). {TO_DO}") from error


def out_of_room(error: sqlite3.Error) -> bool:
    """Say whether SQLite could not write because of the disk (full, quota, input/output error)."""
    # Errors that Python's module raises by itself have no code.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
