"""Challenges: good once, for two minutes, from this process only; and limits of peers."""

from __future__ import annotations

import pytest

from server.challenges import LIFETIME, SIZE, Challenges
from server.enrollment_limits import Gate, Limits, network, peer_address


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_challenge_is_good_once() -> None:
    made = Challenges()
    one, two = made.new(), made.new()
    assert len(one) == SIZE
    assert one != two
    assert made.is_fresh(one)
    assert made.spend(one)
    assert not made.spend(one)
    assert made.spend(two)


def test_a_challenge_gets_stale_and_is_forgotten() -> None:
    clock = Clock()
    made = Challenges(clock)
    old, used = made.new(), made.new()
    clock.now += LIFETIME - 0.5
    assert made.spend(used)
    clock.now += 1.0
    assert not made.spend(old)
    assert not made.spend(used)
    clock.now += 2 * LIFETIME
    assert made.spend(made.new())
    assert len(made._spent) == 1


def test_a_challenge_of_another_process_or_made_up_is_none() -> None:
    made = Challenges()
    assert not made.spend(Challenges().new())
    good = made.new()
    for i in (0, 10, 30, SIZE - 1):
        bent = bytearray(good)
        bent[i] ^= 1
        assert not made.spend(bytes(bent))
    assert not made.spend(b"")
    assert not made.spend(good + b"x")
    assert made.spend(good)


@pytest.mark.parametrize(
    ("peer", "address", "counted"),
    [
        ("ipv4:192.0.2.7:51234", "192.0.2.7", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3::7%5D:51234", "2001:db8:1:2:3::7", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::9]:1", "2001:db8:1:2:ffff::9", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.7]:1", "192.0.2.7", "192.0.2.7"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::1", "fe80::/64"),
        ("ipv6:[::1]:1", "::1", "::/64"),
        ("unix:/tmp/x", "unix:/tmp/x", "unix:/tmp/x"),
        ("ipv4:999.1.1.1:5", "ipv4:999.1.1.1:5", "ipv4:999.1.1.1:5"),
        ("x" * 500, "x" * 100, "x" * 100),
    ],
)
def test_ports_do_not_count_and_ipv6_counts_by_network(
    peer: str, address: str, counted: str
) -> None:
    assert peer_address(peer) == address
    assert network(address) == counted


def enter(gate: Gate, peer: str) -> str:
    with gate.enter(peer) as reason:
        return reason


def test_a_peer_has_its_own_bucket_and_one_peer_cannot_empty_the_common_one() -> None:
    clock = Clock()
    limits = Limits(peer_rate=0.5, peer_burst=3, total_rate=1.0, total_burst=5)
    gate = Gate(limits, clock)
    assert [enter(gate, "a") for _ in range(20)] == [""] * 3 + ["rate"] * 17
    assert [enter(gate, "b") for _ in range(3)] == ["", "", "rate"]
    clock.now += 2.0
    assert [enter(gate, "a"), enter(gate, "a")] == ["", "rate"]


def test_a_network_of_ipv6_is_one_peer() -> None:
    gate = Gate(Limits(peer_burst=1), Clock())
    assert [enter(gate, f"2001:db8::{i}") for i in range(3)] == ["", "rate", "rate"]


def test_a_peer_has_few_requests_under_way() -> None:
    gate = Gate(Limits(peer_requests=2))
    with gate.enter("a") as one, gate.enter("a") as two:
        assert (one, two, enter(gate, "a"), enter(gate, "b")) == ("", "", "busy", "")
    assert enter(gate, "a") == ""
    assert not gate._inside
