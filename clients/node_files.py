"""What joining writes in a site's folder.

::

    HOME/node/     0700   key (0600)  key.pub  ca.crt  site.toml  invite (hash of the used token)
                          key.NAME    a key that is not confirmed yet
    HOME/trainer/  0700   trainer.toml, of which only [site] is ours

Every file is written under another name and renamed, so there is never half of one.  A new key is
kept under its own name until the coordinator has confirmed it; whatever ends in between, trying
again finds it.  Renaming it to ``key`` is the last step.  As root, files get the owner of their
folder, so that each of the site's two users keeps what is its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.keys import (
    PrivateKey,
    fingerprint,
    flower_form,
    new_key,
    openssh_line,
    private_file,
    read_private,
)

MAX_KEY_BYTES = 16 * 1024


@dataclass(frozen=True)
class Identity:
    """Who the site is, and where its coordinator is; what ``site.toml`` holds."""

    site: str
    group: str
    fingerprint: str
    """Of the site's key."""
    enrollment: str
    """``host:port`` of the enrollment service."""
    gateway: str
    """``host:port`` of the gateway."""


class NodeFiles:
    """The files of one site's folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.node = home / "node"
        self.settings = home / "trainer" / "trainer.toml"
        self.key = self.node / "key"
        self.ca = self.node / "ca.crt"

    def make_folders(self) -> None:
        """Make the folders, or make sure that they can be written; nothing is sent before."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            for folder in (self.node, self.settings.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
                probe = folder / f".probe.{secrets.token_hex(4)}"
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                probe.unlink()
            if self.node.stat().st_mode & 0o077:
                self.node.chmod(0o700)
            if self.settings.exists():
                _toml(self.settings)
        except OSError as error:
            raise EnrollmentError(
                f"{error.filename}: cannot be written ({error.strerror}). Join as the user who "
                "owns it, or as root; nothing was sent."
            ) from None

    def identity(self) -> Identity | None:
        """Return what ``site.toml`` says; None before the site has joined."""
        path = self.node / "site.toml"
        if not path.exists():
            return None
        tables = _toml(path)
        try:
            site, coordinator = tables["site"], tables["coordinator"]
            texts = [site[k] for k in ("name", "group", "fingerprint")]
            texts += [coordinator[k] for k in ("enrollment", "gateway")]
        except (KeyError, TypeError):
            texts = []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise EnrollmentError(
                f"{path}: not as joining writes it. Restore it, or move {self.node} away and join "
                "with a new invite."
            )
        return Identity(*texts)

    def ca_certificate(self) -> bytes:
        """Return the CA certificate that the site pinned (PEM)."""
        return self._read(self.ca)

    def read_key(self) -> PrivateKey:
        """Return the site's key."""
        return self._parse(self.key)

    def pending_key(self, name: str) -> PrivateKey:
        """Return the unconfirmed key of this name; made and stored first where there is none."""
        path = self._pending(name)
        if not path.exists():
            write(path, private_file(new_key()), 0o600)
        return self._parse(path)

    def has_pending(self, name: str) -> bool:
        """Say whether there is an unconfirmed key of this name."""
        return self._pending(name).exists()

    def used_invite(self) -> str:
        """Return the hash of the token that the site's key came by; empty if by none."""
        try:
            return (self.node / "invite").read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    def confirm(self, identity: Identity, ca: bytes, name: str, invite: str = "") -> None:
        """Write everything the coordinator confirmed; make the key of ``name`` the site's key.

        An empty ``name``: the site's key stays.  The old key is gone only with the last step.
        """
        pending = self._pending(name) if name else self.key
        public = self._parse(pending).public_key()
        if fingerprint(flower_form(public)) != identity.fingerprint:
            raise EnrollmentError(f"{pending}: another key than was confirmed. Try again.")
        write(self.ca, ca, 0o644)
        write(self.node / "key.pub", f"{openssh_line(public)} {identity.site}\n".encode(), 0o644)
        write(self.node / "site.toml", _site_toml(identity).encode(), 0o600)
        self._write_settings(identity)
        if invite:
            write(self.node / "invite", f"{invite}\n".encode(), 0o600)
        if name:
            os.replace(pending, self.key)
            _sync(self.node)
        for other in self.node.glob("key.*"):
            if other.name != "key.pub":
                other.unlink()

    def _pending(self, name: str) -> Path:
        return self.node / f"key.{name}"

    def _parse(self, path: Path) -> PrivateKey:
        try:
            return read_private(self._read(path)[:MAX_KEY_BYTES])
        except EnrollmentError as error:
            raise EnrollmentError(
                f"{path}: {error} Move it away and join with a new invite."
            ) from None

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise EnrollmentError(
                f"{path}: cannot be read ({error.strerror}). Join first, as the user who owns "
                f"{self.node}."
            ) from None

    def _write_settings(self, identity: Identity) -> None:
        """Set ``[site]`` of ``trainer.toml``; every other line stays as it is."""
        table = f"[site]\nname = {_text(identity.site)}\ngroup = {_text(identity.group)}\n"
        path = self.settings
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        before = tomllib.loads(old)
        wanted = {"name": identity.site, "group": identity.group}
        if before.get("site") == wanted:
            return
        text = _without_site(old)
        text = f"{table}\n{text}" if text.strip() else table
        if tomllib.loads(text) != {**before, "site": wanted}:
            raise EnrollmentError(
                f"{path}: its [site] cannot be set here. Write there:\n{table}and join again "
                "with the same invite."
            )
        write(path, text.encode(), 0o600)


def token_mark(token: str) -> str:
    """Return what a token is remembered by; it does not tell the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def write(path: Path, data: bytes, mode: int) -> None:
    """Write a file at once and wait until it is on disk."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(draft, flags, mode)
        with os.fdopen(descriptor, "wb") as f:
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(f.fileno(), owner.st_uid, owner.st_gid)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
        _sync(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise EnrollmentError(
            f"{path}: cannot be written ({error.strerror}). Make room or set the rights, then run "
            "the same command again."
        ) from None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_site(text: str) -> str:
    """Return TOML text without its table ``[site]``."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            inside = line.strip().split("#")[0].replace(" ", "").strip() == "[site]"
        if not inside:
            kept.append(line)
    return "".join(kept)


def _site_toml(identity: Identity) -> str:
    return (
        "# Written by fedalign-client join.\n"
        f"[site]\nname = {_text(identity.site)}\ngroup = {_text(identity.group)}\n"
        f"fingerprint = {_text(identity.fingerprint)}\n\n"
        f"[coordinator]\nenrollment = {_text(identity.enrollment)}\n"
        f"gateway = {_text(identity.gateway)}\n"
    )


def _text(value: str) -> str:
    return json.dumps(value)


def _toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as f:
            return tomllib.load(f)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EnrollmentError(f"{path}: not valid TOML: {error}. Correct it first.") from None
    except OSError as error:
        raise EnrollmentError(f"{path}: cannot be read ({error.strerror}).") from None
