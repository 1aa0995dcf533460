"""What is signed when a site joins or changes its key.

A signature is ECDSA with SHA-256 over a statement, and a statement is a list of fields, each with
its length (4 bytes, big-endian) before it, so that no two lists give the same bytes:

=========  =======================================================================================
enroll     domain, "enroll", CA, token, new key                           by the new key
renew-old  domain, "renew-old", CA, challenge, old key, new key           by the old key
renew-new  domain, "renew-new", CA, challenge, old key, new key           by the new key
=========  =======================================================================================

The domain names this protocol and its version.  ``CA`` is the SHA-256 (32 bytes) of the CA
certificate that the site pinned: a proof made for one coordinator is worth nothing at another.
Keys are in Flower's form.  The new key always signs: nobody can enroll a key that is not theirs.
An enrollment needs no challenge, because its token is good for one key only; a renewal has none,
so it signs a challenge that the coordinator gave out, which is good once and for two minutes by the
coordinator's clock alone.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.enrollment.keys import PrivateKey, PublicKey, flower_form

DOMAIN = b"fedalign enrollment v1"
MAX_SIGNATURE_BYTES = 141
"""The longest DER signature of a P-521 key has 139."""


def enroll_statement(ca: str, token: str, new: PublicKey) -> bytes:
    """Return what the key signs that joins; ``ca`` is the CA's fingerprint in hex."""
    return _fields(b"enroll", bytes.fromhex(ca), token.encode(), flower_form(new))


def renew_statement(
    signer: str, ca: str, challenge: bytes, old: PublicKey, new: PublicKey
) -> bytes:
    """Return what ``signer``, ``"old"`` or ``"new"``, signs in a renewal."""
    if signer not in ("old", "new"):
        raise ValueError(f"'{signer}' is neither old nor new")
    purpose = f"renew-{signer}".encode()
    return _fields(purpose, bytes.fromhex(ca), challenge, flower_form(old), flower_form(new))


def sign(key: PrivateKey, statement: bytes) -> bytes:
    """Return the signature of a statement (DER)."""
    return key.sign(statement, ec.ECDSA(hashes.SHA256()))


def is_signed(key: PublicKey, statement: bytes, signature: bytes) -> bool:
    """Say whether ``signature`` is the key's over the statement."""
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _fields(*fields: bytes) -> bytes:
    return b"".join(len(f).to_bytes(4, "big") + f for f in (DOMAIN, *fields))
