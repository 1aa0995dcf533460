"""Rows that ask the same question again are merged, and what is left out is listed."""

from __future__ import annotations

from fedalign.data.duplicates import merge_duplicates
from fedalign.data.records import SurveyItem
from fedalign.data.rejects import Rejects


def item(n: int, question: str, **shares: tuple[float, float]) -> SurveyItem:
    return SurveyItem(str(n), question, ("yes", "no"), shares, source=f"f:{n}")


def test_groups_of_a_later_row_join_the_first() -> None:
    rejects = Rejects()
    merged = merge_duplicates(
        [item(1, "Tea?", a=(0.5, 0.5)), item(2, "tea? ", b=(0.2, 0.8))], rejects
    )
    assert [i.id for i in merged] == ["1"]
    assert dict(merged[0].shares) == {"a": (0.5, 0.5), "b": (0.2, 0.8)}
    assert rejects.rows == []


def test_copies_and_contradictions_are_listed_and_the_first_counts() -> None:
    rejects = Rejects()
    rows = [item(1, "Tea?", a=(0.5, 0.5)), item(2, "Tea?", a=(0.5, 0.5)), item(3, "Tea?", a=(1, 0))]
    merged = merge_duplicates(rows, rejects)
    assert dict(merged[0].shares) == {"a": (0.5, 0.5)}
    assert [r.source for r in rejects.rows] == ["f:2", "f:3"]
    assert "otherwise in f:1" in rejects.rows[1].reason
