"""The coordinator's certificate authority: one root for sites, one leaf for its servers.

The root (EC P-384, 10 years, path length 0) signs leaves only.  Sites pin the root when they join,
so the leaf (EC P-256, 825 days, for servers) can be replaced at any time and sites need nothing.
The leaf names every address by which sites reach the coordinator, and the loopback.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedalign.errors import ConfigError

ROOT_DAYS, LEAF_DAYS = 3650, 825
LOOPBACK = ("localhost", "127.0.0.1")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
_SKEW = datetime.timedelta(hours=1)  # a site's clock may be behind


@dataclass(frozen=True)
class Issued:
    """A private key (PKCS8) and its certificate, both PEM."""

    key: bytes
    certificate: bytes


def make_root(now: datetime.datetime) -> Issued:
    """Return a new self-signed root, valid from about ``now`` (aware)."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"fedalign coordinator {secrets.token_hex(4)}")]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return _issued(key, certificate)


def issue_leaf(root: Issued, hosts: Sequence[str], now: datetime.datetime) -> Issued:
    """Return a new server certificate for ``hosts`` (names or IP addresses) and the loopback.

    Raises ``ConfigError`` for something that is neither a host name nor an IP address.
    """
    root_key = serialization.load_pem_private_key(root.key, None)
    if not isinstance(root_key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the root's key is no elliptic-curve key. Restore ca/ca.key.")
    root_certificate = x509.load_pem_x509_certificate(root.certificate)
    names = list(dict.fromkeys([*(host_name(h) for h in hosts), *LOOPBACK]))
    key = ec.generate_private_key(ec.SECP256R1())
    last = root_certificate.not_valid_after_utc
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(root_certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(now + datetime.timedelta(days=LEAF_DAYS), last))
        .add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()),
            critical=False,
        )
        .sign(root_key, hashes.SHA384())
    )
    return _issued(key, certificate)


def host_name(text: str) -> str:
    """Return a host name or IP address in its usual form; ``ConfigError`` for anything else."""
    text = text.strip().strip("[]")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.rstrip(".").split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            f"'{text}' is neither a host name nor an IP address. Give the name or address by which "
            "sites reach this machine, without port, e.g. --host hub.example.org,203.0.113.7"
        )
    if labels[-1].isdigit():
        raise ConfigError(f"'{text}' is not an IP address, and no host name ends in a number.")
    return text.rstrip(".").lower()


def hosts_of(certificate: bytes) -> list[str]:
    """Return the names and addresses that a certificate (PEM) is for, without the loopback."""
    names = (
        x509.load_pem_x509_certificate(certificate)
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    found = [str(name.value) for name in names]
    return [name for name in found if name not in LOOPBACK]


def valid_until(certificate: bytes) -> datetime.datetime:
    """Return the end of a certificate's (PEM) validity, aware."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 (hex) of a certificate's (PEM) DER form."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _issued(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Issued:
    return Issued(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )
