"""Attainable optimum of one shared preference."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fedalign.data.records import Pair
from fedalign.errors import DataError
from fedalign.metrics.attainable_pairs import PairRow, pair_references, pair_rows


def test_rows_speak_of_the_first_response_whoever_chose_it():
    one = Pair("1", "p", "x", "y", "a", vote_share=0.9)
    other = Pair("2", "p", "y", "x", "b", vote_share=0.7)
    rows = pair_rows([one, other])
    assert rows[0].comparison == rows[1].comparison
    assert [r.share for r in rows] == pytest.approx([0.9, 0.3])


def test_share_weighted_majority_by_hand():
    """On c: a .9, b .3 lean to the first (+.8 - .4); a also judged d alone (0)."""
    rows = [PairRow("c", "a", 0.9), PairRow("c", "b", 0.3)]
    got = pair_references(rows)
    best = got["optimum_average"]
    assert best.answers == {"c": (1.0, 0.0)}
    assert best.group_scores == pytest.approx({"a": 0.9, "b": 0.3})
    assert got["uniform"].group_scores == {"a": 0.5, "b": 0.5}
    # Worst group: .1 + .8 x = .7 - .4 x at x = .5.
    assert got["optimum_worst"].worst == pytest.approx(0.5)


def test_without_a_shared_comparison_it_is_not_defined():
    assert pair_references([PairRow("c", "a", 0.9), PairRow("d", "b", 0.3)]) is None
    assert pair_references([]) is None


def test_no_deterministic_side_beats_the_optimum():
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = [
            PairRow(f"c{c}", g, float(rng.random()))
            for c in range(6)
            for g in "abc"
            if g == "abc"[c % 3] or rng.random() < 0.7
        ]
        rows.append(rows[0]._replace(share=0.2))  # the same group judged it twice
        got = pair_references(rows)
        count = {g: sum(r.group == g for r in rows) for g in "abc"}
        for sides in product((0.0, 1.0), repeat=6):
            means = dict.fromkeys("abc", 0.0)
            for r in rows:
                x = sides[int(r.comparison[1:])]
                means[r.group] += (x * r.share + (1 - x) * (1 - r.share)) / count[r.group]
            assert np.mean(list(means.values())) <= got["optimum_average"].average + 1e-9
            assert min(means.values()) <= got["optimum_worst"].worst + 1e-9


def test_a_share_that_is_none_is_an_error():
    with pytest.raises(DataError, match="outside"):
        pair_references([PairRow("c", "a", 1.2), PairRow("c", "b", 0.2)])
