"""Reward federation end to end: the command, its rows and report, the same run on two nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedalign.ledger import Ledger, canonical_rows
from fedalign.runfolder import CHECKPOINT, LEDGER
from server.checkpoint import load

SMALL = {
    "run.rounds": "6",
    "ppo.questions": "8",
    "data.questions": "120",
    "rewards.rule": "mean",
    "ppo.kl": "0.1",
}

Command = Callable[..., Any]


def simulate(command: Command, cwd: Path, *arguments: str, **settings: str) -> Any:
    named = SMALL | {k.replace("__", ".").replace("_", "-"): v for k, v in settings.items()}
    options = [word for k, v in named.items() for word in ("--set", f"{k}={v}")]
    words = (sys.executable, "-m", "simulations.cli", "simulate", *arguments, *options)
    return command(*words, cwd=cwd)


@pytest.fixture(scope="module")
def letters(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("letters")
    done = simulate(command, cwd, "--mode", "rewards", "--out", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "report" in done.stdout
    return cwd / "run"


def test_the_policy_moves_towards_the_closed_form_optimum(letters: Path) -> None:
    with Ledger(letters / LEDGER, readonly=True) as ledger:
        found = {r.quantity: r.value for r in ledger.references("closed_form")}
        rewards = [c.value for c in ledger.curves("reward-mean") if c.client == ""]
    assert found["jsd_base"] is not None
    assert found["jsd_model"] is not None
    assert found["jsd_model"] < 0.8 * found["jsd_base"]  # six small exchanges, not a whole run
    assert 0 < (found["kl_model"] or 0) < 3 * (found["kl_optimum"] or 0)
    assert rewards[-1] > rewards[0]


def test_report_and_summary_are_there(letters: Path) -> None:
    page = (letters / "report.html").read_text()
    assert "mean reward" in page
    summary = json.loads((letters / "summary.json").read_text())
    assert 0 < summary["shared/worst"] <= summary["shared/average"] < 1


def test_two_nodes_and_other_messages_change_nothing(
    command: Command, letters: Path, tmp_path: Path
) -> None:
    done = simulate(
        command,
        tmp_path,
        *("--mode", "rewards", "--out", "run", "--nodes", "2"),
        run__clients_per_message="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = load(letters / CHECKPOINT), load(tmp_path / "run" / CHECKPOINT)
    assert np.array_equal(a.adapter, b.adapter)


def test_a_ranking_run_scores_what_the_policy_writes(command: Command, tmp_path: Path) -> None:
    done = simulate(
        command,
        tmp_path,
        *("--mode", "rewards", "--out", "run"),
        rewards__task="order",
        score__samples="4",
        site__rounding="0.1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with Ledger(tmp_path / "run" / LEDGER, readonly=True) as ledger:
        test = ledger.scores("shared", "test")
        assert {s.metric for s in test} == {"borda"}
        assert all(0.9 < (s.option_mass or 0) <= 1 for s in test)
        assert {round(s.uniform or 0, 6) for s in test} == {0.5}


def test_a_printed_distribution_can_be_trained(command: Command, tmp_path: Path) -> None:
    done = simulate(
        command,
        tmp_path,
        *("--mode", "rewards", "--out", "run"),
        run__rounds="2",
        rewards__task="shares",
        score__samples="2",
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_same_seed_gives_the_same_rows(command: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = simulate(
            command, tmp_path, "--mode", "rewards", "--out", name, run__rounds="2", run__seed="3"
        )
        assert done.returncode == 0, done.stderr[-2000:]
    with Ledger(tmp_path / "a" / LEDGER) as a, Ledger(tmp_path / "b" / LEDGER) as b:
        assert canonical_rows(a) == canonical_rows(b)


def test_option_probabilities_as_a_reward_are_refused(command: Command, tmp_path: Path) -> None:
    done = simulate(
        command, tmp_path, "--mode", "rewards", "--out", "x", rewards__score="js_divergence"
    )
    assert done.returncode == 2
    assert "every sampled letter of a question the same reward" in " ".join(done.stderr.split())
    assert not (tmp_path / "x").exists()
