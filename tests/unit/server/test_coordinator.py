"""The state folder: made whole or not at all, private, and read strictly."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedalign.audit import verify
from fedalign.errors import ConfigError
from server import ca
from server.coordinator import (
    Coordinator,
    NotInitialised,
    init,
    load,
    renew_certificate,
    write_private,
)


@pytest.fixture
def made(tmp_path: Path) -> Coordinator:
    return init(tmp_path / "c", ["hub.example.org", "203.0.113.7"], 20000)


def test_folder_is_private_and_complete(made: Coordinator) -> None:
    for path in [made.state, *made.state.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        public = path in (made.root, made.server_certificate, made.chain)
        assert mode == (0o700 if path.is_dir() else 0o644 if public else 0o600), path
    assert made.secret.stat().st_size == 32
    assert made.chain.read_bytes() == made.server_certificate.read_bytes() + made.root.read_bytes()
    assert verify(made.audit) == 1
    assert made.registry.is_file()


def test_settings_say_where_everything_listens(made: Coordinator) -> None:
    assert load(made.state) == made
    assert [s.port for s in made.services.values()] == [20000, 20001, 20002, 20003]
    assert (made.enrollment.host, made.superlink.host, made.status.host) == (
        "0.0.0.0",
        "127.0.0.1",
        "127.0.0.1",
    )
    assert made.enrollment.public == "hub.example.org:20000"
    assert made.gateway.public == "hub.example.org:20001"
    assert made.superlink_address == "127.0.0.1:20002"


def test_an_address_of_version_6_is_written_in_brackets(tmp_path: Path) -> None:
    assert init(tmp_path / "c", ["2001:db8::1"]).gateway.public == "[2001:db8::1]:9444"


def test_an_existing_folder_is_left_alone(made: Coordinator, tmp_path: Path) -> None:
    before = made.root.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        init(made.state, ["hub"])
    assert made.root.read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        init(tmp_path / "empty", ["hub"])


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="neither a host name"):
        init(tmp_path / "c", ["a b"])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("server.coordinator.ca.issue_leaf", fail)
    with pytest.raises(OSError, match="disk full"):
        init(tmp_path / "c", ["hub"])
    assert list(tmp_path.iterdir()) == []


def test_new_certificate_under_the_same_root(made: Coordinator) -> None:
    root, old = made.root.read_bytes(), made.server_certificate.read_bytes()
    assert renew_certificate(made) == ["hub.example.org", "203.0.113.7"]
    new = made.server_certificate.read_bytes()
    assert made.root.read_bytes() == root
    assert new != old
    assert ca.hosts_of(new) == ca.hosts_of(old)
    assert made.chain.read_bytes() == new + root
    assert renew_certificate(made, ["other.example.org"]) == ["other.example.org"]
    assert stat.S_IMODE(made.server_key.stat().st_mode) == 0o600
    assert verify(made.audit) == 3


def test_no_coordinator_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotInitialised, match="fedalign-server init"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[gateway]", "[gatweay]", "missing"),
        ("[status]", "[more]\nx = 1\n[status]", "unknown section"),
        ("port = 20002", "prot = 20002", "unknown key superlink.prot"),
        ("port = 20002", "port = '20002'", "must be a int"),
        ("port = 20002", "port = true", "must be a int"),
        ("port = 20002", "port = 70000", "not in 1 to 65535"),
        ("port = 20002", "port = 20001", "same port"),
        ("port = 20002", "port = ", "not valid TOML"),
        ('public = "hub.example.org:20001"', 'public = "hub"', "name:port"),
    ],
)
def test_wrong_settings_are_named(made: Coordinator, old: str, new: str, says: str) -> None:
    path = made.state / "coordinator.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load(made.state)


def test_a_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_private(tmp_path / "x", b"secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
