"""The published files beside the checkout, read whole; every count is checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedalign.config import Config, DataConfig
from fedalign.data.describe import describe
from fedalign.data.load import load_dataset
from fedalign.data.partition import build_clients
from fedalign.data.records import SPLITS, Dataset, Pair, SurveyItem
from fedalign.data.split import split_keys

DATA = Path(__file__).parents[3] / "../shared/data"
GOQA = DATA / "globalopinionqa/goqa.jsonl"
POLIS = DATA / "polis"
PERSONAS = DATA / "persona_pairs/preferences.jsonl"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason="no folder of real data beside the checkout"),
]


def load(source: str, path: Path, **more: object) -> Dataset:
    return load_dataset(DataConfig(source=source, path=str(path.resolve()), **more), 0)  # type: ignore[arg-type]


def cells(dataset: Dataset) -> int:
    return sum(len(i.shares) for i in dataset.items if isinstance(i, SurveyItem))


def test_goqa() -> None:
    dataset = load("goqa", GOQA)
    assert (len(dataset.items), cells(dataset), len(dataset.groups)) == (1773, 10416, 130)
    assert dataset.bad_rows == ()
    assert sum(len(i.shares) >= 5 for i in dataset.items if isinstance(i, SurveyItem)) == 803
    assert "India (Current national sample)" in dataset.groups
    assert len({i.key for i in dataset.items}) == 1773
    assert "NC" in dataset.licence


def test_goqa_without_nonresponse() -> None:
    everything = {i.id: i for i in load("goqa", GOQA).items}
    dataset = load("goqa", GOQA, keep_nonresponse=False)
    assert len(dataset.items) == 1772  # two rows become one question
    assert [r.source.rsplit(":", 1)[1] for r in dataset.bad_rows] == ["400"]
    shorter = 0
    for item in dataset.items:
        before = everything[item.id]
        assert isinstance(item, SurveyItem)
        assert isinstance(before, SurveyItem)
        shorter += len(item.options) < len(before.options)
        kept = [before.options.index(o) for o in item.options]
        for group in item.shares.keys() & before.shares.keys():
            shares = item.shares[group]
            mass = sum(before.shares[group][k] for k in kept)
            assert shares == pytest.approx([before.shares[group][k] / mass for k in kept])
    assert shorter == 862


def test_goqa_largest_groups_make_clients() -> None:
    config = Config(data=DataConfig(source="goqa", path=str(GOQA.resolve()), max_groups=12))
    dataset = load_dataset(config.data, 0)
    assert len(dataset.groups) == 12
    clients = build_clients(dataset, config)
    assert [c.group for c in clients] == list(dataset.groups)
    roles: dict[str, set[str]] = {}
    for client in clients:
        for split in SPLITS:
            for item in client.split(split):
                roles.setdefault(item.key, set()).add(split)
    assert all(len(r) == 1 for r in roles.values())


def test_polis_survey() -> None:
    dataset = load("polis", POLIS, form="survey")
    assert (len(dataset.items), cells(dataset), len(dataset.groups)) == (1850, 3654, 26)
    # 3755 cells in the file; the others have fewer than five votes and are listed.
    assert len(dataset.bad_rows) == 3755 - 3654
    assert len({i.topic for i in dataset.items if isinstance(i, SurveyItem)}) == 12


def test_polis_pairs_hold_statements_out() -> None:
    dataset = load("polis", POLIS)
    assert (dataset.form, len(dataset.groups)) == ("pairs", 26)
    split_of: dict[str, set[str]] = {}
    for pair in dataset.items:
        assert isinstance(pair, Pair)
        assert 0.5 < pair.vote_share <= 1
        for key in split_keys(pair):
            split_of.setdefault(key, set()).add(pair.split)
    assert all(len(s) == 1 for s in split_of.values())
    assert max(Counter(p.group for p in dataset.items if isinstance(p, Pair)).values()) == 1000
    conflict = describe(dataset).conflict
    assert conflict is not None
    assert conflict > 0.1
    clients = build_clients(dataset, Config(data=DataConfig(source="polis", path="/unused")))
    assert len(clients) == 26


def test_personas() -> None:
    dataset = load("pairs", PERSONAS)
    assert (len(dataset.items), len(dataset.groups), dataset.bad_rows) == (6600, 22, ())
    assert {i.columns.keys() == {"confidence"} for i in dataset.items} == {True}
    config = Config(data=DataConfig(source="pairs", path=str(PERSONAS.resolve())))
    clients = build_clients(dataset, config)
    assert sum(len(c.split(s)) for c in clients for s in SPLITS) == 6600
