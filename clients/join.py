"""Joining a coordinator with an invite, and changing the key later.

1. A TLS handshake, with nothing sent, shows the server's certificates; the invite's fingerprint
   must be among them (``served_chain.py``).
2. A key is made, or the one of an attempt that broke off is taken, and is on disk before the
   coordinator hears of it.
3. gRPC with that CA as the only root: token, public key, and a signature that binds both to this
   coordinator (``fedalign/enrollment/proofs.py``).
4. The answer is checked, then written (``node_files.py``); the key's last name comes last.

Each step may be cut off: running the same command again goes on.  ``renew`` signs with the old key
too, and keeps it until the new one is confirmed.  A running node takes the new key when it is
started again.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from clients.node_files import Identity, NodeFiles, token_mark
from clients.served_chain import pinned_ca
from fedalign import __version__
from fedalign.enrollment import enrollment_pb2 as pb
from fedalign.enrollment import proofs
from fedalign.enrollment.enrollment_pb2_grpc import EnrollmentStub
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.invite import parse_invite
from fedalign.enrollment.keys import PrivateKey, fingerprint, flower_form, openssh_line
from fedalign.enrollment.names import check_group, check_site, split_address

ANSWER_SECONDS = 90.0
"""Longest wait for an answer; the coordinator may have to ask its SuperLink by command."""
_RENEWED = "renew"
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024),
    # The handshake before did not go through a proxy either: both see the same server.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True)
class Joined:
    """Who the site is now."""

    site: str
    group: str
    fingerprint: str
    """Of the site's key, SHA-256 in hex."""
    enrollment: str
    """``host:port``."""
    gateway: str
    """``host:port``."""
    ca: str
    """SHA-256 of the coordinator's CA certificate, hex."""
    again: bool
    """The site had joined with this very invite before; nothing is new."""


def join(invite: str, home: Path, say: Callable[[str], None] = lambda line: None) -> Joined:
    """Enroll the site of ``home`` with an invite line; ``say`` is told each step that is done.

    A site that has joined before gets a new key, under its own name.  Raises ``EnrollmentError``.
    """
    card = parse_invite(invite)
    files = NodeFiles(home)
    known = files.identity()
    if known is not None and _own_ca(files) != card.ca:
        raise EnrollmentError(
            f"{home} belongs to another coordinator ({known.enrollment}). Use another folder "
            f"(--home), or move {files.node} away to leave that one."
        )
    ca = pinned_ca(card.host, card.port, card.ca)
    say(f"{card.address} shows the certificates that the invite names")
    files.make_folders()
    mark = token_mark(card.token)
    name = mark[:16]
    again = known is not None and files.used_invite() == mark and not files.has_pending(name)
    key = files.read_key() if again else files.pending_key(name)
    say(f"key {_mark(key)[:16]} is in {files.node}")
    request = pb.EnrollRequest(
        token=card.token,
        public_key=openssh_line(key.public_key()),
        proof=proofs.sign(key, proofs.enroll_statement(card.ca, card.token, key.public_key())),
        site=known.site if known else "",
        versions=_versions(),
    )
    with _stub(card.address, ca, _join_refused(known)) as stub:
        answer = stub.Enroll(request, timeout=ANSWER_SECONDS)
    identity = _identity(answer, card.ca, card.address, _mark(key), known)
    files.confirm(identity, answer.ca_certificate, "" if again else name, mark)
    say(f"joined as {identity.site} in group {identity.group}")
    return _joined(identity, card.ca, again)


def renew(home: Path, say: Callable[[str], None] = lambda line: None) -> Joined:
    """Give the site of ``home`` a new key, vouched for by its old one.

    Raises ``EnrollmentError``; the old key is then still the site's.
    """
    files = NodeFiles(home)
    known = files.identity()
    if known is None:
        raise EnrollmentError(
            f"{home} has not joined. Ask the operator for an invite: fedalign-client join INVITE"
        )
    mark = _own_ca(files)
    host, port = split_address(known.enrollment)
    ca = pinned_ca(host, port, mark)
    say(f"{known.enrollment} shows the certificates of this site's coordinator")
    files.make_folders()
    old, new = files.read_key(), files.pending_key(_RENEWED)
    say(f"new key {_mark(new)[:16]} is in {files.node}")
    with _stub(known.enrollment, ca, _RENEW_REFUSED) as stub:
        challenge = stub.Challenge(pb.ChallengeRequest(), timeout=ANSWER_SECONDS).challenge
        keys = (old.public_key(), new.public_key())
        answer = stub.Renew(
            pb.RenewRequest(
                challenge=challenge,
                old_public_key=openssh_line(keys[0]),
                new_public_key=openssh_line(keys[1]),
                signature=proofs.sign(old, proofs.renew_statement("old", mark, challenge, *keys)),
                proof=proofs.sign(new, proofs.renew_statement("new", mark, challenge, *keys)),
                versions=_versions(),
            ),
            timeout=ANSWER_SECONDS,
        )
    identity = _identity(answer, mark, known.enrollment, _mark(new), known)
    files.confirm(identity, answer.ca_certificate, _RENEWED)
    say(f"{identity.site} has a new key; a running node takes it by itself within a minute")
    return _joined(identity, mark, again=False)


