"""The closed-form optimum of a run: by hand on a toy policy, and through a run folder."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedalign.aggregation.records import RuleState
from fedalign.config import Config, from_flat, to_flat, to_json
from fedalign.errors import ConfigError, FedalignError
from fedalign.ledger import CurveRow, Ledger, ReferenceRow
from fedalign.runfolder import CHECKPOINT, LEDGER
from server.checkpoint import Checkpoint, save
from simulations import oracle
from simulations.oracle import Asked, LastExchange, add_closed_form, closed_form, last_exchange
from simulations.references import add_references

BASE = {"q": (0.5, 0.25), "r": (0.1, 0.1, 0.7)}
"""Probabilities of the letters; the rest is .25 and .1."""
ASKED = (
    Asked("q", "q", ("yes", "no"), {"a": (0.9, 0.1), "b": (0.2, 0.8)}),
    Asked("r", "r", ("x", "y", "z"), {"b": (0.5, 0.25, 0.25)}),
)
LAST = LastExchange(3, {"a": 0.75, "b": 0.25}, adaptive=False, kl=0.1)


class Toy:
    """A resident that only knows whether its adapter is off."""

    def __init__(self, trained: dict[str, tuple[float, ...]]) -> None:
        self.trained, self.off = trained, False

    def load(self, adapter: np.ndarray) -> None:
        self.adapter = adapter

    @contextlib.contextmanager
    def reference(self, kind: str):
        assert kind == "base"
        self.off = True
        yield
        self.off = False


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """Return the maker of a toy whose letters have given probabilities."""

    def answers(resident: Toy, task: str, question: str, options: tuple[str, ...]):
        assert task == "letter"
        table = BASE if resident.off else resident.trained
        return list(range(len(options))), np.log(table[question])

    monkeypatch.setattr(oracle, "answer_logps", answers)
    return Toy


def settings(**keys: object) -> Config:
    """Return a run in mode rewards with letters worth the share of people who chose them."""
    flat = {
        "run.mode": "rewards",
        "rewards.score": "share",
        "rewards.rule": "reweighted",
        "personal.steps": 0,
    }
    return from_flat(flat | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()})


def optimum_by_hand(question: str, rewards: tuple[float, ...], kl: float) -> np.ndarray:
    """Weights base * exp(R / kl); the rest is worth 0."""
    p = np.array([*BASE[question], 1 - sum(BASE[question])])
    w = p * np.exp(np.array([*rewards, 0.0]) / kl)
    return w / w.sum()


def jsd(p: np.ndarray, q: np.ndarray) -> float:
    m = (p + q) / 2
    return float(0.5 * (p * np.log2(p / m)).sum() + 0.5 * (q * np.log2(q / m)).sum())


ADAPTER = np.zeros(1, dtype=np.float32)
WANTED = {
    # .75 a + .25 b on q; on r only b answered, so it counts alone.
    "q": optimum_by_hand("q", (0.75 * 0.9 + 0.25 * 0.2, 0.75 * 0.1 + 0.25 * 0.8), 0.1),
    "r": optimum_by_hand("r", (0.5, 0.25, 0.25), 0.1),
}


def test_a_policy_at_the_optimum_closed_everything(toy) -> None:
    policy = toy({k: tuple(p[:-1]) for k, p in WANTED.items()})
    got = closed_form(settings(), policy, ADAPTER, ASKED, LAST)
    assert got.questions == ("q", "r")
    assert got.jsd_model == pytest.approx([0, 0], abs=1e-12)
    assert got.closed == pytest.approx(1.0)
    assert got.kl_model == pytest.approx(got.kl_optimum)
    assert got.mass == pytest.approx([1 - p[-1] for p in WANTED.values()])


def test_a_policy_on_the_way_by_hand(toy) -> None:
    trained = {"q": (0.8, 0.1), "r": (0.3, 0.2, 0.45)}
    got = closed_form(settings(), toy(trained), ADAPTER, ASKED, LAST)
    for i, k in enumerate("qr"):
        base = np.array([*BASE[k], 1 - sum(BASE[k])])
        model = np.array([*trained[k], 1 - sum(trained[k])])
        assert got.jsd_base[i] == pytest.approx(jsd(base, WANTED[k]))
        assert got.jsd_model[i] == pytest.approx(jsd(model, WANTED[k]))
        assert got.kl_model[i] == pytest.approx((model * np.log(model / base)).sum())
        assert got.kl_optimum[i] == pytest.approx((WANTED[k] * np.log(WANTED[k] / base)).sum())
    before, after = got.jsd_base.mean(), got.jsd_model.mean()
    assert got.closed == pytest.approx((before - after) / before)
    rows = {r.quantity: r.value for r in oracle.reference_rows(got)}
    assert rows["closed"] == pytest.approx(got.closed)
    assert rows["mass"] == pytest.approx((0.9 + 0.95) / 2)


def test_the_run_s_rule_and_malformed_text_count(toy) -> None:
    """min of the groups on q; a malformed text is worth .5; half the KL coefficient."""
    config = settings(rewards__rule="min", rewards__malformed=0.5)
    last = replace(LAST, kl=0.05)
    combined = oracle.combined_rewards(config, "share", [0, 1], ASKED[0], last)
    assert combined == pytest.approx([0.2, 0.1, 0.5])
    w = np.array([0.5, 0.25, 0.25]) * np.exp(np.array([0.2, 0.1, 0.5]) / 0.05)
    policy = toy({"q": tuple((w / w.sum())[:2])})
    got = closed_form(config, policy, ADAPTER, ASKED[:1], last)
    assert got.closed == pytest.approx(1.0)


def test_the_branch_decides_for_the_literal_rule(toy) -> None:
    config = settings(rewards__rule="literal")
    mean = oracle.combined_rewards(config, "share", [0], ASKED[0], LAST)
    assert mean == pytest.approx([0.55, 0.0])
    adaptive = oracle.combined_rewards(config, "share", [0], ASKED[0], replace(LAST, adaptive=True))
    literal = math.log((math.exp(0.75 * 0.9) + math.exp(0.25 * 0.2)) / 2)
    assert adaptive == pytest.approx([literal, 0.0])


def test_reference_correction(toy) -> None:
    config = settings(rewards__reference_correction=True)
    w = np.array([math.exp(7.25), math.exp(2.75), 0.25])
    policy = toy({"q": tuple((w / w.sum())[:2])})
    assert closed_form(config, policy, ADAPTER, ASKED[:1], LAST).closed == pytest.approx(1.0)


def test_groups_without_a_weight_count_equally_where_they_are_alone(toy) -> None:
    only_a = replace(LAST, weights={"a": 1.0})
    combined = oracle.combined_rewards(settings(), "share", [0, 1, 2], ASKED[1], only_a)
    assert combined == pytest.approx([0.5, 0.25, 0.25, 0.0])


def test_equal_rewards_leave_nothing_to_close(toy) -> None:
    config = settings(rewards__malformed=0.5)
    even = (Asked("q", "q", ("yes", "no"), {"a": (0.5, 0.5)}),)
    got = closed_form(config, toy({"q": (0.6, 0.3)}), ADAPTER, even, LAST)
    assert got.jsd_base == pytest.approx([0.0], abs=1e-12)
    rows = {r.quantity: r for r in oracle.reference_rows(replace(got, jsd_base=np.zeros(1)))}
    assert rows["closed"].value is None
    assert "do not tell" in rows["closed"].note


def test_long_questions_are_left_out_and_counted(toy) -> None:
    config = settings(rewards__task="order", rewards__score="borda")
    seven = (Asked("s", "s", tuple("1234567"), {"a": (1 / 7,) * 7}),)
    got = closed_form(config, toy({}), ADAPTER, seven, LAST)
    assert got.left_out == 1
    rows = oracle.reference_rows(got)
    assert [r.value for r in rows] == [None]
    assert "6 options" in rows[0].note


# --- a run folder ---------------------------------------------------------------------------------


def curves(number: int, kl: float, weights: dict[str, float]) -> list[CurveRow]:
    """Return what the server writes of an exchange, as far as it is read here."""
    rows = [CurveRow(client="", name="kl-coefficient", value=kl)]
    rows.append(CurveRow(client="", name="adaptive-branch", value=float(number > 1)))
    rows += [CurveRow(client=f"group:{g}", name="weight", value=w) for g, w in weights.items()]
    return [*rows, CurveRow(client="group:red", name="influence", value=0.9)]


def run_folder(folder: Path, size: int, **keys: object) -> Config:
    """Write what a finished run of two exchanges on the synthetic world leaves behind."""
    from fedalign.config import config_hash

    config = settings(data__partition="group", data__questions=40, run__out=str(folder), **keys)
    folder.mkdir()
    with Ledger(folder / LEDGER) as ledger:
        ledger.put_run(config=to_flat(config))
        for number, kl, w in ((1, 0.4, {"red": 0.5, "blue": 0.5}), (2, 0.1, {"red": 1.0})):
            ledger.write("train", number, 1, curves=curves(number, kl, w))
            ledger.commit("train", number, 1)
        ledger.write("train", 3, 1, curves=curves(3, 9.0, {}))  # never committed
        ledger.put_references([ReferenceRow("uniform", "red", 0.5)])
    save(
        folder / CHECKPOINT,
        Checkpoint(
            config_json=to_json(config),
            config_hash=config_hash(config),
            manifest_json="{}",
            versions={},
            phase="final",
            round=2,
            training_done=True,
            best=None,
            rounds_since_best=0,
            rule_state=RuleState(),
            commits=(),
            adapter=np.zeros(size, dtype=np.float32),
        ),
    )
    return config


@pytest.fixture(scope="module")
def pocket():
    import torch

    from fedalign.models.resident import resident_model

    torch.set_num_threads(1)
    return resident_model(Config().model, False)


def test_the_last_committed_exchange_is_read(tmp_path: Path) -> None:
    config = run_folder(tmp_path / "run", 1, rewards__rule="literal")
    with Ledger(tmp_path / "run" / LEDGER, readonly=True) as ledger:
        got = last_exchange(ledger, config)
        assert got == LastExchange(2, {"red": 1.0}, adaptive=True, kl=0.1)
        assert not last_exchange(ledger, settings()).adaptive  # its rule has no branch


@pytest.mark.parametrize("task", ["letter", "order"])
def test_an_untrained_pocket_closed_nothing(tmp_path: Path, pocket, task: str) -> None:
    folder = tmp_path / "run"
    score = {"letter": "log", "order": "borda"}[task]
    run_folder(
        folder,
        pocket.parameters_flat.numel(),
        rewards__task=task,
        rewards__score=score,
        rewards__rule="mean",
    )
    add_closed_form(folder)
    add_closed_form(folder)  # again: rows are replaced
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        rows = {r.quantity: r.value for r in ledger.references("closed_form")}
        assert ledger.references("uniform") == [ReferenceRow("uniform", "red", 0.5)]
    assert rows["closed"] == 0.0
    assert rows["kl_model"] == 0.0
    assert rows["jsd_base"] == rows["jsd_model"] > 0.05
    assert rows["kl_optimum"] > 0.1
    assert 0.9 < rows["mass"] <= 1.0


def test_references_computed_again_keep_the_closed_form(tmp_path: Path, pocket) -> None:
    folder = tmp_path / "run"
    size = pocket.parameters_flat.numel()
    run_folder(
        folder, size, rewards__task="order", rewards__score="kendall", score__metric="kendall"
    )
    add_closed_form(folder)
    add_references(folder)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert len(ledger.references("closed_form")) == 6
        uniform = ledger.references("uniform")
        best = {r.group: r.value for r in ledger.references("optimum_average")}
    assert {r.value for r in uniform if r.quantity == "score"} == {0.5}
    assert sum(v for g, v in best.items() if g) / (len(best) - 1) > 0.6


def test_shares_say_why_there_is_no_optimum(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_folder(folder, 1, rewards__task="shares", rewards__score="js_divergence")
    add_closed_form(folder)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        (row,) = ledger.references("closed_form")
    assert row.value is None
    assert "shares" in row.note


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FedalignError, match="holds no finished run"):
        add_closed_form(tmp_path)
    run_folder(tmp_path / "other", 1, run__mode="adapters")
    with pytest.raises(ConfigError, match="'adapters'"):
        add_closed_form(tmp_path / "other")
    with Ledger(tmp_path / "empty.sqlite") as ledger:
        with pytest.raises(FedalignError, match="no exchange"):
            last_exchange(ledger, settings())
        ledger.write("train", 1, 1, curves=[CurveRow(client="", name="reward", value=1.0)])
        ledger.commit("train", 1, 1)
        with pytest.raises(FedalignError, match="kl-coefficient"):
            last_exchange(ledger, settings())
