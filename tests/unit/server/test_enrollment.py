"""The enrollment service under attack and fault, over real gRPC and TLS on the loopback."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from fedalign.enrollment import enrollment_pb2 as pb
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.keys import fingerprint, new_key, openssh_line
from server.enrollment import build, serve
from server.enrollment_limits import Limits
from server.revoke import revoke

_spec = importlib.util.spec_from_file_location(
    "stand", Path(__file__).parent.parent / "enrollment" / "stand.py"
)
assert _spec is not None
assert _spec.loader is not None
stand = sys.modules["stand"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand)
ask, enroll, form, joined = stand.ask, stand.enroll, stand.form, stand.joined
logged, reasons, renew, token_of = stand.logged, stand.reasons, stand.renew, stand.token_of

CODE = grpc.StatusCode
DENIED = (CODE.PERMISSION_DENIED, "refused")
MALFORMED = (CODE.INVALID_ARGUMENT, "malformed request")
OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    with stand.stand(tmp_path) as hub:
        yield hub


def test_a_site_is_enrolled_as_its_token_says(hub: Any) -> None:
    token, key = token_of(hub, "clinic", "North (1)"), new_key()
    answer = enroll(hub, token, key)
    assert (answer.site, answer.group, answer.gateway) == (
        "clinic",
        "North (1)",
        "localhost:9444",
    )
    assert answer.ca_certificate == stand.pem(hub.authority.certificate)
    (node,) = hub.admin.nodes()
    assert (node.name, node.public_key) == ("clinic@North (1)", form(key))
    row = hub.registry.by_key(form(key))
    assert (row.status, row.node_id) == ("active", node.node_id)
    (event,) = logged(hub)
    assert event["event"] == "site.enrolled"
    assert event["facts"]["key"] == fingerprint(form(key))[:16]
    assert event["facts"]["peer"] in ("127.0.0.1", "::1")
    assert all(token not in line for line in hub.events())


def test_used_expired_guessed_withdrawn_all_give_the_same_words(hub: Any) -> None:
    used, expired = token_of(hub, "a"), token_of(hub, "b", life=5.0)
    old, _ = token_of(hub, "c"), token_of(hub, "c")
    key = new_key()
    enroll(hub, used, key)
    hub.clock.now += 6.0
    known = token_of(hub, "d")
    guessed = "A" * 43
    for token in (used, expired, old, guessed):
        assert enroll(hub, token) == DENIED
    assert enroll(hub, known, key) == DENIED
    assert enroll(hub, known, site="a") == DENIED
    assert reasons(hub) == [
        "token-used",
        "token-expired",
        "token-withdrawn",
        "token-unknown",
        "key-known",
        "site-mismatch",
    ]
    assert enroll(hub, known, site="d").site == "d"
    assert len(hub.admin.live()) == 2


def test_of_sixteen_at_once_one_is_enrolled(hub: Any) -> None:
    token = token_of(hub)
    barrier, results = threading.Barrier(16), []
    requests = [stand.enroll_request(token, hub.authority.mark) for _ in range(16)]

    def work(request: Any) -> None:
        barrier.wait(20)
        results.append(ask(hub, request))

    threads = [threading.Thread(target=work, args=(r,)) for r in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results.count(DENIED) == 15
    assert len(hub.admin.live()) == 1
    assert [s.status for s in hub.registry.sites()] == ["active"]


def test_the_same_key_gets_the_same_answer_again(hub: Any) -> None:
    token, key = token_of(hub), new_key()
    first = enroll(hub, token, key)
    hub.clock.now += 1e6
    assert enroll(hub, token, key) == first
    hub.admin.down = True
    assert enroll(hub, token, key) == first
    assert hub.admin.calls == 1
    assert enroll(hub, token) == DENIED


def test_the_superlink_is_down_and_comes_back(hub: Any) -> None:
    token, key = token_of(hub), new_key()
    hub.admin.down = True
    assert enroll(hub, token, key) == (CODE.UNAVAILABLE, "not ready, try again later")
    assert hub.registry.by_key(form(key)).status == "pending"
    assert enroll(hub, token) == DENIED
    hub.admin.down = False
    hub.clock.now += 1e6
    assert enroll(hub, token, key).site == "clinic"
    assert "superlink-unavailable" in reasons(hub)
    assert all("secret path" not in line for line in hub.events())


def test_a_crash_between_claim_and_registration_is_finished(tmp_path: Path) -> None:
    key = new_key()
    with stand.stand(tmp_path) as hub:
        token = token_of(hub)
        hub.admin.crash = RuntimeError("/secret/path")
        assert enroll(hub, token, key) == (CODE.INTERNAL, "internal error, try again later")
        assert hub.registry.by_key(form(key)).status == "pending"
        node = hub.admin.nodes()[0].node_id
        assert [e["facts"]["reason"] for e in logged(hub)] == ["RuntimeError"]
        admin, authority = hub.admin, hub.authority
    with stand.stand(tmp_path, authority=authority) as hub:
        admin.crash = None
        hub.admin.entries.update(admin.entries)
        assert enroll(hub, token, key).site == "clinic"
        assert hub.registry.by_key(form(key)).node_id == node
        assert len(hub.admin.nodes()) == 1


def test_a_key_serves_one_site_only(hub: Any) -> None:
    key = joined(hub, "a")
    assert enroll(hub, token_of(hub, "b"), key) == DENIED
    assert reasons(hub) == ["key-known"]


def test_nobody_enrolls_a_key_that_is_not_theirs(hub: Any) -> None:
    token, mine, theirs = token_of(hub), new_key(), new_key()
    request = stand.enroll_request(token, hub.authority.mark, mine)
    request.public_key = openssh_line(theirs.public_key())
    assert ask(hub, request) == DENIED
    request.proof = b"\x30" * 100
    assert ask(hub, request) == DENIED
    assert set(reasons(hub)) == {"proof"}
    assert hub.registry.by_key(form(theirs)) is None


def test_a_proof_for_another_coordinator_is_worth_nothing(hub: Any, tmp_path: Path) -> None:
    with stand.stand(tmp_path / "other") as other:
        token, key = token_of(hub), new_key()
        stolen = stand.enroll_request(token, other.authority.mark, key)
        assert ask(hub, stolen) == DENIED
        assert reasons(hub) == ["proof"]
        old = joined(hub, "b")
        challenge = ask(hub, pb.ChallengeRequest(), "Challenge").challenge
        assert (
            ask(hub, stand.renew_request(challenge, other.authority.mark, old, key), "Renew")
            == DENIED
        )


def other_keys() -> dict[str, str]:
    return {
        "rsa": rsa.generate_private_key(65537, 2048).public_key().public_bytes(*OPENSSH).decode(),
        "ed25519": ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(*OPENSSH)
        .decode(),
        "none": "",
        "text": "ecdsa-sha2-nistp384 AAAA",
        "long": "ecdsa-sha2-nistp384 " + "A" * 5000,
    }


@pytest.mark.parametrize("kind", list(other_keys()))
def test_other_kinds_of_key_are_malformed(hub: Any, kind: str) -> None:
    request = stand.enroll_request(token_of(hub), hub.authority.mark)
    request.public_key = other_keys()[kind]
    assert ask(hub, request) == MALFORMED
    assert reasons(hub) == ["key-form"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("token", "", "token-form"),
        ("token", "x" * 60_000, "token-form"),
        ("token", "short", "token-form"),
        ("proof", b"", "proof-form"),
        ("proof", b"x" * 142, "proof-form"),
        ("site", "Not A Site", "site-form"),
        ("site", "x" * 1000, "site-form"),
    ],
)
def test_malformed_fields(hub: Any, field: str, value: Any, reason: str) -> None:
    request = stand.enroll_request(token_of(hub), hub.authority.mark)
    setattr(request, field, value)
    assert ask(hub, request) == MALFORMED
    assert reasons(hub) == [reason]


def test_malformed_versions(hub: Any) -> None:
    request = stand.enroll_request(token_of(hub), hub.authority.mark)
    request.versions.flwr = "1.41\nforged"
    assert ask(hub, request) == MALFORMED
    request.versions.flwr = "1" * 65
    assert ask(hub, request) == MALFORMED


def send(hub: Any, data: bytes, call: str = "Enroll") -> Any:
    credentials = grpc.ssl_channel_credentials(stand.pem(hub.authority.certificate))
    with grpc.secure_channel(f"localhost:{hub.port}", credentials) as channel:
        raw = channel.unary_unary(f"/fedalign.enrollment.v1.Enrollment/{call}")
        try:
            return raw(data, timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()


@pytest.mark.parametrize("data", [b"\xff" * 50, b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_message(hub: Any, data: bytes) -> None:
    assert send(hub, data) == MALFORMED
    assert reasons(hub) == ["not-a-message"]


def test_an_empty_message_and_a_message_too_large(hub: Any) -> None:
    assert send(hub, b"") == MALFORMED
    code, _ = send(hub, b"\x0a" + b"x" * (64 * 1024))
    assert code == CODE.RESOURCE_EXHAUSTED
    assert enroll(hub, token_of(hub)).site == "clinic"
    assert "no-message" in reasons(hub)


def test_an_unknown_call(hub: Any) -> None:
    assert send(hub, b"", "Revoke")[0] == CODE.UNIMPLEMENTED


def test_too_many_requests_are_refused_and_logged_once(tmp_path: Path) -> None:
    limits = Limits(peer_rate=0.1, peer_burst=3)
    with stand.stand(tmp_path, limits=limits) as hub:
        token = token_of(hub, life=600.0)
        found = [enroll(hub, "A" * 43)[0] for _ in range(3)]
        found += [enroll(hub, token)[0] for _ in range(4)]
        assert found == [CODE.PERMISSION_DENIED] * 3 + [CODE.RESOURCE_EXHAUSTED] * 4
        assert reasons(hub) == ["token-unknown", "rate"]
        hub.clock.now += 61.0
        assert enroll(hub, token, site="other") == DENIED
        assert enroll(hub, token).site == "clinic"
        assert [enroll(hub, "A" * 43)[0] for _ in range(3)][-1] == CODE.RESOURCE_EXHAUSTED
        (last,) = [e for e in logged(hub)[3:] if e["facts"].get("reason") == "rate"]
        assert last["facts"]["repeated"] == 3


def test_a_silent_request_is_cut_off_and_does_not_stop_others(tmp_path: Path) -> None:
    from dataclasses import replace

    limits = replace(stand.OPEN, threads=2, peer_requests=8, message_seconds=1.0)
    with stand.stand(tmp_path, limits=limits) as hub:
        credentials = grpc.ssl_channel_credentials(stand.pem(hub.authority.certificate))
        stop = threading.Event()

        def silent() -> Iterator[bytes]:
            stop.wait(20)
            yield from ()

        with grpc.secure_channel(f"localhost:{hub.port}", credentials) as channel:
            call = channel.stream_unary("/fedalign.enrollment.v1.Enrollment/Enroll")
            began = time.monotonic()
            waiting = [call.future(silent(), timeout=20) for _ in range(4)]
            assert enroll(hub, token_of(hub)).site == "clinic"
            for one in waiting:
                with pytest.raises(grpc.RpcError):
                    one.result(timeout=20)
            assert time.monotonic() - began < 10
            stop.set()


def test_one_address_has_few_requests_under_way(tmp_path: Path) -> None:
    limits = Limits(peer_burst=10**6, total_burst=10**6, peer_requests=2, message_seconds=15.0)
    with stand.stand(tmp_path, limits=limits) as hub:
        credentials = grpc.ssl_channel_credentials(stand.pem(hub.authority.certificate))
        stop = threading.Event()

        def silent() -> Iterator[bytes]:
            stop.wait(20)
            yield from ()

        with grpc.secure_channel(f"localhost:{hub.port}", credentials) as channel:
            call = channel.stream_unary("/fedalign.enrollment.v1.Enrollment/Enroll")
            waiting = [call.future(silent(), timeout=20) for _ in range(2)]
            end = time.monotonic() + 10.0
            token = token_of(hub)
            while (found := enroll(hub, token, site="other")) == DENIED:
                assert time.monotonic() < end
            assert found[0] == CODE.RESOURCE_EXHAUSTED
            stop.set()
            for one in waiting:
                with pytest.raises(grpc.RpcError):
                    one.result(timeout=20)


def test_plain_text_is_not_served(hub: Any) -> None:
    with grpc.insecure_channel(f"localhost:{hub.port}") as channel:
        raw = channel.unary_unary("/fedalign.enrollment.v1.Enrollment/Challenge")
        with pytest.raises(grpc.RpcError) as caught:
            raw(b"", timeout=5)
        assert caught.value.code() in (CODE.UNAVAILABLE, CODE.DEADLINE_EXCEEDED)
    with socket.create_connection(("localhost", hub.port), timeout=5) as raw_socket:
        raw_socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert enroll(hub, token_of(hub)).site == "clinic"


def test_a_revoked_key_is_out_and_the_site_can_come_back(hub: Any) -> None:
    token, key, renewed = token_of(hub), new_key(), new_key()
    enroll(hub, token, key)
    open_ = token_of(hub)
    revoke(hub.registry, hub.admin, hub.audit, "clinic")
    assert hub.admin.live() == []
    assert enroll(hub, token, key) == DENIED
    assert enroll(hub, open_, renewed) == DENIED
    assert renew(hub, key, renewed) == DENIED
    assert enroll(hub, token_of(hub), key) == DENIED
    assert enroll(hub, token_of(hub), renewed).group == "north"
    assert hub.admin.live() == [form(renewed)]
    assert reasons(hub) == ["key-revoked", "token-withdrawn", "key-revoked", "key-known"]


def test_revoked_while_the_superlink_was_asked(hub: Any) -> None:
    token, key = token_of(hub), new_key()
    plain = hub.admin.register

    def register(public_key: bytes, name: str) -> int:
        node = int(plain(public_key, name))
        hub.registry.revoke("clinic", hub.clock())
        return node

    hub.admin.register = register
    assert enroll(hub, token, key) == DENIED
    assert hub.admin.live() == []
    assert not hub.registry.allowed(fingerprint(form(key)))


def test_a_second_invite_replaces_the_key_and_unregisters_the_old(hub: Any) -> None:
    old, new = joined(hub), new_key()
    token = token_of(hub)
    hub.admin.down = True
    assert enroll(hub, token, new)[0] == CODE.UNAVAILABLE
    assert hub.registry.allowed(fingerprint(form(old)))
    hub.admin.down = False
    assert enroll(hub, token, new).site == "clinic"
    assert hub.admin.live() == [form(new)]
    assert [s.status for s in hub.registry.sites()] == ["replaced", "active"]


def test_text_of_an_exception_never_reaches_the_peer(hub: Any, tmp_path: Path) -> None:
    token, key = token_of(hub), new_key()
    hub.audit.path.unlink(missing_ok=True)
    hub.audit.path.mkdir()
    assert enroll(hub, token, key) == (CODE.INTERNAL, "internal error, try again later")
    assert enroll(hub, "A" * 43) == DENIED
    hub.audit.path.rmdir()
    assert enroll(hub, token, key).site == "clinic"


def test_the_clock_of_the_server_alone_ends_a_token(hub: Any) -> None:
    token = token_of(hub, life=60.0)
    hub.clock.now += 59.0
    assert enroll(hub, token).site == "clinic"


def test_serve_says_what_is_wrong(hub: Any) -> None:
    key, leaf = hub.authority.leaf()
    whole = stand.pem(leaf) + stand.pem(hub.authority.certificate)
    parts: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "key": key,
        "chain": whole,
        "ca": stand.pem(hub.authority.certificate),
        "gateway": "localhost:9444",
    }
    start = (hub.registry, hub.admin, hub.audit)
    with pytest.raises(EnrollmentError, match="and then the CA"):
        serve(*start, **parts | {"chain": stand.pem(leaf)})
    with pytest.raises(EnrollmentError, match="not HOST:PORT"):
        serve(*start, **parts | {"gateway": "localhost"})
    with pytest.raises(EnrollmentError, match=r"cannot listen on 127\.0\.0\.1"):
        serve(*start, **parts | {"port": hub.port})
    server = serve(*start, **parts)
    server.stop(0).wait(10)
    other, port = build(hub.service, "127.0.0.1", 0, key, whole)
    assert port > 0
    other.stop(0).wait(10)
