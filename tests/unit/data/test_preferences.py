"""Option pairs from shares: the label keeps the distribution."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.data.preferences import OptionPair, option_pairs
from fedalign.errors import DataError
from fedalign.randomness import generator

counts = st.lists(st.integers(0, 100), min_size=2, max_size=8).filter(any)


def rng(*keys: int) -> np.random.Generator:
    return generator(0, "test", *keys)


def test_worked_by_hand() -> None:
    assert option_pairs([0.5, 0.3, 0.2], 0, "shares", rng()) == [
        OptionPair(0, 1, 0.5 / 0.8),
        OptionPair(0, 2, 0.5 / 0.7),
        OptionPair(1, 2, 0.3 / 0.5),
    ]
    # Nobody chose options 1 and 2: that pair has no label.
    assert option_pairs([1.0, 0.0, 0.0], 0, "shares", rng()) == [
        OptionPair(0, 1, 1.0),
        OptionPair(0, 2, 1.0),
    ]


@given(counts)
def test_labels_give_the_distribution_back(votes: list[int]) -> None:
    y = np.array(votes) / sum(votes)
    top = int(y.argmax())
    odds = np.ones(len(y))  # y relative to the modal option, from the pairs that hold it
    for i, j, q in option_pairs(y, 0, "shares", rng()):
        assert i < j
        assert 0 <= q <= 1
        assert y[i] + y[j] > 0
        if top in (i, j):
            other, wins = (j, 1 - q) if i == top else (i, q)
            odds[other] = wins / (1 - wins)
    np.testing.assert_allclose(odds / odds.sum(), y, atol=1e-9)


@given(counts, st.integers(0, 40), st.sampled_from(["shares", "hard"]), st.integers(0, 5))
def test_draw_is_a_subset_without_repeats(votes: list[int], n: int, labels: str, key: int) -> None:
    y = np.array(votes) / sum(votes)
    every = {(p.i, p.j): p.q for p in option_pairs(y, 0, "shares", rng())}
    drawn = option_pairs(y, n, labels, rng(key))
    assert drawn == option_pairs(y, n, labels, rng(key))
    places = [(p.i, p.j) for p in drawn]
    assert places == sorted(set(places))
    assert len(drawn) == (min(n, len(every)) if n else len(every))
    for i, j, q in drawn:
        if labels == "shares":
            assert q == every[i, j]
        else:
            assert q in (0.0, 1.0)


def test_mean_of_hard_labels_is_q() -> None:
    y = [0.5, 0.3, 0.2]
    expected = [p.q for p in option_pairs(y, 0, "shares", rng())]
    draws = 4000
    mean = np.mean(
        [[p.q for p in option_pairs(y, 0, "hard", rng(k))] for k in range(draws)], axis=0
    )
    np.testing.assert_allclose(mean, expected, atol=4 * 0.5 / draws**0.5)


def test_pairs_are_drawn_in_proportion_to_their_mass() -> None:
    y = [0.6, 0.3, 0.1]  # masses 0.9, 0.7, 0.4 of 2
    draws = 4000
    seen = Counter((p.i, p.j) for k in range(draws) for p in option_pairs(y, 1, "shares", rng(k)))
    for pair, mass in (((0, 1), 0.9), ((0, 2), 0.7), ((1, 2), 0.4)):
        assert seen[pair] / draws == pytest.approx(mass / 2, abs=4 * 0.5 / draws**0.5)


@pytest.mark.parametrize(
    ("shares", "n", "labels"),
    [
        ([0.5, 0.4], 1, "shares"),
        ([1.5, -0.5], 1, "shares"),
        ([float("nan"), 1.0], 1, "shares"),
        ([1.0], 1, "shares"),
        ([[0.5, 0.5]], 1, "shares"),
        ([0.5, 0.5], -1, "shares"),
        ([0.5, 0.5], 1, "soft"),
    ],
)
def test_refuses(shares: list[float], n: int, labels: str) -> None:
    with pytest.raises(DataError):
        option_pairs(shares, n, labels, rng())
