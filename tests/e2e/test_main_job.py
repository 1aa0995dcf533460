"""The main job with the real clients, small: what comes out, what stays private, what repeats."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients.trainer
from clients.app import app
from clients.store import population
from fedalign.config import Config, from_flat
from fedalign.data.records import ClientData, SurveyItem
from fedalign.ledger import Ledger, canonical_rows
from fedalign.runfolder import CHECKPOINT, LEDGER, prepare
from server.checkpoint import load
from server.progress import LogProgress
from server.run import execute
from simulations.display import QuietProgress
from simulations.grid import InProcessGrid
from simulations.simulate import simulate

SMALL: dict[str, Any] = {
    "run.rounds": 2,
    "data.questions": 60,
    "data.partition": "sizes",
    "data.clients-per-group": "coast=2,valley=1,hills=1,isles=1",
    "local.steps": 2,
    "personal.steps": 2,
}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    def make(folder: str = "run", **overrides: Any) -> Config:
        flat = {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
        return from_flat(SMALL | {"run.out": str(tmp_path / folder)} | flat)

    return make


def run(config: Config, nodes: int = 1) -> Path:
    execute(InProcessGrid(app, nodes), prepare(config), LogProgress())
    return Path(config.run.out)


def test_everything_that_is_promised_comes_out(small: Callable[..., Config]) -> None:
    folder = simulate(small(), QuietProgress()).folder
    summary = json.loads((folder / "summary.json").read_text())
    for stage in ("base", "shared", "personal", "local_only", "local_only_total"):
        assert 0 < summary[f"{stage}/worst"] <= summary[f"{stage}/average"] <= 1
    for name in ("uniform", "mean_of_groups", "optimum_average", "optimum_worst"):
        assert 0 < summary[f"reference/{name}/average"] <= 1
    # No shared adapter can beat the best shared answer for what that answer is best at.
    best = summary["reference/optimum_average/average"]
    assert summary["shared/average"] <= best + 1e-3
    assert summary["shared/worst"] <= summary["reference/optimum_worst/worst"] + 1e-3
    html = (folder / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "isles" in html


def test_plain_peft_loads_the_adapter(small: Callable[..., Config]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedalign.models.base import ResidentModel
    from fedalign.models.packaged import pocket_folder

    config = small(personal__steps=0)
    folder = run(config)
    base = AutoModelForCausalLM.from_pretrained(pocket_folder())
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    ours = ResidentModel(config.model)
    ours.load(load(folder / CHECKPOINT).adapter)
    tokens = torch.arange(20)[None] % 50
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, ours.network(tokens).logits)


def test_test_questions_are_not_read_in_training(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: dict[str, set[str]] = defaultdict(set)
    phase = {"now": "hello"}
    split = ClientData.split

    def counted(self: ClientData, name: str) -> Any:
        reads[phase["now"]].add(name)
        return split(self, name)

    for name in ("score", "train", "personal"):
        original = getattr(clients.trainer.ResidentTrainer, name)

        def within(self: Any, *args: Any, _n: str = name, _f: Any = original) -> Any:
            phase["now"] = _n
            return _f(self, *args)

        monkeypatch.setattr(clients.trainer.ResidentTrainer, name, within)
    monkeypatch.setattr(ClientData, "split", counted)
    run(small())
    assert reads["train"] == {"validation"}
    assert reads["score"] == {"validation", "test"}
    assert reads["personal"] == {"test"}


def test_no_text_of_a_question_reaches_the_server(small: Callable[..., Config]) -> None:
    config = small()
    folder = run(config)
    written = b"".join(
        p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent.name != "personal"
    )
    for client in population(config):
        for item in (*client.train, *client.validation, *client.test):
            assert isinstance(item, SurveyItem)
            assert item.question.encode() not in written


def test_same_seed_same_run_whatever_the_nodes(small: Callable[..., Config]) -> None:
    """One client a message: bit-equal.  Several are scored and trained as one batch, whose shape
    shows in the last bits and, where a gradient is nearly zero, in AdamW's sign: other sizes agree
    to a tolerance."""
    a = run(small("a", run__clients_per_message=1), nodes=1)
    b = run(small("b", run__clients_per_message=1), nodes=3)
    assert np.array_equal(load(a / CHECKPOINT).adapter, load(b / CHECKPOINT).adapter)
    with Ledger(a / LEDGER, readonly=True) as x, Ledger(b / LEDGER, readonly=True) as y:
        assert canonical_rows(x) == canonical_rows(y)
    again = run(small("again"))
    twice = run(small("twice"))
    assert np.array_equal(load(again / CHECKPOINT).adapter, load(twice / CHECKPOINT).adapter)
    adapter, cohort = load(a / CHECKPOINT).adapter, load(again / CHECKPOINT).adapter
    error = np.abs(adapter - cohort) / np.abs(adapter).max()
    assert error.max() <= 5e-3
    assert error.mean() <= 1e-5
    apart = load(run(small("apart", local__cohort_size=1)) / CHECKPOINT).adapter
    assert np.abs(adapter - apart).max() <= 1e-4 * np.abs(adapter).max()
    with Ledger(a / LEDGER, readonly=True) as x, Ledger(again / LEDGER, readonly=True) as y:
        for one, two in zip(x.scores(), y.scores(), strict=True):
            assert one.score == pytest.approx(two.score, abs=1e-3)
    c = run(small("c", run__seed=1))
    assert not np.array_equal(adapter, load(c / CHECKPOINT).adapter)


def test_frozen_a_sends_b_only_and_keeps_a(small: Callable[..., Config]) -> None:
    config = small(aggregation__method="frozen-a", personal__steps=0)
    folder = run(config)
    from fedalign.aggregation.adapters import initial_adapter
    from fedalign.models.layout import unpack
    from fedalign.wire import Manifest

    state = load(folder / CHECKPOINT)
    manifest = Manifest.from_json(state.manifest_json)
    assert manifest.upload_size < manifest.size
    start = initial_adapter(dict(manifest.layout), config.run.seed)
    end = unpack(state.adapter, manifest.layout)
    for name in end:
        same = np.array_equal(start[name], end[name])
        assert same == name.endswith("lora_A.weight"), name


def test_references_and_losses_run(small: Callable[..., Config]) -> None:
    for i, extra in enumerate(
        (
            {"local__reference": "base"},
            {"local__loss": "ipo", "local__reference": "base"},
            {"local__loss": "conservative", "local__label_noise": 0.1, "local__labels": "hard"},
            {"local__loss": "robust", "local__label_noise": 0.1, "local__labels": "hard"},
        )
    ):
        run(small(f"r{i}", personal__steps=0, run__rounds=1, **extra))


def test_a_named_reference_is_an_adapter_folder(small: Callable[..., Config]) -> None:
    first = run(small("first", personal__steps=0, run__rounds=1))
    adapter = str(first / "adapter")
    second = run(small("second", personal__steps=0, run__rounds=1, local__reference=adapter))
    a, b = load(first / CHECKPOINT), load(second / CHECKPOINT)
    assert not np.array_equal(a.adapter, b.adapter)


def test_engine_trl_runs_the_main_job(small: Callable[..., Config]) -> None:
    folder = run(
        small(
            local__engine="trl",
            local__labels="hard",
            local__reference="base",
            run__rounds=1,
            personal__steps=0,
        )
    )
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert len([r for r in ledger.replies() if r.status == "ok"]) == 5


def test_pairs_from_a_file(tmp_path: Path, small: Callable[..., Config]) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Question {i}: tea or coffee?",
            "chosen": "tea" if group == "north" else "coffee",
            "rejected": "coffee" if group == "north" else "tea",
            "group": group,
            "vote_share": 0.9,
        }
        for i in range(40)
        for group in ("north", "south")
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    config = small(
        data__source="pairs",
        data__path=str(path),
        data__partition="group",
        data__clients_per_group="1",
        data__questions=0,
        score__min_option_mass=0.0,
    )
    folder = simulate(config, QuietProgress()).folder
    summary = json.loads((folder / "summary.json").read_text())
    # The groups want opposite answers: a shared one scores .5 on average, each alone .9.
    assert summary["reference/optimum_average/average"] == pytest.approx(0.5)
    assert summary["reference/optimum_worst/worst"] == pytest.approx(0.5)
    assert summary["shared/average"] == pytest.approx(0.5, abs=1e-6)


def test_low_option_mass_fails_the_run(small: Callable[..., Config]) -> None:
    config = replace(small(), score=replace(small().score, min_option_mass=1.0))
    outcome = execute(InProcessGrid(app), prepare(config), LogProgress())
    assert not outcome.option_mass_ok
    with Ledger(outcome.folder / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"] == "failed: option mass"
    assert "failed" in (outcome.folder / "report.html").read_text().lower()


def test_low_option_mass_still_returns_the_report(small: Callable[..., Config]) -> None:
    config = replace(small(), score=replace(small().score, min_option_mass=1.0))
    assert not simulate(config, QuietProgress()).option_mass_ok
