"""From groups to clients and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.aggregation.clients import capped_sizes, client_weights, group_score


def test_sizes_are_capped_at_four_medians():
    assert capped_sizes([10, 10, 10_000]) == [10.0, 10.0, 40.0]
    assert capped_sizes([0, 0, 0, 8]) == [0.0, 0.0, 0.0, 8.0]


def test_client_weights_by_hand():
    clients = [("a1", "a", 10), ("a2", "a", 30), ("b1", "b", 99)]
    got = client_weights({"a": 0.6, "b": 0.4}, clients, "size")
    assert got == pytest.approx({"a1": 0.15, "a2": 0.45, "b1": 0.4})
    got = client_weights({"a": 0.6, "b": 0.4}, clients, "equal")
    assert got == pytest.approx({"a1": 0.3, "a2": 0.3, "b1": 0.4})


def test_one_liar_cannot_take_its_group():
    clients = [(f"c{i}", "g", 100) for i in range(4)] + [("liar", "g", 10**9)]
    assert client_weights({"g": 1.0}, clients)["liar"] == pytest.approx(0.5)


def test_one_client_carries_exactly_its_group():
    assert client_weights({"g": 0.37, "h": 0.63}, [("c", "g", 7), ("d", "h", 9)]) == {
        "c": 0.37,
        "d": 0.63,
    }


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 10**6)), min_size=1, max_size=30
    ),
    how=st.sampled_from(["size", "equal"]),
)
def test_client_weights_sum_to_the_group_weight(sizes, how):
    clients = [(f"c{i}", g, n) for i, (g, n) in enumerate(sizes)]
    groups = sorted({g for g, _ in sizes})
    shares = {g: (i + 1) / sum(range(1, len(groups) + 1)) for i, g in enumerate(groups)}
    got = client_weights(shares, clients, how)
    for g in groups:
        mine = math.fsum(got[c] for c, group, _ in clients if group == g)
        assert mine == pytest.approx(shares[g])


@pytest.mark.parametrize(
    ("weights", "clients", "how", "message"),
    [
        ({"a": 1.0}, [("x", "b", 1)], "size", "has no weight"),
        ({"a": 0.5, "b": 0.5}, [("x", "a", 1)], "size", "no client"),
        ({"a": 1.0}, [("x", "a", 1), ("x", "a", 1)], "size", "twice"),
        ({"a": 1.0}, [("x", "a", 0)], "size", "size 0"),
        ({"a": 1.0}, [("x", "a", 1)], "median", "not one of"),
    ],
)
def test_errors(weights, clients, how, message):
    with pytest.raises(ValueError, match=message):
        client_weights(weights, clients, how)


def test_group_score_by_hand():
    assert group_score([0.5, 0.9], [30, 10]) == pytest.approx(0.6)
    assert group_score([0.5, 0.9, 0.9], [10, 10, 10**6]) == pytest.approx((0.5 + 0.9 + 4 * 0.9) / 6)
    assert group_score([0.3], [5]) == 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_group_score_refuses_what_is_not_a_score(bad):
    with pytest.raises(ValueError, match="failed score"):
        group_score([0.5, bad], [1, 1])
    with pytest.raises(ValueError, match="sizes"):
        group_score([0.5], [1, 1])
