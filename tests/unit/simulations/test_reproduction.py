"""The reproduction: arms, numbers worked by hand, and verdicts that follow the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fedalign.config import config_hash, to_flat
from fedalign.errors import ConfigError, RunFailed
from fedalign.ledger import ClientRow, CurveRow, ItemRow, Ledger, ReferenceRow, ScoreRow, WeightRow
from fedalign.runfolder import LEDGER
from simulations import compare as comparing
from simulations import scenario
from simulations.cli import app as command
from simulations.reproduce import Planned, plan, reproduce
from simulations.reproduce_arms import FIRST_SEED, KL_TARGET, TASKS, arms_of
from simulations.reproduce_parts import DEFAULT_PARTS, PARTS, choose
from simulations.reproduction_claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    UNDECIDED,
    judge,
    plain_words,
    published_setting,
)
from simulations.reproduction_report import write_reproduction
from simulations.reproduction_values import (
    BASE,
    difference,
    explained,
    load,
    ratio_of_means,
    run_values,
    with_base,
)

BASE_CONFIG = scenario.load("rewards", ["personal.steps=0"])
GROUPS = ("big", "small")
QUESTIONS = 4
"""Too few for a bootstrap over questions, which nothing here reads."""
Scores = Callable[[str, int], tuple[float, float]]
"""(arm, seed) to the scores of the big and the small group."""


def write_run(run: Planned, scores: Scores, kl: float = 0.2, mass: float = 0.98) -> None:
    """Write the ledger of a finished run: base (.7, .5), final scores as given, one exchange."""
    seed = run.seed - FIRST_SEED
    final = dict(zip(GROUPS, scores(run.arm, seed), strict=True))
    base = {"big": 0.7 + 0.01 * seed, "small": 0.5 + 0.01 * seed}

    def rows(stage: str, split: str, of: Mapping[str, float], m: float) -> list[ScoreRow]:
        return [
            ScoreRow(stage, g, g, split, "js_divergence", QUESTIONS, x, m, 0.6)
            for g, x in of.items()
        ]

    def items(stage: str, of: Mapping[str, float]) -> list[ItemRow]:
        shift = np.linspace(-0.05, 0.05, QUESTIONS)
        return [
            ItemRow(stage, g, g, "test", f"q{i}", float(x + shift[i]))
            for g, x in of.items()
            for i in range(QUESTIONS)
        ]

    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / LEDGER).unlink(missing_ok=True)
    with Ledger(run.folder / LEDGER) as ledger:
        ledger.put_run(
            config=to_flat(run.config),
            config_hash=config_hash(run.config),
            metric="js_divergence",
            form="survey",
            status="completed" if mass >= 0.9 else "failed: option mass",
        )
        ledger.put_clients([ClientRow(g, g, "survey", 20, 6, 6, 20) for g in GROUPS])
        references = [
            ReferenceRow(name, g, x)
            for name, x in (
                ("uniform", 0.6),
                ("mean_of_groups", 0.85),
                ("optimum_average", 0.9),
                ("optimum_worst", 0.88),
            )
            for g in GROUPS
        ]
        references += [
            ReferenceRow("closed_form", "", x, quantity=q)
            for q, x in (
                ("jsd_base", 0.2),
                ("jsd_model", 0.02),
                ("closed", 0.9),
                ("kl_model", kl),
                ("kl_optimum", 0.3),
                ("mass", 0.99),
            )
        ]
        ledger.put_references(references)
        ledger.write(
            "base",
            0,
            1,
            scores=[*rows("base", "test", base, 0.99), *rows("base", "validation", base, 0.99)],
            items=items("base", base),
        )
        server = {
            "kl": 0.1,
            "reward-scale": 1.0,
            "adaptive-branch": 1.0,
            "format-rate": 1.0,
            "policy-tokens": 1000.0,
            "tokens": 2000.0,
        }
        ledger.write(
            "train",
            1,
            1,
            weights=[WeightRow(g, 0.5, 0.5, 0.5) for g in GROUPS],
            curves=[CurveRow(client="", name=n, value=v) for n, v in server.items()],
        )
        ledger.write(
            "final", 1, 1, scores=rows("shared", "test", final, mass), items=items("shared", final)
        )
        for triple in ledger.attempts():
            ledger.commit(*triple)


def noise(arm: str, seed: int) -> float:
    """Return a small, fixed number for an arm and a seed."""
    return 0.002 * float(np.sin(1 + 7 * seed + sum(map(ord, arm))))


def world(worst: Mapping[str, float], average_cost: float = 0.0) -> Scores:
    """Return scores whose worst group gains ``worst[arm]`` over mean, the big one pays."""

    def scores(arm: str, seed: int) -> tuple[float, float]:
        gain = worst.get(arm, 0.0)
        small = 0.60 + 0.01 * seed + gain + noise(arm, seed)
        return 0.80 + 0.01 * seed - (gain + average_cost * (gain > 0)) + noise(arm, seed), small

    return scores


HELPS = {"literal": 0.06, "scaled": 0.06, "reweighted": 0.06, "min": 0.08, "max": -0.06}
ARTEFACT = {"literal": 0.04, "mean-over-n": 0.04, "mean-kl-n": 0.04, "placebo": 0.04}


def made(
    out: Path,
    scores: Scores,
    parts: tuple[str, ...] = ("core",),
    seeds: int = 5,
    tasks: tuple[str, ...] = ("letter",),
) -> list[Planned]:
    runs = [r for r in plan(BASE_CONFIG, parts, seeds, out, {}) if r.task in tasks]
    for run in {r.folder: r for r in runs}.values():
        write_run(run, scores)
    return runs


def outcomes(study, task: str = "letter") -> dict[str, str]:
    return {v.claim.text: v.outcome for v in judge(study) if v.key == ("core", task)}


# --- arms ----------------------------------------------------------------------------------------


def test_default_parts_are_what_an_hour_allows() -> None:
    assert choose("", full=False) == ["core", "oracle"] == list(DEFAULT_PARTS)
    assert choose("", full=True) == list(PARTS)
    assert choose("kl, core", full=True) == ["core", "kl"]
    with pytest.raises(ConfigError, match="part 'cores' is not one of core"):
        choose("cores", full=False)


def test_core_is_every_rule_with_its_controls_on_both_tasks(tmp_path: Path) -> None:
    runs = plan(BASE_CONFIG, ["core"], 2, tmp_path, {})
    assert len(runs) == 9 * 2 * 2
    assert {r.config.rewards.rule for r in runs} == {
        "mean", "min", "max", "literal", "scaled", "reweighted", "mean-over-n", "mean-kl-n",
        "placebo",
    }  # fmt: skip
    assert {r.config.rewards.task for r in runs} == {"letter", "order"}
    assert {r.config.run.mode for r in runs} == {"rewards"}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_arm_is_a_valid_configuration_with_baselines_that_exist(
    part: str, tmp_path: Path
) -> None:
    where = str(tmp_path / "x")
    data = {FIRST_SEED: {"data.source": "goqa", "data.path": where, "model.name": "pocket"}}
    runs = plan(BASE_CONFIG, [part], 1, tmp_path, data)
    for task in PARTS[part].tasks:
        arms = arms_of(PARTS[part], task)
        names = [a.name for a in arms]
        assert len(names) == len(set(names))
        assert all(a.reason for a in arms)
        for arm in arms:
            assert set(arm.against) <= set(names), arm
        hashes = [config_hash(r.config) for r in runs if r.task == task]
        assert len(hashes) == len(set(hashes)) == len(arms)


def test_the_same_settings_are_one_run(tmp_path: Path) -> None:
    runs = plan(BASE_CONFIG, [p for p in PARTS if p != "countries"], 1, tmp_path, {})
    by_hash: dict[str, set[Path]] = {}
    for run in runs:
        by_hash.setdefault(config_hash(run.config), set()).add(run.folder)
    assert all(len(folders) == 1 for folders in by_hash.values())
    assert len(by_hash) < len(runs)


def test_parts_set_what_they_say(tmp_path: Path) -> None:
    def of(part: str, task: str, arm: str):
        runs = plan(BASE_CONFIG, [part], 1, tmp_path, {})
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


def test_values_of_a_run(tmp_path: Path) -> None:
    run = plan(BASE_CONFIG, ["core"], 1, tmp_path, {})[0]
    write_run(run, world({}), kl=0.25)
    values = run_values(run.folder)
    assert isinstance(values, dict)
    expected = {
        "base_average": 0.6,
        "base_worst": 0.5,
        "base_worst_at_base": 0.5,
        "average": 0.7 + noise("mean", 0),
        "worst": 0.6 + noise("mean", 0),
        "worst_at_base": 0.6 + noise("mean", 0),
        "gap": 0.2,
        "attained_average": (0.1 + noise("mean", 0)) / 0.3,
        "uniform_worst": 0.6,
        "optimum_worst_worst": 0.88,
        "kl": 0.25,  # the exact one, not the sampled .1
        "closed": 0.9,
        "tokens": 3000.0,
        "reward_scale": 1.0,
    }
    assert {k: values[k] for k in expected} == pytest.approx(expected)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    study = load(made(tmp_path, world(HELPS)))
    arms = study["core", "letter"]
    d = difference(("core", "letter"), arms, "literal", "mean", "worst")
    by_hand = [0.06 + noise("literal", s) - noise("mean", s) for s in range(5)]
    assert d.interval is not None
    assert d.interval.centre == pytest.approx(np.mean(by_hand))
    half = 2.7764451 * np.std(by_hand, ddof=1) / np.sqrt(5)  # t(.975, 4)
    assert d.interval.high - d.interval.centre == pytest.approx(half)
    assert (d.sign, d.missing) == (1, 0)
    assert difference(("core", "letter"), arms, "max", "mean", "worst").sign == -1
    assert with_base(arms)[BASE].of("worst")[FIRST_SEED + 3] == pytest.approx(0.53)


def test_a_control_that_does_the_same_explains_all_and_one_that_does_nothing_none(
    tmp_path: Path,
) -> None:
    study = load(made(tmp_path, world({"literal": 0.04, "mean-over-n": 0.04})))
    arms = study["core", "letter"]
    scale, placebo = (explained(arms, c, "worst") for c in ("mean-over-n", "placebo"))
    assert scale is not None
    assert scale.share is not None
    assert scale.share.low < 1 < scale.share.high
    assert placebo is not None
    assert placebo.share is not None
    assert placebo.share.low < 0 < placebo.share.high
    nothing = explained(load(made(tmp_path, world({})))["core", "letter"], "placebo", "worst")
    assert nothing is not None
    assert nothing.share is None


# --- verdicts ------------------------------------------------------------------------------------

WORST = CLAIMS[0].text
SCALE = next(c.text for c in CLAIMS if "not from its scale" in c.text)
ALONE = next(c.text for c in CLAIMS if c.text.startswith("The weights alone"))


def test_verdicts_flip_with_the_numbers(tmp_path: Path) -> None:
    helps = load(made(tmp_path / "a", world(HELPS)))
    assert [outcomes(helps)[c] for c in (WORST, SCALE, ALONE)] == [HOLDS, HOLDS, HOLDS]
    words = " ".join(plain_words(helps, judge(helps)))
    assert "measurably in 1 of 1 cases (task letter)" in words
    assert "These runs demonstrate a mechanism" in words

    artefact = load(made(tmp_path / "b", world(ARTEFACT)))
    assert [outcomes(artefact)[c] for c in (WORST, SCALE, ALONE)] == [HOLDS, FAILS, FAILS]
    words = " ".join(plain_words(artefact, judge(artefact)))
    assert "measurably in 0 of 1 cases" in words
    assert "Of literal's gain on the worst group" in words

    nothing = load(made(tmp_path / "c", world({})))
    assert [outcomes(nothing)[c] for c in (WORST, SCALE, ALONE)] == [FAILS, FAILS, FAILS]
    words = " ".join(plain_words(nothing, judge(nothing)))
    assert "no gain for the controls to explain" in words

    harms = load(made(tmp_path / "d", world({"literal": -0.05, "reweighted": -0.05})))
    assert outcomes(harms)[WORST] == FAILS
    assert "measurably harmful in 1" in " ".join(plain_words(harms, judge(harms)))


def test_wide_noise_decides_nothing(tmp_path: Path) -> None:
    def scores(arm: str, seed: int) -> tuple[float, float]:
        return 0.8, 0.6 + 30 * noise(arm, seed) + 0.03 * (arm == "literal")

    study = load(made(tmp_path, scores))
    assert outcomes(study)[WORST] == UNDECIDED


def test_two_seeds_failed_runs_and_lost_mass_decide_nothing(tmp_path: Path) -> None:
    two = load(made(tmp_path / "two", world(HELPS), seeds=2))
    assert outcomes(two)[WORST] == UNDECIDED
    runs = made(tmp_path / "all", world(HELPS))
    literal = [r for r in runs if r.arm == "literal"]
    write_run(literal[0], world(HELPS), mass=0.5)
    found = next(v for v in judge(load(runs)) if v.claim.text == WORST and v.key[1] == "letter")
    assert (found.outcome, found.note) == (UNDECIDED, "1 runs of literal count as failed")
    write_run(literal[0], world(HELPS))
    assert outcomes(load(runs))[WORST] == HOLDS
    with Ledger(literal[0].folder / LEDGER) as ledger:
        ledger.put_run(status="failed: exchange 7: the policy collapsed")
    study = load(runs)
    failed = study["core", "letter"]["literal"].failed
    assert failed == {FIRST_SEED: "exchange 7: the policy collapsed"}
    assert outcomes(study)[WORST] == UNDECIDED


def test_only_published_models_on_published_data_reproduce(tmp_path: Path) -> None:
    study = load(made(tmp_path, world(HELPS)))
    assert {v.word for v in judge(study)} <= {
        "demonstrated", "not demonstrated", "not decidable",
    }  # fmt: skip
    assert not published_setting(BASE_CONFIG)
    real = scenario.load(
        "rewards",
        ["model.name=google/gemma-2-2b", "data.source=globalopinionqa", "data.path=/x.csv"],
    )
    assert published_setting(real)


# --- the page ------------------------------------------------------------------------------------


def page(out: Path, runs: list[Planned]) -> tuple[str, dict]:
    path = write_reproduction(out, BASE_CONFIG, runs, ["countries"])
    return path.read_text(), json.loads((out / "reproduction.json").read_text())


def test_page_has_every_section_and_says_what_the_numbers_say(tmp_path: Path) -> None:
    parts = ("core", "oracle", "scores", "adapters", "balanced")
    text, data = page(tmp_path, made(tmp_path, world(HELPS), parts, 3, ("letter", "order")))
    for heading in (
        "In plain words",
        "Claims",
        "The rules: letter",
        "The rules: order",
        "Balanced groups: letter",
        "Alignment against KL",
        "Distance to the closed-form optimum",
        "The published tables beside ours",
        "What the papers leave open",
        "What reviewers of arXiv 2512.08786 asked",
        "Why each arm is there",
    ):
        assert f"## {heading}" in text
    assert "So nothing here reproduces a published figure" in text
    assert "Left out: countries" in text
    assert "| *untouched base* | 0.610 ± 0.025 | 0.510 ± 0.025 |" in text
    assert "Part `predictor` was not run" in text
    for beside in ("+0.0310; ours (letter, core) +0.06", "+0.1020; ours (order, core) +0.06"):
        assert f"adaptive (APPA) - mean, worst group: published {beside}" in text
    assert "| 3 of 3 |" in text
    for column in ("average", "KL", "closed"):
        assert column in text
    assert not [line for line in text.splitlines() if "nan" in line.lower().split()]
    assert (tmp_path / "reproduction.svg").read_text().startswith("<?xml")
    arm = next(a for a in data["arms"] if (a["task"], a["arm"]) == ("order", "literal"))
    assert set(arm["values"]) == {"3", "4", "5"}
    found = next(
        d
        for d in data["differences"]
        if (d["part"], d["task"], d["arm"], d["against"], d["metric"])
        == ("core", "letter", "literal", "mean", "worst")
    )
    assert found["interval"]["centre"] == pytest.approx(
        np.mean([0.06 + noise("literal", s) - noise("mean", s) for s in range(3)])
    )
    # Every table row of a block has as many cells as its head.
    width = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.replace(r"\|", "").count("|")
        assert width in (0, cells), line
        width = cells


def test_same_ledgers_same_page(tmp_path: Path) -> None:
    runs = made(tmp_path, world(HELPS), seeds=3)
    first = page(tmp_path, runs)
    svg = (tmp_path / "reproduction.svg").read_text()
    assert page(tmp_path, runs) == first
    assert (tmp_path / "reproduction.svg").read_text() == svg


def test_page_with_no_finished_run(tmp_path: Path) -> None:
    text, _ = page(tmp_path, plan(BASE_CONFIG, ["core"], 1, tmp_path, {}))
    assert "core, letter, mean, seed 3: it did not begin" in text
    assert "not decidable" in text


# --- the command ---------------------------------------------------------------------------------


def test_reproduce_runs_what_is_missing_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []
    by_folder = {str(r.folder): r for r in plan(BASE_CONFIG, ["oracle"], 2, tmp_path, {})}

    def fake(task: comparing.Task) -> float:
        asked.append((task.arm, task.seed))
        if task.arm == "order min":
            raise RunFailed("the policy collapsed")
        write_run(by_folder[task.config.run.out], world(HELPS))
        return 0.1

    monkeypatch.setattr(comparing, "run_task", fake)
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
