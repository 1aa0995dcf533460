"""A site's own policy: what it lets out when it is asked what sampled texts are worth to it.

Three settings (section ``site``):

``answers``       which source a reward may come from: the client's true answers, the frozen
                  predictor, or both (``exchange.py`` asks the source)
``rounding``      a reward r leaves as the nearest multiple of m, halves up, then at most 1:
                  min(1, m floor(r / m + 1/2))
``query_budget``  B different texts a question are ever answered; further ones are refused

Two texts that parse to the same answer are the same text.  One that was answered before is answered
again, free, with the same number, so that a repeated or resumed exchange loses nothing and learns
nothing; malformed text costs nothing, since anybody can see that it is malformed.

:func:`release` is a pure function over the answers given so far.  With a budget these are kept for
each client in one SQLite file in the run folder (:func:`decide`), which is written before the reply
leaves: a process that is killed at any moment has answered nothing that it does not remember.  The
file is made in full under another name and linked into place, so an empty or truncated file is a
damaged one: an error, never a fresh budget.  Without a budget :func:`release` is enough: the same
text to the same answers is worth the same number.

*What this is not.*  It is no differential privacy (``docs/privacy.md``).  A new run folder is a new
budget, and whoever can delete the file can reset it.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedalign.config import SiteConfig
from fedalign.errors import ConfigError, DataError
from fedalign.wire import FROM_SHARES, PREDICTED

SITE = "site"
"""Folder of these files in the run folder."""


@dataclass(frozen=True)
class Asked:
    """One text that the site could answer, and what it is worth before the policy."""

    question: str
    """Key of the question (``data.records.question_key``)."""
    answer: str
    """Canonical form of what the text says."""
    reward: float
    """In [0, 1], exact."""
    code: int
    """``FROM_SHARES`` or ``PREDICTED``."""


@dataclass(frozen=True)
class Released:
    """What leaves the site for one text."""

    reward: float
    code: int


Given = Mapping[tuple[str, str], Released]
"""Everything answered so far, by (question, answer)."""


def rounded(reward: float, multiple: float) -> float:
    """Return a reward in [0, 1] as the nearest multiple, at most 1; exact where ``multiple`` is 0.

    Raises ``ValueError`` for a reward that is not in [0, 1] or a multiple outside [0, 1).
    """
    if not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
        raise ValueError(f"reward = {reward} is outside [0, 1]")
    if not 0.0 <= multiple < 1.0:
        raise ValueError(f"rounding = {multiple} is outside [0, 1); 0 sends rewards exact")
    if multiple == 0.0:
        return reward
    # Without the inner rounding .15 / .1 is 1.4999999999999998, and a half would go down.
    return min(1.0, multiple * math.floor(round(reward / multiple, 9) + 0.5))


def release(
    settings: SiteConfig, given: Given, asked: Sequence[Asked]
) -> tuple[Given, list[Released | None]]:
    """Return the answers given from now on, and what leaves for each text; None is refused.

    Args:
        settings: ``rounding`` and ``query_budget`` (0 sets no limit) are read.
        given: what was answered before, at least for the questions of ``asked``.
        asked: texts in the order of the rollouts, which is the order the budget is spent in.
    """
    known = dict(given)
    spent: dict[str, int] = {}
    for question, _ in known:
        spent[question] = spent.get(question, 0) + 1
    out: list[Released | None] = []
    for one in asked:
        key = (one.question, one.answer)
        if key not in known:
            used = spent.get(one.question, 0)
            if settings.query_budget and used >= settings.query_budget:
                out.append(None)
                continue
            known[key] = Released(rounded(one.reward, settings.rounding), one.code)
            spent[one.question] = used + 1
        out.append(known[key])
    return known, out


def decide(
    settings: SiteConfig, path: Path, client: str, asked: Sequence[Asked]
) -> list[Released | None]:
    """Release one client's texts, and remember what is answered before returning.

    Args:
        path: the client's file (:func:`policy_file`), made where it is absent.
        client: written to the file, so that it is not mistaken for another client's.

    Raises:
        DataError: the file is damaged, is another client's, or cannot be written.
    """
    if not path.exists():
        _create(path, client)
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=60.0)
    except sqlite3.Error as error:
        raise DataError(f"{path}: cannot be opened ({error}).") from None
    try:
        connection.execute("PRAGMA synchronous=FULL")
        # Taken before reading, so that two processes cannot spend the same budget twice.
        connection.execute("BEGIN IMMEDIATE")
        before = _read(connection, path, client)
        after, out = release(settings, before, asked)
        rows = [(*k, v.reward, v.code) for k, v in after.items() if k not in before]
        connection.executemany("INSERT INTO given VALUES (?, ?, ?, ?)", rows)
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        # Locked for a minute, no space, no permission; or tables that are not ours.
        raise DataError(
            f"{path}: the answers given so far could not be read or kept ({error}); nothing was "
            "answered. See that the file is whole, writable and in no other process's hands."
        ) from None
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from None
    finally:
        connection.close()
    return out


def policy_file(out: str, place: int, client: str) -> Path:
    """Return the file of a client in run folder ``out``; ``place`` is its place in the population.

    Raises ``ConfigError`` where there is no run folder.
    """
    if not out:
        raise ConfigError(
            "site.query-budget needs a run folder to remember answers in; set run.out."
        )
    readable = re.sub(r"[^A-Za-z0-9]+", "-", client).strip("-")[:60]
    return Path(out) / SITE / f"{place:05d}-{readable}.sqlite"


def _create(path: Path, client: str) -> None:
    """Make an empty file under another name and link it into place, unless another was faster."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute("CREATE TABLE about (client TEXT NOT NULL)")
            connection.execute(
                "CREATE TABLE given (question TEXT NOT NULL, answer TEXT NOT NULL, "
                "reward REAL NOT NULL, code INTEGER NOT NULL, PRIMARY KEY (question, answer))"
            )
            connection.execute("INSERT INTO about VALUES (?)", (client,))
        finally:
            connection.close()
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another process of this site made it in the meantime
        finally:
            temporary.unlink()
    except (OSError, sqlite3.Error) as error:
        raise DataError(f"{path}: cannot be made ({error}); a query budget needs it.") from None


def _read(
    connection: sqlite3.Connection, path: Path, client: str
) -> dict[tuple[str, str], Released]:
    """Return everything answered so far, checked row by row."""
    state = connection.execute("PRAGMA integrity_check").fetchone()
    if state != ("ok",):
        raise _damaged(path, str(state[0] if state else "no answer to the integrity check"))
    owners = connection.execute("SELECT client FROM about").fetchall()
    if owners != [(client,)]:
        raise _damaged(path, f"it belongs to {owners}, not to client '{client}'")
    given: dict[tuple[str, str], Released] = {}
    for question, answer, reward, code in connection.execute("SELECT * FROM given"):
        # SQLite keeps whatever type it is given, so the type is part of the check.
        sound = isinstance(reward, float) and 0.0 <= reward <= 1.0
        if not (sound and code in (FROM_SHARES, PREDICTED)):
            raise _damaged(path, f"question {question} holds reward {reward} and code {code}")
        given[(question, answer)] = Released(reward, code)
    return given


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}: the record of answered texts is damaged ({why}). Nothing is answered from it: a "
        "lost record would be a fresh budget. Put a copy back, or start a new run."
    )
