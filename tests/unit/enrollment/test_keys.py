"""Keys and what is signed: one spelling for one key, NIST curves only, no two statements alike."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedalign.enrollment import proofs
from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.keys import (
    fingerprint,
    flower_form,
    new_key,
    openssh_line,
    private_file,
    read_openssh,
    read_private,
)

CA, OTHER = "11" * 32, "22" * 32
OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_forms_of_a_key(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    public = key.public_key()
    assert openssh_line(read_openssh(openssh_line(public))) == openssh_line(public)
    assert len(openssh_line(public)) < 300
    assert flower_form(public) == public_key_to_bytes(public)
    assert len(fingerprint(flower_form(public))) == 64
    again = read_private(private_file(key))
    assert again.private_numbers() == key.private_numbers()
    for _ in range(20):
        assert len(proofs.sign(key, b"x")) <= proofs.MAX_SIGNATURE_BYTES


def test_new_keys_differ_and_are_p384() -> None:
    one, two = new_key(), new_key()
    assert one.curve.name == "secp384r1"
    assert flower_form(one.public_key()) != flower_form(two.public_key())
    assert private_file(one).startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")


def other_lines() -> dict[str, str]:
    good = openssh_line(new_key().public_key())
    kind, body = good.split(" ")
    bent = bytearray(base64.b64decode(body))
    bent[-1] ^= 1
    small = openssh_line(ec.generate_private_key(ec.SECP256R1()).public_key())
    return {
        "empty": "",
        "rsa": rsa.generate_private_key(65537, 2048).public_key().public_bytes(*OPENSSH).decode(),
        "ed25519": ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(*OPENSSH)
        .decode(),
        "comment": f"{good} me@host",
        "newline": f"{good}\n",
        "leading": f" {good}",
        "padded": f"{kind} {body}====",
        "not on the curve": f"{kind} {base64.b64encode(bent).decode()}",
        "kind of another": f"{kind} {small.split(' ')[1]}",
        "certificate": good.replace("nistp384", "nistp384-cert-v01@openssh.com"),
        "pem": flower_form(new_key().public_key()).decode(),
        "long": good + "A" * 500,
        "not ascii": f"{kind} \u00e4\u00f6",
        "null": f"{kind} \x00",
    }


@pytest.mark.parametrize("name", list(other_lines()))
def test_other_keys_are_refused(name: str) -> None:
    with pytest.raises(EnrollmentError, match=r"P-256, P-384 or P-521"):
        read_openssh(other_lines()[name])


def test_other_private_files_are_refused() -> None:
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    for data in (other, b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"\xff"):
        with pytest.raises(EnrollmentError, match="P-256"):
            read_private(data)


def test_a_proof_holds_for_its_own_statement_only() -> None:
    key, other = new_key(), new_key()
    public = key.public_key()
    statement = proofs.enroll_statement(CA, "token", public)
    proof = proofs.sign(key, statement)
    assert proofs.is_signed(public, statement, proof)
    assert not proofs.is_signed(other.public_key(), statement, proof)
    assert not proofs.is_signed(public, statement, proof[:-1])
    assert not proofs.is_signed(public, statement, b"")
    for changed in (
        proofs.enroll_statement(OTHER, "token", public),
        proofs.enroll_statement(CA, "token2", public),
        proofs.enroll_statement(CA, "token", other.public_key()),
    ):
        assert not proofs.is_signed(public, changed, proof)


def test_no_two_statements_are_alike() -> None:
    one, two = new_key().public_key(), new_key().public_key()
    found = [
        proofs.enroll_statement(CA, "ab", one),
        proofs.enroll_statement(CA, "a", one),
        proofs.enroll_statement(CA, "ab", two),
        proofs.renew_statement("old", CA, b"c", one, two),
        proofs.renew_statement("new", CA, b"c", one, two),
        proofs.renew_statement("old", CA, b"c", two, one),
        proofs.renew_statement("old", CA, b"d", one, two),
    ]
    assert len(set(found)) == len(found)
    with pytest.raises(ValueError, match="neither"):
        proofs.renew_statement("enroll", CA, b"c", one, two)


def test_a_statement_byte_by_byte() -> None:
    """Where a field ends is part of what is signed."""
    key = new_key().public_key()
    form = flower_form(key)
    domain = b"\0\0\0\x16fedalign enrollment v1"
    expected = b"\0\0\0\x06enroll\0\0\0\x20" + b"\x11" * 32 + b"\0\0\0\x03tok"
    assert proofs.enroll_statement(CA, "tok", key) == (
        domain + expected + len(form).to_bytes(4, "big") + form
    )
