"""Names of sites and groups, and addresses: what is allowed, checked in one place.

A site is ``[a-z0-9-]``, 1 to 40 characters, a letter or digit first and last.  A group is 1 to 64
characters of ``[A-Za-z0-9 ._()-]``, the first a letter or digit.  Neither can hold an ``@``, so
``site@group``, the name that Flower shows for a node, is read in one way only.
"""

from __future__ import annotations

import ipaddress
import re

from fedalign.enrollment.errors import EnrollmentError

_SITE = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._()-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def check_site(name: str) -> str:
    """Return a site's name as given, or raise ``EnrollmentError``."""
    if not _SITE.fullmatch(name):
        raise EnrollmentError(
            f"{_shown(name)} cannot be a site's name. Use 1 to 40 small letters, digits and "
            "hyphens, a letter or digit first and last, e.g. north-clinic."
        )
    return name


def check_group(name: str) -> str:
    """Return a group's name as given, or raise ``EnrollmentError``."""
    if not _GROUP.fullmatch(name):
        raise EnrollmentError(
            f"{_shown(name)} cannot be a group's name. Use 1 to 64 of: letters, digits, space, and "
            "._()- with a letter or digit first."
        )
    return name


def node_name(site: str, group: str) -> str:
    """Return the name under which Flower lists a site's node; for people, never for trust."""
    return f"{check_site(site)}@{check_group(group)}"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; an IPv6 address stands in brackets, here without.

    Host names come back in small letters.  Raises ``EnrollmentError``.
    """
    host, colon, port = address.rpartition(":")
    number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
    if not colon or not 1 <= number <= 65535:
        raise EnrollmentError(
            f"{_shown(address)} is not HOST:PORT with a port in 1 to 65535, "
            "e.g. hub.example.org:9443 or [2001:db8::1]:9443."
        )
    return _host(host, address), number


def join_address(host: str, port: int) -> str:
    """Return ``HOST:PORT``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(host: str, address: str) -> str:
    bracketed = host.startswith("[") and host.endswith("]")
    inner = host[1:-1] if bracketed else host
    try:
        ip = ipaddress.ip_address(inner)
    except ValueError:
        ip = None
    if ip is not None and (ip.version == 6) == bracketed and "%" not in inner:
        return str(ip)
    labels = host.removesuffix(".").split(".")
    number = labels[-1].isdigit()
    if ip is None and len(host) <= 253 and not number and all(map(_LABEL.fullmatch, labels)):
        return host.removesuffix(".").lower()
    raise EnrollmentError(
        f"{_shown(address)}: {_shown(host)} is neither a host name nor an IP address "
        "(IPv6 in brackets)."
    )


def _shown(text: str) -> str:
    """Return a text that came from outside, short and printable, in quotes."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return f"'{clean[:60]}...'" if len(clean) > 63 else f"'{clean}'"
