"""Published claims, judged by stated rules from intervals; and the same in plain words.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalign.config import Config
from fedalign.metrics.intervals import Interval
from simulations.reproduce_arms import CONTROLS
from simulations.reproduction_values import (
    BASE,
    ArmResult,
    Difference,
    Key,
    Study,
    difference,
    explained,
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


def plain_words(study: Study, verdicts: Sequence[Verdict]) -> list[str]:
    """Answer, from the numbers: does adaptive weighting help, where, by how much, and why."""
    keys = [k for k in study if k[0] in POPULATIONS]
    said = [line for key in study for line in _left_out(key, study[key])]
    study = {key: sound for key, arms in study.items() if (sound := _sound(arms))}
    keys = [k for k in keys if k in study]
    said += [_headline(study, keys)] if keys else []
    for key in keys:
        said += _population(key, study[key])
    for key in study:
        if key[0] == "balanced" and {"reweighted", "mean"} <= study[key].keys():
            d = difference(key, study[key], "reweighted", "mean", "worst")
            said.append(
                f"**Balanced groups, {key[1]}.** With nothing to gain, the weights alone change "
                f"the worst group by {text(d.interval)} against the mean: {how(d)}."
            )
    if any(v.outcome == HOLDS and v.word == "demonstrated" for v in verdicts):
        said.append(
            "These runs demonstrate a mechanism on a small model. They reproduce no published "
            "figure: that takes the published models on the published data."
        )
    return said


def _sound(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
    """Return the arms of which something can be said: all seeds ran and kept their mass."""
    return {name: a for name, a in arms.items() if not (a.failed or a.low_mass)}


def _left_out(key: Key, arms: Mapping[str, ArmResult]) -> list[str]:
    """Say which arms nothing is said about, and why."""
    bad = [
        f"{name} ({len(a.failed)} failed, {len(a.low_mass)} below the mass limit)"
        for name, a in arms.items()
        if a.failed or a.low_mass
    ]
    if not bad:
        return []
    return [f"**{where(key).capitalize()}: nothing is said of** {', '.join(bad)}."]


def _headline(study: Study, keys: Sequence[Key]) -> str:
    helped, harmed, tried = [], [], []
    for key in keys:
        arms = study[key]
        if {"reweighted", "mean"} <= arms.keys():
            sign = difference(key, arms, "reweighted", "mean", "worst").sign
            tried.append(key)
            helped += [key] * (sign > 0)
            harmed += [key] * (sign < 0)
    if not tried:
        return "**Does adaptive weighting help?** Not answered: reweighted and mean were not run."
    answer = f"measurably in {len(helped)} of {len(tried)} cases"
    if helped:
        answer += f" ({', '.join(where(k) for k in helped)})"
    if harmed:
        answer += f"; measurably harmful in {len(harmed)} ({', '.join(where(k) for k in harmed)})"
    return (
        "**Does adaptive weighting help the worst-served group?** The weights alone, without the "
        f"published form's change of scale: {answer}."
    )


def _population(key: Key, arms: Mapping[str, ArmResult]) -> list[str]:
    said = []
    name = f"**{where(key).capitalize()}.**"
    everything = with_base(arms)
    if "mean" in arms:
        d = {m: difference(key, everything, "mean", BASE, m) for m in ("worst", "average")}
        said.append(
            f"{name} Training on the plain mean changes the worst group by "
            f"{text(d['worst'].interval)} against the untouched base, {how(d['worst'])}, and the "
            f"average by {text(d['average'].interval)}, {how(d['average'])}."
        )
        name = ""
    for arm, what in (("reweighted", "The weights alone"), ("literal", "The published rule")):
        if {arm, "mean"} <= arms.keys():
            d = {
                m: difference(key, arms, arm, "mean", m)
                for m in ("worst", "average", "fairness_index", "kl")
            }
            line = (
                f"{what} ({arm}) against mean: worst group {text(d['worst'].interval)}, "
                f"{how(d['worst'])}; average {text(d['average'].interval)}, {how(d['average'])}; "
                f"fairness index {text(d['fairness_index'].interval)}, {how(d['fairness_index'])}"
            )
            if d["kl"].interval is not None:
                line += f"; KL to the base {text(d['kl'].interval)} nats, {how(d['kl'])}"
            said.append(f"{name} {line}.")
            name = ""
    for metric, label in (("worst", "worst group"), ("average", "average")):
        sentence = _controls(arms, metric, label)
        if sentence:
            said.append(sentence)
    best = _best(key, arms)
    if best:
        said.append(best)
    return [s.strip() for s in said]


def _controls(arms: Mapping[str, ArmResult], metric: str, label: str) -> str:
    made = [e for c in CONTROLS if (e := explained(arms, c, metric)) is not None]
    if not made:
        return ""
    whole = made[0].difference
    if whole is None:
        return f"With fewer than 3 seeds, nothing can be said of the controls ({label})."
    if whole.low <= 0 <= whole.high:
        return (
            f"On the {label} literal's own difference to mean is within noise ({text(whole)}), so "
            "there is no gain for the controls to explain."
        )
    parts = [
        f"{e.control} {e.share.centre:.0%} [{e.share.low:.0%}, {e.share.high:.0%}]"
        for e in made
        if e.share is not None
    ]
    kind = "gain" if whole.low > 0 else "loss"
    return (
        f"Of literal's {kind} on the {label} ({text(whole)}) the controls, which do not favour the "
        f"worst served, give by themselves: {', '.join(parts)}."
    )


def _best(key: Key, arms: Mapping[str, ArmResult]) -> str:
    """Name the rule with the best worst group, and whether mean is measurably below it."""
    scored = {
        a: sum(x) / len(x)
        for a, r in arms.items()
        if (x := list(r.of("worst").values())) and not r.failed
    }
    if "mean" not in scored or len(scored) < 2:
        return ""
    best = max(sorted(scored), key=lambda a: scored[a])
    if best == "mean":
        return f"No rule has a better worst group than mean ({scored['mean']:.3f})."
    d = difference(key, arms, best, "mean", "worst")
    return (
        f"The best worst group is that of {best} ({scored[best]:.3f}; mean {scored['mean']:.3f}), "
        f"picked from {len(scored)} rules after the fact: {text(d.interval)} against mean, "
        f"{how(d)}."
    )


def how(d: Difference) -> str:
    """Return a difference in words."""
    if d.interval is None:
        return "no interval"
    return {1: "measurably higher", -1: "measurably lower", 0: "within noise"}[d.sign]


def text(interval: Interval | None) -> str:
    """Return a difference with its interval."""
    if interval is None:
        return "no interval"
    return f"{interval.centre:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def where(key: Key) -> str:
    """Return a population and task in words."""
    part, task = key
    return f"task {task}, countries" if part == "countries" else f"task {task}"
