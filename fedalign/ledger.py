"""The ledger: every number of a run, in one SQLite file.  The report is built from it alone.

A row that a phase or round produced carries ``(phase, round, attempt)`` and counts only when that
triple stands in the table ``commits``.  The order of a round is

1. :meth:`Ledger.write`: all rows of the attempt, in one transaction;
2. the checkpoint is renamed into place: *that* is the commit of the round;
3. :meth:`Ledger.commit`.

A run killed between 2 and 3 calls :meth:`Ledger.set_commits` with what the checkpoint says when it
resumes.  Rows of attempts that never counted stay as history, and no reader sees them unless it
asks.  One attempt of a ``(phase, round)`` counts at most.

Phases are ``base`` (round 0), ``train`` (rounds 1, 2, ...), ``final`` and ``personal`` (both with
the number of the last round).  Stages of a score are ``base``, ``shared``, ``personal``,
``local_only`` and ``local_only_total`` on split ``test``, and ``base`` and ``received`` (the
adapter a client got in a round, before it trained) on split ``validation``.

Not a number is not a value: SQLite would store NaN as NULL, so it is refused here.  A score that
failed, or that a site withholds, has a status, a reason and no value.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, TypeVar

from fedalign.errors import FedalignError, StorageError
from fedalign.ledger_rows import (
    DATED,
    TABLES,
    WITHHELD,
    ClientRow,
    CurveRow,
    DiscardedRow,
    EventRow,
    ItemRow,
    ReferenceRow,
    ReplyRow,
    ScoreRow,
    TimingRow,
    Triple,
    WeightRow,
)
from fedalign.ledger_store import columns_of, insert, is_blank, open_ledger
from fedalign.storage import TO_DO, out_of_room

__all__ = [
    "WITHHELD",
    "ClientRow",
    "CurveRow",
    "DiscardedRow",
    "EventRow",
    "ItemRow",
    "Ledger",
    "ReferenceRow",
    "ReplyRow",
    "ScoreRow",
    "TimingRow",
    "Triple",
    "WeightRow",
    "canonical_rows",
    "is_blank",
]

Row = TypeVar("Row")


class Ledger:
    """One run's ledger.  Safe to use from several threads; one writing process at a time.

    Raises ``FedalignError`` when the file cannot be opened, written or understood, and for a value
    that may not be stored; ``StorageError`` where the disk is the reason.  A transaction that fails
    leaves nothing behind.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            self._db = open_ledger(path, readonly)
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.Error) and not readonly and out_of_room(error):
                raise StorageError(f"{path}: cannot write the ledger: {error}. {TO_DO}") from error
            raise FedalignError(f"{path}: cannot open the ledger: {error}.") from error

    def close(self) -> None:
        """Close the file; SQLite folds its write-ahead log into it."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing ---------------------------------------------------------------------------------

    def put_run(self, **values: Any) -> None:
        """Store facts of the run as JSON, replacing earlier values of the same keys.

        The report reads ``config`` (flat configuration), ``metric``, ``form``, ``status``
        (``running``, ``completed``, or ``failed: <reason>``), ``manifest`` (JSON text of the wire
        manifest), ``parameters`` (of the base), ``data_name``, ``data_licence``, ``versions``
        (library name to version) and ``started`` (seconds since 1970).  All but ``config`` and
        ``metric`` may be absent.
        """
        rows = []
        for key, value in values.items():
            try:
                rows.append((key, json.dumps(value, sort_keys=True, allow_nan=False)))
            except (TypeError, ValueError) as error:
                raise FedalignError(
                    f"run value '{key}' cannot be stored: {error}. Give plain JSON types."
                ) from error
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO run VALUES (?, ?)", rows)

    def put_clients(self, rows: Sequence[ClientRow]) -> None:
        """Replace the list of clients."""
        with self._transaction() as db:
            db.execute("DELETE FROM clients")
            insert(db, rows)

    def put_references(self, rows: Sequence[ReferenceRow]) -> None:
        """Replace all references."""
        with self._transaction() as db:
            db.execute("DELETE FROM refs")
            insert(db, rows)

    def write(
        self,
        phase: str,
        round: int,
        attempt: int,
        *,
        scores: Sequence[ScoreRow] = (),
        items: Sequence[ItemRow] = (),
        weights: Sequence[WeightRow] = (),
        replies: Sequence[ReplyRow] = (),
        curves: Sequence[CurveRow] = (),
        discarded: Sequence[DiscardedRow] = (),
        timings: Sequence[TimingRow] = (),
    ) -> None:
        """Store all rows of one attempt in one transaction; the same triple again replaces it.

        Rows of other attempts stay.  Call it for every triple that will be committed, also when it
        has no rows.
        """
        triple = (phase, round, attempt)
        with self._transaction() as db:
            for kind in DATED:
                db.execute(
                    f"DELETE FROM {TABLES[kind]} WHERE phase=? AND round=? AND attempt=?", triple
                )
            for rows in (scores, items, weights, replies, curves, discarded, timings):
                insert(db, rows, triple)
            db.execute("INSERT OR REPLACE INTO written VALUES (?, ?, ?)", triple)

    def event(
        self,
        kind: str,
        detail: str = "",
        *,
        phase: str = "",
        round: int = 0,
        attempt: int = 0,
        client: str = "",
    ) -> None:
        """Record that something happened now.  ``detail`` must hold no text a client sent."""
        self.put_events([EventRow(time.time(), kind, phase, round, attempt, client, detail)])

    def put_events(self, rows: Sequence[EventRow]) -> None:
        """Record several events in one transaction; none writes nothing."""
        if rows:
            with self._transaction() as db:
                insert(db, rows)

    def commit(self, phase: str, round: int, attempt: int) -> None:
        """Let an attempt count, in place of any other attempt of the same phase and round."""
        with self._transaction() as db:
            self._commit(db, (phase, round, attempt))

    def set_commits(self, triples: Iterable[Triple]) -> None:
        """Let exactly these attempts count: what the checkpoint says, when a run resumes."""
        with self._transaction() as db:
            db.execute("DELETE FROM commits")
            for triple in triples:
                self._commit(db, triple)

    def _commit(self, db: sqlite3.Connection, triple: Triple) -> None:
        known = db.execute(
            "SELECT 1 FROM written WHERE phase=? AND round=? AND attempt=?", tuple(triple)
        ).fetchone()
        if known is None:
            phase, round, attempt = triple
            raise FedalignError(
                f"{self.path}: phase '{phase}', round {round}, attempt {attempt} was never "
                "written, so it cannot count. Write its rows first; after a crash this means that "
                "the ledger is older than the checkpoint: restore the ledger that belongs to it."
            )
        db.execute("INSERT OR REPLACE INTO commits VALUES (?, ?, ?)", tuple(triple))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.IntegrityError as error:
                raise FedalignError(
                    f"{self.path}: a row breaks a rule of its table: {error}. A score needs "
                    "a value, or a failed status with a reason, and no row may occur twice."
                ) from error
            except sqlite3.Error as error:
                if out_of_room(error):
                    raise StorageError(
                        f"{self.path}: cannot write the ledger: {error}. {TO_DO}"
                    ) from error
                raise FedalignError(
                    f"{self.path}: cannot write the ledger: {error}. Nothing of this step was "
                    "stored; check permissions and other writers, then resume."
                ) from error

    # -- reading: committed rows only --------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Return the facts of the run."""
        return {key: json.loads(value) for key, value in self._query("SELECT * FROM run")}

    def commits(self) -> list[Triple]:
        """Return the attempts that count, sorted by phase and round."""
        rows = self._query("SELECT phase, round, attempt FROM commits ORDER BY phase, round")
        return [(str(p), int(r), int(a)) for p, r, a in rows]

    def attempts(self) -> list[Triple]:
        """Return every attempt that wrote rows, counting or not, sorted."""
        rows = self._query("SELECT phase, round, attempt FROM written ORDER BY 1, 2, 3")
        return [(str(p), int(r), int(a)) for p, r, a in rows]

    def clients(self) -> list[ClientRow]:
        """Return the clients, sorted by name."""
        return self._read(ClientRow, order="client")

    def references(self, name: str | None = None) -> list[ReferenceRow]:
        """Return the references, or those of one name."""
        return self._read(ReferenceRow, {"name": name}, order="name, quantity, grp")

    def events(self, kind: str | None = None) -> list[EventRow]:
        """Return the events in the order in which they were recorded."""
        return self._read(EventRow, {"kind": kind}, order="rowid")

    def scores(self, stage: str | None = None, split: str | None = None) -> list[ScoreRow]:
        """Return committed scores, sorted by phase, round, stage and client."""
        where = {"stage": stage, "split": split}
        return self._read(ScoreRow, where, order="phase, round, stage, client")

    def items(self, stage: str | None = None, split: str | None = None) -> list[ItemRow]:
        """Return committed per-question scores, sorted by stage, client and question."""
        where = {"stage": stage, "split": split}
        return self._read(ItemRow, where, order="phase, round, stage, client, question")

    def weights(self) -> list[WeightRow]:
        """Return committed group weights, sorted by round and group."""
        return self._read(WeightRow, order="phase, round, grp")

    def replies(self, committed: bool = True) -> list[ReplyRow]:
        """Return replies of attempts that count, or (``False``) of those that never did."""
        order = "phase, round, attempt, client"
        return self._read(ReplyRow, order=order, committed=committed)

    def curves(self, name: str | None = None) -> list[CurveRow]:
        """Return committed training metrics, sorted by round, client and name."""
        return self._read(CurveRow, {"name": name}, order="phase, round, client, name")

    def discarded(self) -> list[DiscardedRow]:
        """Return committed discarded shares, sorted by round, layer and group."""
        return self._read(DiscardedRow, order="phase, round, layer, grp")

    def timings(self) -> list[TimingRow]:
        """Return committed timings, sorted by round and name."""
        return self._read(TimingRow, order="phase, round, name")

    def _read(
        self,
        kind: type[Row],
        where: dict[str, str | None] | None = None,
        *,
        order: str,
        committed: bool = True,
    ) -> list[Row]:
        conditions = [f"{column} = ?" for column, v in (where or {}).items() if v is not None]
        values = [v for v in (where or {}).values() if v is not None]
        if kind in DATED:
            verb = "IN" if committed else "NOT IN"
            conditions.append(
                f"(phase, round, attempt) {verb} (SELECT phase, round, attempt FROM commits)"
            )
        clause = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        columns = ", ".join(columns_of(kind))
        rows = self._query(f"SELECT {columns} FROM {TABLES[kind]}{clause} ORDER BY {order}", values)
        names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        made = (dict(zip(names, row, strict=True)) for row in rows)
        if kind is WeightRow:
            return [kind(**{**values, "present": bool(values["present"])}) for values in made]
        return [kind(**values) for values in made]

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise FedalignError(f"{self.path}: cannot read the ledger: {error}.") from error


def canonical_rows(ledger: Ledger) -> list[tuple[Any, ...]]:
    """Return what two runs must agree on: clients, references and committed rows, sorted.

    Left out: attempt numbers, timings, node names (the result must not depend on nodes), events
    (a resumed run has one more) and the facts of the run (they hold times and paths).
    """
    rows: list[Any] = [*ledger.clients(), *ledger.references()]
    for read in (ledger.scores, ledger.items, ledger.weights, ledger.replies, ledger.curves):
        rows.extend(read())
    rows.extend(ledger.discarded())
    left_out = ("attempt", "node")
    made = (
        (TABLES[type(r)], *(getattr(r, f.name) for f in fields(r) if f.name not in left_out))
        for r in rows
    )
    return sorted(made, key=lambda row: [(v is not None, str(v)) for v in row])
