"""Revocation: the registry at once, Flower as soon as it can be told."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.audit import AuditLog, verify
from fedalign.compat import public_key_to_bytes
from fedalign.enrollment.errors import EnrollmentError
from server.registry import Registry
from server.revoke import reconcile, revoke
from server.superlink_admin import AdminUnavailable, NodeEntry


class Admin:
    def __init__(self) -> None:
        self.status: dict[int, str] = {}
        self.down = False

    def register(self, public_key: bytes, name: str) -> int:
        node_id = len(self.status) + 1
        self.status[node_id] = "registered"
        return node_id

    def unregister(self, node_id: int) -> None:
        self.status[node_id] = "unregistered"

    def nodes(self) -> list[NodeEntry]:
        if self.down:
            raise AdminUnavailable("no answer")
        return [NodeEntry(i, "", status, b"") for i, status in self.status.items()]


def enrol(registry: Registry, admin: Admin, site: str) -> bytes:
    key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    pending = registry.claim(registry.invite(site, "north", 60.0, 0.0), key, 0.0)
    registry.registered(pending.fingerprint, admin.register(key, f"{site}@north"), 0.0)
    return key


def test_a_site_is_out_everywhere(tmp_path: Path) -> None:
    admin, audit = Admin(), AuditLog(tmp_path / "audit.jsonl")
    with Registry(tmp_path / "registry.sqlite") as registry:
        gone, kept = enrol(registry, admin, "a"), enrol(registry, admin, "b")
        done = revoke(registry, admin, audit, "a")
        assert (done.keys, done.flower_knows) == (1, True)
        statuses = [found.status for k in (gone, kept) if (found := registry.by_key(k))]
        assert statuses == ["revoked", "active"]
        assert list(admin.status.values()) == ["unregistered", "registered"]
        again = revoke(registry, admin, audit, "a")
        assert (again.keys, again.flower_knows) == (0, True)
        with pytest.raises(EnrollmentError, match="no site 'c'"):
            revoke(registry, admin, audit, "c")
    assert verify(tmp_path / "audit.jsonl") == 3


def test_flower_is_told_when_it_is_back(tmp_path: Path) -> None:
    admin, audit = Admin(), AuditLog(tmp_path / "audit.jsonl")
    with Registry(tmp_path / "registry.sqlite") as registry:
        gone = enrol(registry, admin, "a")
        admin.down = True
        assert not revoke(registry, admin, audit, "a").flower_knows
        found = registry.by_key(gone)
        assert found is not None
        assert found.status == "revoked"
        admin.down = False
        assert [site.site for site in reconcile(registry, admin, audit)] == ["a"]
        assert admin.status == {1: "unregistered"}
        assert reconcile(registry, admin, audit) == []


def test_a_replaced_key_is_unregistered(tmp_path: Path) -> None:
    admin, audit = Admin(), AuditLog(tmp_path / "audit.jsonl")
    with Registry(tmp_path / "registry.sqlite") as registry:
        enrol(registry, admin, "a")
        enrol(registry, admin, "a")
        reconcile(registry, admin, audit)
        assert admin.status == {1: "unregistered", 2: "registered"}
