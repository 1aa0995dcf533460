"""Which nodes are sites: the key decides, and the registry is read at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedalign.audit import AuditLog, verify
from fedalign.compat import NodeInfo
from fedalign.config import DeploymentConfig
from fedalign.errors import FedalignError
from fedalign.ledger import Ledger
from server.asking import Asking, QuorumMissed
from server.directory import Directory, Member
from server.enrolled import Enrolled, OnlineSite, open_enrolled
from server.registry import Registry
from server.roll_call import OTHER_GROUP, OTHER_SITE, false_claim


@dataclass(frozen=True)
class Row:
    site: str
    group: str
    public_key: bytes
    status: str


class Nodes:
    """All that is read of a grid."""

    def __init__(self, *nodes: tuple[int, bytes]) -> None:
        self.nodes = nodes

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=n, name="x@y", public_key=k) for n, k in self.nodes]


ROWS = [
    Row("a", "g", b"a", "active"),
    Row("b", "g", b"b", "pending"),
    Row("c", "h", b"c", "revoked"),
    Row("d", "h", b"d-old", "replaced"),
    Row("d", "h", b"d", "active"),
]


def test_only_active_keys_are_sites() -> None:
    enrolled = Enrolled(lambda: ROWS)
    assert enrolled.active() == {"a": "g", "d": "h"}
    grid: Any = Nodes(
        (5, b"a"), (4, b"b"), (3, b"c"), (2, b"d-old"), (1, b"d"), (9, b"?"), (8, b"")
    )
    assert enrolled.online(grid) == {
        "a": OnlineSite("a", "g", 5, b"a"),
        "d": OnlineSite("d", "h", 1, b"d"),
    }


def test_a_key_its_own_site_replaced_may_finish_and_no_other() -> None:
    keys = {"a": b"a", "c": b"c", "d": b"d-old", "e": b"forgotten"}
    assert Enrolled(lambda: ROWS).revoked(keys) == {"c", "e"}


def test_claims() -> None:
    from fedalign.wire import Hello, Manifest

    def hello(*clients: str, group: str = "g") -> Hello:
        n = len(clients)
        manifest = Manifest((("m", (1, 1)),), 1, 1.0, ("m",), "b", "t", False)
        ones = (1,) * n
        return Hello(clients, (group,) * n, "survey", ones, ones, ones, ones, manifest, {})

    site = OnlineSite("a", "g", 1, b"a")
    assert false_claim(site, hello("a")) == ""
    assert false_claim(site, hello("b")) == OTHER_SITE
    assert false_claim(site, hello("a", "b")) == OTHER_SITE
    assert false_claim(site, hello()) == OTHER_SITE
    assert false_claim(site, hello("a", group="h")) == OTHER_GROUP


def public_key() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_the_real_registry_is_read_anew_each_time(tmp_path: Path) -> None:
    path, log = tmp_path / "registry.sqlite", tmp_path / "audit.jsonl"
    key = public_key()
    grid: Any = Nodes((11, key))
    with Registry(path) as registry:
        token = registry.invite("oslo", "north", 60.0, 1000.0)
        enrolled = open_enrolled(DeploymentConfig(str(path), str(log)))
        assert enrolled is not None
        site = registry.claim(token, key, 1001.0)
        assert enrolled.online(grid) == {}
        registry.registered(site.fingerprint, 11, 1002.0)
        assert enrolled.online(grid) == {"oslo": OnlineSite("oslo", "north", 11, key)}
        assert enrolled.revoked({"oslo": key}) == set()
        registry.revoke("oslo", 1003.0)
        assert enrolled.online(grid) == {}
        assert enrolled.revoked({"oslo": key}) == {"oslo"}
    enrolled.note("claims-other-site", site="oslo")
    AuditLog(log)
    assert verify(log) == 1


def test_without_a_registry_it_is_a_simulation(tmp_path: Path) -> None:
    assert open_enrolled(DeploymentConfig()) is None
    missing = open_enrolled(DeploymentConfig(str(tmp_path / "none.sqlite")))
    assert missing is not None
    with pytest.raises(FedalignError):
        missing.active()


def test_what_a_revoked_site_sent_does_not_count(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    members = {c: Member(c, "g", 1, 1, 1, 1, 1, c.encode()) for c in ("a", "c")}
    manifest: Any = type("M", (), {"hash": "h", "upload_size": 4})()
    directory = Directory(members, "survey", manifest, {}, enrolled=True)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asking = Asking(settings(run__quorum=1.0), directory, ledger)
        asking.enrolled = Enrolled(lambda: ROWS)
        asking.messages("train.round", "train", 1, ("a", "c"), lambda request: _content(request))
        usable, failed = {"a": 1, "c": 2}, {}
        with pytest.raises(QuorumMissed, match=r"1 of 2 clients usable, 2 needed.*revoked"):
            asking.check_quorum("train", 1, usable, failed)
        assert (usable, failed) == ({"a": 1}, {"c": "revoked"})
        assert [(e.kind, e.detail, e.client) for e in ledger.events()] == [
            ("reply-rejected", "revoked", "c")
        ]


def _content(request: Any) -> Any:
    from fedalign.wire import encode_request

    return encode_request(request)
