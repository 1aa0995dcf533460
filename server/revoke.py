"""Taking a site out: the registry at once, the gateway within a second, Flower as soon as it is up.

The registry is what counts: the gateway lets no key through that is not active there, and a run
takes no site that is not.  Unregistering at Flower besides makes its SuperNode stop, and is final:
the site needs a new invite and a new key.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedalign.audit import AuditLog
from server.registry import Registry, Site
from server.superlink_admin import AdminUnavailable, SuperLinkAdmin

GONE = ("revoked", "replaced")


@dataclass(frozen=True)
class Revoked:
    """What a revocation did: the keys it ended, and whether Flower knows of it."""

    keys: int
    flower_knows: bool


def revoke(registry: Registry, admin: SuperLinkAdmin, audit: AuditLog, site: str) -> Revoked:
    """Revoke all keys and open invites of a site; ``EnrollmentError`` for one never invited."""
    ended = registry.revoke(site, time.time())
    audit.append("site.revoked", site=site, keys=len(ended))
    try:
        reconcile(registry, admin, audit)
    except AdminUnavailable:
        return Revoked(len(ended), flower_knows=False)
    return Revoked(len(ended), flower_knows=True)


def reconcile(registry: Registry, admin: SuperLinkAdmin, audit: AuditLog) -> list[Site]:
    """Unregister every node whose key the registry has ended and Flower has not; return them.

    Raises ``AdminUnavailable`` when the SuperLink cannot be asked.
    """
    gone = [s for s in registry.sites() if s.status in GONE]
    by_node = {s.node_id: s for s in gone if s.node_id is not None}
    # A key that was given up before the registry noted its node is known to Flower all the same.
    by_key = {s.public_key: s for s in gone}
    if not gone:
        return []
    done = []
    for node in sorted(admin.nodes(), key=lambda n: n.node_id):
        site = by_node.get(node.node_id) or by_key.get(node.public_key)
        if site is not None and node.status != "unregistered":
            admin.unregister(node.node_id)
            audit.append("site.unregistered", site=site.site, key=site.fingerprint[:16])
            done.append(site)
    return done
