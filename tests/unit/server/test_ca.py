"""The certificate authority: what its certificates are for, and that they work in a handshake."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from fedalign.errors import ConfigError
from server import ca

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def root() -> ca.Issued:
    return ca.make_root(NOW)


@pytest.fixture(scope="module")
def leaf(root: ca.Issued) -> ca.Issued:
    return ca.issue_leaf(root, ["Hub.example.org", "203.0.113.7", "2001:db8::1"], NOW)


def test_root_signs_leaves_only_for_ten_years(root: ca.Issued) -> None:
    found = x509.load_pem_x509_certificate(root.certificate)
    limits = found.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
    assert limits.critical
    assert (limits.value.ca, limits.value.path_length) == (True, 0)
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert isinstance(found.public_key(), ec.EllipticCurvePublicKey)
    assert found.public_key().curve.name == "secp384r1"
    assert (found.not_valid_after_utc - NOW).days in (3649, 3650)
    assert found.not_valid_before_utc < NOW


def test_leaf_is_for_servers_under_all_names(root: ca.Issued, leaf: ca.Issued) -> None:
    found = x509.load_pem_x509_certificate(leaf.certificate)
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(root.certificate))
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(a) for a in ("203.0.113.7", "2001:db8::1", "127.0.0.1")
    ]
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (found.not_valid_after_utc - NOW).days in (824, 825)
    assert ca.hosts_of(leaf.certificate) == ["hub.example.org", "203.0.113.7", "2001:db8::1"]


def test_leaf_does_not_outlive_its_root(root: ca.Issued) -> None:
    late = NOW + datetime.timedelta(days=3600)
    leaf = ca.issue_leaf(root, ["hub"], late)
    assert ca.valid_until(leaf.certificate) == ca.valid_until(root.certificate)


def greet(folder: Path, leaf: ca.Issued, trusted: ca.Issued, name: str) -> str:
    """Serve one TLS handshake with ``leaf``; return how it went for a client."""
    (folder / "key").write_bytes(leaf.key)
    (folder / "crt").write_bytes(leaf.certificate)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "crt", folder / "key")
    client = ssl.create_default_context(cadata=trusted.certificate.decode())
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(ours, server_side=True).close()
        except OSError:
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname=name) as done:
            return str(done.version())
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        theirs.close()
        thread.join(10)


def test_handshake_needs_this_root_and_a_name_of_the_leaf(
    tmp_path: Path, root: ca.Issued, leaf: ca.Issued
) -> None:
    for name in ("hub.example.org", "203.0.113.7", "localhost", "127.0.0.1"):
        assert greet(tmp_path, leaf, root, name) == "TLSv1.3"
    assert "Hostname mismatch" in greet(tmp_path, leaf, root, "other.example.org")
    assert "unable to get" in greet(tmp_path, leaf, ca.make_root(NOW), "localhost")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "http://hub",
        "hub:9443",
        "hub/x",
        "-hub",
        "hub-",
        "1.2.3",
        "999.1.1.1",
        "a..b",
        "*.example.org",
        "x" * 254,
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ca.host_name(text)


@given(st.text(max_size=40))
def test_a_host_name_is_stable_or_refused(text: str) -> None:
    try:
        name = ca.host_name(text)
    except ConfigError:
        return
    assert ca.host_name(name) == name
    assert not set(name) & set(" /\\@\n\"'")
