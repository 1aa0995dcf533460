"""A reward federation over real sites: the coordinator trains, sites score, policies hold."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedalign.audit import verify
from fedalign.ledger import Ledger
from fedalign.runfolder import ADAPTER, CHECKPOINT, LEDGER
from server.checkpoint import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs peer credentials"),
]
SETTINGS = ("run.rounds=3", "ppo.questions=8", "run.quorum=0.6")
TRAINING = 'objectives = ["dpo", "exchange"]'
POLICIES = {
    "coast-a": {'answers = "shares"': 'answers = "both"'},
    "coast-b": {TRAINING: 'objectives = ["dpo"]'},
    "isles-a": {'answers = "shares"': 'answers = "both"'},
}


@pytest.fixture(scope="module")
def federation(loopback: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("rewards")
    with loopback.Federation(folder, policies=POLICIES) as made:
        yield made


@pytest.fixture(scope="module")
def prompts(federation: Any) -> Path:
    """Return the public questions of the two sites that judge; no group, no shares."""
    path = Path(federation.folder) / "questions.jsonl"
    with path.open("w") as f:
        for row in rows(federation, "coast-a", "isles-a"):
            kept = {key: row[key] for key in ("question", "options")}
            f.write(json.dumps(kept) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(federation: Any, prompts: Path) -> Path:
    """Return the folder of a reward federation that ran to its end."""
    done = start(federation, "judged", f"rewards.prompts={prompts}")
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(federation.result("judged"))


def rows(federation: Any, *sites: str) -> list[dict[str, Any]]:
    everything = [json.loads(line) for line in federation.merged.read_text().splitlines()]
    return [row for row in everything if row["site"] in sites]


def start(federation: Any, name: str, *settings: str) -> Any:
    words = ["run", "--scenario", "rewards", "--name", name]
    for text in (*SETTINGS, *settings):
        words += ["--set", text]
    return federation.command("server.cli", *words, timeout=400.0)


def audited(federation: Any, site: str) -> list[tuple[str, str, int, str]]:
    """Return event, kind, round and code of every request in a site's log, checked whole."""
    log = federation.home(site) / "trainer" / "audit.jsonl"
    assert verify(log) > 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        (line["event"], facts["kind"], facts["round"], facts["code"])
        for line in lines
        if "kind" in (facts := line["facts"])
    ]


def test_a_run_ends_with_everything_a_simulation_leaves(finished: Path) -> None:
    for name in ("report.html", "summary.json", f"{ADAPTER}/adapter_model.safetensors"):
        assert (finished / name).stat().st_size > 0, name
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["shared/worst"] <= summary["shared/average"] < 1
    with Ledger(finished / LEDGER, readonly=True) as ledger:
        assert [c for c in ledger.commits() if c[0] == "train"] == [
            ("train", t, 1) for t in (1, 2, 3)
        ]
        rewards = [c.value for c in ledger.curves("reward-mean") if c.client == ""]
        assert len(rewards) == 3
        assert all(0 < value < 1 for value in rewards)
        assert {r.client for r in ledger.replies()} == {"coast-a", "isles-a"}


