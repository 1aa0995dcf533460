"""The registry: who is enrolled, under which key, and which invites are open.  One SQLite file.

A key's life::

    claim (a token)  \\                            registered (the SuperLink has it)
    renew (old key)  --> pending ------------------------------------------------> active
                            |  a later key of the site is registered: replaced       |
                            '--- the operator revokes the site: revoked -------------'

* A token is 32 random bytes; only its SHA-256 is stored.  It is bound to one site and group, lives
  until the server's clock says so, and belongs for ever to the first key that claims it.  That key
  may claim again as often as it likes: a lost answer or a crash after the claim is finished by
  trying again, also after the token's end.
* A key is claimed once.  It never comes back, at no site, in whatever state it is (Flower does not
  take a key twice either).
* A site has one active key at most and one group for ever.  Its old key stays active until the new
  one is registered; then, in the same transaction, it is replaced.

Every change is one immediate transaction, so of any number of threads and processes that claim one
token, one wins.  An object may be shared by threads, but not taken over a fork.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.keys import fingerprint as fingerprint_of
from fedalign.enrollment.names import check_group, check_site
from fedalign.errors import DataError

VERSION = 1
BUSY_SECONDS = 10.0
TOKEN_BYTES = 32
MAX_LIFETIME = 90 * 86400.0
"""Longest life of an invite, in seconds."""
_SCHEMA = """
create table key (
  seq integer primary key autoincrement,
  fingerprint text not null unique,
  public_key blob not null unique,
  site text not null,
  grp text not null,
  node_id text,
  status text not null check (status in ('pending', 'active', 'revoked', 'replaced')),
  renews text,
  enrolled_at real not null,
  ended_at real
) strict;
create unique index one_active_key on key (site) where status = 'active';
create table invite (
  hash text primary key,
  site text not null,
  grp text not null,
  created_at real not null,
  expires_at real not null,
  status text not null check (status in ('open', 'claimed', 'withdrawn')),
  fingerprint text
) strict;
"""
_SITE = "select site, grp, public_key, fingerprint, node_id, status, enrolled_at, ended_at from key"


class Refused(EnrollmentError):
    """The registry does not accept this.  ``code`` and ``site`` are for the log, not for the peer.

    ``token-unknown``, ``token-used``, ``token-expired``, ``token-withdrawn``, ``site-mismatch``,
    ``key-known``, ``key-unknown``, ``key-revoked``, ``key-replaced``, ``key-pending``.
    """

    def __init__(self, code: str, site: str = "") -> None:
        super().__init__(f"refused: {code}")
        self.code = code
        self.site = site


@dataclass(frozen=True)
class Site:
    """One key of a site; a site that changed its key has several."""

    site: str
    group: str
    public_key: bytes
    """Flower's form."""
    fingerprint: str
    node_id: int | None
    """Flower's id; None until registered."""
    status: str
    """``pending``, ``active``, ``revoked`` or ``replaced``."""
    enrolled_at: float
    """Seconds since 1970: of the claim while pending, then of the registration."""
    ended_at: float | None


@dataclass(frozen=True)
class OpenInvite:
    """An invite that nobody has claimed; it may have expired."""

    site: str
    group: str
    created_at: float
    expires_at: float


