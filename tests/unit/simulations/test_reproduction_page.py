"""The page of the reproduction: verdicts and words that follow the numbers, every section."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER
from simulations import scenario
from simulations.reproduce import Planned, plan
from simulations.reproduce_arms import FIRST_SEED
from simulations.reproduction_answer import answer
from simulations.reproduction_claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    UNDECIDED,
    judge,
    published_setting,
)
from simulations.reproduction_report import write_reproduction
from simulations.reproduction_trust import trust
from simulations.reproduction_values import load
from simulations.reproduction_words import plain_words


def outcomes(study, task: str = "letter") -> dict[str, str]:
    return {v.claim.text: v.outcome for v in judge(study) if v.key == ("core", task)}


# --- verdicts ------------------------------------------------------------------------------------

WORST = CLAIMS[0].text
SCALE = next(c.text for c in CLAIMS if "not from its scale" in c.text)
ALONE = next(c.text for c in CLAIMS if c.text.startswith("The weights alone"))


def test_verdicts_flip_with_the_numbers(tmp_path: Path, fake: SimpleNamespace) -> None:
    helps = load(fake.made(tmp_path / "a", fake.world(fake.helps)))
    assert [outcomes(helps)[c] for c in (WORST, SCALE, ALONE)] == [HOLDS, HOLDS, HOLDS]
    words = " ".join(plain_words(helps, judge(helps)))
    assert "measurably better in 1 of 1 cases (letters)" in " ".join(answer(helps))
    assert "These runs demonstrate a mechanism" in words
    assert "better than not training?** Letters: the mean worst group +0." in " ".join(
        answer(helps)
    )

    artefact = load(fake.made(tmp_path / "b", fake.world(fake.artefact)))
    assert [outcomes(artefact)[c] for c in (WORST, SCALE, ALONE)] == [HOLDS, FAILS, FAILS]
    words = " ".join(plain_words(artefact, judge(artefact)))
    assert "Not measurably." in " ".join(answer(artefact))
    assert "Letters, worst group: **all of it (" in " ".join(answer(artefact))
    assert "Of the published rule's gain on the worst group" in words

    nothing = load(fake.made(tmp_path / "c", fake.world({})))
    assert [outcomes(nothing)[c] for c in (WORST, SCALE, ALONE)] == [FAILS, FAILS, FAILS]
    words = " ".join(plain_words(nothing, judge(nothing)))
    assert "no measurable difference, so nothing to explain" in words
    assert "no measurable difference in 1 of 1 cases" in " ".join(answer(nothing))

    harms = load(fake.made(tmp_path / "d", fake.world({"literal": -0.05, "reweighted": -0.05})))
    assert outcomes(harms)[WORST] == FAILS
    assert "measurably worse in 1 of 1 cases (letters)" in " ".join(answer(harms))


def test_wide_noise_decides_nothing(tmp_path: Path, fake: SimpleNamespace) -> None:
    def scores(arm: str, seed: int) -> tuple[float, float]:
        return 0.8, 0.6 + 30 * fake.noise(arm, seed) + 0.03 * (arm == "literal")

    study = load(fake.made(tmp_path, scores))
    assert outcomes(study)[WORST] == UNDECIDED


def test_two_seeds_failed_runs_and_lost_mass_decide_nothing(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    two = load(fake.made(tmp_path / "two", fake.world(fake.helps), seeds=2))
    assert outcomes(two)[WORST] == UNDECIDED
    runs = fake.made(tmp_path / "all", fake.world(fake.helps))
    literal = [r for r in runs if r.arm == "literal"]
    fake.write_run(literal[0], fake.world(fake.helps), mass=0.5)
    found = next(v for v in judge(load(runs)) if v.claim.text == WORST and v.key[1] == "letter")
    assert (found.outcome, found.note) == (UNDECIDED, "1 runs of literal count as failed")
    fake.write_run(literal[0], fake.world(fake.helps))
    assert outcomes(load(runs))[WORST] == HOLDS
    with Ledger(literal[0].folder / LEDGER) as ledger:
        ledger.put_run(status="failed: exchange 7: the policy collapsed")
    study = load(runs)
    failed = study["core", "letter"]["literal"].failed
    assert failed == {FIRST_SEED: "exchange 7: the policy collapsed"}
    assert outcomes(study)[WORST] == UNDECIDED


def test_only_published_models_on_published_data_reproduce(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    study = load(fake.made(tmp_path, fake.world(fake.helps)))
    assert {v.word for v in judge(study)} <= {
        "demonstrated", "not demonstrated", "not decidable",
    }  # fmt: skip
    assert not published_setting(fake.base)
    real = scenario.load(
        "rewards",
        ["model.name=google/gemma-2-2b", "data.source=globalopinionqa", "data.path=/x.csv"],
    )
    assert published_setting(real)


# --- the page ------------------------------------------------------------------------------------


def page(out: Path, runs: list[Planned], base) -> tuple[str, dict]:
    path = write_reproduction(out, base, runs, ["countries"])
    return path.read_text(), json.loads((out / "reproduction.json").read_text())


def test_page_has_every_section_and_says_what_the_numbers_say(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    parts = ("core", "oracle", "scores", "adapters", "balanced")
    runs = fake.made(tmp_path, fake.world(fake.helps), parts, 3, ("letter", "order"))
    text, data = page(tmp_path, runs, fake.base)
    assert text.index("Does adaptive weighting help?") < text.index("What these numbers stand on")
    for heading in (
        "Does adaptive weighting help?",
        "What these numbers stand on",
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
        np.mean([0.06 + fake.noise("literal", s) - fake.noise("mean", s) for s in range(3)])
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


def test_same_ledgers_same_page(tmp_path: Path, fake: SimpleNamespace) -> None:
    runs = fake.made(tmp_path, fake.world(fake.helps), seeds=3)
    first = page(tmp_path, runs, fake.base)
    svg = (tmp_path / "reproduction.svg").read_text()
    assert page(tmp_path, runs, fake.base) == first
    assert (tmp_path / "reproduction.svg").read_text() == svg


def test_page_with_no_finished_run(tmp_path: Path, fake: SimpleNamespace) -> None:
    text, _ = page(tmp_path, plan(fake.base, ["core"], 1, tmp_path, {}), fake.base)
    assert "core, letter, mean, seed 3: it did not begin" in text
    assert "not decidable" in text


def test_with_two_seeds_every_seed_is_shown_and_the_page_says_why(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    runs = fake.made(tmp_path, fake.world(fake.helps), seeds=2)
    text, data = page(tmp_path, runs, fake.base)
    assert "**No interval where there are fewer than 3 seeds:**" in text
    assert "| *untouched base* | 0.605 (0.600, 0.610; no interval) |" in text
    by_hand = [0.06 + fake.noise("literal", s) - fake.noise("mean", s) for s in range(2)]
    shown = f"{np.mean(by_hand):+.3f} ({by_hand[0]:+.3f}, {by_hand[1]:+.3f}; no interval)"
    assert f"literal - mean, worst: {shown}" in text
    assert "Not decidable: fewer than 3 seeds give no interval." in text
    found = next(
        d
        for d in data["differences"]
        if (d["arm"], d["against"], d["metric"]) == ("literal", "mean", "worst")
    )
    assert found["interval"] is None
    assert found["points"] == pytest.approx(by_hand)
    svg = (tmp_path / "reproduction.svg").read_text()
    assert "no interval where there are fewer than 3 seeds" in svg
    three = fake.made(tmp_path / "three", fake.world(fake.helps), seeds=3)
    assert "no interval" not in page(tmp_path / "three", three, fake.base)[0].lower()


def predictor_runs(out: Path, fake: SimpleNamespace, worst: dict[str, float], error: float):
    runs = [r for r in plan(fake.base, ["predictor"], 3, out, {}) if r.task == "letter"]
    for run in {r.folder: r for r in runs}.values():
        known = error if "predictor" in run.arm else None
        fake.write_run(run, fake.world(worst), error=known)
    return " ".join(trust(load(runs)))


def test_the_page_says_whether_the_predictor_changes_the_winner(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    same = {"reweighted": 0.06, "reweighted, predictor": 0.04}
    said = predictor_runs(tmp_path / "a", fake, same, 0.12)
    assert "change which rule wins?** Letters: no. Best worst group of mean, reweighted" in said
    assert "seed by seed the same in 3 of 3. Its held-out error is 0.120 (0.120 to 0.120" in said
    changed = {"reweighted": 0.06, "mean, predictor": 0.05}
    said = predictor_runs(tmp_path / "b", fake, changed, 0.3)
    assert "Letters: yes." in said
    assert "seed by seed the same in 0 of 3" in said
    assert "What it costs mean: worst group +0.0" in said


def test_arms_with_many_refusals_are_named(tmp_path: Path, fake: SimpleNamespace) -> None:
    runs = fake.made(tmp_path, fake.world(fake.helps), seeds=3)
    said = " ".join(trust(load(runs)))
    assert "go without a reward?** No. Means over the seeds of an arm, at most: 0.0%" in said
    for run in runs:
        if run.arm == "min":
            fake.write_run(run, fake.world(fake.helps), refused=300)  # beside 100 that came
    said = " ".join(trust(load(runs)))
    assert "Yes, in 1 arm 10% or more" in said
    assert "The rules, letter, min: 75% refused." in said


def test_the_answer_says_what_is_left_at_equal_kl(tmp_path: Path, fake: SimpleNamespace) -> None:
    runs = fake.made(tmp_path, fake.world(fake.helps), parts=("core", "kl-matched"), seeds=3)
    for run in runs:
        if run.part == "kl-matched" and run.arm == "literal":
            fake.write_run(run, fake.world(fake.helps), kl=0.3)
    said = " ".join(answer(load(runs)))
    assert "At equal KL?** Letters: weights alone worst group +0.0" in said
    assert "the published rule worst group +0.0" in said
    assert "its scale alone worst group" in said
    assert said.count("(KL still +0.") == 1
    alone = answer(load(fake.made(tmp_path / "core", fake.world(fake.helps), seeds=3)))
    assert "At equal KL" not in " ".join(alone)


def test_an_undefined_fairness_index_is_named_with_its_reason(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    runs = fake.made(tmp_path, fake.world(fake.helps), seeds=3)
    for run in runs:
        fake.write_run(run, fake.world(fake.helps), index=False, shared=False)
    text, _ = page(tmp_path, runs, fake.base)
    assert "- fairness index: not defined: no question was answered by all groups." in text
    assert "not defined in 100% of their exchanges: no question of such an exchange" in text
    assert "fairness index not defined;" in text
    claim = next(line for line in text.splitlines() if "is fairer (fairness index)" in line)
    assert "**not decidable** (fairness_index is not defined: no question was" in claim
    row = next(line for line in text.splitlines() if line.startswith("| mean |"))
    assert row.split("|")[5].strip() == "not defined"