def test_it_trains_what_a_simulation_of_the_same_sites_trains(
    federation: Any, finished: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    judges = rows(federation, "coast-a", "isles-a")
    data.write_text("".join(json.dumps(row) + "\n" for row in judges))
    words = ["simulate", "--mode", "rewards", "--out", str(tmp_path / "run")]
    own = ("data.source=survey", f"data.path={data}")
    dealt = ("data.partition=column", "data.partition-column=site")
    for text in (*SETTINGS, *own, *dealt):
        words += ["--set", text]
    done = federation.command("simulations.cli", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    simulated = load(tmp_path / "run" / CHECKPOINT).adapter
    deployed = load(finished / CHECKPOINT).adapter
    assert np.abs(simulated).max() > 0
    np.testing.assert_allclose(deployed, simulated, rtol=1e-4, atol=1e-6)


def test_sites_wrote_down_every_exchange(federation: Any, finished: Path) -> None:
    for site in ("coast-a", "isles-a"):
        found = audited(federation, site)
        exchanges = [line for line in found if line[1] == "query.exchange"]
        assert exchanges[:3] == [("job", "query.exchange", t, "ok") for t in (1, 2, 3)]
        assert not [line for line in found if line[1] == "train.round"]


def test_a_site_that_does_not_judge_is_left_in_peace(federation: Any, finished: Path) -> None:
    found = audited(federation, "coast-b")
    assert found[0] == ("refused", "query.hello", 0, "refused-objective")
    assert {kind for _, kind, _, _ in found} == {"query.hello"}
    log = federation.state / "audit.jsonl"
    assert verify(log) > 5
    refused = [
        facts
        for line in log.read_text().splitlines()
        if (facts := json.loads(line)["facts"]).get("code") == "refused-objective"
    ]
    assert {facts["site"] for facts in refused} == {"coast-b"}


def test_no_site_learns_where_the_questions_are(
    federation: Any, finished: Path, prompts: Path
) -> None:
    for site in federation.sites:
        shipped = [*federation.home(site).rglob("flwr/apps/*/pyproject.toml")]
        assert shipped or site == "coast-b"
        for path in shipped:
            assert str(prompts.parent) not in path.read_text(), path


def test_a_killed_coordinator_app_goes_on_where_it_was(
    federation: Any, finished: Path, prompts: Path, loopback: ModuleType
) -> None:
    words = ["run", "--scenario", "rewards", "--name", "killed"]
    for text in (*SETTINGS, f"rewards.prompts={prompts}"):
        words += ["--set", text]
    process = federation.spawn(federation.folder / "killed.txt", "server.cli", *words)
    ledger = federation.result("killed") / LEDGER
    loopback.wait(lambda: ledger.exists() and ("train", 1, 1) in commits(ledger), "an exchange")
    apps = [
        pid
        for pid in loopback.descendants(federation.pids()["superexec"])
        if "flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert apps
    for pid in apps:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(300) == 5
    done = federation.command("server.cli", "resume", "killed", timeout=400.0)
    assert done.returncode == 0, done.stdout + done.stderr
    again, before = (load(f / CHECKPOINT).adapter for f in (ledger.parent, finished))
    assert np.array_equal(again, before)


def commits(ledger: Path) -> list[tuple[str, int, int]]:
    with Ledger(ledger, readonly=True) as opened:
        return opened.commits()


def test_sites_that_answer_by_their_predictor_only(federation: Any, prompts: Path) -> None:
    settings = (f"rewards.prompts={prompts}", "site.answers=predictor", "predictor.rounds=2")
    done = start(federation, "predicted", *settings, "predictor.context=10", "predictor.targets=8")
    assert done.returncode == 0, done.stdout + done.stderr
    with Ledger(federation.result("predicted") / LEDGER, readonly=True) as ledger:
        assert [c[1] for c in ledger.commits() if c[0] == "predictor"] == [1, 2, 3]
        assert [c.value for c in ledger.curves("shares")] == [0.0] * 3
        assert all(c.value > 0 for c in ledger.curves("predicted"))
    kinds = [kind for _, kind, _, _ in audited(federation, "isles-a")]
    assert kinds.count("train.predictor") == 3


def test_where_every_policy_refuses_the_run_fails_and_says_who(
    federation: Any, prompts: Path
) -> None:
    done = start(federation, "greedy", f"rewards.prompts={prompts}", "personal.steps=5000")
    assert done.returncode == 5
    said = " ".join((done.stdout + done.stderr).split())
    assert "0 of 3 sites can take part" in said
    assert "isles-a (refused-settings)" in said


def test_without_questions_nothing_is_sent(federation: Any) -> None:
    done = start(federation, "mute")
    assert done.returncode == 2
    assert "rewards.prompts" in done.stderr
    assert not federation.result("mute").exists()
