"""The run loop and the strategy over the in-process grid, with clients that misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedalign.config import Config
from fedalign.errors import ConfigError, ResumeError, RunFailed
from fedalign.ledger import Ledger, canonical_rows
from fedalign.runfolder import CHECKPOINT, LEDGER, SPOOL, prepare
from server.checkpoint import load
from server.progress import LogProgress
from server.run import execute
from simulations.grid import InProcessGrid

Make = Callable[..., Any]


def run(config: Config, app: Any, nodes: int = 1, fault: Any = None) -> Path:
    execute(InProcessGrid(app, nodes, fault), config, LogProgress(), poll=0.01)
    return Path(config.run.out)


def rows(folder: Path) -> list[tuple[Any, ...]]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return canonical_rows(ledger)


@pytest.mark.usefixtures("with_report")
def test_a_run_leaves_everything_behind(settings: Make, make_app: Make) -> None:
    folder = run(settings(), make_app())
    for name in (LEDGER, CHECKPOINT, "report.html", "summary.json", "adapter"):
        assert (folder / name).exists(), name
    assert not (folder / SPOOL).exists()
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert ledger.commits() == [
            ("base", 0, 1),
            ("final", 3, 1),
            ("personal", 3, 1),
            ("train", 1, 1),
            ("train", 2, 1),
            ("train", 3, 1),
        ]
        weights = [w for w in ledger.weights() if w.round == 2]
        assert sum(w.weight or 0 for w in weights) == pytest.approx(1)
        assert ledger.run()["status"] == "completed"
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["shared/worst"] <= summary["shared/average"] < 1


def test_the_number_of_nodes_and_clients_a_message_do_not_matter(
    settings: Make, make_app: Make
) -> None:
    a = run(settings("a"), make_app(), nodes=1)
    b = run(settings("b"), make_app(), nodes=3)
    c = run(settings("c", run__clients_per_message=1), make_app(), nodes=2)
    reference = load(a / CHECKPOINT).adapter
    for other in (b, c):
        assert np.array_equal(load(other / CHECKPOINT).adapter, reference)
        assert rows(other) == rows(a)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("nan", "non-finite"), ("high", "non-finite"), ("status", "no-data")],
)
def test_a_bad_row_is_recorded_and_left_out(
    settings: Make, make_app: Make, what: str, reason: str
) -> None:
    def tamper(kind: str, client: str, round_: int) -> str | None:
        return what if (kind, client, round_) == ("train", "east#1", 2) else None

    folder = run(settings(), make_app(tamper))
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        bad = [r for r in ledger.replies() if r.status != "ok"]
        assert [(r.client, r.round, r.reason) for r in bad] == [("east#1", 2, reason)]
        good = [r.weight for r in ledger.replies() if r.round == 2 and r.status == "ok"]
        assert sum(w or 0 for w in good) == pytest.approx(1)
    assert np.isfinite(load(folder / CHECKPOINT).adapter).all()


@pytest.mark.parametrize(("what", "reason"), [("raise", "flower-error-2"), ("shape", "bad-array")])
def test_a_broken_message_condemns_the_clients_it_names(
    settings: Make, make_app: Make, what: str, reason: str
) -> None:
    def tamper(kind: str, client: str, round_: int) -> str | None:
        return what if (kind, client, round_) == ("train", "north#0", 1) else None

    folder = run(settings(run__clients_per_message=1), make_app(tamper))
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        bad = [(r.client, r.reason) for r in ledger.replies() if r.status != "ok"]
        assert bad == [("north#0", reason)]
        north = [w for w in ledger.weights() if w.group == "north"]
        assert [w.present for w in north] == [False, True, True]
        assert north[0].weight is None
    text = (folder / LEDGER).read_bytes()
    assert b"secret of a client" not in text


def test_an_absent_group_keeps_its_history(settings: Make, make_app: Make) -> None:
    def tamper(kind: str, client: str, round_: int) -> str | None:
        return "nan" if kind == "train" and client == "north#0" and round_ == 2 else None

    folder = run(settings(weights__decay=0.5), make_app(tamper))
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        north = {w.round: w for w in ledger.weights() if w.group == "north"}
    assert north[2].history == north[1].history
    assert north[3].history != north[2].history


def test_below_quorum_a_round_is_tried_again_then_fails(settings: Make, make_app: Make) -> None:
    def tamper(kind: str, client: str, round_: int) -> str | None:
        return "nan" if kind == "train" and round_ == 2 and client != "east#0" else None

    config = settings()
    with pytest.raises(RunFailed, match=r"gave up after 2 attempts.*1 of 5 clients.*non-finite"):
        run(config, make_app(tamper))
    folder = Path(config.run.out)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert [e.attempt for e in ledger.events("round-void")] == [1, 2]
        assert ledger.run()["status"].startswith("failed: ")
        assert ("train", 2) not in [(p, r) for p, r, _ in ledger.commits()]
    # The fault mended, the run goes on as if it had never been there.
    resumed = prepare(replace(config, run=replace(config.run, resume=True)))
    run(resumed, make_app())
    whole = run(settings("whole"), make_app())
    assert rows(folder) == rows(whole)
    assert np.array_equal(load(folder / CHECKPOINT).adapter, load(whole / CHECKPOINT).adapter)


def test_when_nothing_comes_back_the_run_fails(settings: Make, make_app: Make) -> None:
    def fault(node: int, message: Message) -> str | None:
        return "drop" if message.metadata.message_type == "train.round" else None

    config = settings(run__round_timeout=0.3, run__quorum=0.01)
    with pytest.raises(RunFailed, match="no-reply"):
        run(config, make_app(), fault=fault)


def test_a_node_that_cannot_start_fails_the_run(settings: Make, make_app: Make) -> None:
    def fault(node: int, message: Message) -> str | None:
        return "error" if message.metadata.message_type == "query.hello" else None

    with pytest.raises(RunFailed, match="could not start"):
        run(settings(), make_app(), fault=fault)


def test_a_folder_left_by_a_failed_start_can_be_used_again(settings: Make, make_app: Make) -> None:
    def fault(node: int, message: Message) -> str | None:
        return "error" if message.metadata.message_type == "query.hello" else None

    config = settings()
    with pytest.raises(RunFailed):
        run(config, make_app(), fault=fault)
    run(prepare(config), make_app())


def test_no_node_at_all_is_said(settings: Make, make_app: Make) -> None:
    with pytest.raises(RunFailed, match="no node came online"):
        run(settings(run__round_timeout=0.2), make_app(), nodes=0)


def test_early_stop_ends_training_and_says_so(settings: Make, make_app: Make) -> None:
    config = settings(run__rounds=50, run__early_stop_patience=2, personal__steps=0)
    folder = run(config, make_app())
    state = load(folder / CHECKPOINT)
    assert state.training_done
    assert state.round < 50
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert len(ledger.events("early-stop")) == 1


def test_sampling_is_keyed_and_respected(settings: Make, make_app: Make) -> None:
    a = run(settings("a", run__clients_per_round=2), make_app())
    b = run(settings("b", run__clients_per_round=2), make_app(), nodes=2)
    assert rows(a) == rows(b)
    with Ledger(a / LEDGER, readonly=True) as ledger:
        for round_ in (1, 2, 3):
            assert len([r for r in ledger.replies() if r.round == round_]) == 2


def test_too_many_clients_per_round_is_an_error(settings: Make, make_app: Make) -> None:
    with pytest.raises(ConfigError, match="there are 5 clients"):
        run(settings(run__clients_per_round=6), make_app())


def test_a_used_folder_is_refused(settings: Make, make_app: Make) -> None:
    config = settings()
    run(config, make_app())
    with pytest.raises(ResumeError, match="already holds a run"):
        prepare(config)


def test_resume_with_other_settings_names_the_key(settings: Make, make_app: Make) -> None:
    config = settings()
    run(config, make_app())
    other = replace(
        config,
        run=replace(config.run, resume=True),
        weights=replace(config.weights, temperature=0.2),
    )
    with pytest.raises(ResumeError, match=r"weights\.temperature"):
        run(prepare(other), make_app())


def test_resume_with_another_base_is_refused(settings: Make, make_app: Make) -> None:
    config = settings()
    run(config, make_app())
    resumed = prepare(replace(config, run=replace(config.run, resume=True)))
    from fedalign.wire import Manifest

    app = make_app()
    other = Manifest(tuple(load_layout(config)), 2, 4.0, ("q", "v"), "another base", "tok", False)
    with pytest.raises(ResumeError, match="base model"):
        run(resumed, make_app(None, other))
    del app


def load_layout(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    from fedalign.wire import Manifest

    with Ledger(Path(config.run.out) / LEDGER, readonly=True) as ledger:
        return list(Manifest.from_json(ledger.run()["manifest"]).layout)


def test_a_finished_run_resumed_changes_nothing(settings: Make, make_app: Make) -> None:
    config = settings()
    folder = run(config, make_app())
    before = rows(folder)
    run(prepare(replace(config, run=replace(config.run, resume=True))), make_app())
    assert rows(folder) == before


def test_damaged_checkpoint_is_refused(settings: Make, make_app: Make) -> None:
    config = settings()
    folder = run(config, make_app())
    (folder / CHECKPOINT).write_bytes(b"nonsense")
    resumed = prepare(replace(config, run=replace(config.run, resume=True)))
    with pytest.raises(ResumeError, match="not a readable checkpoint"):
        run(resumed, make_app())


@pytest.mark.parametrize("method", ["product", "factor-mean"])
def test_aggregations_of_both_factors_run(settings: Make, make_app: Make, method: str) -> None:
    run(settings(aggregation__method=method), make_app())


@pytest.mark.parametrize("rule", ["uniform", "size", "adaptive", "worst", "afl", "qffl", "placebo"])
def test_every_rule_runs(settings: Make, make_app: Make, rule: str) -> None:
    folder = run(settings(weights__rule=rule, personal__steps=0), make_app())
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        by_round: dict[int, float] = {}
        for w in ledger.weights():
            by_round[w.round] = by_round.get(w.round, 0.0) + (w.weight or 0.0)
    assert all(total == pytest.approx(1) for total in by_round.values())
