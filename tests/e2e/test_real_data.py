"""The studies on real data at their smallest; what a pocket is trained on is checked in full."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedalign.config import config_hash, from_flat
from fedalign.data.load import load_dataset
from fedalign.data.partition import build_clients
from fedalign.data.records import Pair, SurveyItem
from fedalign.errors import DataError
from fedalign.ledger import Ledger
from fedalign.models.pocket import CorpusQuestion, corpus_digest, mean_shares
from fedalign.runfolder import LEDGER
from simulations.real_data import (
    ASKED,
    COUNTRIES,
    MAX_CHARACTERS,
    MAX_OPTIONS,
    PREPARE,
    RULES,
    Prepared,
    corpus,
    main,
    prepare_goqa,
)
from simulations.real_data import real_data as run_study

SMALL = {"run.rounds": 1, "local.steps": 1, "local.batch-size": 4}
QUESTIONS = {"goqa": 100, "polis": 450}


def plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def held_out_texts(prepared: Prepared, seed: int) -> set[str]:
    """Every question or statement that a run of the seed holds in validation or test."""
    config = from_flat({**prepared.settings, "run.seed": seed})
    texts: set[str] = set()
    for client in build_clients(load_dataset(config.data, seed), config):
        for item in (*client.validation, *client.test):
            if isinstance(item, SurveyItem):
                texts.add(plain(item.question))
            else:
                assert isinstance(item, Pair)
                texts |= {plain(str(item.chosen)), plain(str(item.rejected))}
    return texts


@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(PREPARE))
@pytest.mark.parametrize("seed", [0, 3])
def test_no_held_out_text_is_in_the_corpus_of_the_pocket(
    name: str, seed: int, real_data: Path, tmp_path: Path
) -> None:
    prepared = PREPARE[name](real_data, tmp_path)
    items = corpus(prepared, from_flat(prepared.settings).data, seed)
    trained = {plain(i.question.partition("\nStatement: ")[2] or i.question) for i in items}
    held_out = held_out_texts(prepared, seed)
    assert len(items) > 900
    assert len(held_out) > 150
    assert not trained & held_out
    # The check can fail: another seed's corpus holds many of these texts.
    other = corpus(prepared, from_flat(prepared.settings).data, seed + 1)
    assert {plain(i.question.partition("\nStatement: ")[2] or i.question) for i in other} & held_out


@pytest.mark.real_data
def test_the_pocket_of_a_seed_has_read_the_training_questions_of_the_run(
    real_data: Path, tmp_path: Path
) -> None:
    prepared = prepare_goqa(real_data, tmp_path)
    config = from_flat({**prepared.settings, "run.seed": 1})
    read = {i.key for i in corpus(prepared, config.data, 1)}
    clients = build_clients(load_dataset(config.data, 1), config)
    assert {i.key for c in clients for i in c.train if isinstance(i, SurveyItem)} <= read


@pytest.mark.real_data
def test_countries_and_questions_are_chosen_as_stated(real_data: Path, tmp_path: Path) -> None:
    prepared = prepare_goqa(real_data, tmp_path)
    path = Path(str(prepared.settings["data.path"]))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({c for r in rows for c in r["distribution"]}) == COUNTRIES
    assert min(len(r["distribution"]) for r in rows) >= ASKED
    assert max(len(r["options"]) for r in rows) <= MAX_OPTIONS
    longest = max(len(r["question"]) + sum(map(len, r["options"])) for r in rows)
    assert longest <= MAX_CHARACTERS
    assert len({plain(r["question"]) for r in rows}) == len(rows)
    assert prepare_goqa(real_data, tmp_path).settings == prepared.settings


@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(PREPARE))
def test_smallest_study(name: str, real_data: Path, tmp_path: Path) -> None:
    more = {**SMALL, "data.questions": QUESTIONS[name], "score.min-option-mass": 0.0}
    page = study(name, real_data, tmp_path, more)
    text = page.read_text()
    found = json.loads((tmp_path / "real_data.json").read_text())
    assert set(found["statuses"].values()) == {"completed"}
    values = {arm: by["0"] for arm, by in found["values"].items()}
    assert set(values) == {*RULES, "base", "uniform_answerer", "mean_of_groups", "optimum"}
    for split in ("seen", "unseen"):
        best = values["optimum"]
        for arm in (*RULES, "base", "uniform_answerer"):
            for metric in ("average", "worst"):
                value = values[arm][f"{split}/{metric}"]
                assert math.isfinite(value)
                assert value <= best[f"{split}/{metric}"] + 1e-3
    assert {c["verdict"] for c in found["comparisons"]} == {"no interval (fewer than 3 seeds)"}
    assert ("CC BY-NC-SA" if name == "goqa" else "Computational Democracy Project") in text

    # The digest that the pocket records is that of the corpus checked above.
    prepared = PREPARE[name](real_data, tmp_path)
    config = from_flat({**prepared.settings, **more, "run.seed": 0})
    items = sorted(corpus(prepared, config.data, 0), key=lambda i: i.id)
    digest = corpus_digest([CorpusQuestion(i.question, i.options, mean_shares(i)) for i in items])
    (record,) = tmp_path.glob("pockets/*/training.json")
    assert json.loads(record.read_text())["corpus_sha256"] == digest

    # Done again, nothing is run or trained again, and the page is the same.
    before = {p: p.stat().st_mtime_ns for p in [record, *tmp_path.glob(f"runs/*/{LEDGER}")]}
    assert study(name, real_data, tmp_path, more).read_text() == text
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(before) == 1 + len(RULES)
    for folder in (tmp_path / "runs").iterdir():
        with Ledger(folder / LEDGER, readonly=True) as ledger:
            run = ledger.run()
        assert config_hash(from_flat(run["config"])) == run["config_hash"]
        assert run["config"]["score.seen"] is True


def study(name: str, data: Path, out: Path, more: dict[str, object]) -> Path:
    return run_study(name, data, out, 1, 1, more, pocket_steps=3)  # type: ignore[arg-type]


def test_absent_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="Give the folder"):
        prepare_goqa(tmp_path, tmp_path)
    assert main(["goqa", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "goqa.jsonl: no such file" in capsys.readouterr().err
