"""The results of every part in plain words, made from the numbers: nobody writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedalign.metrics.intervals import Interval
from simulations.reproduce_arms import CONTROLS
from simulations.reproduction_claims import HOLDS, POPULATIONS, Verdict
from simulations.reproduction_values import (
    BASE,
    ArmResult,
    Difference,
    Explained,
    Key,
    Study,
    difference,
    explained,
    with_base,
)
from simulations.seed_text import change_cell

TASKS = {"letter": "letters", "order": "orders", "shares": "printed shares"}
UNDECIDED = "not decidable with fewer than 3 seeds"
NOTHING = "no measurable difference, so nothing to explain"


def plain_words(study: Study, verdicts: Sequence[Verdict]) -> list[str]:
    """Say, population by population, what each rule changed and what its controls give."""
    keys = [k for k in study if k[0] in POPULATIONS]
    said = [line for key in study for line in _left_out(key, study[key])]
    study = sound_study(study)
    for key in [k for k in keys if k in study]:
        said += _population(key, study[key])
    for key in study:
        if key[0] == "balanced" and {"reweighted", "mean"} <= study[key].keys():
            d = difference(key, study[key], "reweighted", "mean", "worst")
            said.append(
                f"**Balanced groups, {key[1]}.** With nothing to gain, the weights alone change "
                f"the worst group by {text(d)} against the mean: {how(d)}."
            )
    if any(v.outcome == HOLDS and v.word == "demonstrated" for v in verdicts):
        said.append(
            "These runs demonstrate a mechanism on a small model. They reproduce no published "
            "figure: that takes the published models on the published data."
        )
    return said


def sound_study(study: Study) -> Study:
    """Return the arms of which something can be said: all seeds ran and kept their mass."""
    sound = {
        key: {name: a for name, a in arms.items() if a.values and not (a.failed or a.low_mass)}
        for key, arms in study.items()
    }
    return {key: arms for key, arms in sound.items() if arms}


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


def _population(key: Key, arms: Mapping[str, ArmResult]) -> list[str]:
    said = []
    name = f"**{where(key).capitalize()}.**"
    everything = with_base(arms)
    if "mean" in arms:
        d = {m: difference(key, everything, "mean", BASE, m) for m in ("worst", "average")}
        said.append(
            f"{name} Training on the plain mean changes the worst group by "
            f"{text(d['worst'])} against the untouched base, {how(d['worst'])}, and the "
            f"average by {said_of(d['average'])}."
        )
        name = ""
    for arm, what in (("reweighted", "The weights alone"), ("literal", "The published rule")):
        if {arm, "mean"} <= arms.keys():
            d = {
                m: difference(key, arms, arm, "mean", m)
                for m in ("worst", "average", "fairness_index", "kl")
            }
            line = (
                f"{what} ({arm}) against mean: worst group {said_of(d['worst'])}; average "
                f"{said_of(d['average'])}; fairness index {said_of(d['fairness_index'])}"
            )
            if d["kl"].points:
                line += f"; KL to the base {text(d['kl'])} nats, {how(d['kl'])}"
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
    whole = change_cell(made[0].difference, made[0].points)
    found = by_controls(made)
    if found in (UNDECIDED, NOTHING):
        return f"On the {label} the published rule differs from mean by {whole}: {found}."
    parts = [
        f"{e.control} {e.share.centre:.0%} [{e.share.low:.0%}, {e.share.high:.0%}]"
        for e in made
        if e.share is not None
    ]
    return (
        f"Of the published rule's {kind(made)} on the {label} ({whole}) the controls, which do not "
        f"favour the worst served, explain {found}: {', '.join(parts)}."
    )


def kind(made: Sequence[Explained]) -> str:
    """Return ``gain`` or ``loss``: the sign of literal - mean."""
    whole = made[0].difference
    return "gain" if whole is not None and whole.centre > 0 else "loss"


def by_controls(made: Sequence[Explained]) -> str:
    """Return in words how much of literal - mean its controls explain.

    Of a share with its interval: *all of it* when the interval holds 1 and not 0, *none of it
    measurably* when it holds 0 or less and not 1, *a part of it* when it lies between the two, *an
    unknown part of it* when it holds both.
    """
    whole = made[0].difference
    if whole is None:
        return UNDECIDED
    if whole.low <= 0 <= whole.high:
        return NOTHING
    words: dict[str, list[Explained]] = {}
    for e in made:
        if e.share is not None:
            words.setdefault(_share_word(e.share), []).append(e)
    said = []
    for word, found in words.items():
        whose = "" if len(words) == 1 else f", {' and '.join(e.control for e in found)}"
        said.append(f"{word} ({_range(word, [e.share for e in found if e.share])}{whose})")
    return "; ".join(said)


NONE, PART, ALL, UNKNOWN = (
    "none of it measurably", "a part of it", "all of it", "an unknown part of it"
)  # fmt: skip


def _share_word(share: Interval) -> str:
    if share.low <= 0:
        return NONE if share.high < 1 else UNKNOWN
    return PART if share.high < 1 else ALL


def _range(word: str, shares: Sequence[Interval]) -> str:
    if word == NONE:
        return f"at most {max(0.0, *(s.high for s in shares)):.0%}"
    low, high = (f"{f(s.centre for s in shares):.0%}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


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
        f"picked from {len(scored)} rules after the fact: {text(d)} against mean, "
        f"{how(d)}."
    )


def said_of(d: Difference) -> str:
    """Return a difference and what it is: measurably higher or lower, or within noise."""
    return f"{text(d)}, {how(d)}" if d.points else text(d)


def how(d: Difference) -> str:
    """Return a difference in words."""
    if d.interval is None:
        return "not decidable"
    return {1: "measurably higher", -1: "measurably lower", 0: "within noise"}[d.sign]


def text(d: Difference) -> str:
    """Return a difference with its interval, or with the difference of every seed."""
    return change_cell(d.interval, d.points)


def where(key: Key) -> str:
    """Return a population and task in words."""
    part, task = key
    return TASKS[task] + (", countries" if part == "countries" else "")
