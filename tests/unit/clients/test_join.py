"""Joining and renewing: false coordinators, faults at every step, and what lies on the disk."""

from __future__ import annotations

import importlib.util
import os
import stat as modes
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients import node_files
from clients.join import join, renew
from clients.node_files import NodeFiles
from clients.site import Home, node_settings
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.keys import fingerprint, flower_form, read_private
from server.revoke import revoke

_spec = importlib.util.spec_from_file_location(
    "stand", Path(__file__).parent.parent / "enrollment" / "stand.py"
)
assert _spec is not None
assert _spec.loader is not None
stand = sys.modules["stand"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    with stand.stand(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def key_of(home: Path, name: str = "key") -> bytes:
    """Return a key of the folder, public, in Flower's form."""
    return flower_form(read_private((home / "node" / name).read_bytes()).public_key())


def node_names(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "node").iterdir())


def mode(path: Path) -> int:
    return modes.S_IMODE(path.stat().st_mode)


FINISHED = ["ca.crt", "invite", "key", "key.pub", "site.toml"]


def test_a_site_joins(hub: Any, home: Path) -> None:
    said: list[str] = []
    invite = hub.invite("clinic", "North (1)")
    done = join(invite, home, said.append)
    mark = fingerprint(key_of(home))
    assert (done.site, done.group, done.fingerprint) == ("clinic", "North (1)", mark)
    assert (done.gateway, done.ca, done.again) == ("localhost:9444", hub.authority.mark, False)
    assert hub.registry.by_key(key_of(home)).status == "active"
    assert node_names(home) == FINISHED
    assert mode(home / "node") == mode(home / "trainer") == 0o700
    assert mode(home / "node" / "key") == 0o600
    assert (home / "node" / "ca.crt").read_bytes() == stand.pem(hub.authority.certificate)
    assert (home / "node" / "key.pub").read_text().endswith(" clinic\n")
    assert node_settings(Home(home)) == {
        "name": "clinic",
        "group": "North (1)",
        "fingerprint": mark,
        "enrollment": f"localhost:{hub.port}",
        "gateway": "localhost:9444",
    }
    settings = tomllib.loads((home / "trainer" / "trainer.toml").read_text())
    assert settings == {"site": {"name": "clinic", "group": "North (1)"}}
    assert len(said) == 3
    token = invite.partition("token=")[2].partition("&")[0]
    assert all(token not in line for line in said)
    assert all(token.encode() not in p.read_bytes() for p in home.rglob("*") if p.is_file())


def test_joining_again_with_the_same_invite_changes_nothing(hub: Any, home: Path) -> None:
    invite = hub.invite()
    first = join(invite, home)
    before = key_of(home)
    again = join(invite, home)
    assert again.again
    assert (again.site, again.fingerprint) == (first.site, first.fingerprint)
    assert key_of(home) == before
    assert node_names(home) == FINISHED


def test_other_lines_of_trainer_toml_stay(hub: Any, home: Path) -> None:
    (home / "trainer").mkdir(parents=True)
    text = (
        '# mine\n[data]\nsource = "pairs" # [site]\npath = "/srv/x"\n\n'
        '[site] # old\nname = "x"\ngroup = "y"\n[model]\ndevice = "cpu"\n'
    )
    (home / "trainer" / "trainer.toml").write_text(text)
    join(hub.invite("clinic", "north"), home)
    written = (home / "trainer" / "trainer.toml").read_text()
    assert tomllib.loads(written) == {
        "site": {"name": "clinic", "group": "north"},
        "data": {"source": "pairs", "path": "/srv/x"},
        "model": {"device": "cpu"},
    }
    assert "# mine" in written


def test_a_trainer_toml_that_cannot_be_kept_stops_before_anything_is_sent(
    hub: Any, home: Path
) -> None:
    (home / "trainer").mkdir(parents=True)
    (home / "trainer" / "trainer.toml").write_text("[data\n")
    with pytest.raises(EnrollmentError, match="not valid TOML"):
        join(hub.invite(), home)
    assert hub.events() == []
    assert hub.registry.sites() == []


# --- faults -------------------------------------------------------------------------------------


def test_used_expired_and_guessed_invites(hub: Any, home: Path, tmp_path: Path) -> None:
    used = hub.invite("a")
    join(used, tmp_path / "first")
    expired = hub.invite("b", life=5.0)
    hub.clock.now += 6.0
    for line in (used, expired, hub.line("A" * 43)):
        with pytest.raises(EnrollmentError, match="Ask the operator for a new one"):
            join(line, home)
    assert not (home / "node" / "key").exists()
    assert join(hub.invite("c"), home).site == "c"
    assert node_names(home) == FINISHED


def test_the_superlink_is_down_then_up(hub: Any, home: Path) -> None:
    invite = hub.invite()
    hub.admin.down = True
    with pytest.raises(EnrollmentError, match="Run the same command again later"):
        join(invite, home)
    (pending,) = home.glob("node/key*")
    kept = key_of(home, pending.name)
    assert mode(pending) == 0o600
    hub.admin.down = False
    hub.clock.now += 1e6
    assert join(invite, home).site == "north-clinic"
    assert key_of(home) == kept


STEPS = ["ca.crt", "key.pub", "site.toml", "trainer.toml", "invite", "rename"]


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_while_the_answer_is_written_is_finished(
    hub: Any, home: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = hub.invite()
    crash_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        join(invite, home)
    monkeypatch.undo()
    (pending,) = [p for p in home.glob("node/key.*") if p.name != "key.pub"]
    kept = key_of(home, pending.name)
    assert join(invite, home).site == "north-clinic"
    assert key_of(home) == kept
    assert node_names(home) == FINISHED


def crash_at(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_write, plain_replace = node_files.write, os.replace

    def write(path: Path, data: bytes, mode: int) -> None:
        if path.name == step:
            raise KeyboardInterrupt
        plain_write(path, data, mode)

    def replace(old: Path, new: Path) -> None:
        if step == "rename" and Path(new).name == "key":
            raise KeyboardInterrupt
        plain_replace(old, new)

    monkeypatch.setattr(node_files, "write", write)
    monkeypatch.setattr("clients.node_files.os.replace", replace)


def test_a_crash_before_the_answer(hub: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invite = hub.invite()
    monkeypatch.setattr(
        "clients.join._identity", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        join(invite, home)
    monkeypatch.undo()
    assert len(hub.admin.live()) == 1
    assert join(invite, home).site == "north-clinic"
    assert hub.admin.live() == [key_of(home)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gateway": "not an address"}, "cannot be used"),
        ({"answer_ca": b"no certificate"}, "cannot be used"),
        ({"answer_ca": b""}, "cannot be used"),
        ({"answer_ca": stand.pem(stand.Authority().certificate)}, "another CA certificate"),
    ],
)
def test_answers_that_cannot_be(
    home: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with stand.stand(tmp_path / "hub", **changes) as hub:
        with pytest.raises(EnrollmentError, match=words):
            join(hub.invite(), home)
        assert not (home / "node" / "site.toml").exists()


def test_folders_that_cannot_be_written(hub: Any, home: Path) -> None:
    home.mkdir()
    (home / "trainer").write_text("a file")
    with pytest.raises(EnrollmentError, match="nothing was sent"):
        join(hub.invite(), home)
    assert hub.events() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="changing owners needs root")
def test_as_root_files_belong_to_the_owner_of_their_folder(hub: Any, home: Path) -> None:
    for name, owner in (("node", 12345), ("trainer", 12346)):
        (home / name).mkdir(parents=True, mode=0o700)
        os.chown(home / name, owner, owner)
    join(hub.invite(), home)
    assert {p.stat().st_uid for p in (home / "node").iterdir()} == {12345}
    assert (home / "trainer" / "trainer.toml").stat().st_uid == 12346


# --- one folder, one site, one coordinator ------------------------------------------------------


def test_a_folder_of_another_coordinator(hub: Any, home: Path, tmp_path: Path) -> None:
    join(hub.invite(), home)
    before = key_of(home)
    with stand.stand(tmp_path / "other") as other:
        with pytest.raises(EnrollmentError, match="belongs to another coordinator"):
            join(other.invite(), home)
        assert other.events() == []
    assert key_of(home) == before


def test_an_invite_for_another_site_is_not_used_up(hub: Any, home: Path, tmp_path: Path) -> None:
    join(hub.invite("a"), home)
    invite = hub.invite("b")
    with pytest.raises(EnrollmentError, match="This folder is site 'a'"):
        join(invite, home)
    assert NodeFiles(home).identity().site == "a"  # type: ignore[union-attr]
    assert join(invite, tmp_path / "second").site == "b"


def test_a_second_invite_gives_a_new_key(hub: Any, home: Path) -> None:
    join(hub.invite(), home)
    old = key_of(home)
    done = join(hub.invite(), home)
    assert not done.again
    assert key_of(home) != old
    assert hub.admin.live() == [key_of(home)]
    assert node_names(home) == FINISHED


# --- renewal ------------------------------------------------------------------------------------


def test_renewal(hub: Any, home: Path) -> None:
    first = join(hub.invite(), home)
    old = key_of(home)
    done = renew(home)
    assert key_of(home) != old
    assert done.fingerprint == fingerprint(key_of(home)) != first.fingerprint
    assert node_settings(Home(home))["fingerprint"] == done.fingerprint
    assert hub.admin.live() == [key_of(home)]
    assert node_names(home) == FINISHED
    assert renew(home).fingerprint != done.fingerprint


def test_renewal_keeps_the_old_key_until_the_new_one_is_confirmed(hub: Any, home: Path) -> None:
    join(hub.invite(), home)
    old = key_of(home)
    hub.admin.down = True
    with pytest.raises(EnrollmentError, match="Run the same command again later"):
        renew(home)
    assert key_of(home) == old
    assert hub.registry.allowed(fingerprint(old))
    new = key_of(home, "key.renew")
    hub.admin.down = False
    renew(home)
    assert key_of(home) == new


@pytest.mark.parametrize("step", ["ca.crt", "key.pub", "site.toml", "rename"])
def test_a_crash_while_a_renewal_is_written_is_finished(
    hub: Any, home: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(hub.invite(), home)
    old = key_of(home)
    crash_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        renew(home)
    monkeypatch.undo()
    assert key_of(home) == old
    new = key_of(home, "key.renew")
    renew(home)
    assert key_of(home) == new
    assert hub.admin.live() == [new]


def test_renewal_of_a_revoked_site(hub: Any, home: Path) -> None:
    join(hub.invite(), home)
    old = key_of(home)
    revoke(hub.registry, hub.admin, hub.audit, "north-clinic")
    with pytest.raises(EnrollmentError, match="may have been revoked"):
        renew(home)
    assert key_of(home) == old
    assert join(hub.invite(), home).site == "north-clinic"
    assert node_names(home) == FINISHED


def test_renewal_before_joining_and_at_a_false_coordinator(
    hub: Any, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(EnrollmentError, match="has not joined"):
        renew(home)
    join(hub.invite(), home)
    with stand.stand(tmp_path / "false") as false:
        path = home / "node" / "site.toml"
        path.write_text(path.read_text().replace(f":{hub.port}", f":{false.port}"))
        with pytest.raises(EnrollmentError, match="is not the coordinator"):
            renew(home)
        assert false.events() == []
    assert not (home / "node" / "key.renew").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("key", "", "not an OpenSSH private key"),
        ("site.toml", "[site]\n", "not as joining writes it"),
        ("site.toml", "[site", "not valid TOML"),
        ("ca.crt", None, "cannot be read"),
        ("ca.crt", "garbage", "not a certificate"),
    ],
)
def test_damaged_files_are_named(
    hub: Any, home: Path, name: str, text: str | None, words: str
) -> None:
    join(hub.invite(), home)
    path = home / "node" / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(EnrollmentError, match=words) as caught:
        renew(home)
    assert str(path) in str(caught.value)
