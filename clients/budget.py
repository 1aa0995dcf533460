"""What a site has done today, kept so that no restart is a fresh budget.

One SQLite file with a row for each job: day (UTC), kind, whether it is a round, seconds.  A job is
written when it begins, so it counts whatever becomes of it; its seconds are brought up to date
while it runs and when it ends, before the reply leaves.  A process that is killed has therefore
spent what it did, to within one tick.

The file is made in full under another name and linked into place, so an empty or damaged one is an
error, never a fresh budget.  Whoever owns the file can reset it: it protects from the coordinator,
not from the site.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients.site_policy import ROUNDS, Spent
from fedalign.errors import DataError

TABLE = (
    "CREATE TABLE job (number INTEGER PRIMARY KEY, day TEXT NOT NULL, "
    "kind TEXT NOT NULL, round INTEGER NOT NULL, seconds REAL NOT NULL)"
)


class Budget:
    """The jobs of a site.  Safe for several processes."""

    def __init__(self, path: Path, readonly: bool = False) -> None:
        """Open or make the file; with ``readonly`` a missing file is an error.

        Raises ``DataError`` where it is damaged or cannot be opened.
        """
        self._path = path
        if not path.exists():
            if readonly:
                raise DataError(f"{path}: no such file; nothing was asked of this site yet.")
            self._create()
        with self._open() as connection:
            state = connection.execute("PRAGMA quick_check").fetchone()
            if state != ("ok",):
                raise sqlite3.DatabaseError(str(state))
            connection.execute("SELECT count(*) FROM job").fetchone()

    def begin(self, kind: str, now: float) -> int:
        """Count a job from here on; returns its number.  ``now``: seconds since the epoch."""
        with self._open() as connection:
            cursor = connection.execute(
                "INSERT INTO job (day, kind, round, seconds) VALUES (?, ?, ?, 0)",
                (_day(now), kind, int(kind in ROUNDS)),
            )
            number = cursor.lastrowid
        assert number is not None
        return number

    def worked(self, number: int, seconds: float) -> None:
        """Say how long a job has run so far."""
        with self._open() as connection:
            connection.execute("UPDATE job SET seconds = ? WHERE number = ?", (seconds, number))

    def spent(self, now: float) -> Spent:
        """Return what was done on the day of ``now``."""
        with self._open() as connection:
            jobs, rounds, seconds = connection.execute(
                "SELECT count(*), coalesce(sum(round), 0), coalesce(sum(seconds), 0.0) "
                "FROM job WHERE day = ?",
                (_day(now),),
            ).fetchone()
        return Spent(int(jobs), int(rounds), float(seconds))

    def _create(self) -> None:
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch(mode=0o600)
            connection = sqlite3.connect(temporary)
            connection.execute(TABLE)
            connection.close()
            try:
                os.link(temporary, self._path)
            except FileExistsError:
                pass  # another process made it in the meantime
            finally:
                temporary.unlink()
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{self._path}: cannot be made ({error}).") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, on disk when this ends."""
        try:
            connection = sqlite3.connect(self._path, timeout=30.0)
            try:
                connection.execute("PRAGMA synchronous=FULL")
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise DataError(
                f"{self._path}: the record of work done cannot be read or kept ({error}). Nothing "
                "is done without it; see that the file is whole and writable."
            ) from None


def _day(now: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now))
