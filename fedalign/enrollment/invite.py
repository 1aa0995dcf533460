"""The invite: one line that an operator hands to a site.

::

    fedalign://HOST:PORT?token=TOKEN&ca=sha256:HEX

``TOKEN`` is 32 random bytes in base64url (43 characters), good for one key, once.  ``HEX`` is the
SHA-256 of the coordinator's CA certificate in DER form (64 digits).  Whoever holds the line can
join as that site until somebody did or it expires: send it as you would send a password.  It also
says whom the site may trust, so a line that was changed on its way leads to somebody else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.names import join_address, split_address

SCHEME = "fedalign://"
TOKEN_CHARACTERS = 43
MAX_CHARACTERS = 512
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_HEX = re.compile(r"[0-9a-fA-F]+")
_QUOTED = "Paste it whole, as one line in single quotes."


@dataclass(frozen=True)
class Invite:
    """Where to go, with what, and whom to find there."""

    host: str
    port: int
    token: str = field(repr=False)
    ca: str
    """SHA-256 of the CA certificate, 64 small hexadecimal digits."""

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the enrollment service."""
        return join_address(self.host, self.port)

    def line(self) -> str:
        """Return the invite as it is handed over; it holds the secret token."""
        return f"{SCHEME}{self.address}?token={self.token}&ca=sha256:{self.ca}"


def make_invite(address: str, token: str, ca: str) -> Invite:
    """Return the invite for a service at ``HOST:PORT``, checked as a pasted one is."""
    host, port = split_address(address)
    return parse_invite(Invite(host, port, token, ca).line())


def parse_invite(text: str) -> Invite:
    """Read an invite; white space around it is dropped.

    Raises ``EnrollmentError`` that says what is wrong.  The message never holds the token.
    """
    line = text.strip()
    if not line:
        raise EnrollmentError(f"The invite is empty. {_QUOTED}")
    if any(c.isspace() for c in line):
        what = "a line break" if re.search(r"[\r\n]", line) else "white space"
        raise EnrollmentError(f"The invite has {what} in its midst. {_QUOTED}")
    if len(line) > MAX_CHARACTERS or not (line.isascii() and line.isprintable()):
        raise EnrollmentError(
            f"The invite holds characters that no invite has, or more than {MAX_CHARACTERS}. "
            f"{_QUOTED}"
        )
    if not line.lower().startswith(SCHEME):
        raise EnrollmentError(f"An invite begins with {SCHEME}, this one does not. {_QUOTED}")
    address, question, query = line[len(SCHEME) :].partition("?")
    if not question:
        raise EnrollmentError(f"The invite has no ?token=...&ca=... after its address. {_QUOTED}")
    host, port = split_address(address)
    given = _query(query)
    if not TOKEN.fullmatch(given["token"]):
        raise EnrollmentError(
            f"The invite's token has {len(given['token'])} characters or odd ones; it must be "
            f"{TOKEN_CHARACTERS} letters, digits, _ or -. {_QUOTED}"
        )
    return Invite(host, port, given["token"], _fingerprint(given["ca"]))


def _query(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if key not in ("token", "ca") or key in found:
            raise EnrollmentError(
                f"The invite must hold token=... and ca=..., once each, and nothing else. {_QUOTED}"
            )
        found[key] = value
    for key in ("token", "ca"):
        if key not in found:
            cut = " (a shell cuts an invite without quotes at its &)" if key == "ca" else ""
            raise EnrollmentError(f"The invite has no {key}=...{cut}. {_QUOTED}")
    return found


def _fingerprint(text: str) -> str:
    name, colon, digits = text.partition(":")
    if not colon or name.lower() != "sha256" or not _HEX.fullmatch(digits):
        raise EnrollmentError(
            f"The invite's ca must be sha256: and 64 hexadecimal digits. {_QUOTED}"
        )
    if len(digits) != 64:
        raise EnrollmentError(
            f"The invite's ca has {len(digits)} of 64 hexadecimal digits. {_QUOTED}"
        )
    return digits.lower()
