"""The registry: one token, one key; one site, one active key; and what survives a crash."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.keys import fingerprint
from fedalign.errors import DataError
from server.registry import Refused, Registry

NOW = 1000.0
HOUR = 3600.0


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry.sqlite") as registry:
        yield registry


def enroll(registry: Registry, site: str, group: str, key: bytes, node: int = 7) -> str:
    token = registry.invite(site, group, HOUR, NOW)
    registry.claim(token, key, NOW)
    registry.registered(fingerprint(key), node, NOW)
    return token


def refused(code: str, work: object, *arguments: object) -> None:
    with pytest.raises(Refused) as caught:
        work(*arguments)  # type: ignore[operator]
    assert caught.value.code == code


def test_a_life(registry: Registry) -> None:
    token = registry.invite("clinic", "North (1)", HOUR, NOW)
    (invite,) = registry.invites()
    assert (invite.site, invite.group, invite.expires_at) == ("clinic", "North (1)", NOW + HOUR)
    pending = registry.claim(token, b"one", NOW + 1)
    assert (pending.status, pending.node_id, pending.ended_at) == ("pending", None, None)
    assert registry.invites() == []
    assert not registry.allowed(pending.fingerprint)
    big = 2**64 - 2
    active = registry.registered(pending.fingerprint, big, NOW + 2)
    assert (active.status, active.node_id, active.enrolled_at) == ("active", big, NOW + 2)
    assert registry.allowed(active.fingerprint)
    assert registry.by_key(b"one") == active
    assert registry.by_key(b"two") is None
    assert registry.sites() == [active]
    assert registry.registered(active.fingerprint, big, NOW + 9) == active


def test_nothing_secret_is_stored_and_the_files_are_private(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    old = os.umask(0)
    try:
        with Registry(path) as registry:
            token = registry.invite("clinic", "north", HOUR, NOW)
            found = sorted(tmp_path.iterdir())
            assert len(found) == 3
            assert {stat.S_IMODE(p.stat().st_mode) for p in found} == {0o600}
            assert all(token.encode() not in p.read_bytes() for p in found)
    finally:
        os.umask(old)
    path.chmod(0o644)
    with Registry(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_tokens_differ_and_are_long(registry: Registry) -> None:
    tokens = {registry.invite(f"site-{i}", "g", HOUR, NOW) for i in range(50)}
    assert len(tokens) == 50
    assert {len(t) for t in tokens} == {43}


def test_guessed_used_expired_withdrawn(registry: Registry) -> None:
    refused("token-unknown", registry.claim, "guess", b"key", NOW)
    token = registry.invite("a", "g", HOUR, NOW)
    refused("token-expired", registry.claim, token, b"key", NOW + HOUR)
    registry.claim(token, b"key", NOW + HOUR - 1)
    refused("token-used", registry.claim, token, b"other", NOW)
    old = registry.invite("b", "g", HOUR, NOW)
    new = registry.invite("b", "g", HOUR, NOW)
    refused("token-withdrawn", registry.claim, old, b"key2", NOW)
    assert registry.claim(new, b"key2", NOW).site == "b"


def test_a_refused_claim_leaves_the_token_open(registry: Registry) -> None:
    enroll(registry, "a", "g", b"known")
    token = registry.invite("b", "g", HOUR, NOW)
    refused("key-known", registry.claim, token, b"known", NOW)
    refused("site-mismatch", registry.claim, token, b"new", NOW, "a")
    assert registry.claim(token, b"new", NOW, "b").site == "b"


def test_the_same_key_finishes_after_a_crash_even_when_the_token_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with Registry(path) as registry:
        token = registry.invite("a", "g", HOUR, NOW)
        registry.claim(token, b"key", NOW)
    with Registry(path) as registry:
        again = registry.claim(token, b"key", NOW + 2 * HOUR)
        assert again.status == "pending"
        refused("token-used", registry.claim, token, b"thief", NOW)
        registry.registered(again.fingerprint, 5, NOW)
        assert registry.claim(token, b"key", NOW + 3 * HOUR).status == "active"


@pytest.mark.parametrize("state", ["pending", "active", "revoked", "replaced"])
def test_a_key_is_claimed_once_whatever_became_of_it(registry: Registry, state: str) -> None:
    token = registry.invite("a", "g", HOUR, NOW)
    registry.claim(token, b"key", NOW)
    if state != "pending":
        registry.registered(fingerprint(b"key"), 1, NOW)
    if state == "revoked":
        registry.revoke("a", NOW)
    if state == "replaced":
        enroll(registry, "a", "g", b"next", 2)
    for site in ("a", "b"):
        other = registry.invite(site, "g", HOUR, NOW)
        refused("key-known", registry.claim, other, b"key", NOW)
    assert registry.by_key(b"key").status == state  # type: ignore[union-attr]


def test_a_second_invite_changes_the_key_when_the_new_one_is_registered(
    registry: Registry,
) -> None:
    enroll(registry, "a", "g", b"old", 1)
    token = registry.invite("a", "g", HOUR, NOW)
    registry.claim(token, b"new", NOW)
    assert registry.allowed(fingerprint(b"old"))
    registry.registered(fingerprint(b"new"), 2, NOW + 5)
    assert [(s.public_key, s.status, s.ended_at) for s in registry.sites()] == [
        (b"old", "replaced", NOW + 5),
        (b"new", "active", None),
    ]


def test_a_site_keeps_its_group_once_it_had_a_key(registry: Registry) -> None:
    registry.invite("a", "typo", HOUR, NOW)
    enroll(registry, "a", "g", b"key")
    for _ in range(2):
        with pytest.raises(EnrollmentError, match="is enrolled in group 'g'"):
            registry.invite("a", "h", HOUR, NOW)
        registry.revoke("a", NOW)
    registry.invite("a", "g", HOUR, NOW)


@pytest.mark.parametrize("life", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_an_invite_lives_a_sensible_time(registry: Registry, life: float) -> None:
    with pytest.raises(EnrollmentError, match="cannot live"):
        registry.invite("a", "g", life, NOW)
    with pytest.raises(EnrollmentError, match="site's name"):
        registry.invite("A", "g", HOUR, NOW)


def test_revocation_is_for_ever_and_closes_open_invites(registry: Registry) -> None:
    token = enroll(registry, "a", "g", b"key", 3)
    renewal = registry.invite("a", "g", HOUR, NOW)
    other = registry.invite("b", "g", HOUR, NOW)
    (ended,) = registry.revoke("a", NOW + 1)
    assert (ended.status, ended.node_id, ended.ended_at) == ("revoked", 3, NOW + 1)
    assert not registry.allowed(ended.fingerprint)
    refused("key-revoked", registry.claim, token, b"key", NOW)
    refused("token-withdrawn", registry.claim, renewal, b"new", NOW)
    refused("key-revoked", registry.registered, ended.fingerprint, 3, NOW)
    refused("key-revoked", registry.renew, b"key", b"new", NOW)
    assert registry.claim(other, b"b", NOW).site == "b"
    assert registry.revoke("a", NOW) == []
    enroll(registry, "a", "g", b"new", 4)
    assert registry.allowed(fingerprint(b"new"))
    with pytest.raises(EnrollmentError, match="no site 'zzz'"):
        registry.revoke("zzz", NOW)


def test_a_pending_key_is_revoked_too(registry: Registry) -> None:
    token = registry.invite("a", "g", HOUR, NOW)
    registry.claim(token, b"key", NOW)
    assert [s.status for s in registry.revoke("a", NOW)] == ["revoked"]
    refused("key-revoked", registry.claim, token, b"key", NOW)


def test_renewal(registry: Registry) -> None:
    enroll(registry, "a", "g", b"old", 1)
    pending = registry.renew(b"old", b"new", NOW)
    assert (pending.site, pending.group, pending.status) == ("a", "g", "pending")
    assert registry.allowed(fingerprint(b"old"))
    assert registry.renew(b"old", b"new", NOW) == pending
    registry.registered(pending.fingerprint, 2, NOW)
    assert not registry.allowed(fingerprint(b"old"))
    # The answer was lost: the old key asks again for the same new one, and only for that.
    assert registry.renew(b"old", b"new", NOW).status == "active"
    refused("key-replaced", registry.renew, b"old", b"third", NOW)
    refused("key-unknown", registry.renew, b"nobody", b"third", NOW)
    refused("key-known", registry.renew, b"new", b"old", NOW)


def test_renewal_by_a_key_that_is_not_active(registry: Registry) -> None:
    token = registry.invite("a", "g", HOUR, NOW)
    registry.claim(token, b"pending", NOW)
    refused("key-pending", registry.renew, b"pending", b"new", NOW)
    enroll(registry, "b", "g", b"b")
    refused("key-known", registry.renew, b"b", b"pending", NOW)


def test_an_older_claim_cannot_take_the_site_back(registry: Registry) -> None:
    first = registry.invite("a", "g", HOUR, NOW)
    registry.claim(first, b"first", NOW)
    enroll(registry, "a", "g", b"second")
    refused("key-replaced", registry.claim, first, b"first", NOW)
    refused("key-replaced", registry.registered, fingerprint(b"first"), 9, NOW)
    assert registry.allowed(fingerprint(b"second"))


def test_a_later_claim_may_still_take_the_site_from_an_older_one(registry: Registry) -> None:
    for key in (b"first", b"second"):
        registry.claim(registry.invite("a", "g", HOUR, NOW), key, NOW)
    registry.registered(fingerprint(b"first"), 1, NOW)
    registry.registered(fingerprint(b"second"), 2, NOW)
    assert [s.status for s in registry.sites()] == ["replaced", "active"]


def test_sixteen_threads_one_token(registry: Registry) -> None:
    token = registry.invite("a", "g", HOUR, NOW)
    barrier, results = threading.Barrier(16), []

    def work(i: int) -> None:
        barrier.wait(10)
        try:
            results.append(registry.claim(token, f"key-{i}".encode(), NOW).public_key)
        except Refused as error:
            results.append(error.code)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 16
    assert results.count("token-used") == 15
    assert len(registry.sites()) == 1


CLAIM = """
import sys, time
from pathlib import Path
from server.registry import Refused, Registry
path, token, name, start = sys.argv[1:]
with Registry(Path(path)) as registry:
    while time.time() < float(start):
        time.sleep(0.001)
    for i in range(25):
        try:
            registry.claim(token, f"{name}-{i}".encode(), 1000.0)
            print("won")
        except Refused as error:
            print(error.code)
