"""Runs in every condition: what counts, where a run is, what was refused, who died."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from fedalign.compat import RunState
from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER
from server.status import facts, print_status
from server.status_records import Status


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


fixture = _load("status_state")
NOW: float = fixture.NOW


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path


def shown(status: Status, width: int = 80) -> str:
    """What a terminal without colours of this width shows."""
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        print_status(status, console)
    return capture.get()


def texts(status: Status) -> str:
    return "\n".join(f"{a.level}: {a.text}" for a in status.attention)


def test_running_run_shows_committed_numbers_only(state: Path) -> None:
    folder = fixture.make_run(state / "runs" / "spring", done=3, void=True)
    run = facts(state, now=NOW).run
    assert run is not None
    assert (run.brief.status, run.brief.phase, run.brief.done) == ("running", "train", 3)
    assert run.brief.attempt == 2
    assert run.last_round == 3
    assert (run.worst, run.worst_score) == ("isles", fixture.score_of("isles", 3))
    expected = [fixture.score_of(g, 3) for g in fixture.GROUPS]
    assert run.average == pytest.approx(sum(expected) / 4)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        rows = {(w.group, w.round): w for w in ledger.weights()}
    for group in run.groups:
        assert group.weights == {r: w.weight for (g, r), w in rows.items() if g == group.group}
        assert {r: s for r, s in group.scores.items() if r} == {
            r: w.score for (g, r), w in rows.items() if g == group.group
        }
        assert group.scores[0] == fixture.score_of(group.group, 0)
        assert group.history == rows[group.group, 3].history
    assert "0.999" not in json.dumps(asdict(facts(state, now=NOW)))
    assert [(b.code, b.counted) for b in run.bad_replies] == [("bad-shape", False)] * 3
    text = shown(facts(state, now=NOW))
    assert "round 4 of 8, attempt 2" in text
    assert "worst served" in text
    assert "0.999" not in text


def test_resumed_and_completed_runs(state: Path) -> None:
    fixture.make_run(state / "runs" / "a", resumed=True, done=2)
    made = facts(state, now=NOW).run
    assert made is not None
    assert (made.brief.resumed, made.brief.attempt) == (1, 1)
    assert any(e.kind == "resumed" and e.detail == "after train 2" for e in made.events)
    fixture.make_run(state / "runs" / "b", status="completed", done=8, started=NOW - 10)
    brief = next(b for b in facts(state, now=NOW).runs if b.name == "b")
    assert (brief.status, brief.phase, brief.done) == ("completed", "done", 8)
    assert brief.report.endswith("runs/b/report.html")


def test_withheld_and_absent_groups_have_no_score_of_the_round(state: Path) -> None:
    fixture.make_run(state / "runs" / "a", withheld="hills", absent="isles", done=3)
    run = facts(state, now=NOW).run
    assert run is not None
    groups = {g.group: g for g in run.groups}
    assert groups["hills"].state == "withheld"
    assert groups["hills"].history is None
    assert groups["hills"].score_round == 0
    assert groups["isles"].state == "absent"
    assert (groups["isles"].usable, groups["isles"].asked) == (0, 1)
    assert groups["isles"].weight is None
    # The worst of those with a score, said so; never a 0 for a score that was not given.
    assert run.scored == 2
    assert run.worst == "valley"
    assert "2 of 4 groups" in shown(facts(state, now=NOW))
    assert "isles-lab (no-reply)" in texts(facts(state, now=NOW))


def test_run_that_stands_still_is_noticed(state: Path) -> None:
    fixture.make_run(state / "runs" / "a", config={"run.round-timeout": 600.0})
    assert texts(facts(state, now=NOW)) == ""
    later = facts(state, now=NOW + 700)
    assert "nothing was recorded for 12 min" in texts(later)


def test_phases_in_work(state: Path) -> None:
    def phase(folder: Path) -> tuple[str, str]:
        brief = next(b for b in facts(state, now=NOW).runs if b.folder == str(folder))
        return brief.status, brief.phase

    runs = state / "runs"
    (runs / "empty").mkdir()
    assert phase(runs / "empty") == ("starting", "hello")
    with Ledger(runs / "hello" / LEDGER):
        pass
    assert phase(runs / "hello") == ("starting", "hello")
    with Ledger(runs / "base" / LEDGER) as ledger:
        ledger.put_run(config={"run.rounds": 2}, status="running", started=NOW)
    assert phase(runs / "base") == ("running", "base")
    assert phase(fixture.make_run(runs / "first", done=0)) == ("running", "train")
    asked = {"site.answers": "predictor", "predictor.rounds": 3}
    assert phase(fixture.make_run(runs / "p", done=0, config=asked)) == ("running", "predictor")
    assert phase(fixture.make_run(runs / "last", done=2, rounds=2)) == ("running", "final")
    (runs / "odd").mkdir()
    (runs / "odd" / LEDGER).write_text("not a database, and longer than its header")
    assert phase(runs / "odd")[0] == "unreadable"
    assert "Run odd cannot be read" in texts(facts(state, now=NOW))


def test_a_run_that_fails_before_it_has_settings(state: Path) -> None:
    with Ledger(state / "runs" / "a" / LEDGER) as ledger:
        ledger.event("run-failed", "no node came online")
    made = facts(state, now=time.time())
    assert made.runs[0].status == "failed"
    assert "no node came online" in texts(made)


def test_a_run_whose_process_died_is_failed(state: Path) -> None:
    fixture.make_run(state / "runs" / "a", done=3)
    (state / "apps").mkdir()
    asked = []

    def ask(run_id: int) -> RunState | None:
        asked.append(run_id)
        return RunState("finished:failed", "")

    # Not submitted from here: nobody to ask about.
    made = facts(state, now=NOW, run_state=ask)
    assert (asked, made.runs[0].status) == ([], "running")
    record = {"name": "a", "run_id": 17, "bundle": "00", "submitted": NOW}
    (state / "apps" / "a.json").write_text(json.dumps(record))
    made = facts(state, now=NOW, run_state=ask)
    assert asked == [17]
    assert made.run is not None
    assert (made.runs[0].status, made.run.brief.status) == ("failed", "failed")
    assert "Flower says finished:failed" in made.attention[0].text
    assert made.attention[0].todo.endswith("fedalign-server resume a")
    goes_on = facts(state, now=NOW, run_state=lambda _: RunState("running", ""))
    assert (goes_on.runs[0].status, goes_on.attention) == ("running", ())


def test_a_run_that_ends_well_while_we_look_is_not_failed(state: Path) -> None:
    fixture.make_run(state / "runs" / "a", done=8)
    (state / "apps").mkdir()
    record = {"name": "a", "run_id": 17, "bundle": "00", "submitted": NOW}
    (state / "apps" / "a.json").write_text(json.dumps(record))

    def ask(run_id: int) -> RunState | None:
        with Ledger(state / "runs" / "a" / LEDGER) as ledger:
            ledger.put_run(status="completed")
        return RunState("finished:completed", "")

    made = facts(state, now=NOW, run_state=ask)
    assert made.runs[0].status == "completed"
    assert made.attention == ()


def test_roll_call_refusals_and_a_run_that_does_not_begin(state: Path) -> None:
    folder = fixture.make_run(state / "runs" / "a", done=1, started=time.time() - 9000)
    with Ledger(folder / LEDGER) as ledger:
        ledger.event("site-refused", "refused-base-model", phase="hello", client="far-lab")
    run = facts(state, now=NOW).run
    assert run is not None
    assert [(b.client, b.code, b.counted) for b in run.bad_replies] == [
        ("far-lab", "refused-base-model", None)
    ]
    assert "far-lab: refused-base-model (hello; not in the run)" in shown(facts(state, now=NOW))
    with Ledger(state / "runs" / "b" / LEDGER):
        pass
    later = facts(state, now=time.time() + 700)
    assert "Run b has not begun; nothing was recorded for 11 min." in texts(later)
