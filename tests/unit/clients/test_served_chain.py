"""Joining a coordinator that is not the one of the invite: nothing is sent, and it is said why."""

from __future__ import annotations

import datetime
import importlib.util
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.join import join
from clients.served_chain import check_chain, served_chain
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.invite import make_invite

_spec = importlib.util.spec_from_file_location(
    "stand", Path(__file__).parent.parent / "enrollment" / "stand.py"
)
assert _spec is not None
assert _spec.loader is not None
stand = sys.modules["stand"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand)
DAY = stand.DAY


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    with stand.stand(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def refused(work: Callable[[], object], words: str, home: Path) -> None:
    """Assert the words of the error, and that no key was made: nothing was sent."""
    with pytest.raises(EnrollmentError, match=words) as caught:
        work()
    assert caught.value.exit_code == 7
    assert not list(home.glob("node/key*"))


def test_another_coordinator_at_the_address(hub: Any, home: Path, tmp_path: Path) -> None:
    with stand.stand(tmp_path / "false") as false:
        invite = make_invite(f"localhost:{false.port}", "A" * 43, hub.authority.mark).line()
        refused(lambda: join(invite, home), "is not the coordinator of this invite", home)
        assert false.events() == []


def test_a_chain_that_shows_the_true_ca_but_is_not_signed_by_it(
    hub: Any, home: Path, tmp_path: Path
) -> None:
    mine = stand.Authority()
    key, leaf = mine.leaf()
    chain = stand.pem(leaf) + stand.pem(hub.authority.certificate)
    with stand.stand(tmp_path / "false", leaf=(key, leaf), chain=chain) as false:
        invite = make_invite(f"localhost:{false.port}", "A" * 43, hub.authority.mark).line()
        refused(lambda: join(invite, home), "not signed by the CA of this invite", home)
        assert false.events() == []


def test_a_fingerprint_with_one_wrong_digit(hub: Any, home: Path) -> None:
    line = hub.invite()
    wrong = line[:-1] + ("0" if line[-1] != "0" else "1")
    refused(lambda: join(wrong, home), "fingerprint sha256:", home)
    assert hub.events() == []
    assert join(line, home).site == "north-clinic"


def test_the_leaf_itself_cannot_be_the_ca(home: Path, tmp_path: Path) -> None:
    authority = stand.Authority()
    leaf = authority.leaf()
    chain = stand.pem(leaf[1])
    with stand.stand(tmp_path / "hub", authority=authority, leaf=leaf, chain=chain) as hub:
        mark = stand.hashes.SHA256()
        line = make_invite(f"localhost:{hub.port}", "A" * 43, leaf[1].fingerprint(mark).hex())
        refused(lambda: join(line.line(), home), "is not the coordinator", home)


def test_a_certificate_that_may_not_sign(home: Path, tmp_path: Path) -> None:
    with stand.stand(tmp_path / "hub", authority=stand.Authority(signs=False)) as hub:
        refused(lambda: join(hub.invite(), home), "not signed by the CA", home)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("other.example.org", "10.0.0.1")}, r"is for other.example.org, 10.0.0.1, not"),
        ({"names": ("*",)}, r"is for \*, not"),
        ({"last": stand.NOW - DAY, "first": stand.NOW - 2 * DAY}, "has expired: it is good from"),
        ({"first": stand.NOW + DAY}, "is not valid yet"),
        ({"server": False}, "not one for servers"),
    ],
)
def test_certificates_of_servers_that_are_wrong(
    home: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    authority = stand.Authority()
    leaf = authority.leaf(**changes)
    with stand.stand(tmp_path / "hub", authority=authority, leaf=leaf) as hub:
        refused(lambda: join(hub.invite(), home), words, home)
        assert hub.events() == []


def test_both_times_are_said_when_a_clock_may_be_wrong(hub: Any) -> None:
    chain = served_chain("localhost", hub.port)
    assert chain == [chain[0], stand.der(hub.authority.certificate)]
    late = datetime.datetime(2099, 1, 2, 3, 4, tzinfo=datetime.UTC)
    with pytest.raises(EnrollmentError, match="machine's clock says 2099-01-02 03:04") as caught:
        check_chain(chain, "localhost", hub.authority.mark, late)
    assert f"to {stand.NOW + 30 * DAY:%Y-%m-%d}" in str(caught.value)


def test_addresses_are_compared_as_addresses(hub: Any, home: Path) -> None:
    token = hub.registry.invite("clinic", "north", 60.0, hub.clock())
    assert join(hub.line(token, "127.0.0.1"), home).enrollment == f"127.0.0.1:{hub.port}"


def server(answer: bytes | None) -> tuple[socket.socket, int]:
    """Run a server without TLS that sends ``answer`` and closes, or (None) says nothing."""
    listener = socket.create_server(("localhost", 0))

    def work() -> None:
        try:
            while True:
                peer, _ = listener.accept()
                if answer is not None:
                    peer.recv(1000)
                    peer.sendall(answer)
                    peer.close()
        except OSError:
            return

    threading.Thread(target=work, daemon=True).start()
    return listener, listener.getsockname()[1]


def test_no_tls_nothing_there_and_silence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.served_chain.CONNECT_SECONDS", 0.5)

    def line(port: int, host: str = "localhost") -> str:
        return make_invite(f"{host}:{port}", "A" * 43, "ab" * 32).line()

    for answer, words in (
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not with TLS"),
        (b"", "not with TLS|connection ended|cannot be reached"),
        (None, "does not answer within"),
    ):
        listener, port = server(answer)
        refused(lambda port=port: join(line(port), home), words, home)
        listener.close()
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    refused(lambda: join(line(port), home), r"cannot be reached", home)
    refused(lambda: join(line(1, "no-such-host.invalid"), home), "no such host", home)
