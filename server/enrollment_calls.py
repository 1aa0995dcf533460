"""The three calls of the enrollment service, without the network.

What a request goes through, cheapest first: lengths and forms of all fields; possession of the key
(``fedalign/enrollment/proofs.py``); for a renewal a challenge of this process; the registry, in one
transaction; the SuperLink; the registry.  Site and group come from the token alone, or from the old
key.

A key that is claimed but not registered is *pending*.  Whatever broke off in between (the SuperLink
is down, this process was killed, the answer was lost), the same key finishes it by asking again.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedalign.audit import AuditLog
from fedalign.enrollment import enrollment_pb2 as pb
from fedalign.enrollment import proofs
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.invite import TOKEN
from fedalign.enrollment.keys import PublicKey, fingerprint, flower_form, read_openssh
from fedalign.enrollment.names import check_site, node_name
from fedalign.errors import FedalignError
from server.challenges import SIZE as CHALLENGE_BYTES
from server.challenges import Challenges
from server.registry import Refused, Registry, Site
from server.revoke import reconcile
from server.superlink_admin import AdminUnavailable, KeyBurnt, SuperLinkAdmin

log = logging.getLogger("fedalign.server")
_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{0,64}")


class Stop(Exception):
    """A request is refused with ``status``; ``reason`` is for the log."""

    def __init__(self, status: grpc.StatusCode, reason: str, site: str = "", key: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.site = site
        self.key = key


def denied(reason: str, site: str = "", key: str = "") -> Stop:
    return Stop(grpc.StatusCode.PERMISSION_DENIED, reason, site, key)


def malformed(reason: str) -> Stop:
    return Stop(grpc.StatusCode.INVALID_ARGUMENT, reason)


@dataclass(frozen=True)
class Answers:
    """What every site is told: gateway as ``host:port``, the CA certificate as PEM."""

    gateway: str
    ca: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the CA certificate; every proof names it."""
        return x509.load_pem_x509_certificate(self.ca).fingerprint(hashes.SHA256()).hex()


class Calls:
    """Enroll, Challenge, Renew.  Each raises :class:`Stop` for a refusal.  Safe for threads.

    ``clock`` gives the server's time in seconds since 1970, ``steady`` one that never goes back.
    """

    def __init__(
        self,
        registry: Registry,
        admin: SuperLinkAdmin,
        audit: AuditLog,
        answers: Answers,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._admin = admin
        self._audit = audit
        self._answers = answers
        self._ca = answers.fingerprint
        self._clock = clock
        self._challenges = Challenges(steady)

    def enroll(self, request: pb.EnrollRequest, peer: str) -> pb.Enrolled:
        """Give the key of the request the site that its token is for."""
        if not TOKEN.fullmatch(request.token):
            raise malformed("token-form")
        if request.site:
            _site(request.site)
        versions = _versions(request.versions)
        key = _key(request.public_key, "key-form")
        _length(request.proof, proofs.MAX_SIGNATURE_BYTES, "proof-form")
        mark = fingerprint(flower_form(key))
        statement = proofs.enroll_statement(self._ca, request.token, key)
        if not proofs.is_signed(key, statement, request.proof):
            raise denied("proof", key=mark)
        now = self._clock()
        try:
            row = self._registry.claim(request.token, flower_form(key), now, request.site)
        except Refused as refused:
            raise denied(refused.code, refused.site, mark) from None
        return self._finish(row, peer, "site.enrolled", versions)

    def challenge(self, request: pb.ChallengeRequest, peer: str) -> pb.ChallengeReply:
        """Give a value that a renewal has to sign."""
        return pb.ChallengeReply(challenge=self._challenges.new())

    def renew(self, request: pb.RenewRequest, peer: str) -> pb.Enrolled:
        """Give the new key the site of the old one."""
        if len(request.challenge) != CHALLENGE_BYTES:
            raise malformed("challenge-form")
        versions = _versions(request.versions)
        old = _key(request.old_public_key, "old-key-form")
        new = _key(request.new_public_key, "new-key-form")
        if request.old_public_key == request.new_public_key:
            raise malformed("same-key")
        _length(request.signature, proofs.MAX_SIGNATURE_BYTES, "signature-form")
        _length(request.proof, proofs.MAX_SIGNATURE_BYTES, "proof-form")
        before = fingerprint(flower_form(old))
        if not self._challenges.is_fresh(request.challenge):
            raise denied("challenge-stale", key=before)
        for signer, key, signature in (
            ("old", old, request.signature),
            ("new", new, request.proof),
        ):
            statement = proofs.renew_statement(signer, self._ca, request.challenge, old, new)
            if not proofs.is_signed(key, statement, signature):
                raise denied(f"proof-{signer}", key=before)
        if not self._challenges.spend(request.challenge):
            raise denied("challenge-spent", key=before)
        try:
            row = self._registry.renew(flower_form(old), flower_form(new), self._clock())
        except Refused as refused:
            raise denied(refused.code, refused.site, before) from None
        return self._finish(row, peer, "site.renewed", versions)

    def _finish(self, row: Site, peer: str, event: str, versions: dict[str, str]) -> pb.Enrolled:
        """Register a claimed key at the SuperLink, make it active, and answer."""
        facts = {"site": row.site, "group": row.group, "key": row.fingerprint[:16], "peer": peer}
        if row.status == "active":
            self._audit.append("enrollment.repeated", **facts)
            return self._answer(row)
        try:
            node = self._admin.register(row.public_key, node_name(row.site, row.group))
        except KeyBurnt:
            raise denied("key-burnt", row.site, row.fingerprint) from None
        except AdminUnavailable:
            raise _later("superlink-unavailable", row) from None
        except FedalignError:
            log.exception("enrollment: the SuperLink refused the key of %s", row.site)
            raise _later("superlink-refused", row) from None
        try:
            site = self._registry.registered(row.fingerprint, node, self._clock())
        except Refused as refused:
            # Revoked, or replaced by a later key, while the SuperLink was asked.
            self._unregister(node)
            raise denied(refused.code, row.site, row.fingerprint) from None
        self._audit.append(event, **facts, node=str(node), **versions)
        try:
            reconcile(self._registry, self._admin, self._audit)
        except FedalignError:
            # The registry has ended the old key already; the coordinator compares again later.
            log.warning("enrollment: the old key of %s is not unregistered yet", site.site)
        return self._answer(site)

    def _unregister(self, node: int) -> None:
        try:
            self._admin.unregister(node)
        except FedalignError:
            log.warning("enrollment: node %d is not unregistered yet", node)

    def _answer(self, site: Site) -> pb.Enrolled:
        return pb.Enrolled(
            site=site.site,
            group=site.group,
            gateway=self._answers.gateway,
            ca_certificate=self._answers.ca,
        )


def _later(reason: str, row: Site) -> Stop:
    return Stop(grpc.StatusCode.UNAVAILABLE, reason, row.site, row.fingerprint)


def _length(data: bytes, most: int, reason: str) -> None:
    if not 1 <= len(data) <= most:
        raise malformed(reason)


def _key(text: str, reason: str) -> PublicKey:
    try:
        return read_openssh(text)
    except EnrollmentError:
        raise malformed(reason) from None


def _site(name: str) -> None:
    try:
        check_site(name)
    except EnrollmentError:
        raise malformed("site-form") from None


def _versions(given: pb.Versions) -> dict[str, str]:
    found = {"fedalign": given.fedalign, "flwr": given.flwr, "python": given.python}
    if not all(_VERSION.fullmatch(text) for text in found.values()):
        raise malformed("versions-form")
    return found
