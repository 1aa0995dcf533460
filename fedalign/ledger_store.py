"""How rows get into SQLite: opening the file, and strict conversion of every value."""

from __future__ import annotations

import math
import operator
import sqlite3
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from fedalign.errors import FedalignError
from fedalign.ledger_rows import FORMAT, SCHEMA, TABLES, Triple

BUSY_SECONDS = 30.0


def open_ledger(path: Path, readonly: bool) -> sqlite3.Connection:
    """Open or create the file; ``FedalignError`` for another format or, read-only, no file."""
    if readonly:
        if not path.is_file():
            raise FedalignError(f"{path}: no such ledger. Give the folder of a run.")
        uri = path.resolve().as_uri() + "?mode=ro"
        db = _connect(uri)
        try:
            version = _format(db)
        except sqlite3.OperationalError:
            # A folder without write permission cannot hold the log's index; without a log there
            # is nothing to miss.
            db.close()
            if path.with_name(path.name + "-wal").exists():
                raise
            db = _connect(uri + "&immutable=1")
            version = _format(db)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = _connect(path.resolve().as_uri())
        db.execute("PRAGMA journal_mode = WAL")
        # The checkpoint must never name rows that a power cut took away.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty:
            for statement in SCHEMA.split(";\n"):
                if statement.strip():
                    db.execute(statement)
        db.execute("COMMIT")
        version = _format(db)
    if version != FORMAT:
        db.close()
        raise FedalignError(
            f"{path}: ledger format {version}; this version of fedalign reads format {FORMAT}."
        )
    return db


def is_blank(path: Path) -> bool:
    """Say whether ``path`` is a database without tables: a ledger whose making was cut off."""
    try:
        db = _connect(path.resolve().as_uri() + "?mode=ro")
        try:
            return int(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]) == 0
        finally:
            db.close()
    except sqlite3.Error:
        return False  # whoever opens it is told why it cannot be read


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS
    )


def _format(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def columns_of(kind: type) -> list[str]:
    """Return the columns of a row type, in the order of its fields."""
    return ["grp" if f.name == "group" else f.name for f in fields(kind)]


def insert(db: sqlite3.Connection, rows: Sequence[Any], triple: Triple | None = None) -> None:
    """Insert rows of one type; a value that is not of its column's type or not finite raises.

    ``triple`` stands in place of the rows' own phase, round and attempt.
    """
    if not rows:
        return
    kind = type(rows[0])
    table, columns = TABLES[kind], columns_of(kind)
    names = [f.name for f in fields(kind)]
    types = get_type_hints(kind)
    given = {} if triple is None else dict(zip(("phase", "round", "attempt"), triple, strict=True))
    made = []
    for name in names:
        if name in given:
            made.append([_value(given[name], name, types[name], table, rows[0])] * len(rows))
        else:
            kept = types[name]
            made.append([_value(getattr(r, name), name, kept, table, r) for r in rows])
    marks = ", ".join("?" for _ in columns)
    db.executemany(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", zip(*made, strict=True)
    )


def _value(value: Any, name: str, kind: Any, table: str, row: Any) -> Any:
    """Return a field of ``row`` as SQLite takes it; numpy scalars become Python's own."""
    plain = type(value)
    if (plain is str and kind is str) or (plain is int and kind is int):
        return value
    if value is None:
        return None
    if kind is str:
        if not isinstance(value, str):
            raise FedalignError(f"ledger table '{table}': {name} = {value!r} is not text.")
        return value
    try:
        if kind in (int, bool):
            return operator.index(value)
        number = value + 0.0
    except TypeError:
        raise FedalignError(
            f"ledger table '{table}': {name} = {value!r} is a {type(value).__name__}, not a number."
        ) from None
    if not math.isfinite(number):
        raise FedalignError(
            f"ledger table '{table}': {name} = {value} in {row}. A value must be finite; record a "
            "failure with a status and a reason, and no value."
        )
    return float(number)
