"""Survey files: two layouts, shares or votes, and every way a row can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.data.rejects import Rejects
from fedalign.data.survey import normalised, read_survey
from fedalign.errors import DataError

GOOD: dict[str, Any] = {
    "question": "Tea?",
    "options": ["yes", "no"],
    "shares": {"a": [0.75, 0.25], "b": [0.5, 0.5]},
}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_wide_row_with_everything(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "id": "q7",
        "ordinals": [1, 0],
        "split": "test",
        "topic": "drinks",
        "wave": 3,
        "site": "north",
    }
    (item,) = read_survey(write(tmp_path / "s.jsonl", row), Rejects())
    assert item.id == "q7"
    assert item.options == ("yes", "no")
    assert item.shares == {"a": (0.75, 0.25), "b": (0.5, 0.5)}
    assert item.ordinals == (1.0, 0.0)
    assert (item.split, item.topic) == ("test", "drinks")
    assert item.columns == {"wave": "3", "site": "north"}
    assert item.source == f"{tmp_path / 's.jsonl'}:1"


def test_votes_become_shares(tmp_path: Path) -> None:
    row = {"question": "Tea?", "options": ["yes", "no"], "votes": {"a": [3, 1]}}
    (item,) = read_survey(write(tmp_path / "s.jsonl", row), Rejects())
    assert item.shares == {"a": (0.75, 0.25)}


def test_rounded_shares_are_renormalised_once(tmp_path: Path) -> None:
    row = {**GOOD, "shares": {"a": [0.66, 0.33]}}
    (item,) = read_survey(write(tmp_path / "s.jsonl", row), Rejects())
    assert item.shares["a"] == pytest.approx((2 / 3, 1 / 3))


def test_long_rows_of_a_question_are_joined(tmp_path: Path) -> None:
    row = {"question": "Tea?", "options": ["yes", "no"]}
    other = {"question": "Milk?", "options": ["yes", "no"], "group": "a", "shares": [1, 0]}
    file = write(
        tmp_path / "s.jsonl",
        {**row, "group": "a", "shares": [0.75, 0.25], "site": "x"},
        other,
        {**row, "group": "b", "shares": [0.5, 0.5], "site": "y"},
    )
    tea, milk = read_survey(file, Rejects())
    assert tea.shares == {"a": (0.75, 0.25), "b": (0.5, 0.5)}
    assert tea.columns == {"site@a": "x", "site@b": "y"}
    assert milk.shares == {"a": (1.0, 0.0)}


def test_csv_and_parquet_with_json_cells_give_the_same_items(tmp_path: Path) -> None:
    expected = read_survey(write(tmp_path / "s.jsonl", GOOD), Rejects())
    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in GOOD.items()}
    quoted = ",".join('"' + v.replace('"', '""') + '"' for v in cells.values())
    csv_file = tmp_path / "s.csv"
    csv_file.write_text(",".join(cells) + "\n" + quoted + "\n")
    parquet = tmp_path / "s.parquet"
    pq.write_table(pa.Table.from_pylist([cells]), parquet)
    for file in (csv_file, parquet):
        (item,) = read_survey(file, Rejects())
        assert (item.id, item.question, item.options) == ("0", "Tea?", ("yes", "no"))
        assert item.shares == expected[0].shares


def test_parquet_struct_with_null_for_absent_groups(tmp_path: Path) -> None:
    file = tmp_path / "s.parquet"
    second = {"question": "Milk?", "options": ["yes", "no"], "shares": {"c": [0.5, 0.5]}}
    pq.write_table(pa.Table.from_pylist([GOOD, second]), file)
    tea, milk = read_survey(file, Rejects())
    assert set(tea.shares) == {"a", "b"}
    assert set(milk.shares) == {"c"}


BAD = [
    ({"shares": {"a": [1.25, -0.25]}}, "group 'a': must be finite and not negative"),
    ({"shares": {"a": [1.0]}}, "group 'a': 1 values for 2 options"),
    ({"shares": {"a": [0.5, 0.4]}}, "shares sum to 0.9, more than 2% from 1"),
    ({"shares": {"a": [0, 0]}}, "group 'a': all zero"),
    ({"shares": {"a": ["x", 1]}}, "must be a list of numbers"),
    ({"shares": {"a": [True, False]}}, "must be a list of numbers"),
    ({"shares": {"a": [10**400, 1]}}, "group 'a': a number is too large"),
    ({"shares": {"a": [1.5e308, 1.5e308]}}, "group 'a': too large to add up"),
    ({"shares": {" ": [1, 0]}}, "group ' ' is not a name"),
    ({"shares": {}}, "shares names no group"),
    ({"shares": [0.5, 0.5]}, "must map each group to a list"),
    ({"shares": "{'a'"}, "shares: not valid JSON"),
    ({"options": ["yes", "yes"]}, "two options have the same text"),
    ({"options": ["yes"], "shares": {"a": [1]}}, "a question needs at least 2"),
    ({"options": ["yes", " "]}, "an option is empty"),
    ({"options": ["yes", 2]}, "options must be a list of texts"),
    ({"question": " "}, "empty question"),
    ({"question": 5}, "question must be text"),
    ({"ordinals": [1, 2, 3]}, "3 ordinals for 2 options"),
    ({"split": "dev"}, "split 'dev' is not one of train, validation, test"),
    ({"group": "a"}, "shares must be a list where the row has a 'group'"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_row_is_named_and_can_be_listed(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    first = {**GOOD, "question": "First?"}
    file = write(tmp_path / "s.jsonl", first, {**GOOD, **change})
    with pytest.raises(DataError) as error:
        read_survey(file, Rejects())
    message = str(error.value)
    assert message.startswith(f"{file}:2: ")
    assert reason in message
    assert "data.skip-bad=true" in message
    rejects = Rejects(skip=True)
    assert [i.question for i in read_survey(file, rejects)] == ["First?"]
    assert [r.source for r in rejects.rows] == [f"{file}:2"]
    assert reason in rejects.rows[0].reason


def test_nan_shares_in_json_and_in_parquet(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(
        json.dumps(GOOD) + '\n{"question": "q", "options": ["a", "b"], "shares": {"g": [NaN, 1]}}\n'
    )
    with pytest.raises(DataError, match=r"s\.jsonl:2: NaN is not a number"):
        read_survey(file, Rejects())
    parquet = tmp_path / "s.parquet"
    pq.write_table(pa.Table.from_pylist([{**GOOD, "shares": {"a": [float("nan"), 1.0]}}]), parquet)
    with pytest.raises(DataError, match=r"s\.parquet:row 1: group 'a': must be finite"):
        read_survey(parquet, Rejects())


def test_duplicate_id_names_both_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", {**GOOD, "id": "q"}, {**GOOD, "id": "q"})
    with pytest.raises(DataError, match=r":2: id 'q' was used before, in .*:1\."):
        read_survey(file, Rejects())


def test_long_rows_must_agree(tmp_path: Path) -> None:
    row = {"id": "q", "question": "Tea?", "options": ["yes", "no"], "shares": [0.5, 0.5]}
    file = write(tmp_path / "s.jsonl", {**row, "group": "a"}, {**row, "group": "a"})
    with pytest.raises(DataError, match=r":2: group 'a' answered this question before"):
        read_survey(file, Rejects())
    file = write(
        tmp_path / "s.jsonl", {**row, "group": "a"}, {**row, "group": "b", "question": "Milk?"}
    )
    with pytest.raises(DataError, match=r":2: question differs"):
        read_survey(file, Rejects())


def test_misspelt_column_is_named(tmp_path: Path) -> None:
    row = {"questions": "Tea?", "options": ["yes", "no"], "shares": {"a": [1, 0]}}
    with pytest.raises(DataError, match="no column 'question'; is it 'questions'"):
        read_survey(write(tmp_path / "s.jsonl", row), Rejects())


def test_nonresponse_is_dropped_and_what_falls_away_is_noted(tmp_path: Path) -> None:
    row = {
        "question": "Tea?",
        "options": ["yes", "no", "don't know"],
        "ordinals": [2, 1, 0],
        "nonresponse_options": [2],
        "shares": {"a": [0.6, 0.2, 0.2], "silent": [0, 0, 1]},
    }
    tiny = {
        "question": "Milk?",
        "options": ["yes", "refused"],
        "nonresponse_options": [1],
        "shares": {"a": [0.5, 0.5]},
    }
    file = write(tmp_path / "s.jsonl", row, tiny)
    kept = read_survey(file, Rejects(), keep_nonresponse=True)
    assert [len(i.options) for i in kept] == [3, 2]
    rejects = Rejects()
    (item,) = read_survey(file, rejects, keep_nonresponse=False)
    assert item.options == ("yes", "no")
    assert item.ordinals == (2.0, 1.0)
    assert set(item.shares) == {"a"}
    assert item.shares["a"] == pytest.approx((0.75, 0.25))
    assert [(r.source, r.reason) for r in rejects.rows] == [
        (f"{file}:1", "group 'silent': all its mass is on non-response."),
        (f"{file}:2", "1 options left without non-response."),
    ]


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=12).filter(any))
def test_counts_always_normalise(counts: list[int]) -> None:
    shares = normalised([float(c) for c in counts], counts=True, where="g")
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    assert [s > 0 for s in shares] == [c > 0 for c in counts]