"""


def test_four_processes_one_token(tmp_path: Path) -> None:
    import time

    path = tmp_path / "registry.sqlite"
    with Registry(path) as registry:
        token = registry.invite("a", "g", HOUR, NOW)
        start = str(time.time() + 2.0)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CLAIM, str(path), token, f"p{i}", start],
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(4)
        ]
        out = "".join(p.communicate(timeout=60)[0] for p in processes).split()
        assert len(out) == 100
        assert sorted(set(out)) == ["token-used", "won"]
        assert out.count("won") == 1
        assert len(registry.sites()) == 1


def test_readers_see_changes_and_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with Registry(path) as registry, Registry(path, readonly=True) as reader:
        enroll(registry, "a", "g", b"key")
        assert [s.site for s in reader.sites()] == ["a"]
        registry.revoke("a", NOW)
        assert not reader.allowed(fingerprint(b"key"))
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.invite("b", "g", HOUR, NOW)
    with Registry(path, readonly=True) as reader:
        assert reader.sites()[0].status == "revoked"


def test_what_is_no_registry_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a registry"):
        Registry(tmp_path / "none", readonly=True)
    assert not (tmp_path / "none").exists()
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to be looked at as one\n" * 20)
    with pytest.raises(DataError, match="cannot be read as a registry"):
        Registry(text)
    newer = tmp_path / "newer"
    Registry(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("pragma user_version = 9")
    with pytest.raises(DataError, match="format 9"):
        Registry(newer)
    with pytest.raises(DataError, match="cannot be opened"):
        Registry(tmp_path / "no-folder" / "r")


class Life(RuleBasedStateMachine):
    """Any order of events: one active key a site, ends are final, a key has one site."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.folder.name) / "r")
        self.tokens: list[str] = []
        self.ended: set[bytes] = set()
        self.owner: dict[bytes, tuple[str, str]] = {}

    @rule(site=st.sampled_from("ab"))
    def invite(self, site: str) -> None:
        self.tokens.append(self.registry.invite(site, f"group-{site}", HOUR, NOW))

    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def claim(self, data: st.DataObject, key: bytes) -> None:
        if self.tokens:
            self._try(self.registry.claim, data.draw(st.sampled_from(self.tokens)), key, NOW)

    @rule(old=st.binary(min_size=1, max_size=1), new=st.binary(min_size=1, max_size=1))
    def renew(self, old: bytes, new: bytes) -> None:
        self._try(self.registry.renew, old, new, NOW)

    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        keys = [s.fingerprint for s in self.registry.sites()]
        if keys:
            self._try(self.registry.registered, data.draw(st.sampled_from(keys)), 1, NOW)

    @rule(site=st.sampled_from("ab"))
    def revoke(self, site: str) -> None:
        self._try(self.registry.revoke, site, NOW)

    def _try(self, work: object, *arguments: object) -> None:
        with contextlib.suppress(EnrollmentError):
            work(*arguments)  # type: ignore[operator]

    @invariant()
    def holds(self) -> None:
        rows = self.registry.sites()
        active = [s.site for s in rows if s.status == "active"]
        assert len(active) == len(set(active))
        for row in rows:
            assert self.owner.setdefault(row.public_key, (row.site, row.group)) == (
                row.site,
                f"group-{row.site}",
            )
            assert (row.ended_at is not None) == (row.status in ("revoked", "replaced"))
            if row.public_key in self.ended:
                assert row.ended_at is not None
            elif row.ended_at is not None:
                self.ended.add(row.public_key)

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()


Life.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLife = Life.TestCase