class Registry:
    """The file at ``path``, made with mode 0600 where it is missing (not when ``readonly``).

    Times are in seconds since 1970 by the server's clock.  Raises ``DataError`` for a file that is
    no registry.
    """

    def __init__(self, path: Path, readonly: bool = False) -> None:
        if not readonly:
            _make_private(path)
        mode = "ro" if readonly else "rw"
        uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(
                uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._prepare(readonly)
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{path}: cannot be read as a registry ({error}). Restore it from a copy, or name "
                "the state folder of a coordinator."
            ) from None

    def _prepare(self, readonly: bool) -> None:
        if not readonly and self._version() == 0:
            self._db.execute("pragma journal_mode = wal")
        if not readonly:
            self._db.execute("pragma synchronous = full")
            with self._change() as db:
                if self._version() == 0:
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"pragma user_version = {VERSION}")
        if self._version() != VERSION:
            raise sqlite3.DatabaseError(f"format {self._version()}, this release has {VERSION}")

    def _version(self) -> int:
        return int(self._db.execute("pragma user_version").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def invite(self, site: str, group: str, lifetime: float, now: float) -> str:
        """Return a new token for ``site`` in ``group``; it lives ``lifetime`` seconds.

        An older invite of the site that nobody claimed is withdrawn.  For a site with an active
        key it invites to change the key.  Raises ``EnrollmentError`` for a bad name or lifetime,
        and for another group than the site has.
        """
        check_site(site)
        check_group(group)
        if not (math.isfinite(lifetime) and 0 < lifetime <= MAX_LIFETIME):
            raise EnrollmentError(
                f"an invite cannot live {lifetime} seconds; choose more than 0 and at most "
                f"{MAX_LIFETIME:.0f} (90 days)."
            )
        token = secrets.token_urlsafe(TOKEN_BYTES)
        with self._change() as db:
            row = db.execute("select grp from key where site = ? limit 1", (site,)).fetchone()
            if row is not None and row[0] != group:
                raise EnrollmentError(
                    f"site '{site}' is enrolled in group '{row[0]}', where its history is, and "
                    f"cannot change to '{group}'. Invite it to its own group, or another name."
                )
            db.execute(
                "update invite set status = 'withdrawn' where site = ? and status = 'open'",
                (site,),
            )
            values = (_hash(token), site, group, now, now + lifetime)
            db.execute("insert into invite values (?, ?, ?, ?, ?, 'open', null)", values)
        return token

    def claim(self, token: str, public_key: bytes, now: float, site: str = "") -> Site:
        """Give a token to a key (Flower's form), or confirm that it has it.

        Returns the key's row, pending until :meth:`registered`.  ``site``, when given, must be the
        token's.  Raises ``Refused``; a refused claim changes nothing.
        """
        mine = fingerprint_of(public_key)
        with self._change() as db:
            row = db.execute(
                "select site, grp, expires_at, status, fingerprint from invite where hash = ?",
                (_hash(token),),
            ).fetchone()
            if row is None:
                raise Refused("token-unknown")
            name, group, expires, status, owner = row
            if site and site != name:
                raise Refused("site-mismatch", name)
            if status == "claimed":
                if owner != mine:
                    raise Refused("token-used", name)
                return self._live(mine)
            if status == "withdrawn":
                raise Refused("token-withdrawn", name)
            if now >= expires:
                raise Refused("token-expired", name)
            self._add(public_key, name, group, "", now)
            db.execute(
                "update invite set status = 'claimed', fingerprint = ? where hash = ?",
                (mine, _hash(token)),
            )
            return self._live(mine)

    def renew(self, old: bytes, new: bytes, now: float) -> Site:
        """Let an active key name its successor (both Flower's form), or confirm that it did.

        Returns the row of ``new``, pending until :meth:`registered`.  Raises ``Refused``.
        """
        before, after = fingerprint_of(old), fingerprint_of(new)
        with self._change() as db:
            row = self._find(before)
            if row is None:
                raise Refused("key-unknown")
            if row.status == "revoked":
                raise Refused("key-revoked", row.site)
            known = db.execute("select renews from key where fingerprint = ?", (after,)).fetchone()
            if known is not None:
                if known[0] != before:
                    raise Refused("key-known", row.site)
                return self._live(after)
            if row.status != "active":
                raise Refused(f"key-{row.status}", row.site)
            self._add(new, row.site, row.group, before, now)
            return self._live(after)

    def registered(self, fingerprint: str, node_id: int, now: float) -> Site:
        """Make a pending key active under Flower's ``node_id``; older keys of the site end.

        Happening again changes nothing but the id.  Raises ``Refused`` when the key was revoked or
        replaced in the meantime, and for an unknown one.
        """
        with self._change() as db:
            row = self._live(fingerprint)
            db.execute(
                "update key set status = 'replaced', ended_at = ? where site = ? and "
                "status in ('pending', 'active') and "
                "seq < (select seq from key where fingerprint = ?)",
                (now, row.site, fingerprint),
            )
            since = row.enrolled_at if row.status == "active" else now
            db.execute(
                "update key set status = 'active', node_id = ?, enrolled_at = ? "
                "where fingerprint = ?",
                (str(node_id), since, fingerprint),
            )
            return self._live(fingerprint)

    def revoke(self, site: str, now: float) -> list[Site]:
        """End all live keys of a site for ever and withdraw its open invites; return those keys.

        The site can be invited again, with a new key, to the same group.  Raises
        ``EnrollmentError`` for a site that was never invited.
        """
        with self._change() as db:
            known = "select 1 from key where site = ? union select 1 from invite where site = ?"
            if db.execute(known, (site, site)).fetchone() is None:
                names = [r[0] for r in db.execute("select distinct site from key order by site")]
                raise EnrollmentError(
                    f"no site '{site}' to revoke. Enrolled: {', '.join(names) or 'none'}."
                )
            live = [s for s in self._sites("where site = ?", site) if s.ended_at is None]
            db.execute(
                "update key set status = 'revoked', ended_at = ? where site = ? and "
                "status in ('pending', 'active')",
                (now, site),
            )
            db.execute(
                "update invite set status = 'withdrawn' where site = ? and status = 'open'",
                (site,),
            )
            ended = {key.fingerprint for key in live}
            return [s for s in self._sites("where site = ?", site) if s.fingerprint in ended]

    def by_key(self, public_key: bytes) -> Site | None:
        """Return the row of a key in Flower's form, whatever its status."""
        with self._lock:
            return self._find(fingerprint_of(public_key))

    def allowed(self, fingerprint: str) -> bool:
        """Say whether a key is active now."""
        with self._lock:
            row = self._find(fingerprint)
        return row is not None and row.status == "active"

    def sites(self) -> list[Site]:
        """Return all keys, by site and then from the oldest to the newest."""
        with self._lock:
            return self._sites("order by site, seq")

    def invites(self) -> list[OpenInvite]:
        """Return the invites that nobody claimed, also expired ones, by site."""
        query = (
            "select site, grp, created_at, expires_at from invite where status = 'open' "
            "order by site"
        )
        with self._lock:
            return [OpenInvite(*row) for row in self._db.execute(query)]

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("rollback")
                raise

    def _add(self, public_key: bytes, site: str, group: str, renews: str, now: float) -> None:
        fingerprint = fingerprint_of(public_key)
        if self._find(fingerprint) is not None:
            raise Refused("key-known", site)
        self._db.execute(
            "insert into key (fingerprint, public_key, site, grp, status, renews, enrolled_at) "
            "values (?, ?, ?, ?, 'pending', ?, ?)",
            (fingerprint, public_key, site, group, renews or None, now),
        )

    def _live(self, fingerprint: str) -> Site:
        row = self._find(fingerprint)
        if row is None:
            raise Refused("key-unknown")
        if row.status not in ("pending", "active"):
            raise Refused(f"key-{row.status}", row.site)
        return row

    def _find(self, fingerprint: str) -> Site | None:
        found = self._sites("where fingerprint = ?", fingerprint)
        return found[0] if found else None

    def _sites(self, rest: str, *values: str) -> list[Site]:
        rows = self._db.execute(f"{_SITE} {rest}", values).fetchall()
        return [
            Site(site, group, key, mark, int(node) if node else None, status, since, end)
            for site, group, key, mark, node, status, since, end in rows
        ]


def _make_private(path: Path) -> None:
    """Make the file where it is missing, so that it is private from birth.

    SQLite gives its side files the mode of the main one.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_mode & 0o077:
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{path}: the registry cannot be opened ({error.strerror}).") from None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
