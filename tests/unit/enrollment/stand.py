"""A coordinator to attack: certificates of every kind, a SuperLink that can be down."""

from __future__ import annotations

import datetime
import ipaddress
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedalign.audit import AuditLog, verify
from fedalign.enrollment import enrollment_pb2 as pb
from fedalign.enrollment import proofs
from fedalign.enrollment.enrollment_pb2_grpc import EnrollmentStub
from fedalign.enrollment.invite import make_invite
from fedalign.enrollment.keys import PrivateKey, flower_form, new_key, openssh_line
from server.enrollment import Service, build
from server.enrollment_calls import Answers, Calls
from server.enrollment_limits import Limits
from server.registry import Registry
from server.superlink_admin import AdminUnavailable, NodeEntry

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)
OPEN = Limits(peer_rate=1e6, peer_burst=10**6, total_rate=1e6, total_burst=10**6, peer_requests=64)
"""Limits that no test meets by accident."""


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@dataclass
class Authority:
    """A CA; ``signs = False`` makes a certificate that may sign nothing."""

    signs: bool = True
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("test CA"))
            .issuer_name(_name("test CA"))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 400 * DAY)
            .not_valid_after(NOW + 400 * DAY)
            .add_extension(x509.BasicConstraints(ca=self.signs, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def mark(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def leaf(
        self,
        names: tuple[str, ...] = ("localhost", "127.0.0.1"),
        first: datetime.datetime = NOW - DAY,
        last: datetime.datetime = NOW + 30 * DAY,
        server: bool = True,
    ) -> tuple[bytes, x509.Certificate]:
        """Return key (PEM) and certificate of a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        general: list[x509.GeneralName] = []
        for name in names:
            try:
                general.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                general.append(x509.DNSName(name))
        use = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("test server"))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(first)
            .not_valid_after(last)
            .add_extension(x509.SubjectAlternativeName(general), critical=False)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return private, certificate


class FakeAdmin:
    """A SuperLink in memory, with Flower's rule: a key that was unregistered never comes back."""

    def __init__(self) -> None:
        self.entries: dict[int, NodeEntry] = {}
        self.down = False
        self.crash: BaseException | None = None
        self.calls = 0
        self._lock = threading.Lock()

    def register(self, public_key: bytes, name: str) -> int:
        with self._lock:
            self.calls += 1
            if self.down:
                raise AdminUnavailable("secret path of the coordinator")
            for entry in self.entries.values():
                if entry.public_key == public_key:
                    assert entry.status != "unregistered"
                    return entry.node_id
            node = 2**63 + len(self.entries)
            self.entries[node] = NodeEntry(node, name, "registered", public_key)
            if self.crash is not None:
                raise self.crash
            return node

    def unregister(self, node_id: int) -> None:
        with self._lock:
            if self.down:
                raise AdminUnavailable("down")
            old = self.entries[node_id]
            self.entries[node_id] = NodeEntry(node_id, old.name, "unregistered", old.public_key)

    def nodes(self) -> list[NodeEntry]:
        with self._lock:
            if self.down:
                raise AdminUnavailable("down")
            return list(self.entries.values())

    def live(self) -> list[bytes]:
        return [e.public_key for e in self.entries.values() if e.status != "unregistered"]


class Clocks:
    """Both clocks of the service; they stand still until moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stand:
    """A running coordinator."""

    folder: Path
    authority: Authority
    registry: Registry
    admin: FakeAdmin
    audit: AuditLog
    clock: Clocks
    port: int
    service: Service

    def invite(self, site: str = "north-clinic", group: str = "north", life: float = 60.0) -> str:
        return self.line(self.registry.invite(site, group, life, self.clock()))

    def line(self, token: str, host: str = "localhost") -> str:
        return make_invite(f"{host}:{self.port}", token, self.authority.mark).line()

    def events(self) -> list[str]:
        return self.audit.path.read_text().splitlines() if self.audit.path.exists() else []

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """Give a client without any of our own checks, as an attacker has it."""
        credentials = grpc.ssl_channel_credentials(pem(self.authority.certificate))
        with grpc.secure_channel(f"localhost:{self.port}", credentials) as channel:
            yield EnrollmentStub(channel)


@contextmanager
def stand(
    folder: Path,
    limits: Limits = OPEN,
    authority: Authority | None = None,
    leaf: tuple[bytes, x509.Certificate] | None = None,
    chain: bytes | None = None,
    gateway: str = "localhost:9444",
    answer_ca: bytes | None = None,
) -> Iterator[Stand]:
    """Run a coordinator whose every part can be wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = authority or Authority()
    key, certificate = leaf or authority.leaf()
    chain = chain or pem(certificate) + pem(authority.certificate)
    clock, admin, audit = Clocks(), FakeAdmin(), AuditLog(folder / "audit.jsonl")
    with Registry(folder / "registry.sqlite") as registry:
        answers = Answers(gateway, pem(authority.certificate))
        calls = Calls(registry, admin, audit, answers, clock, clock)
        if answer_ca is not None:
            object.__setattr__(answers, "ca", answer_ca)
        service = Service(calls, audit, limits, clock)
        # Not "localhost": of its two addresses another process may have the port of one.
        server, port = build(service, "127.0.0.1", 0, key, chain)
        server.start()
        try:
            yield Stand(folder, authority, registry, admin, audit, clock, port, service)
        finally:
            server.stop(0).wait(10)


def enroll_request(
    token: str, ca: str, key: PrivateKey | None = None, site: str = ""
) -> pb.EnrollRequest:
    """Return a request as an honest site makes it."""
    key = key or new_key()
    statement = proofs.enroll_statement(ca, token, key.public_key())
    return pb.EnrollRequest(
        token=token,
        public_key=openssh_line(key.public_key()),
        proof=proofs.sign(key, statement),
        site=site,
    )


def renew_request(challenge: bytes, ca: str, old: PrivateKey, new: PrivateKey) -> pb.RenewRequest:
    """Return a request as an honest site makes it."""
    keys = old.public_key(), new.public_key()
    return pb.RenewRequest(
        challenge=challenge,
        old_public_key=openssh_line(keys[0]),
        new_public_key=openssh_line(keys[1]),
        signature=proofs.sign(old, proofs.renew_statement("old", ca, challenge, *keys)),
        proof=proofs.sign(new, proofs.renew_statement("new", ca, challenge, *keys)),
    )


def token_of(hub: Any, site: str = "clinic", group: str = "north", life: float = 60.0) -> str:
    return str(hub.registry.invite(site, group, life, hub.clock()))


def ask(hub: Any, request: Any, call: str = "Enroll") -> Any:
    """Return the answer, or the status and words of the refusal."""
    with hub.stub() as stub:
        try:
            return getattr(stub, call)(request, timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()


def enroll(hub: Any, token: str, key: Any = None, site: str = "") -> Any:
    return ask(hub, enroll_request(token, hub.authority.mark, key, site))


def renew(hub: Any, old: Any, new: Any, challenge: bytes | None = None) -> Any:
    challenge = challenge or ask(hub, pb.ChallengeRequest(), "Challenge").challenge
    return ask(hub, renew_request(challenge, hub.authority.mark, old, new), "Renew")


def joined(hub: Any, site: str = "clinic", group: str = "north") -> Any:
    key = new_key()
    assert enroll(hub, token_of(hub, site, group), key).site == site
    return key


def logged(hub: Any) -> list[dict[str, Any]]:
    assert verify(hub.audit.path) > 0
    return [json.loads(line) for line in hub.events()]


def reasons(hub: Any) -> list[str]:
    return [e["facts"]["reason"] for e in logged(hub) if e["event"] == "enrollment.refused"]


def form(key: Any) -> bytes:
    return flower_form(key.public_key())
