"""Preference pairs: plain and conversational, and the checks between rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.data.pairs import read_pairs
from fedalign.data.records import Message
from fedalign.data.rejects import Rejects
from fedalign.errors import DataError

GOOD: dict[str, Any] = {"prompt": "Tea?", "chosen": "Yes", "rejected": "No", "group": "a"}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_plain_pair_with_everything(tmp_path: Path) -> None:
    row = {**GOOD, "id": "p1", "vote_share": 0.75, "split": "train", "client": "x", "score": 0.5}
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", row), Rejects())
    assert (pair.prompt, pair.chosen, pair.rejected, pair.group) == ("Tea?", "Yes", "No", "a")
    assert (pair.id, pair.vote_share, pair.split) == ("p1", 0.75, "train")
    assert pair.columns == {"client": "x", "score": "0.5"}
    assert pair.source == f"{tmp_path / 'p.jsonl'}:1"


def test_conversation_in_jsonl_csv_and_parquet(tmp_path: Path) -> None:
    row = {
        "prompt": [turn("user", "Tea?")],
        "chosen": [turn("assistant", "Yes")],
        "rejected": [turn("assistant", "No")],
        "group": "a",
    }
    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
    quoted = ",".join('"' + v.replace('"', '""') + '"' for v in cells.values())
    (tmp_path / "p.csv").write_text(",".join(cells) + "\n" + quoted + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    write(tmp_path / "p.jsonl", row)
    for name in ("p.jsonl", "p.csv", "p.parquet"):
        (pair,) = read_pairs(tmp_path / name, Rejects())
        assert pair.prompt == (Message("user", "Tea?"),)
        assert pair.chosen == (Message("assistant", "Yes"),)


def test_csv_numbers_and_default_vote_share(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,chosen,rejected,group,vote_share\nq,a,b,g,0.6\nq,b,a,g,\n")
    first, second = read_pairs(file, Rejects())
    assert (first.vote_share, second.vote_share) == (0.6, 1.0)
    assert first.comparison == second.comparison


BAD = [
    ({"vote_share": 1.5}, "vote share 1.5 is outside [0, 1]"),
    ({"vote_share": -0.1}, "vote share -0.1 is outside [0, 1]"),
    ({"vote_share": "most"}, "vote_share 'most' is not a number"),
    ({"vote_share": 10**400}, "is not a number in [0, 1]"),
    ({"vote_share": True}, "vote_share must be a number"),
    ({"prompt": " "}, "empty prompt"),
    ({"rejected": ""}, "empty rejected"),
    ({"chosen": "No"}, "chosen and rejected are the same text"),
    ({"chosen": 3}, "chosen must be text or a list of messages, not int"),
    ({"chosen": [turn("assistant", "Yes")]}, "mixes plain text and conversation"),
    ({"chosen": [{"role": "assistant"}]}, "a message needs the texts 'role' and 'content'"),
    ({"group": 4}, "group must be text"),
    ({"group": " "}, "empty group"),
    ({"split": "dev"}, "split 'dev' is not one of"),
    ({"id": "first"}, "id 'first' was used before"),
    ({"prompt": "first?", "split": "test"}, "a prompt has one split"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_row_is_named_and_can_be_listed(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    first = {**GOOD, "id": "first", "prompt": "First?", "split": "train"}
    file = write(tmp_path / "p.jsonl", first, {**GOOD, "prompt": "Other?", **change})
    with pytest.raises(DataError) as error:
        read_pairs(file, Rejects())
    assert str(error.value).startswith(f"{file}:2: ")
    assert reason in str(error.value)
    rejects = Rejects(skip=True)
    assert [p.id for p in read_pairs(file, rejects)] == ["first"]
    assert [r.source for r in rejects.rows] == [f"{file}:2"]
    assert reason in rejects.rows[0].reason


def test_one_form_in_a_file(tmp_path: Path) -> None:
    talk = {
        "prompt": [turn("user", "Milk?")],
        "chosen": [turn("assistant", "Yes")],
        "rejected": [turn("assistant", "No")],
        "group": "a",
    }
    file = write(tmp_path / "p.jsonl", GOOD, talk)
    with pytest.raises(DataError, match=r":2: a conversation, but .*:1 is plain text"):
        read_pairs(file, Rejects())


@pytest.mark.parametrize(
    ("wrong", "right"), [("choosen", "chosen"), ("Prompt", "prompt"), ("groups", "group")]
)
def test_near_miss_of_a_required_column_is_named(tmp_path: Path, wrong: str, right: str) -> None:
    row = {(wrong if k == right else k): v for k, v in GOOD.items()}
    with pytest.raises(DataError, match=f"no column '{right}'; is it '{wrong}'"):
        read_pairs(write(tmp_path / "p.jsonl", row), Rejects())


def test_missing_column_lists_what_is_there(tmp_path: Path) -> None:
    row = {k: v for k, v in GOOD.items() if k != "group"}
    with pytest.raises(DataError, match=r"no column 'group', or it is empty\. Needed: prompt"):
        read_pairs(write(tmp_path / "p.jsonl", row), Rejects())
