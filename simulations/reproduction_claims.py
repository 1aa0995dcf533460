"""Published claims, judged by stated rules from intervals.

A claim is one or more contrasts "A is above (below) B on metric m".  With d the paired difference
in the claimed direction and its 95 % t interval over seeds, a contrast

- *holds* when the interval lies above 0;
- *fails* when it does not, and its upper end is below ``SMALLEST``: the data rule out even the
  smallest difference that was published;
- is *undecided* otherwise, with fewer than 3 seeds, when a run of A or B failed (what is left is a
  selection), or when a run of the favoured arm ended below the limit of option mass or of
  well-formed texts (its scores then mean little).

A claim holds when all its contrasts hold and fails when one fails.  Only the published models on
the published data can *reproduce* a figure; everything else *demonstrates* a mechanism, and is so
named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedalign.config import Config
from simulations.reproduction_values import (
    BASE,
    ArmResult,
    Difference,
    Key,
    Study,
    difference,
    with_base,
)

SMALLEST = 0.01
"""Published differences between rules are .01 to .03 of the score."""
POPULATIONS = ("core", "shares", "countries")
"""Parts in which claims about rules are judged: one population and task each."""
PROBABILITY, RANKING = ("letter", "shares"), ("order",)
PUBLISHED_MODELS = (
    "google/gemma-2-2b",
    "google/gemma-2-2b-it",
    "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.2-3B-Instruct",
    "Qwen/Qwen3-0.6B",
)
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
WORDS = {
    True: {HOLDS: "reproduced", FAILS: "not reproduced", UNDECIDED: "not decidable"},
    False: {HOLDS: "demonstrated", FAILS: "not demonstrated", UNDECIDED: "not decidable"},
}


@dataclass(frozen=True)
class Contrast:
    """``arm`` is above ``against`` on ``metric``, or below it where ``sign`` is -1."""

    arm: str
    against: str
    metric: str
    sign: int = 1


@dataclass(frozen=True)
class Claim:
    """A sentence somebody published, or that must hold for it to mean what it says."""

    text: str
    source: str
    contrasts: tuple[Contrast, ...]
    tasks: tuple[str, ...] = (*PROBABILITY, *RANKING)
    parts: tuple[str, ...] = POPULATIONS


CLAIMS = (
    Claim(
        "The adaptive rule serves the worst group better than the mean.",
        "arXiv 2604.04261, 2512.08786",
        (Contrast("literal", "mean", "worst"),),
    ),
    Claim(
        "The adaptive rule reaches a higher average than the mean.",
        "arXiv 2604.04261; 2512.08786 for ranking",
        (Contrast("literal", "mean", "average"),),
    ),
    Claim(
        "The adaptive rule is fairer (fairness index) than the mean.",
        "arXiv 2604.04261, 2512.08786",
        (Contrast("literal", "mean", "fairness_index"),),
    ),
    Claim(
        "The adaptive rule beats the minimum on average and on the worst group.",
        "arXiv 2604.04261",
        (Contrast("literal", "min", "average"), Contrast("literal", "min", "worst")),
    ),
    Claim(
        "The minimum is fairer than the mean, at a lower average.",
        "arXiv 2604.04261, probability task",
        (Contrast("min", "mean", "fairness_index"), Contrast("min", "mean", "average", -1)),
        PROBABILITY,
    ),
    Claim(
        "The maximum has the best average of all rules.",
        "arXiv 2512.08786, probability task",
        (Contrast("max", "mean", "average"), Contrast("max", "literal", "average")),
        PROBABILITY,
    ),
    Claim(
        "With Kendall rewards the adaptive rule is less fair than no training.",
        "arXiv 2512.08786, ranking task",
        (Contrast("kendall: literal", BASE, "fairness_index", -1),),
        RANKING,
        ("scores",),
    ),
    Claim(
        "What the adaptive rule gives the worst group comes from whom it favours, not from its "
        "scale: it beats mean-over-n and the placebo.",
        "ours; without it no gain is credited to fairness weights",
        (Contrast("literal", "mean-over-n", "worst"), Contrast("literal", "placebo", "worst")),
    ),
    Claim(
        "The weights alone (reweighted) serve the worst group better than the mean.",
        "ours; free of the scale artefact",
        (Contrast("reweighted", "mean", "worst"),),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """One claim judged on one population and task."""

    claim: Claim
    key: Key
    outcome: str
    """``holds``, ``fails`` or ``undecided``."""
    word: str
    differences: tuple[Difference, ...]
    note: str


def published_setting(config: Config) -> bool:
    """Say whether a run uses a published model on the published data."""
    return config.model.name in PUBLISHED_MODELS and config.data.source == "globalopinionqa"


def judge(study: Study) -> list[Verdict]:
    """Judge every claim wherever all its arms were run."""
    out = []
    for claim in CLAIMS:
        for key, plain in study.items():
            if key[0] not in claim.parts or key[1] not in claim.tasks:
                continue
            arms = with_base(plain)
            if all(c.arm in arms and c.against in arms for c in claim.contrasts):
                out.append(_judge(claim, key, arms))
    return out


def _judge(claim: Claim, key: Key, arms: Mapping[str, ArmResult]) -> Verdict:
    found = [_contrast(c, key, arms) for c in claim.contrasts]
    outcomes = [outcome for outcome, _, _ in found]
    if FAILS in outcomes:
        outcome = FAILS
    elif UNDECIDED in outcomes:
        outcome = UNDECIDED
    else:
        outcome = HOLDS
    notes = list(dict.fromkeys(note for _, _, note in found if note))
    small = outcome == HOLDS and any(
        d.interval is not None and max(abs(d.interval.low), abs(d.interval.high)) < SMALLEST
        for _, d, _ in found
    )
    if small:
        notes.append(f"smaller than any published difference ({SMALLEST:g})")
    word = WORDS[published_setting(next(iter(arms.values())).config)][outcome]
    return Verdict(claim, key, outcome, word, tuple(d for _, d, _ in found), "; ".join(notes))


def _contrast(c: Contrast, key: Key, arms: Mapping[str, ArmResult]) -> tuple[str, Difference, str]:
    d = difference(key, arms, c.arm, c.against, c.metric)
    for name in (c.arm, c.against):
        if c.metric in arms[name].undefined:
            return UNDECIDED, d, f"{c.metric} is not defined: {arms[name].undefined[c.metric]}"
    if d.missing:
        return UNDECIDED, d, f"{d.missing} seeds of {c.arm} or {c.against} have no value"
    if d.interval is None:
        return UNDECIDED, d, "fewer than 3 seeds"
    for name in (c.arm, c.against):
        if arms[name].low_mass:
            return UNDECIDED, d, f"{len(arms[name].low_mass)} runs of {name} count as failed"
    low, high = sorted((c.sign * d.interval.low, c.sign * d.interval.high))
    if low > 0:
        return HOLDS, d, ""
    return (FAILS if high < SMALLEST else UNDECIDED), d, ""