_RENEW_REFUSED = (
    "The coordinator refuses to renew this site's key: it may have been revoked or replaced. Ask "
    "the operator for a new invite: fedalign-client join INVITE"
)


def _join_refused(known: Identity | None) -> str:
    text = (
        "The coordinator refuses this invite: it may be used, expired, withdrawn or mistyped. Ask "
        "the operator for a new one."
    )
    if known is None:
        return text
    return f"{text} This folder is site '{known.site}'; for another site use another (--home)."


@contextmanager
def _stub(address: str, ca: bytes, refused: str) -> Iterator[EnrollmentStub]:
    """Give a connection that trusts ``ca`` alone; what goes wrong on it says what to do next."""
    channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options=_OPTIONS)
    try:
        yield EnrollmentStub(channel)  # type: ignore[no-untyped-call]
    except grpc.RpcError as error:
        code = error.code()
        raise EnrollmentError(_explained(code, address, refused)) from None
    finally:
        channel.close()


def _explained(code: grpc.StatusCode, address: str, refused: str) -> str:
    """Return what to do; the server's own words are not shown."""
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return refused
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return (
            f"{address} does not understand this request. Compare the release of fedalign here and "
            "there (fedalign-client --version)."
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"{address} has had too many requests from here. Wait a minute and try again."
    if code == grpc.StatusCode.UNAVAILABLE:
        return (
            f"{address} is not ready (its SuperLink or the connection is down). Run the same "
            "command again later: your key and invite are kept."
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} did not answer in {ANSWER_SECONDS:.0f} s. Run the same command again."
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return f"{address} is not an enrollment service. Ask the operator for its address."
    return (
        f"{address} failed ({code.name}). Run the same command again later; if it stays so, the "
        "operator finds the reason in the coordinator's log."
    )


def _identity(
    answer: pb.Enrolled, ca: str, enrollment: str, key: str, known: Identity | None
) -> Identity:
    """Return the checked answer; ``EnrollmentError`` for one that cannot be."""
    try:
        check_site(answer.site)
        check_group(answer.group)
        split_address(answer.gateway)
        same = _ca_mark(answer.ca_certificate) == ca
    except (EnrollmentError, ValueError) as error:
        raise EnrollmentError(
            f"{enrollment} gave an answer that cannot be used ({error}). Tell the operator."
        ) from None
    if not same:
        raise EnrollmentError(
            f"{enrollment} gave another CA certificate than the one it was reached by. "
            "Nothing was kept. Tell the operator."
        )
    if known is not None and (answer.site, answer.group) != (known.site, known.group):
        raise EnrollmentError(
            f"{enrollment} says that this site is '{answer.site}' in '{answer.group}', but it "
            f"joined as '{known.site}' in '{known.group}'. Nothing was kept. Tell the operator."
        )
    return Identity(answer.site, answer.group, key, enrollment, answer.gateway)


def _joined(identity: Identity, ca: str, again: bool) -> Joined:
    return Joined(
        identity.site,
        identity.group,
        identity.fingerprint,
        identity.enrollment,
        identity.gateway,
        ca,
        again,
    )


def _own_ca(files: NodeFiles) -> str:
    """Return the fingerprint of the CA that the site pinned when it joined."""
    try:
        return _ca_mark(files.ca_certificate())
    except ValueError:
        raise EnrollmentError(
            f"{files.ca}: not a certificate. Restore it, or move {files.node} away and join with "
            "a new invite."
        ) from None


def _ca_mark(pem: bytes) -> str:
    """Return the fingerprint of the one certificate in ``pem``; ``ValueError`` if not one."""
    found = x509.load_pem_x509_certificates(pem)
    if len(found) != 1:
        raise ValueError("not exactly one CA certificate")
    return found[0].fingerprint(hashes.SHA256()).hex()


def _mark(key: PrivateKey) -> str:
    return fingerprint(flower_form(key.public_key()))


def _versions() -> pb.Versions:
    return pb.Versions(fedalign=__version__, flwr=version("flwr"), python=platform.python_version())
