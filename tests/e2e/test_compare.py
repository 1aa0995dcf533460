"""Comparisons: resumable, paired, honest about noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedalign.errors import ConfigError
from fedalign.runfolder import CHECKPOINT
from simulations import compare as comparing
from simulations.compare import arms, compare

SMALL = [
    "run.rounds=1",
    "local.steps=1",
    "data.questions=60",
    "data.partition=group",
    "data.clients-per-group=1",
    "score.min-option-mass=0.0",
]


def test_arms_cross_rules_and_settings() -> None:
    found = arms(["uniform", "adaptive"], ["local.reference=base|none", "local.beta=0.5|1"])
    assert len(found) == 8
    assert found[0].name == "uniform reference=base beta=0.5"
    assert dict(found[0].settings)["local.beta"] == 0.5


@pytest.mark.parametrize(
    ("rules", "vary", "words"),
    [(["fair"], [], "not one of"), (["uniform"], ["local.beta"], "varies nothing")],
)
def test_bad_arms_are_refused(rules: list[str], vary: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        arms(rules, vary)


def test_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not one of the arms"):
        compare("default", ["uniform"], 1, tmp_path, SMALL, [], "adaptive", 1)


def test_a_comparison_is_resumable_and_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ["uniform", "worst"]
    page = compare("default", rules, 3, tmp_path, SMALL, [], "", 1)
    text = page.read_text()
    assert "| worst |" in text
    assert "attainable optimum" in text
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["seeds"] == [0, 1, 2]
    assert set(data["values"]) == set(rules)
    by_metric = {d["metric"]: d for d in data["differences"] if d["arm"] == "worst"}
    values = data["values"]
    hand = sum(values["worst"][s]["worst"] - values["uniform"][s]["worst"] for s in "012") / 3
    assert by_metric["worst"]["seeds"]["centre"] == pytest.approx(hand)
    assert by_metric["worst"]["questions"][0] <= hand <= by_metric["worst"]["questions"][1]
    assert (tmp_path / "comparison.svg").read_text().startswith("<?xml")

    def refuse(task: comparing.Task) -> float:
        raise AssertionError(f"{task.arm} seed {task.seed} was run again")

    monkeypatch.setattr(comparing, "run_task", refuse)
    assert compare("default", rules, 3, tmp_path, SMALL, [], "", 1).read_text() == text
    # A run whose folder was lost is the only one that is run again.
    lost = next((tmp_path / "runs").glob("worst-seed1-*"))
    for path in (lost / CHECKPOINT, lost / "ledger.sqlite"):
        path.unlink()
    with pytest.raises(AssertionError, match="worst seed 1 was run again"):
        compare("default", rules, 3, tmp_path, SMALL, [], "", 1)


def test_two_seeds_give_no_interval(tmp_path: Path) -> None:
    text = compare("default", ["uniform", "worst"], 2, tmp_path, SMALL, [], "", 1).read_text()
    assert "no interval" in text
    assert "better than" not in text
