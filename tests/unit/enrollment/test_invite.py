"""The invite line, names and addresses: what is read, what is refused, and with which words."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.enrollment.errors import EnrollmentError
from fedalign.enrollment.invite import make_invite, parse_invite
from fedalign.enrollment.names import check_group, check_site, node_name, split_address

TOKEN = base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("=")
CA = "ab" * 32
GOOD = f"fedalign://hub.example.org:9443?token={TOKEN}&ca=sha256:{CA}"


def test_a_line_and_back() -> None:
    invite = parse_invite(GOOD)
    assert (invite.host, invite.port, invite.token, invite.ca) == (
        "hub.example.org",
        9443,
        TOKEN,
        CA,
    )
    assert invite.line() == GOOD
    assert parse_invite(f"  {GOOD}\n") == invite
    assert make_invite("hub.example.org:9443", TOKEN, CA) == invite
    assert TOKEN not in repr(invite)


def test_order_case_and_ipv6() -> None:
    line = f"fedalign://[2001:DB8::1]:443?ca=SHA256:{CA.upper()}&token={TOKEN}"
    invite = parse_invite(line)
    assert (invite.host, invite.address, invite.ca) == ("2001:db8::1", "[2001:db8::1]:443", CA)
    assert parse_invite(invite.line()) == invite


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty"),
        (GOOD.replace("&", "\n&"), "a line break"),
        (GOOD.replace(":9443", ": 9443"), "white space"),
        (GOOD.replace("token", "tok\u00e9n"), "no invite has"),
        (GOOD + "x" * 600, "more than 512"),
        (GOOD.replace("fedalign", "https"), "begins with fedalign://"),
        (GOOD.partition("?")[0], r"no \?token"),
        (GOOD.partition("&")[0], "cuts an invite without quotes"),
        (GOOD.replace(f"token={TOKEN}&", ""), "no token="),
        (GOOD + "&x=1", "once each, and nothing else"),
        (GOOD + f"&token={TOKEN}", "once each"),
        (GOOD.replace(TOKEN, TOKEN[:-1]), "token has 42 characters"),
        (GOOD.replace(TOKEN, TOKEN[:-1] + "%"), "odd ones"),
        (GOOD.replace("sha256:", "sha1:"), "must be sha256"),
        (GOOD.replace("sha256:", ""), "must be sha256"),
        (GOOD[:-1], "63 of 64"),
        (GOOD + "00", "66 of 64"),
        (GOOD[:-1] + "g", "must be sha256"),
        (GOOD.replace(":9443", ""), "not HOST:PORT"),
        (GOOD.replace(":9443", ":0"), "not HOST:PORT"),
        (GOOD.replace(":9443", ":65536"), "not HOST:PORT"),
        (GOOD.replace("hub.", "user:secret@hub."), "neither a host name"),
        (GOOD.replace("hub.example.org", "2001:db8::1"), "neither a host name"),
        (GOOD.replace("hub.example.org", "10.0.0.300"), "neither a host name"),
        (GOOD.replace("hub.example.org", "-a.org"), "neither a host name"),
        (GOOD.replace("9443?", "9443/?"), "not HOST:PORT"),
        (GOOD.replace("hub.example.org", ""), "neither a host name"),
    ],
)
def test_what_is_wrong_is_said_without_the_token(line: str, words: str) -> None:
    with pytest.raises(EnrollmentError, match=words) as caught:
        parse_invite(line)
    assert TOKEN[:20] not in str(caught.value)
    assert caught.value.exit_code == 7


@given(st.text(max_size=200))
def test_any_other_text_is_refused_with_an_error_of_ours(text: str) -> None:
    for line in (text, f"fedalign://{text}", GOOD.replace("hub", text, 1) if text else text):
        try:
            parse_invite(line)
        except EnrollmentError:
            continue
        assert parse_invite(parse_invite(line).line()) == parse_invite(line)


@pytest.mark.parametrize("name", ["a", "7", "north-clinic", "a" * 40])
def test_sites(name: str) -> None:
    assert check_site(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a b", "a@b", "a" * 41, "a\n", "\u00e4", "a.b", "a/b"]
)
def test_no_sites(name: str) -> None:
    with pytest.raises(EnrollmentError, match="site's name"):
        check_site(name)


@pytest.mark.parametrize("name", ["A", "United States (2020)", "b_c.d-e", "9" * 64])
def test_groups(name: str) -> None:
    assert check_group(name) == name


@pytest.mark.parametrize("name", ["", " a", "(a)", "a@b", "a" * 65, "a\n", 'a"b', "\u00e4"])
def test_no_groups(name: str) -> None:
    with pytest.raises(EnrollmentError, match="group's name"):
        check_group(name)


def test_the_name_of_a_node_reads_in_one_way() -> None:
    assert node_name("north-clinic", "North (2)") == "north-clinic@North (2)"
    with pytest.raises(EnrollmentError):
        node_name("a@b", "c")


def test_addresses() -> None:
    assert split_address("Hub.Example.org.:1") == ("hub.example.org", 1)
    assert split_address("127.0.0.1:65535") == ("127.0.0.1", 65535)
    for bad in (
        "[127.0.0.1]:1",
        "::1:1",
        "[fe80::1%eth0]:1",
        "a:\u0661",
        "a:",
        "a",
        ":1",
        "a:000001",
    ):
        with pytest.raises(EnrollmentError):
            split_address(bad)
