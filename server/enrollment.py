"""The enrollment service: gRPC over TLS, the only door for somebody whom nobody knows yet.

This file is the door: limits before anything is read (``enrollment_limits.py``), parsing, refusals.
What the calls do is in ``enrollment_calls.py``.

**What a peer learns.**  ``INVALID_ARGUMENT``: the request is malformed, whatever its token.
``PERMISSION_DENIED``: no; unknown, guessed, used, expired and withdrawn tokens, bad proofs, known
and revoked keys all give the same words.  ``RESOURCE_EXHAUSTED``: later.  ``UNAVAILABLE``: the
SuperLink cannot be asked now; the token is kept for this key, which tries again.  ``INTERNAL``: our
fault.  Reason, peer, site and key go to the audit log (the same refusal of the same peer once a
minute, with its number, so that nobody can fill the disk).  Tokens go nowhere.

Requests are read as streams of one message and parsed here, not by gRPC: so a peer is judged before
it has sent anything, a silent one is cut off, and a message that cannot be parsed is logged too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf.message import DecodeError, Message

from fedalign.audit import AuditLog
from fedalign.enrollment import enrollment_pb2 as pb
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.names import join_address, split_address
from fedalign.errors import FedalignError
from server.enrollment_calls import Answers, Calls, Stop, malformed
from server.enrollment_limits import Gate, Limits, network, peer_address
from server.limits import Refusals
from server.registry import Registry
from server.superlink_admin import SuperLinkAdmin

log = logging.getLogger("fedalign.server")
SERVICE = "fedalign.enrollment.v1.Enrollment"
GRACE_SECONDS = 10.0
_WORDS = {
    grpc.StatusCode.INVALID_ARGUMENT: "malformed request",
    grpc.StatusCode.PERMISSION_DENIED: "refused",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "too many requests, try again later",
    grpc.StatusCode.UNAVAILABLE: "not ready, try again later",
    grpc.StatusCode.INTERNAL: "internal error, try again later",
}
Request = TypeVar("Request", bound=Message)


class Service:
    """Stands between gRPC and the calls.  ``steady`` is a clock that never goes back."""

    def __init__(
        self,
        calls: Calls,
        audit: AuditLog,
        limits: Limits,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._calls = calls
        self._audit = audit
        self._steady = steady
        self._gate = Gate(limits, steady)
        self._refusals = Refusals()

    def handlers(self) -> Any:
        """Return what a gRPC server needs to serve this."""
        calls = {
            "Enroll": self._call("enroll", pb.EnrollRequest, self._calls.enroll),
            "Challenge": self._call("challenge", pb.ChallengeRequest, self._calls.challenge),
            "Renew": self._call("renew", pb.RenewRequest, self._calls.renew),
        }
        streams = {
            name: grpc.stream_unary_rpc_method_handler(call, None, None)
            for name, call in calls.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, streams)

    def _call(
        self, name: str, kind: type[Request], work: Callable[[Request, str], Message]
    ) -> Callable[[Iterator[bytes], Any], bytes]:
        def call(messages: Iterator[bytes], context: Any) -> bytes:
            peer = peer_address(context.peer())
            with self._gate.enter(peer) as reason:
                try:
                    if reason:
                        raise Stop(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
                    request = _parse(kind, self._receive(messages, context))
                    return work(request, peer).SerializeToString()
                except Stop as stop:
                    status = stop.status
                    self._note(name, peer, stop)
                except Exception as error:
                    # Text of an exception may hold anything: it stays here, and in no log file
                    # that is meant to be read by others.
                    log.exception("enrollment: %s failed", name)
                    status = grpc.StatusCode.INTERNAL
                    self._note(name, peer, Stop(status, type(error).__name__))
            context.abort(status, _WORDS[status])
            raise AssertionError("unreachable")

        return call

    def _receive(self, messages: Iterator[bytes], context: Any) -> bytes:
        timer = threading.Timer(self.limits.message_seconds, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            return next(messages)
        except (StopIteration, grpc.RpcError):
            # Nothing came in time, the peer went away, or the message was too large.
            raise malformed("no-message") from None
        finally:
            timer.cancel()

    def _note(self, call: str, peer: str, stop: Stop) -> None:
        """Log a refusal; the same reason from the same peer once a minute, with their number."""
        repeated = self._refusals.count(
            (call, network(peer), stop.reason, stop.site), self._steady()
        )
        if repeated is None:
            return
        event = "enrollment.failed" if stop.status == grpc.StatusCode.INTERNAL else None
        try:
            self._audit.append(
                event or "enrollment.refused",
                call=call,
                reason=stop.reason,
                peer=peer,
                site=stop.site,
                key=stop.key[:16],
                repeated=repeated,
            )
        except (OSError, FedalignError):
            log.exception("enrollment: a refusal (%s) could not be logged", stop.reason)


def build(service: Service, host: str, port: int, key: bytes, chain: bytes) -> tuple[Any, int]:
    """Return a gRPC server that is bound but not started, and its port (useful for port 0).

    ``key`` and ``chain`` (leaf, then CA) are PEM.  Raises ``EnrollmentError`` when the port is
    taken.
    """
    limits = service.limits
    options = [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.max_concurrent_streams", limits.peer_requests),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_connection_idle_ms", int(1000 * limits.message_seconds)),
        ("grpc.max_connection_age_ms", int(1000 * limits.connection_seconds)),
        ("grpc.max_connection_age_grace_ms", int(1000 * GRACE_SECONDS)),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.handshake_seconds)),
        # Else a second coordinator on the same port would silently take half of the sites.
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.server(
        ThreadPoolExecutor(limits.threads, thread_name_prefix="enrollment"),
        options=options,
        maximum_concurrent_rpcs=limits.requests,
    )
    server.add_generic_rpc_handlers((service.handlers(),))
    address = join_address(host, port)
    try:
        bound = server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)]))
    except RuntimeError:
        bound = 0
    if not bound:
        raise EnrollmentError(
            f"cannot listen on {address}: the port is taken, or key and certificate do not fit. "
            "Stop what uses it, or change [enrollment] in coordinator.toml."
        )
    return server, int(bound)


def serve(
    registry: Registry,
    admin: SuperLinkAdmin,
    audit: AuditLog,
    *,
    host: str,
    port: int,
    key: bytes,
    chain: bytes,
    ca: bytes,
    gateway: str,
    limits: Limits | None = None,
) -> Any:
    """Start the service; return the running ``grpc.Server`` (``stop(seconds)`` ends it).

    ``key``, ``chain`` (leaf, then CA) and ``ca`` are PEM; ``gateway`` is the ``host:port`` that
    sites are told.  Raises ``EnrollmentError`` when it cannot start.
    """
    split_address(gateway)
    answers = Answers(gateway, ca)
    served = x509.load_pem_x509_certificates(chain)
    if answers.fingerprint not in [c.fingerprint(hashes.SHA256()).hex() for c in served[1:]]:
        raise EnrollmentError(
            "the certificate chain must hold the server's certificate and then the CA's; "
            "sites look for the CA in it. Run fedalign-server renew-certificate."
        )
    service = Service(Calls(registry, admin, audit, answers), audit, limits or Limits())
    server, _ = build(service, host, port, key, chain)
    server.start()
    return server


def _parse(kind: type[Request], data: bytes) -> Request:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise malformed("not-a-message") from None
