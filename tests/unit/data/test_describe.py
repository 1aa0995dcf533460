"""How much groups disagree, on numbers worked by hand."""

from __future__ import annotations

import pytest

from fedalign.data.describe import describe, table
from fedalign.data.records import BadRow, Dataset, Item, Pair, SurveyItem


def pair(group: str, prompt: str, chosen: str, rejected: str, share: float = 1.0) -> Pair:
    return Pair(f"{group}{prompt}{chosen}", prompt, chosen, rejected, group, vote_share=share)


def test_pairs() -> None:
    items: list[Item] = [
        pair("a", "p1", "long answer", "no"),
        pair("a", "p1", "no", "long answer"),
        pair("a", "p2", "yes", "no"),
        pair("a", "p3", "yes", "no"),
        pair("b", "p1", "no", "long answer"),
        pair("b", "p2", "no", "yes"),
        pair("b", "p3", "yes", "no", 0.25),
        pair("c", "p9", "yes", "no"),
    ]
    d = describe(Dataset("pairs", tuple(items), (BadRow("f:1", "x"),), name="n"))
    a = d.groups[0]
    assert (a.group, a.rows, a.questions) == ("a", 4, 3)
    assert a.chosen_length == pytest.approx((11 + 2 + 3 + 3) / 4)
    assert a.rejected_length == pytest.approx((2 + 11 + 2 + 2) / 4)
    assert a.disagreement == pytest.approx(1 / 3)  # p1 in both directions
    # p1: a is divided, no reversal; p2 reversed; p3 reversed, since b's vote share is 1/4.
    (ab,) = d.overlaps
    assert (ab.a, ab.b, ab.shared, ab.reversed) == ("a", "b", 3, 2)
    assert d.conflict == pytest.approx(2 / 3)
    assert "a / b: 3 shared, 66.7% reversed" in table(d)
    assert "expect no difference" not in table(d)


def test_survey() -> None:
    def item(i: int, **shares: tuple[float, ...]) -> SurveyItem:
        return SurveyItem(str(i), f"Q{i}?", ("yes", "maybe", "no"), shares)

    items = (
        item(0, a=(0.6, 0.2, 0.2), b=(0.2, 0.6, 0.2)),
        item(1, a=(0.6, 0.2, 0.2), b=(0.5, 0.3, 0.2)),
        item(2, a=(0.4, 0.4, 0.2), b=(0.2, 0.6, 0.2)),  # a tie that holds b's mode
        item(3, a=(0.0, 0.0, 1.0)),
    )
    d = describe(Dataset("survey", items, name="s"))
    (ab,) = d.overlaps
    assert (ab.shared, ab.reversed) == (3, 1)
    b = d.groups[1]
    assert b.disagreement is None
    assert b.chosen_length == pytest.approx((5 + 3 + 5) / 3)
    assert b.rejected_length == pytest.approx((2.5 + 3.5 + 2.5) / 3)


def test_little_conflict_and_none_shared() -> None:
    same: list[Item] = [pair(g, "p", "yes", "no") for g in "ab"]
    d = describe(Dataset("pairs", tuple(same)))
    assert d.conflict == 0
    assert "Below 2%: expect no difference between weight rules" in table(d)
    apart: list[Item] = [pair(g, f"p{g}", "yes", "no") for g in "ab"]
    d = describe(Dataset("pairs", tuple(apart)))
    assert d.conflict is None
    assert "not defined" in table(d)
