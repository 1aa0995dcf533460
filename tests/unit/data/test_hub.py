"""Hugging Face datasets from a local folder: same items as the file readers, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedalign.config import DataConfig
from fedalign.data.hub import detect
from fedalign.data.load import load_dataset
from fedalign.data.records import Pair, SurveyItem
from fedalign.errors import DataError

PAIRS: list[dict[str, Any]] = [
    {"prompt": f"Tea {i}?", "chosen": "Yes", "rejected": "No", "group": "ab"[i % 2]}
    for i in range(4)
]
SURVEY: list[dict[str, Any]] = [
    {"question": "Tea?", "options": ["yes", "no"], "shares": {"a": [0.75, 0.25]}},
    {"question": "Milk?", "options": ["yes", "no"], "shares": {"b": [0.5, 0.5]}},
]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def folder(path: Path, rows: list[dict[str, Any]], kind: str) -> str:
    out = path / "data"
    out.mkdir()
    if kind == "jsonl":
        (out / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), out / "train.parquet")
    else:
        lines = [",".join(rows[0])] + [",".join(r.values()) for r in rows]
        (out / "train.csv").write_text("\n".join(lines) + "\n")
    return str(out)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_pairs_folder(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path, PAIRS, kind)
    dataset = load_dataset(DataConfig(source="hf", path=path), 0)
    assert (dataset.form, dataset.groups, len(dataset.items)) == ("pairs", ("a", "b"), 4)
    first = dataset.items[0]
    assert isinstance(first, Pair)
    assert (first.prompt, first.chosen, first.id) == ("Tea 0?", "Yes", "0")
    assert first.source == f"{path}[train]:row 1"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_survey_folder_with_absent_groups(tmp_path: Path, kind: str) -> None:
    dataset = load_dataset(DataConfig(source="hf", path=folder(tmp_path, SURVEY, kind)), 0)
    tea, milk = dataset.items
    assert isinstance(tea, SurveyItem)
    assert isinstance(milk, SurveyItem)
    assert tea.shares == {"a": (0.75, 0.25)}
    assert milk.shares == {"b": (0.5, 0.5)}


def test_published_globalopinionqa_layout_is_known(tmp_path: Path) -> None:
    row = {
        "question": "Tea?",
        "selections": "defaultdict(<class 'list'>, {'Peru': [0.75, 0.25]})",
        "options": "['yes', 'no']",
        "source": "GAS",
    }
    dataset = load_dataset(DataConfig(source="hf", path=folder(tmp_path, [row], "parquet")), 0)
    assert dataset.groups == ("Peru",)


def test_bad_row_names_dataset_and_row(tmp_path: Path) -> None:
    path = folder(tmp_path, [*PAIRS, {**PAIRS[0], "rejected": "Yes"}], "jsonl")
    with pytest.raises(DataError, match=r"data\[train\]:row 5: chosen and rejected are the same"):
        load_dataset(DataConfig(source="hf", path=path), 0)


def test_missing_split_and_folder(tmp_path: Path) -> None:
    path = folder(tmp_path, PAIRS, "jsonl")
    with pytest.raises(DataError, match=r"split 'nothing' cannot be loaded.*data\.hf-split"):
        load_dataset(DataConfig(source="hf", path=path, hf_split="nothing"), 0)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_dataset(DataConfig(source="hf", path=str(tmp_path / "none")), 0)


def test_columns_that_fit_nothing() -> None:
    with pytest.raises(DataError, match="columns text, label are neither pairs"):
        detect(["text", "label"])
