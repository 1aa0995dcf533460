"""Which nodes of a deployment may take part: the public key decides, and the registry knows keys.

Flower lists every node that is online, with the public key it proved to hold.  A node is a *site*
only when the coordinator's registry holds that key as active; the site's name and group are those
that enrolment bound to the key.  The readable name ``site@group`` in Flower, and what a node says
of itself, count for nothing.  Nodes that are unknown, pending, replaced or revoked are never sent
anything.

The registry is read anew at every call: a revocation counts at once, also in the middle of a round.
When it cannot be read the run fails; nobody is let in because nobody could be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.serverapp import Grid

from fedalign.config import DeploymentConfig
from server.link import nodes

ACTIVE = "active"
MAY_FINISH = (ACTIVE, "replaced")
"""A key that its own site renewed may still answer what it was asked before."""


class Registered(Protocol):
    """One key of the registry; ``server.registry.Site`` is one."""

    @property
    def site(self) -> str:
        """Name of the site, and of its one client."""

    @property
    def group(self) -> str:
        """Group the key was enrolled for."""

    @property
    def public_key(self) -> bytes:
        """The key as Flower shows it in ``NodeInfo.public_key``."""

    @property
    def status(self) -> str:
        """``pending``, ``active``, ``revoked`` or ``replaced``."""


class Audit(Protocol):
    """Takes what the operator must be able to prove later; ``fedalign.audit.AuditLog`` is one."""

    def append(self, event: str, **facts: str | int | float) -> object:
        """Write one event."""


@dataclass(frozen=True)
class OnlineSite:
    """An enrolled site that is online now."""

    site: str
    group: str
    node: int
    key: bytes


class Enrolled:
    """The enrolled sites, as the registry has them now."""

    def __init__(
        self, read: Callable[[], Iterable[Registered]], audit: Audit | None = None
    ) -> None:
        self._read = read
        self._audit = audit

    def active(self) -> dict[str, str]:
        """Return site to group of every active key, sorted by site."""
        found = {r.site: r.group for r in self._read() if r.status == ACTIVE}
        return dict(sorted(found.items()))

    def online(self, grid: Grid) -> dict[str, OnlineSite]:
        """Return the active sites that are online, sorted by name."""
        active = {r.public_key: r for r in self._read() if r.status == ACTIVE}
        found: dict[str, OnlineSite] = {}
        for info in sorted(nodes(grid), key=lambda n: n.node_id):
            row = active.get(bytes(info.public_key))
            if row is not None:
                found[row.site] = OnlineSite(row.site, row.group, info.node_id, row.public_key)
        return dict(sorted(found.items()))

    def revoked(self, keys: Mapping[str, bytes]) -> set[str]:
        """Return the clients whose key, as they were asked by, may no longer speak for them."""
        good = {r.public_key for r in self._read() if r.status in MAY_FINISH}
        return {client for client, key in keys.items() if key not in good}

    def note(self, event: str, **facts: str | int | float) -> None:
        """Write to the audit log, where there is one."""
        if self._audit is not None:
            self._audit.append(event, **facts)


def open_enrolled(deployment: DeploymentConfig) -> Enrolled | None:
    """Return the sites of the registry that the settings name; None in a simulation."""
    if not deployment.registry:
        return None
    from fedalign.audit import AuditLog
    from server.registry import Registry, Site

    path = Path(deployment.registry)

    def read() -> list[Site]:
        with Registry(path, readonly=True) as registry:
            return registry.sites()

    return Enrolled(read, AuditLog(Path(deployment.audit)) if deployment.audit else None)
