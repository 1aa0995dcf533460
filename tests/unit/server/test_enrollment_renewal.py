"""Renewal of a key: both keys sign, a recording is worth nothing, the old key holds until then."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedalign.enrollment import enrollment_pb2 as pb
from fedalign.enrollment import proofs
from fedalign.enrollment.keys import fingerprint, new_key
from server.challenges import LIFETIME

_spec = importlib.util.spec_from_file_location(
    "stand", Path(__file__).parent.parent / "enrollment" / "stand.py"
)
assert _spec is not None
assert _spec.loader is not None
stand = sys.modules["stand"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand)
ask, form, joined, logged = stand.ask, stand.form, stand.joined, stand.logged
reasons, renew = stand.reasons, stand.renew

CODE = grpc.StatusCode
DENIED = (CODE.PERMISSION_DENIED, "refused")
MALFORMED = (CODE.INVALID_ARGUMENT, "malformed request")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    with stand.stand(tmp_path) as hub:
        yield hub


def test_renewal(hub: Any) -> None:
    old, new = joined(hub), new_key()
    answer = renew(hub, old, new)
    assert (answer.site, answer.group) == ("clinic", "north")
    assert hub.admin.live() == [form(new)]
    assert renew(hub, old, new) == answer
    assert renew(hub, old, new_key()) == DENIED
    assert [e["event"] for e in logged(hub)] == [
        "site.enrolled",
        "site.renewed",
        "site.unregistered",
        "enrollment.repeated",
        "enrollment.refused",
    ]


def test_renewal_when_the_superlink_is_down_keeps_the_old_key(hub: Any) -> None:
    old, new = joined(hub), new_key()
    hub.admin.down = True
    assert renew(hub, old, new)[0] == CODE.UNAVAILABLE
    assert hub.registry.allowed(fingerprint(form(old)))
    hub.admin.down = False
    assert renew(hub, old, new).site == "clinic"
    assert not hub.registry.allowed(fingerprint(form(old)))


def test_a_recorded_renewal_cannot_be_played_again(hub: Any) -> None:
    old, new = joined(hub), new_key()
    challenge = ask(hub, pb.ChallengeRequest(), "Challenge").challenge
    request = stand.renew_request(challenge, hub.authority.mark, old, new)
    hub.admin.down = True
    assert ask(hub, request, "Renew")[0] == CODE.UNAVAILABLE
    hub.admin.down = False
    assert ask(hub, request, "Renew") == DENIED
    late = ask(hub, pb.ChallengeRequest(), "Challenge").challenge
    hub.clock.now += LIFETIME + 1
    assert renew(hub, old, new, late) == DENIED
    assert renew(hub, old, new, b"x" * 56) == DENIED
    assert hub.registry.allowed(fingerprint(form(old)))
    assert reasons(hub) == ["superlink-unavailable", "challenge-spent", "challenge-stale"]


def test_a_renewal_needs_both_keys(hub: Any) -> None:
    old, new, thief = joined(hub), new_key(), new_key()
    keys = old.public_key(), new.public_key()
    for field, signer, reason in (
        ("signature", "old", "proof-old"),
        ("proof", "new", "proof-new"),
    ):
        challenge = ask(hub, pb.ChallengeRequest(), "Challenge").challenge
        request = stand.renew_request(challenge, hub.authority.mark, old, new)
        statement = proofs.renew_statement(signer, hub.authority.mark, challenge, *keys)
        setattr(request, field, proofs.sign(thief, statement))
        assert ask(hub, request, "Renew") == DENIED
        assert reasons(hub)[-1] == reason
    assert renew(hub, thief, new) == DENIED
    assert reasons(hub)[-1] == "key-unknown"


def test_malformed_renewals(hub: Any) -> None:
    old, new = joined(hub), new_key()
    assert renew(hub, old, old) == MALFORMED
    for field, value in (
        ("challenge", b"short"),
        ("old_public_key", "x"),
        ("new_public_key", ""),
        ("signature", b""),
        ("proof", b"x" * 200),
    ):
        challenge = ask(hub, pb.ChallengeRequest(), "Challenge").challenge
        request = stand.renew_request(challenge, hub.authority.mark, old, new)
        setattr(request, field, value)
        assert ask(hub, request, "Renew") == MALFORMED
    assert hub.registry.allowed(fingerprint(form(old)))
