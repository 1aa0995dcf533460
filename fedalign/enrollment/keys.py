"""A site's key: ECDSA on a NIST curve, as Flower's node authentication needs it.

Three forms of one key: OpenSSH's private file (what ``flower-supernode`` reads), OpenSSH's public
line (what travels), and *Flower's form* of the public key, its SubjectPublicKeyInfo in PEM (what
Flower stores and shows).  The fingerprint of a key is the SHA-256 (hex) of Flower's form.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.enrollment.errors import EnrollmentError

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
MAX_OPENSSH_CHARACTERS = 512
"""A P-521 key has about 270; what is longer is not even parsed."""
KINDS = {
    "ecdsa-sha2-nistp256": "secp256r1",
    "ecdsa-sha2-nistp384": "secp384r1",
    "ecdsa-sha2-nistp521": "secp521r1",
}
"""First word of an OpenSSH line, and the curve it stands for."""
_ALLOWED = "Use an ECDSA key on P-256, P-384 or P-521."


def new_key() -> PrivateKey:
    """Return a new private key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def private_file(key: PrivateKey) -> bytes:
    """Return the OpenSSH private form, not encrypted: keep it in a file of mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def read_private(data: bytes) -> PrivateKey:
    """Return the key of an OpenSSH private file.  Raises ``EnrollmentError``."""
    try:
        key = serialization.load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise EnrollmentError(
            f"not an OpenSSH private key without passphrase. {_ALLOWED}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in KINDS.values():
        raise EnrollmentError(f"a private key of another kind. {_ALLOWED}")
    return key


def openssh_line(key: PublicKey) -> str:
    """Return the OpenSSH public form: kind and base64, without comment."""
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return key.public_bytes(*form).decode()


def read_openssh(text: str) -> PublicKey:
    """Return the key of an OpenSSH public line as :func:`openssh_line` makes it.

    Raises ``EnrollmentError`` for RSA, Ed25519, certificates, comments, and what is not a point on
    the curve.
    """
    kind, _, body = text.partition(" ")
    if len(text) > MAX_OPENSSH_CHARACTERS or kind not in KINDS or not body.isascii():
        raise EnrollmentError(f"not a public key in OpenSSH form. {_ALLOWED}")
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise EnrollmentError(f"not a public key in OpenSSH form. {_ALLOWED}") from None
    # One key, one spelling: a second spelling could pass for another key.
    if not isinstance(key, ec.EllipticCurvePublicKey) or openssh_line(key) != text:
        raise EnrollmentError(f"not a public key in OpenSSH form without comment. {_ALLOWED}")
    return key


def flower_form(key: PublicKey) -> bytes:
    """Return the key as Flower stores it (PEM, as its ``public_key_to_bytes``)."""
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key.public_bytes(*form)


def fingerprint(flower: bytes) -> str:
    """Return the fingerprint of a key in Flower's form."""
    return hashlib.sha256(flower).hexdigest()
