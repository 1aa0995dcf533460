"""Sites that keep their scores, and exchanges of rewards with sites."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedalign import wire
from fedalign.config import Config
from fedalign.ledger import Ledger
from fedalign.runfolder import CHECKPOINT, LEDGER
from server import exchange_round
from server.checkpoint import load
from server.progress import LogProgress
from server.rlhf import Sampled
from server.run import execute

Make = Callable[..., Any]

_spec = importlib.util.spec_from_file_location(
    "sites_grid", Path(__file__).with_name("sites_grid.py")
)
assert _spec is not None
assert _spec.loader is not None
sites_grid = importlib.util.module_from_spec(_spec)
sys.modules["sites_grid"] = sites_grid
_spec.loader.exec_module(sites_grid)
SITES, FakeRegistry, SiteGrid = (
    sites_grid.SITES,
    sites_grid.FakeRegistry,
    sites_grid.SiteGrid,
)


def run(config: Config, grid: Any, registry: Any = None) -> Path:
    registry = registry or FakeRegistry(SITES)
    execute(grid, config, LogProgress(), poll=0.005, enrolled=registry.enrolled)
    return Path(config.run.out)


@pytest.mark.parametrize("rule", ["uniform", "size", "adaptive", "worst", "afl", "qffl", "placebo"])
def test_a_site_may_keep_its_scores(deployed: Make, make_app: Make, rule: str) -> None:
    app = make_app(lambda kind, c, r: "withhold" if c == "north-a" else None)
    folder = run(deployed(weights__rule=rule), SiteGrid(app, SITES))
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        north = [s for s in ledger.scores() if s.group == "north"]
        assert {s.stage for s in north} == {
            "base", "received", "shared", "personal", "local_only", "local_only_total",
        }  # fmt: skip
        assert all((s.score, s.status) == (None, "withheld") for s in north)
        rows = [w for w in ledger.weights() if w.group == "north"]
        assert all(w.present and w.score is None and w.history is None for w in rows)
        assert all(w.weight is not None for w in rows)
        for round_ in (1, 2, 3):
            total = sum(w.weight or 0 for w in ledger.weights() if w.round == round_)
            assert total == pytest.approx(1)
    assert set(load(folder / CHECKPOINT).rule_state.history) == {"east"}
    if rule == "adaptive":  # one other group: the neutral value is its own
        assert rows[0].weight == pytest.approx(0.5)


@pytest.mark.usefixtures("with_report")
def test_the_report_says_withheld(deployed: Make, make_app: Make) -> None:
    app = make_app(lambda kind, c, r: "withhold" if c == "north-a" else None)
    folder = run(deployed(), SiteGrid(app, SITES))
    page = (folder / "report.html").read_text()
    assert page.count("<td>withheld</td>") >= 2
    assert "speak of the other 1" in page
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["run/status"] == "completed"
    assert summary["shared/worst_group"] == "east"
    assert summary["groups/counted"] == 1
    assert "shared/group/north/score" not in summary
    assert any(m["name"] == "group/north" for m in summary["missing"])


@pytest.mark.usefixtures("with_report")
def test_all_may_keep_their_scores(deployed: Make, make_app: Make) -> None:
    app = make_app(lambda kind, c, r: "withhold")
    folder = run(deployed(run__early_stop_patience=1), SiteGrid(app, SITES))
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert {w.weight for w in ledger.weights()} == {0.5}
        assert ledger.run()["status"] == "completed"
    assert load(folder / CHECKPOINT).round == 3
    assert "no group gives a score" in (folder / "report.html").read_text()


class Policy:
    """Writes the same texts; an update adds the mean reward to the adapter."""

    bank_hash = "bank"

    def __init__(self, config: Config, _: Any, state: Any) -> None:
        self.kl = config.ppo.kl
        self.adapter = state.adapter

    def sample(self, exchange: int) -> Sampled:
        texts = ("A", "B", "A")
        question = wire.Question("question", ("yes", "no"))
        formed = np.ones(3, dtype=bool)
        rollouts = wire.Rollouts((question,), (0, 0, 0), texts)
        return Sampled(rollouts, formed, formed, np.zeros(3), 0.0, 3, {})

    def improve(self, exchange: int, sampled: Sampled, rewards: Any) -> tuple[Any, dict, dict]:
        self.adapter = (self.adapter + np.float32(rewards.mean())).astype(np.float32)
        return self.adapter, {}, {}

    def adopt(self) -> None:
        pass


def test_an_exchange_drops_the_revoked_and_needs_no_score(
    deployed: Make, make_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_round, "make_policy", Policy)
    registry = FakeRegistry(SITES)
    app = make_app(lambda kind, c, r: "withhold" if c == "east-a" else None)
    grid = SiteGrid(app, SITES)

    def revoke(node: int, message: Any) -> None:
        request = wire.decode_request(message.content)
        if (message.metadata.message_type, request.round, node) == (wire.EXCHANGE, 2, 3):
            registry.set_status("north-a", "revoked")

    grid.after_handling = revoke
    folder = run(deployed(run__mode="rewards", run__rounds=3, personal__steps=0), grid, registry)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        bad = [(r.client, r.round, r.reason) for r in ledger.replies() if r.status != "ok"]
        weights = {(w.group, w.round): w.weight for w in ledger.weights()}
        withheld = {s.client for s in ledger.scores() if s.status == "withheld"}
    assert bad == [("north-a", 2, "revoked")]
    assert weights[("north", 1)] is not None
    assert weights[("north", 2)] is None
    assert weights[("east", 3)] == pytest.approx(1.0)
    assert ("north", 3) not in weights
    assert withheld == {"east-a"}
