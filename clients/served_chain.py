"""Is this the coordinator of the invite?  Answered before a byte of ours is sent.

A TLS handshake shows the server's certificates.  The one whose SHA-256 the invite names is the
coordinator's CA; it is then the only root that gRPC trusts, so the connection that carries the
token is verified by TLS itself.  What is checked here would fail there too, but gRPC cannot say
why; these messages can.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.names import join_address

CONNECT_SECONDS = 10.0
_ASK = "Ask the operator"


def pinned_ca(host: str, port: int, ca: str, now: datetime.datetime | None = None) -> bytes:
    """Connect, and return the CA certificate (PEM) with the fingerprint ``ca`` (hex).

    The server must show a certificate for ``host`` that this CA signed, for servers, in date.
    ``now`` (aware) is this machine's time if None.  Raises ``EnrollmentError`` that says what does
    not fit and what to do.
    """
    chain = served_chain(host, port)
    return check_chain(chain, host, ca, now or datetime.datetime.now(datetime.UTC))


def served_chain(host: str, port: int) -> list[bytes]:
    """Return the certificates (DER, leaf first) that a server shows; nothing else is sent."""
    address = join_address(host, port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is verified yet, and nothing is sent: this only fetches what is then compared.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=CONNECT_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            return _unverified_chain(tls)
    except socket.gaierror:
        raise EnrollmentError(
            f"{host}: no such host, or no name service here. Compare the name with the invite; "
            f"{_ASK} whether it is known outside."
        ) from None
    except ssl.SSLError as error:
        raise EnrollmentError(
            f"{address} answers, but not with TLS ({error.reason or 'no reason given'}). "
            f"{_ASK} for the port of the enrollment service, and whether a proxy is in between."
        ) from None
    except TimeoutError:
        raise EnrollmentError(
            f"{address} does not answer within {CONNECT_SECONDS:.0f} s. A firewall here or there "
            f"may be in between; {_ASK} whether it runs."
        ) from None
    except OSError as error:
        raise EnrollmentError(
            f"{address} cannot be reached ({error.strerror or 'connection ended'}). "
            f"{_ASK} whether the coordinator runs and its port is open."
        ) from None


def _unverified_chain(tls: ssl.SSLSocket) -> list[bytes]:
    """Return the peer's certificates as DER; public in Python 3.13, there before under a name."""
    if sys.version_info >= (3, 13):
        return [bytes(der) for der in tls.get_unverified_chain()]
    import _ssl

    inner: Any = tls._sslobj  # type: ignore[attr-defined]
    chain = inner.get_unverified_chain() or []
    return [bytes(c.public_bytes(_ssl.ENCODING_DER)) for c in chain]


def check_chain(chain: Sequence[bytes], host: str, ca: str, now: datetime.datetime) -> bytes:
    """Return the CA (PEM) of a served chain (DER, leaf first), or raise ``EnrollmentError``."""
    found = [der for der in chain[1:] if hashlib.sha256(der).hexdigest() == ca]
    if not found:
        raise EnrollmentError(
            f"{host} is not the coordinator of this invite: none of its {len(chain)} certificates "
            f"has the fingerprint sha256:{ca[:16]}... Nothing was sent. Compare the invite with "
            "the operator's, over another way; somebody may be in between, or the coordinator was "
            "made anew."
        )
    try:
        leaf = x509.load_der_x509_certificate(chain[0])
        root = x509.load_der_x509_certificate(found[0])
        signs = root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, x509.ExtensionNotFound, InvalidSignature):
        signs = False
    if not signs:
        raise EnrollmentError(
            f"The certificate that {host} shows is not signed by the CA of this invite. Nothing "
            f"was sent. {_ASK}; somebody may be in between."
        )
    for what, certificate in (("certificate", leaf), ("CA", root)):
        _check_dates(f"The {what} of {host}", certificate, now)
    _check_purpose(leaf, host)
    return root.public_bytes(serialization.Encoding.PEM)


def _check_dates(what: str, certificate: x509.Certificate, now: datetime.datetime) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if first <= now <= last:
        return
    when = "is not valid yet" if now < first else "has expired"
    raise EnrollmentError(
        f"{what} {when}: it is good from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}, and this "
        f"machine's clock says {now:%Y-%m-%d %H:%M} (all UTC). If the clock is wrong, set it; else "
        "the operator has to renew it (fedalign-server renew-certificate)."
    )


def _check_purpose(leaf: x509.Certificate, host: str) -> None:
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        usage, names = None, None
    if usage is None or names is None or ExtendedKeyUsageOID.SERVER_AUTH not in usage:
        raise EnrollmentError(
            f"The certificate of {host} is not one for servers. {_ASK} to renew it "
            "(fedalign-server renew-certificate)."
        )
    addresses = [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    listed = [n.lower() for n in names.get_values_for_type(x509.DNSName)]
    if host.lower() not in (addresses if _is_address(host) else listed):
        raise EnrollmentError(
            f"The certificate of {host} is for {', '.join(listed + addresses) or 'no name'}, not "
            f"for {host}. {_ASK} for an invite with one of these, or to renew the certificate for "
            f"this name (fedalign-server renew-certificate --host {host})."
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
