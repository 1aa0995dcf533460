"""The first screen of the reproduction: does adaptive weighting help, where, by how much, and why.

Four questions, answered from the numbers by the rules of ``reproduction_words.py``, and one table
that holds every number they stand on.  Only arms all of whose runs count are spoken of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simulations.reproduce_arms import CONTROLS
from simulations.reproduction_claims import POPULATIONS
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
from simulations.reproduction_words import (
    NOTHING,
    UNDECIDED,
    by_controls,
    kind,
    sound_study,
    text,
    where,
)

ALONE, PUBLISHED, PLAIN = "reweighted", "literal", "mean"
MATCHED = "kl-matched"
MATCHED_RULES = {
    ALONE: "weights alone",
    PUBLISHED: "the published rule",
    "mean-over-n": "its scale alone",
}
KL_NEAR = 0.05
"""Nats a text; arms of part ``kl-matched`` nearer to each other than this count as matched."""


def answer(study: Study) -> list[str]:
    """Return the section that opens the page."""
    study = sound_study(study)
    keys = [k for k in study if k[0] in POPULATIONS]
    return [
        "",
        "## Does adaptive weighting help?",
        "",
        f"- **Does it help the worst-served group?** {_helps(study, keys)}",
        *(f"- **By how much?** {line}" for line in _how_much(study, keys)),
        *(f"- **At equal KL?** {line}" for line in _matched(study)),
        *(f"- **Is it better than not training?** {line}" for line in _untrained(study, keys)),
        "- **How much of the published rule's gain do its controls explain?** "
        f"{_explained(study, keys)}",
        "",
        *_table(study, keys),
    ]


def _helps(study: Study, keys: Sequence[Key]) -> str:
    found = {
        key: difference(key, study[key], ALONE, PLAIN, "worst")
        for key in keys
        if {ALONE, PLAIN} <= study[key].keys()
    }
    if not found:
        return f"Not answered: {ALONE} and {PLAIN} were not both run to the end."
    if all(d.interval is None for d in found.values()):
        return "Not decidable: fewer than 3 seeds give no interval."
    said = {1: "measurably better", -1: "measurably worse", 0: "no measurable difference"}
    parts = []
    for sign, words in said.items():
        here = [where(key) for key, d in found.items() if d.sign == sign]
        if here:
            parts.append(f"{words} in {len(here)} of {len(found)} cases ({', '.join(here)})")
    yes = sum(d.sign > 0 for d in found.values())
    word = "Yes" if yes == len(found) else "Not everywhere" if yes else "Not measurably"
    return (
        f"{word}. Weights alone (rule `{ALONE}`, free of the published form's change of scale) "
        f"against the plain mean: {'; '.join(parts)}."
    )


def _how_much(study: Study, keys: Sequence[Key]) -> list[str]:
    parts = []
    for key in keys:
        arms = study[key]
        if {ALONE, PLAIN} <= arms.keys():
            d = {m: difference(key, arms, ALONE, PLAIN, m) for m in ("worst", "average", "kl")}
            part = f"{where(key)}: worst group {text(d['worst'])}, average {text(d['average'])}"
            if d["kl"].points:
                part += f", for {text(d['kl'])} nats of KL"
            parts.append(part)
    if not parts:
        return []
    return [f"On a score from 0 to 1. {_upper('; '.join(parts))}."]


def _matched(study: Study) -> list[str]:
    """Say what is left of the differences when a controller holds every arm at one KL."""
    parts = []
    for key, arms in study.items():
        if key[0] != MATCHED or PLAIN not in arms:
            continue
        said = []
        for rule, name in MATCHED_RULES.items():
            if rule not in arms:
                continue
            worst, average, kl = (
                difference(key, arms, rule, PLAIN, m) for m in ("worst", "average", "kl")
            )
            if not kl.points:
                continue
            apart = sum(kl.points) / len(kl.points)
            near = "" if abs(apart) <= KL_NEAR else f" (KL still {apart:+.3f} nats apart)"
            said.append(f"{name} worst group {text(worst)}, average {text(average)}{near}")
        if said:
            parts.append(_upper(f"{where(key)}: {'; '.join(said)}"))
    return [f"{'. '.join(parts)}."] if parts else []


def _untrained(study: Study, keys: Sequence[Key]) -> list[str]:
    """Hold the rules against the untouched base: a rule that moves less may only harm less."""
    parts = []
    for key in keys:
        arms = with_base(study[key])
        said = [
            f"{name} worst group {text(worst)}, average {text(average)}"
            for rule, name in {PLAIN: "the mean", **MATCHED_RULES}.items()
            if rule in (PLAIN, ALONE, PUBLISHED) and rule in arms
            for worst, average in [
                (difference(key, arms, rule, BASE, m) for m in ("worst", "average"))
            ]
        ]
        if said:
            parts.append(_upper(f"{where(key)}: {'; '.join(said)}"))
    return [f"{'. '.join(parts)}."] if parts else []


def _explained(study: Study, keys: Sequence[Key]) -> str:
    parts = []
    for key in keys:
        for metric, label in (("worst", "worst group"), ("average", "average")):
            made = _made(study[key], metric)
            if not made:
                continue
            found = by_controls(made)
            if found == UNDECIDED:
                return f"{_upper(found)}."
            if found == NOTHING:
                parts.append(f"{where(key)}, {label}: {found}")
            else:
                whole = text(difference(key, study[key], PUBLISHED, PLAIN, metric))
                parts.append(f"{where(key)}, {label}: **{found}** (the {kind(made)} is {whole})")
    if not parts:
        return f"Not answered: {PUBLISHED}, {PLAIN} and a control were not all run to the end."
    return f"{_upper('; '.join(parts))}."


def _made(arms: Mapping[str, ArmResult], metric: str) -> list[Explained]:
    return [e for c in CONTROLS if (e := explained(arms, c, metric)) is not None]


def _table(study: Study, keys: Sequence[Key]) -> list[str]:
    rows = []
    for key in keys:
        arms = study[key]
        if PLAIN not in arms:
            continue
        cells = [
            _cell(difference(key, arms, arm, PLAIN, metric)) if arm in arms else "not run"
            for arm in (ALONE, PUBLISHED)
            for metric in ("worst", "average", "kl")
        ]
        rows.append(f"| {where(key)} | {' | '.join(cells)} |")
    if not rows:
        return []
    return [
        f"Each rule minus the plain mean; **bold** where the interval leaves out 0. *Alone*: "
        f"`{ALONE}`. *Published*: `{PUBLISHED}`.",
        "",
        "| case | alone: worst group | alone: average | alone: KL | published: worst group | "
        "published: average | published: KL |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _cell(d: Difference) -> str:
    return f"**{text(d)}**" if d.sign else text(d)


def _upper(words: str) -> str:
    return words[:1].upper() + words[1:]
