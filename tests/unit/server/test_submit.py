"""Submitting and following a run: settings, what is refused, and the true end."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedalign.compat import RunState
from fedalign.config import Config, flatten, from_flat, to_flat
from fedalign.errors import ConfigError, DataError, ResumeError, RunFailed
from fedalign.ledger import Ledger, ScoreRow
from fedalign.runfolder import LEDGER, NO_OPTION_MASS
from server import follow as following
from server import submit as submitting
from server.bundle import BundleRefused
from server.coordinator import Coordinator, init
from server.follow import Interrupted, Watcher, follow
from server.places import STATE, located
from server.submit import Submission, new_run, old_run, packaged_scenarios, settings, submit
from server.superlink_admin import AdminRefused, AdminUnavailable, NodeEntry


class Admin:
    """A SuperLink whose runs go through the states it is told; ``None`` is silence."""

    def __init__(self, *states: str | None) -> None:
        self.states = list(states)
        self.stopped: list[int] = []

    def register(self, public_key: bytes, name: str) -> int:
        raise AssertionError

    def unregister(self, node_id: int) -> None:
        raise AssertionError

    def nodes(self) -> list[NodeEntry]:
        return []

    def run_state(self, run_id: int) -> RunState | None:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            raise AdminUnavailable("no answer.")
        if state == "interrupt":
            raise KeyboardInterrupt
        return RunState(state, "") if state else None

    def stop_run(self, run_id: int) -> bool:
        self.stopped.append(run_id)
        return True


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return init(tmp_path / "c", ["localhost"], 24000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[tuple[str, ...]]]:
    """Stand in for ``flwr``: builds ``content`` as the bundle and accepts it as run 7."""

    def install(content: bytes = b"bundle", sent: bytes | None = None) -> list[tuple[str, ...]]:
        said: list[tuple[str, ...]] = []

        def flwr(environment: dict[str, str], *words: str, cwd: Path | None = None) -> Any:
            said.append(words)
            if words[0] == "build":
                assert cwd is not None
                (cwd / "x.fab").write_bytes(content)
                return {}
            digest = hashlib.sha256(content if sent is None else sent).hexdigest()
            return {"success": True, "run-id": "7", "fab-hash": digest[:8]}

        monkeypatch.setattr(submitting, "flwr", flwr)
        monkeypatch.setattr(submitting, "check_bundle", lambda path: [])
        return said

    return install


def begin(coordinator: Coordinator, name: str, **facts: Any) -> Path:
    """Let a run begin in its folder: a ledger with settings."""
    folder = coordinator.runs / name
    with Ledger(folder / LEDGER) as ledger:
        ledger.put_run(**({"config": to_flat(Config()), "status": "running"} | facts))
    return folder


def test_settings_of_packaged_scenarios_and_files(tmp_path: Path) -> None:
    assert {"default", "rewards"} <= set(packaged_scenarios())
    assert settings("rewards", ["run.rounds=3"])["run.rounds"] == 3
    assert settings("rewards", [])["run.mode"] == "rewards"
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nrounds = 5\n")
    assert settings(str(path), [])["run.rounds"] == 5
    path.write_text("[run]\nruonds = 5\n")
    with pytest.raises(ConfigError, match=r"mine\.toml.*ruonds"):
        settings(str(path), [])
    with pytest.raises(ConfigError, match="Packaged: balanced, default"):
        settings("nosuch", [])


def test_a_new_run_gets_its_places(coordinator: Coordinator) -> None:
    flat = settings("default", ["deployment.min-sites=2", "run.out=/elsewhere"])
    config = new_run(coordinator, flat, "first")
    assert config.run.out == str(coordinator.runs / "first")
    assert (config.run.name, config.run.resume) == ("first", False)
    assert config.deployment.registry == str(coordinator.registry)
    assert config.deployment.audit == str(coordinator.audit)
    assert config.deployment.min_sites == 2


def test_a_reward_federation_needs_questions(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.prompts"):
        new_run(coordinator, settings("rewards", []), "first")
    asked = tmp_path / "questions.jsonl"
    flat = settings("rewards", [f"rewards.prompts={asked}"])
    with pytest.raises(DataError, match=r"questions\.jsonl"):
        new_run(coordinator, flat, "first")
    asked.write_text('{"question": "Tea?", "options": ["yes", "no"]}\n')
    assert new_run(coordinator, flat, "first").rewards.prompts == str(asked)


def test_no_path_of_a_file_is_in_the_bundle(
    coordinator: Coordinator, flower: Callable[..., list[tuple[str, ...]]], tmp_path: Path
) -> None:
    flower()
    asked = tmp_path / "questions.jsonl"
    asked.write_text('{"question": "Tea?", "options": ["yes", "no"]}\n')
    data = ("data.source=survey", f"data.path={tmp_path / 'survey.jsonl'}")
    flat = settings("rewards", [f"rewards.prompts={asked}", *data])
    config = new_run(coordinator, flat, "first")
    submit(coordinator, Admin("pending"), config, "first")
    project = (coordinator.apps / "first" / "pyproject.toml").read_text()
    assert str(tmp_path) not in project
    run_config = flatten(tomllib.loads(project)["tool"]["flwr"]["app"]["config"])
    here = {STATE: str(coordinator.state)}
    assert from_flat(located(run_config, here)) == config
    (coordinator.apps / "first.files.json").unlink()
    with pytest.raises(ConfigError, match="Submit the run again"):
        located(run_config, here)


def test_a_run_that_began_is_resumed_and_not_begun_again(coordinator: Coordinator) -> None:
    begin(coordinator, "first")
    with pytest.raises(ResumeError, match="resume first"):
        new_run(coordinator, settings("default", []), "first")
    config = old_run(coordinator, "first", ["run.round-timeout=60.0"])
    assert config.run.resume
    assert config.run.round_timeout == 60.0
    with pytest.raises(ResumeError, match="Runs: first"):
        old_run(coordinator, "second", [])


def test_what_was_checked_is_what_was_sent(
    coordinator: Coordinator, flower: Callable[..., list[tuple[str, ...]]]
) -> None:
    said = flower()
    config = new_run(coordinator, settings("default", []), "first")
    submission = submit(coordinator, Admin("pending"), config, "first")
    assert (submission.run_id, submission.name) == (7, "first")
    assert [words[0] for words in said] == ["build", "run"]
    project = (coordinator.apps / "first" / "pyproject.toml").read_text()
    assert str(coordinator.state) not in project
    run_config = flatten(tomllib.loads(project)["tool"]["flwr"]["app"]["config"])
    assert run_config["run.out"] == "runs/first"
    assert from_flat(located(run_config, {STATE: str(coordinator.state)})) == config
    with pytest.raises(ConfigError, match="not an absolute path"):
        located(run_config, {})
    assert json.loads((coordinator.apps / "first.json").read_text())["run_id"] == 7
    with pytest.raises(ResumeError, match="goes on: Flower says 'running'"):
        submit(coordinator, Admin("running"), config, "first")
    assert submit(coordinator, Admin("finished:failed"), config, "first").run_id == 7


def test_another_bundle_than_the_checked_one_is_stopped(
    coordinator: Coordinator, flower: Callable[..., list[tuple[str, ...]]]
) -> None:
    flower(b"checked", b"sent")
    admin = Admin("pending")
    config = new_run(coordinator, settings("default", []), "first")
    with pytest.raises(AdminRefused, match="another bundle"):
        submit(coordinator, admin, config, "first")
    assert admin.stopped == [7]


def test_a_bundle_that_fails_the_check_is_not_sent(
    coordinator: Coordinator,
    flower: Callable[..., list[tuple[str, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = flower()

    def refuse(path: Path) -> list[str]:
        raise BundleRefused("'prefs.jsonl' in the bundle is not code.")

    monkeypatch.setattr(submitting, "check_bundle", refuse)
    config = new_run(coordinator, settings("default", []), "first")
    with pytest.raises(BundleRefused):
        submit(coordinator, Admin("pending"), config, "first")
    assert [words[0] for words in said] == ["build"]


RUN = Submission("first", 7, "0" * 64, 0.0)


def score(group: str, value: float) -> ScoreRow:
    return ScoreRow(
        stage="received",
        client=f"{group}-1",
        group=group,
        split="validation",
        metric="js_divergence",
        n=5,
        score=value,
    )


def test_progress_is_told_once_and_the_report_at_the_end(coordinator: Coordinator) -> None:
    lines: list[str] = []
    watcher = Watcher(coordinator.runs / "first")
    folder = begin(coordinator, "first")
    with Ledger(folder / LEDGER) as ledger:
        ledger.write("train", 1, 1, scores=[score("north", 0.9), score("south", 0.4)])
        ledger.commit("train", 1, 1)
        ledger.event("quorum", "2 of 3")
        ledger.put_run(status="completed")
    admin = Admin("pending", "running", None, "running", "finished:completed")
    report = follow(coordinator, admin, RUN, watcher, lines.append)
    assert report == folder / "report.html"
    told = "\n".join(lines)
    assert told.count("train 1/") == 1
    assert "worst 'south' 0.4000 of 2 groups" in told
    assert "quorum 2 of 3" in told
    assert told.count("does not answer") == 1
    resumed: list[str] = []
    follow(coordinator, Admin("finished:completed"), RUN, Watcher(folder), resumed.append)
    assert resumed == []


@pytest.mark.parametrize(
    ("flower_says", "ledger_says", "reason"),
    [
        ("finished:failed", "running", "finished:failed"),
        ("finished:failed", "failed: quorum missed", "quorum missed"),
        ("finished:stopped", "running", "finished:stopped"),
        ("finished:completed", "running", "no reason given"),
    ],
)
def test_only_what_both_call_completed_is(
    coordinator: Coordinator, flower_says: str, ledger_says: str, reason: str
) -> None:
    begin(coordinator, "first", status=ledger_says)
    watcher = Watcher(coordinator.runs / "first")
    with pytest.raises(RunFailed, match=reason) as failed:
        follow(coordinator, Admin(flower_says), RUN, watcher, print)
    assert failed.value.exit_code == 5
    assert "fedalign-server resume first" in str(failed.value)


def test_a_model_that_does_not_answer_is_told_apart(coordinator: Coordinator) -> None:
    begin(coordinator, "first", status=NO_OPTION_MASS)
    watcher = Watcher(coordinator.runs / "first")
    with pytest.raises(RunFailed, match=r"min-option-mass") as failed:
        follow(coordinator, Admin("finished:failed"), RUN, watcher, print)
    assert failed.value.exit_code == 5
    assert str(coordinator.runs / "first" / "report.html") in str(failed.value)
    assert "resume first" not in str(failed.value)


def test_a_run_that_wrote_nothing_did_not_complete(coordinator: Coordinator) -> None:
    watcher = Watcher(coordinator.runs / "first")
    with pytest.raises(RunFailed, match="run --name first"):
        follow(coordinator, Admin("finished:completed"), RUN, watcher, print)


def test_a_run_that_the_superlink_forgot_failed(coordinator: Coordinator) -> None:
    watcher = Watcher(coordinator.runs / "first")
    with pytest.raises(RunFailed, match="does not know"):
        follow(coordinator, Admin(""), RUN, watcher, print)


def test_ctrl_c_stops_the_run_and_says_so(coordinator: Coordinator) -> None:
    begin(coordinator, "first")
    admin = Admin("running", "interrupt")
    watcher = Watcher(coordinator.runs / "first")
    with pytest.raises(Interrupted, match=r"asked to stop.*resume first") as stopped:
        follow(coordinator, admin, RUN, watcher, print)
    assert admin.stopped == [7]
    assert stopped.value.exit_code == 130


def test_a_superlink_that_stays_silent_ends_the_wait(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOST_SECONDS", 0.05)
    watcher = Watcher(coordinator.runs / "first")
    with pytest.raises(AdminUnavailable, match="may go on"):
        follow(coordinator, Admin(None), RUN, watcher, print)
