"""Both layouts of GlobalOpinionQA, and what is dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.data.globalopinionqa import read_published, read_rebuilt
from fedalign.data.rejects import Rejects
from fedalign.errors import DataError

VARIANT = "India (Current national sample)"


def published(selections: str, options: str = "['Good', 'Bad', \"Don't know\"]") -> dict[str, str]:
    return {
        "question": "How is it?",
        "selections": selections,
        "options": options,
        "source": "GAS",
    }


def test_published_csv(tmp_path: Path) -> None:
    file = tmp_path / "g.csv"
    cell = published(
        f"defaultdict(<class 'list'>, {{'Peru': [0.5, 0.25, 0.25], '{VARIANT}': [0.2, 0.8, 0.0]}})"
    )
    quoted = ",".join('"' + v.replace('"', '""') + '"' for v in cell.values())
    file.write_text(",".join(cell) + "\n" + quoted + "\n")
    (item,) = read_published(file, Rejects())
    assert item.id == "0"
    assert item.options == ("Good", "Bad", "Don't know")
    assert item.shares == {"Peru": (0.5, 0.25, 0.25), VARIANT: (0.2, 0.8, 0.0)}
    assert item.columns == {"source": "GAS"}

    (item,) = read_published(file, Rejects(), keep_nonresponse=False)
    assert item.options == ("Good", "Bad")
    assert item.shares["Peru"] == pytest.approx((2 / 3, 1 / 3))


def test_published_parquet_keeps_row_numbers_as_ids(tmp_path: Path) -> None:
    file = tmp_path / "g.parquet"
    good = published("defaultdict(<class 'list'>, {'Peru': [0.5, 0.25, 0.25]})")
    table = [good, published("defaultdict(<class 'list'>, {'Peru': [1.0]})"), good]
    pq.write_table(pa.Table.from_pylist(table), file)
    with pytest.raises(DataError, match=r"g\.parquet:row 2: group 'Peru': 1 values for 3 options"):
        read_published(file, Rejects())
    rejects = Rejects(skip=True)
    assert [i.id for i in read_published(file, rejects)] == ["0", "2"]
    assert [r.source for r in rejects.rows] == [f"{file}:row 2"]


def test_empty_cells_are_noted_without_stopping(tmp_path: Path) -> None:
    file = tmp_path / "g.jsonl"
    text = "defaultdict(<class 'list'>, {'Peru': [], 'Chad': [0, 0, 0], 'Mali': [1, 0, 0]})"
    nobody = published("defaultdict(<class 'list'>, {'Peru': []})")
    file.write_text(json.dumps(published(text)) + "\n" + json.dumps(nobody) + "\n")
    rejects = Rejects()
    (item,) = read_published(file, rejects)
    assert set(item.shares) == {"Mali"}
    assert [(r.source, r.reason.split(":")[0]) for r in rejects.rows] == [
        (f"{file}:1", "group 'Chad'"),
        (f"{file}:1", "group 'Peru'"),
        (f"{file}:2", "group 'Peru'"),
        (f"{file}:2", "no country answered this question."),
    ]


@pytest.mark.parametrize(
    ("selections", "reason"),
    [
        ("defaultdict(<class 'list'>, )", "selections holds no {...}"),
        ("{'Peru': __import__('os').getcwd()}", "selections is not a Python literal"),
        ("{'Peru': [0.5, 0.25, 0.25]", "selections holds no {...}"),
        ("{'Peru': [0.5, -0.25, 0.75]}", "group 'Peru': must be finite and not negative"),
        ("{'Peru': [0.5, 1e999, 0.75]}", "group 'Peru': must be finite and not negative"),
    ],
)
def test_bad_selections(tmp_path: Path, selections: str, reason: str) -> None:
    file = tmp_path / "g.jsonl"
    file.write_text(json.dumps(published(selections)) + "\n")
    with pytest.raises(DataError) as error:
        read_published(file, Rejects())
    assert str(error.value).startswith(f"{file}:1: {reason}")


def rebuilt(**change: Any) -> dict[str, Any]:
    row = {
        "qid": "goqa0000",
        "question": "How is it?",
        "options": ["Good", "Bad", "DK/Refused"],
        "nonresponse_options": [2],
        "n_countries": 1,
        "distribution": {"Peru": [0.5, 0.25, 0.25]},
        "copies": {"Peru": 2},
    }
    return {**row, **change}


def test_rebuilt(tmp_path: Path) -> None:
    file = tmp_path / "goqa.jsonl"
    file.write_text(json.dumps(rebuilt()) + "\n")
    (item,) = read_rebuilt(file, Rejects())
    assert item.id == "goqa0000"
    assert item.shares == {"Peru": (0.5, 0.25, 0.25)}
    assert item.columns == {"n_countries": "1", "copies": '{"Peru": 2}'}
    (item,) = read_rebuilt(file, Rejects(), keep_nonresponse=False)
    assert item.options == ("Good", "Bad")
    assert item.shares["Peru"] == pytest.approx((2 / 3, 1 / 3))


def test_rebuilt_duplicate_qid(tmp_path: Path) -> None:
    file = tmp_path / "goqa.jsonl"
    file.write_text(json.dumps(rebuilt()) + "\n" + json.dumps(rebuilt(question="Other?")) + "\n")
    with pytest.raises(DataError, match=r"goqa\.jsonl:2: qid 'goqa0000' was used before"):
        read_rebuilt(file, Rejects())


def test_a_layout_given_to_the_other_reader_names_the_right_source(tmp_path: Path) -> None:
    file = tmp_path / "goqa.jsonl"
    file.write_text(json.dumps(rebuilt()) + "\n")
    with pytest.raises(DataError, match=r"data\.source = 'goqa'"):
        read_published(file, Rejects())
    file.write_text(json.dumps(published("{'Peru': [0.5, 0.25, 0.25]}")) + "\n")
    with pytest.raises(DataError, match=r"data\.source = 'globalopinionqa'"):
        read_rebuilt(file, Rejects())
