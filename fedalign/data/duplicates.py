"""One question, one set of answers a group: rows that ask the same thing again are merged.

Two survey rows with the same text and options (case and white space apart) are one question.
Groups that only the later row has are added to the first.  Of a group that both have, the first
shares count and the later ones are left out and listed, with a note where they differ.  Surveys
that were asked in several years hold such rows, so they do not stop a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedalign.data.records import Item, SurveyItem
from fedalign.data.rejects import Rejects

TOLERANCE = 1e-6


def merge_duplicates(items: Iterable[Item], rejects: Rejects) -> list[Item]:
    """Return the items with repeated survey questions merged, in order of first appearance."""
    merged: dict[str, Item] = {}
    for n, item in enumerate(items):
        if not isinstance(item, SurveyItem):
            merged[f"pair {n}"] = item
            continue
        first = merged.setdefault(item.key, item)
        if first is not item and isinstance(first, SurveyItem):
            merged[item.key] = _merge(first, item, rejects)
    return list(merged.values())


def _merge(first: SurveyItem, again: SurveyItem, rejects: Rejects) -> SurveyItem:
    where = again.source or again.id
    shares = dict(first.shares)
    for group, given in again.shares.items():
        known = shares.get(group)
        if known is None:
            shares[group] = given
        elif max(abs(a - b) for a, b in zip(known, given, strict=True)) > TOLERANCE:
            earlier = first.source or first.id
            rejects.note(where, f"group '{group}' answered this question otherwise in {earlier}")
        else:
            rejects.note(where, f"group '{group}': the same question and answers again")
    return replace(first, shares=shares)
