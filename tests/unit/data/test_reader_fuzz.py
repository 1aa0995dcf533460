"""Whatever a row holds, a reader returns an item or a ``DataError``: never another exception."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.data.globalopinionqa import parse_published
from fedalign.data.pairs import parse_pairs
from fedalign.data.rejects import Rejects
from fedalign.data.survey import parse_survey
from fedalign.data.tables import Row

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["", " ", "a", "b", "[", "[1]", '{"a": [1, 0]}', "{'a': [0.5, 0.5]}", "NaN"]),
)
keys = st.sampled_from(["a", "b", "role", "content", ""])
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=6,
)


def tables(columns: tuple[str, ...], good: dict[str, Any]) -> st.SearchStrategy[list[Row]]:
    row = st.builds(
        lambda change: {**good, **change},
        st.dictionaries(st.sampled_from(columns), anything, max_size=3),
    )
    return st.lists(row, min_size=1, max_size=3).map(
        lambda rows: [Row(f"f.csv:{n + 2}", n, values) for n, values in enumerate(rows)]
    )


def check(table: list[Row], rejects: Rejects, items: int) -> None:
    assert items + len(rejects.rows) >= 1
    assert {r.source for r in rejects.rows} <= {row.source for row in table}
    assert all(r.reason for r in rejects.rows)


SURVEY = {"question": "q", "options": ["x", "y"], "shares": {"a": [0.5, 0.5]}}


@settings(max_examples=200, deadline=None)
@given(
    tables((*SURVEY, "votes", "group", "id", "ordinals", "split", "nonresponse_options"), SURVEY),
    st.booleans(),
)
def test_survey(table: list[Row], keep: bool) -> None:
    rejects = Rejects(skip=True)
    items = parse_survey(table, rejects, keep)
    check(table, rejects, len(items))
    for item in items:
        for shares in item.shares.values():
            assert abs(sum(shares) - 1) < 1e-9
            assert len(shares) == len(item.options)


PAIR = {"prompt": "p", "chosen": "x", "rejected": "y", "group": "a"}


@settings(max_examples=200, deadline=None)
@given(tables((*PAIR, "id", "vote_share", "split", "other"), PAIR))
def test_pairs(table: list[Row]) -> None:
    rejects = Rejects(skip=True)
    pairs = parse_pairs(table, rejects)
    assert len(pairs) + len(rejects.rows) == len(table)
    check(table, rejects, len(pairs))


PUBLISHED = {"question": "q", "options": "['x', 'y']", "selections": "{'a': [0.5, 0.5]}"}


@settings(max_examples=200, deadline=None)
@given(tables((*PUBLISHED, "source"), PUBLISHED), st.booleans())
def test_published(table: list[Row], keep: bool) -> None:
    rejects = Rejects(skip=True)
    items = parse_published(table, rejects, keep)
    check(table, rejects, len(items))
