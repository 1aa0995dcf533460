"""What the coordinator's host says: registry, processes, certificates, audit log, disk.

Each function reads one part of the state folder.  A part that is not there yet is empty; one that
cannot be read raises ``FedalignError``, and the caller shows that sentence instead.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from fedalign.audit import verify
from fedalign.errors import DataError, FedalignError
from server.registry import Registry, Site
from server.status_records import (
    AuditFacts,
    CertificateFacts,
    InviteFacts,
    ProcessFacts,
    SiteFacts,
)

if TYPE_CHECKING:
    from server.superlink_admin import NodeEntry

REGISTRY = "registry.sqlite"
AUDIT = "audit.jsonl"
PIDS = "pids.json"
CERTIFICATES = (("server certificate", "tls/server.crt"), ("CA certificate", "ca/ca.crt"))
CLOCK_SLACK = 2.0
"""Seconds by which the kernel's time of a process's start may be off."""
RANK = {"pending": 1, "active": 2}
"""Which key of a site is shown: the active one, else a pending one, else the last that ended."""


def read_registry(
    state: Path, now: float, nodes: Sequence[NodeEntry] | None
) -> tuple[tuple[SiteFacts, ...], tuple[InviteFacts, ...]]:
    """Return one row for each site and the invitations that are still open.

    ``nodes`` is what the SuperLink says; None when it was not asked.  A site with several keys
    shows the one in force, else the last one.
    """
    path = state / REGISTRY
    if not path.is_file():
        return (), ()
    try:
        with Registry(path, readonly=True) as registry:
            keys, invites = registry.sites(), registry.invites()
    except sqlite3.Error as error:
        raise FedalignError(f"{path}: cannot read the registry: {error}.") from error
    shown: dict[str, Site] = {}
    for key in sorted(keys, key=lambda k: (RANK.get(k.status, 0), k.enrolled_at)):
        shown[key.site] = key
    by_id = None if nodes is None else {n.node_id: n for n in nodes}
    sites = tuple(_site(shown[name], by_id, now) for name in sorted(shown))
    open_ = [InviteFacts(i.site, i.group, i.expires_at) for i in invites if i.expires_at > now]
    return sites, tuple(sorted(open_, key=lambda i: (i.expires, i.site)))


def _site(key: Site, nodes: Mapping[int, NodeEntry] | None, now: float) -> SiteFacts:
    status, seen = key.status, None
    if nodes is not None and status == "active":
        node = None if key.node_id is None else nodes.get(key.node_id)
        online = node is not None and node.status == "online"
        status = "online" if online else "offline"
        seen = now if online else node.last_seen if node is not None else None
    return SiteFacts(key.site, key.group, status, key.enrolled_at, seen, "", "")


def read_processes(state: Path) -> tuple[ProcessFacts, ...]:
    """Return what ``pids.json`` names, and whether each is alive; empty when nothing was started.

    Raises ``DataError`` when the file is not a table of names and process ids.
    """
    path = state / PIDS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        pids = {str(name): int(pid) for name, pid in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{path}: not a table of process names and ids. Start again.") from None
    noted = path.stat().st_mtime
    return tuple(ProcessFacts(n, pid, alive(pid, noted)) for n, pid in sorted(pids.items()))


def alive(pid: int, noted: float) -> bool:
    """Say whether the process that had this id at time ``noted`` still runs.

    One that ended but was not collected does not, and one that began later is another that got the
    same id, for example after this host was started anew.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # another user's: not one that we started
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/stat").read_text(encoding="utf-8")
    except OSError:
        return True  # no /proc on this system
    words = stat.rpartition(")")[2].split()
    booted = next(float(x.split()[1]) for x in boot.splitlines() if x.startswith("btime "))
    began = booted + float(words[19]) / os.sysconf("SC_CLK_TCK")
    return words[0] != "Z" and began <= noted + CLOCK_SLACK


def read_certificates(state: Path) -> tuple[CertificateFacts, ...]:
    """Return when the coordinator's certificates end; ``DataError`` for one that is none."""
    found = []
    for name, place in CERTIFICATES:
        path = state / place
        if not path.is_file():
            continue
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except ValueError:
            raise DataError(
                f"{path}: not a certificate in PEM form. Restore it from a copy, or make the "
                "certificates again (fedalign-server init)."
            ) from None
        found.append(CertificateFacts(name, certificate.not_valid_after_utc.timestamp()))
    return tuple(found)


def read_audit(state: Path) -> AuditFacts:
    """Verify the audit log's chain; a broken one is a finding, not an error."""
    path = state / AUDIT
    if not path.is_file():
        return AuditFacts("none", 0, "")
    try:
        return AuditFacts("verified", verify(path), "")
    except DataError as error:
        return AuditFacts("broken", 0, str(error))


def disk_free(state: Path) -> int:
    """Return the bytes free for this user where the state folder is."""
    return shutil.disk_usage(state).free
