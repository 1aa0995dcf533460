"""The reproduction: arms, numbers worked by hand, and the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedalign.config import config_hash
from fedalign.errors import ConfigError, RunFailed
from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER
from simulations import compare as comparing
from simulations.cli import app as command
from simulations.reproduce import plan, reproduce
from simulations.reproduce_arms import FIRST_SEED, KL_TARGET, TASKS, arms_of
from simulations.reproduce_parts import DEFAULT_PARTS, PARTS, choose
from simulations.reproduction_values import (
    BASE,
    RunResult,
    difference,
    explained,
    load,
    ratio_of_means,
    run_result,
    with_base,
)

# --- arms ----------------------------------------------------------------------------------------


def test_default_parts_are_what_an_hour_allows() -> None:
    assert choose("", full=False) == ["core", "oracle"] == list(DEFAULT_PARTS)
    assert choose("", full=True) == list(PARTS)
    assert choose("kl, core", full=True) == ["core", "kl"]
    with pytest.raises(ConfigError, match="part 'cores' is not one of core"):
        choose("cores", full=False)


def test_core_is_every_rule_with_its_controls_on_both_tasks(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    runs = plan(fake.base, ["core"], 2, tmp_path, {})
    assert len(runs) == 9 * 2 * 2
    assert {r.config.rewards.rule for r in runs} == {
        "mean", "min", "max", "literal", "scaled", "reweighted", "mean-over-n", "mean-kl-n",
        "placebo",
    }  # fmt: skip
    assert {r.config.rewards.task for r in runs} == {"letter", "order"}
    assert {r.config.run.mode for r in runs} == {"rewards"}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_arm_is_a_valid_configuration_with_baselines_that_exist(
    part: str, tmp_path: Path, fake: SimpleNamespace
) -> None:
    where = str(tmp_path / "x")
    data = {FIRST_SEED: {"data.source": "goqa", "data.path": where, "model.name": "pocket"}}
    runs = plan(fake.base, [part], 1, tmp_path, data)
    for task in PARTS[part].tasks:
        arms = arms_of(PARTS[part], task)
        names = [a.name for a in arms]
        assert len(names) == len(set(names))
        assert all(a.reason for a in arms)
        for arm in arms:
            assert set(arm.against) <= set(names), arm
        hashes = [config_hash(r.config) for r in runs if r.task == task]
        assert len(hashes) == len(set(hashes)) == len(arms)


def test_the_same_settings_are_one_run(tmp_path: Path, fake: SimpleNamespace) -> None:
    runs = plan(fake.base, [p for p in PARTS if p != "countries"], 1, tmp_path, {})
    by_hash: dict[str, set[Path]] = {}
    for run in runs:
        by_hash.setdefault(config_hash(run.config), set()).add(run.folder)
    assert all(len(folders) == 1 for folders in by_hash.values())
    assert len(by_hash) < len(runs)


def test_parts_set_what_they_say(tmp_path: Path, fake: SimpleNamespace) -> None:
    def of(part: str, task: str, arm: str):
        runs = plan(fake.base, [part], 1, tmp_path, {})
        return next(r.config for r in runs if (r.task, r.arm) == (task, arm))

    kl = float(TASKS["order"]["ppo.kl"])
    assert of("oracle", "letter", "min").ppo.kl == 0.1
    assert of("oracle", "order", "min").ppo.kl == 0.05
    assert of("kl", "order", "literal, kl x .5").ppo.kl == pytest.approx(kl / 2)
    assert of("kl", "order", "literal, kl x 2").ppo.kl == pytest.approx(kl * 2)
    assert of("kl-matched", "order", "min").ppo.kl_target == KL_TARGET["order"]
    assert of("correction", "order", "mixture").rewards.reference_correction
    assert of("balanced", "letter", "mean").data.world == "balanced"
    assert of("predictor", "letter", "mean, predictor").site.answers == "predictor"
    adapters = of("adapters", "letter", "ppo adaptive")
    assert (adapters.run.mode, adapters.local.objective) == ("adapters", "ppo")
    assert of("history", "order", "literal, decay 0, T 0.3").weights.temperature == 0.3


# --- numbers -------------------------------------------------------------------------------------


def test_ratio_of_means_by_hand() -> None:
    # y = 2 x exactly: the ratio is .5 without any doubt.
    exact = ratio_of_means([1.0, 1.1, 1.2], [2.0, 2.2, 2.4])
    assert exact is not None
    assert (exact.centre, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    # The bounds are where the t test of mean(x - rho y) = 0 just rejects at 5 %.
    from scipy.stats import ttest_1samp

    x, y = np.array([0.02, 0.035, 0.01, 0.03, 0.02]), np.array([0.05, 0.06, 0.045, 0.05, 0.07])
    found = ratio_of_means(x.tolist(), y.tolist())
    assert found is not None
    assert found.centre == pytest.approx(x.mean() / y.mean())
    for bound in (found.low, found.high):
        assert ttest_1samp(x - bound * y, 0.0).pvalue == pytest.approx(0.05)


def test_ratio_is_not_defined_when_the_denominator_covers_zero() -> None:
    assert ratio_of_means([0.1, 0.2, 0.1], [0.01, -0.02, 0.01]) is None
    assert ratio_of_means([0.1, 0.2], [1.0, 1.1]) is None


def test_values_of_a_run(tmp_path: Path, fake: SimpleNamespace) -> None:
    run = plan(fake.base, ["core"], 1, tmp_path, {})[0]
    fake.write_run(run, fake.world({}), kl=0.25)
    result = run_result(run.folder)
    assert isinstance(result, RunResult)
    assert result.undefined == {}
    values = result.values
    expected = {
        "base_average": 0.6,
        "base_worst": 0.5,
        "base_worst_at_base": 0.5,
        "average": 0.7 + fake.noise("mean", 0),
        "worst": 0.6 + fake.noise("mean", 0),
        "worst_at_base": 0.6 + fake.noise("mean", 0),
        "gap": 0.2,
        "attained_average": (0.1 + fake.noise("mean", 0)) / 0.3,
        "uniform_worst": 0.6,
        "optimum_worst_worst": 0.88,
        "kl": 0.25,  # the exact one, not the sampled .1
        "closed": 0.9,
        "tokens": 3000.0,
        "reward_scale": 1.0,
    }
    assert {k: values[k] for k in expected} == pytest.approx(expected)


def test_differences_are_paired_by_seed(tmp_path: Path, fake: SimpleNamespace) -> None:
    study = load(fake.made(tmp_path, fake.world(fake.helps)))
    arms = study["core", "letter"]
    d = difference(("core", "letter"), arms, "literal", "mean", "worst")
    by_hand = [0.06 + fake.noise("literal", s) - fake.noise("mean", s) for s in range(5)]
    assert d.interval is not None
    assert d.interval.centre == pytest.approx(np.mean(by_hand))
    half = 2.7764451 * np.std(by_hand, ddof=1) / np.sqrt(5)  # t(.975, 4)
    assert d.interval.high - d.interval.centre == pytest.approx(half)
    assert (d.sign, d.missing) == (1, 0)
    assert difference(("core", "letter"), arms, "max", "mean", "worst").sign == -1
    assert with_base(arms)[BASE].of("worst")[FIRST_SEED + 3] == pytest.approx(0.53)


def test_a_control_that_does_the_same_explains_all_and_one_that_does_nothing_none(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    study = load(fake.made(tmp_path, fake.world({"literal": 0.04, "mean-over-n": 0.04})))
    arms = study["core", "letter"]
    scale, placebo = (explained(arms, c, "worst") for c in ("mean-over-n", "placebo"))
    assert scale is not None
    assert scale.share is not None
    assert scale.share.low < 1 < scale.share.high
    assert placebo is not None
    assert placebo.share is not None
    assert placebo.share.low < 0 < placebo.share.high
    nothing = explained(
        load(fake.made(tmp_path, fake.world({})))["core", "letter"], "placebo", "worst"
    )
    assert nothing is not None
    assert nothing.share is None


# --- the command ---------------------------------------------------------------------------------


def test_reproduce_runs_what_is_missing_and_goes_on_after_a_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake: SimpleNamespace,
) -> None:
    asked: list[tuple[str, int]] = []
    by_folder = {str(r.folder): r for r in plan(fake.base, ["oracle"], 2, tmp_path, {})}

    def stand_in(task: comparing.Task) -> float:
        asked.append((task.arm, task.seed))
        if task.arm == "order min":
            raise RunFailed("the policy collapsed")
        fake.write_run(by_folder[task.config.run.out], fake.world(fake.helps))
        return 0.1

    monkeypatch.setattr(comparing, "run_task", stand_in)
    path = reproduce(tmp_path, ["oracle", "countries"], 2, 1)
    assert len(asked) == 12
    assert "order, min, seed 4: it did not begin" in path.read_text()
    said = capsys.readouterr().err
    assert "part countries is left out" in said
    assert "failed: the policy collapsed" in said
    asked.clear()
    reproduce(tmp_path, ["oracle"], 2, 1)
    assert asked == [("order min", 3), ("order min", 4)]
    # Killed between the end of a run and its distance to the optimum: not finished.
    killed = next(r for r in by_folder.values() if (r.task, r.arm, r.seed) == ("letter", "mean", 4))
    with Ledger(killed.folder / LEDGER) as ledger:
        ledger.put_references([])
    asked.clear()
    reproduce(tmp_path, ["oracle"], 2, 1)
    assert asked == [("order min", 3), ("letter mean", 4), ("order min", 4)]


def test_reproduce_refuses_nothing_to_do_and_another_mode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no part is left"):
        reproduce(tmp_path, ["countries"], 1, 1)
    with pytest.raises(ConfigError, match=r"run\.mode cannot be set"):
        reproduce(tmp_path, ["core"], 1, 1, ["run.mode=adapters"])


def test_help_names_the_parts_and_options() -> None:
    from typer.testing import CliRunner

    shown = CliRunner().invoke(command, ["reproduce", "--help"], terminal_width=200)
    assert shown.exit_code == 0
    for option in ("--out", "--full", "--seeds", "--workers", "--parts", "--countries"):
        assert option in shown.output
