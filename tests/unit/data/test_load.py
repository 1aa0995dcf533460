"""Loading by configuration: filters, the policy for bad rows, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedalign.config import CHOICES, DataConfig
from fedalign.data.load import FORMS, READERS, load_dataset, names
from fedalign.data.records import SurveyItem
from fedalign.errors import ConfigError, DataError


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def question(i: int, *groups: str) -> dict[str, Any]:
    shares = {g: [0.5, 0.5] for g in groups}
    return {"question": f"Question {i}?", "options": ["yes", "no"], "shares": shares}


@pytest.fixture
def survey(tmp_path: Path) -> str:
    rows = [
        question(i, "a", *(["b, c"] if i < 6 else []), *(["d"] if i < 3 else [])) for i in range(9)
    ]
    return write(tmp_path / "s.jsonl", *rows)


def test_every_source_has_a_reader() -> None:
    assert set(READERS) == set(FORMS) == set(CHOICES["data.source"])


def test_names_split_at_semicolons_where_there_are_any() -> None:
    assert names("a, b") == ["a", "b"]
    assert names("a, b;c") == ["a, b", "c"]
    assert names(" ") == []


def test_all_groups_and_the_name(survey: str) -> None:
    dataset = load_dataset(DataConfig(source="survey", path=survey), 0)
    assert (dataset.form, dataset.name, len(dataset.items)) == ("survey", "survey:s.jsonl", 9)
    assert dataset.groups == ("a", "b, c", "d")


def test_groups_filter(survey: str) -> None:
    dataset = load_dataset(DataConfig(source="survey", path=survey, groups="b, c;d"), 0)
    assert dataset.groups == ("b, c", "d")
    assert len(dataset.items) == 6


def test_unknown_group_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", question(0, "Nigeria", "Peru"))
    with pytest.raises(DataError, match=r"no group 'Nigera'\. Did you mean 'Nigeria'"):
        load_dataset(DataConfig(source="survey", path=path, groups="Peru,Nigera"), 0)


def test_part_before_the_slash_stands_for_its_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", question(0, "x/g0", "x/g1", "y/g0"))
    for wanted in ("x", "x/"):
        dataset = load_dataset(DataConfig(source="survey", path=path, groups=wanted), 0)
        assert dataset.groups == ("x/g0", "x/g1")


def test_max_groups_keeps_those_with_most_questions(survey: str) -> None:
    dataset = load_dataset(DataConfig(source="survey", path=survey, max_groups=2), 0)
    assert dataset.groups == ("a", "b, c")


def test_questions_are_drawn_by_seed_not_by_order(tmp_path: Path) -> None:
    rows = [question(i, "a") for i in range(40)]
    forward = write(tmp_path / "f.jsonl", *rows)
    backward = write(tmp_path / "b.jsonl", *rows[::-1])

    def drawn(path: str, seed: int) -> set[str]:
        data = DataConfig(source="survey", path=path, questions=10)
        return {i.question for i in load_dataset(data, seed).items if isinstance(i, SurveyItem)}

    assert len(drawn(forward, 1)) == 10
    assert drawn(forward, 1) == drawn(backward, 1)
    assert drawn(forward, 1) != drawn(forward, 2)


def test_question_draw_that_empties_a_group_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", *(question(i, f"g{i}") for i in range(5)))
    with pytest.raises(DataError, match=r"data\.questions = 2 leaves no question for 3 groups"):
        load_dataset(DataConfig(source="survey", path=path, questions=2), 0)


def test_bad_rows_stop_or_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    bad = {"question": "q", "options": ["yes", "no"], "shares": {"a": [2, 1]}}
    write(path, question(0, "a"), bad, question(1, "a"))
    with path.open("a") as f:
        f.write('{"question": "cut')
    with pytest.raises(DataError, match=re.escape(f"{path}:2: group 'a': shares sum to 3")):
        load_dataset(DataConfig(source="survey", path=str(path)), 0)
    dataset = load_dataset(DataConfig(source="survey", path=str(path), skip_bad=True), 0)
    assert len(dataset.items) == 2
    assert [r.source for r in dataset.bad_rows] == [f"{path}:2", f"{path}:4"]


def test_nothing_usable_is_an_error_with_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {"x": 1})
    with pytest.raises(
        DataError, match=r"no usable row; 1 left out\.\n .*:1: no column 'question'"
    ):
        load_dataset(DataConfig(source="survey", path=path, skip_bad=True), 0)


def test_form_the_source_has_not(survey: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.form = 'pairs', but source 'survey' gives survey"
    ):
        load_dataset(DataConfig(source="survey", path=survey, form="pairs"), 0)


def test_pairs_filters(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "chosen": "Yes", "rejected": "No", "group": g}
        for i in range(4)
        for g in (["a", "b"] if i < 2 else ["a"])
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    dataset = load_dataset(DataConfig(source="pairs", path=path, max_groups=1), 0)
    assert (dataset.form, dataset.groups, len(dataset.items)) == ("pairs", ("a",), 4)


def test_polis_in_both_forms(tmp_path: Path) -> None:
    for conversation in "xy":
        with (tmp_path / "statements.jsonl").open("a") as f:
            for i in range(12):
                line = {
                    "conversation": conversation,
                    "sid": i,
                    "prompt": conversation,
                    "statement": f"Statement {i}",
                    "agree_disagree_pass": {"g0": [i, 12 - i, 0], "g1": [9, i, 0]},
                }
                f.write(json.dumps(line) + "\n")
    data = DataConfig(source="polis", path=str(tmp_path), groups="x")
    pairs = load_dataset(data, 0)
    assert (pairs.form, pairs.groups) == ("pairs", ("x/g0", "x/g1"))
    assert "Computational Democracy Project" in pairs.licence
    survey = load_dataset(DataConfig(source="polis", path=str(tmp_path), form="survey"), 0)
    assert (survey.form, len(survey.items)) == ("survey", 24)


def test_synthetic() -> None:
    dataset = load_dataset(DataConfig(max_groups=3, questions=20), 0)
    assert (dataset.form, len(dataset.groups), len(dataset.items)) == ("survey", 3, 20)
