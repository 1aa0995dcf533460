"""What surrounds the results: published tables, choices left open, reviewers, failures, reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedalign.config import Config
from simulations.reproduce_parts import PARTS
from simulations.reproduction_claims import POPULATIONS
from simulations.reproduction_published import REVIEWS, TABLES, UNSET, Table
from simulations.reproduction_values import ArmResult, Key, Study, difference, with_base
from simulations.reproduction_words import text
from simulations.seed_text import mean_cell

TRIPLE = {"average": "average", "worst": "worst group", "fairness_index": "fairness index"}


def beside_published(study: Study) -> list[str]:
    """Return the published tables, each beside our arms on the tasks that resemble it."""
    lines = [
        "",
        "## The published tables beside ours",
        "",
        "Published figures are from secondary summaries of the papers; – was not found in any. "
        "Models, questions and scores differ from ours, so values cannot be compared. What can be: "
        "which rule is above which, and by how much where the score is the same kind.",
    ]
    for table in TABLES:
        found = [
            (key, with_base({**_other_rewards(study, key), **study[key]}))
            for key in study
            if key[0] in POPULATIONS and key[1] in table.tasks
        ]
        lines += ["", f"### {table.title} ({table.source})", "", table.remark, ""]
        heads = [f"ours: {k[1]}{', countries' if k[0] == 'countries' else ''}" for k, _ in found]
        heads = [f"{h} ({k[0]})" for h, (k, _) in zip(heads, found, strict=True)]
        lines.append(
            f"| row | published average / worst / index | {' | '.join([*heads, ''])[:-3]} |"
        )
        lines.append("|---" * (2 + max(1, len(found))) + "|")
        if not found:
            lines[-2] = "| row | published average / worst / index | ours |"
        for row in table.rows:
            shown = " / ".join(
                "–" if x is None else f"{x:.4g}"
                for x in (row.average, row.worst, row.fairness_index)
            )
            cells = [_ours(arms.get(row.ours)) for _, arms in found] or ["not run"]
            lines.append(f"| {row.label} | {shown} | {' | '.join(cells)} |")
        lines += _signs(table, found)
    return lines


def _other_rewards(study: Study, key: Key) -> Mapping[str, ArmResult]:
    """Return the arms of part ``scores``, which are of the same population as ``key``'s."""
    return {} if key[0] == "countries" else study.get(("scores", key[1]), {})


def _ours(arm: ArmResult | None) -> str:
    if arm is None or not arm.values:
        return "–"
    return " / ".join(mean_cell(list(arm.of(m).values())).split(" ")[0] for m in TRIPLE)


def _signs(table: Table, found: Sequence[tuple[Key, Mapping[str, ArmResult]]]) -> list[str]:
    """Set each published difference to the table's first row beside ours."""
    lines = []
    first = table.rows[0]
    for row in table.rows[1:]:
        for key, arms in found:
            if row.ours not in arms or first.ours not in arms:
                continue
            for metric in TRIPLE:
                a, b = getattr(row, metric), getattr(first, metric)
                d = difference(key, arms, row.ours, first.ours, metric)
                if a is None or b is None or d.interval is None:
                    continue
                agrees = (
                    "the same direction" if d.sign * (a - b) > 0
                    else "the opposite direction" if d.sign * (a - b) < 0
                    else "no measurable difference here"
                )  # fmt: skip
                lines.append(
                    f"- {row.label} - {first.label}, {TRIPLE[metric]}: published {a - b:+.4f}; "
                    f"ours ({key[1]}, {key[0]}) {text(d)}: {agrees}."
                )
    return ["", *lines] if lines else []


def left_open(base: Config, seeds: Sequence[int]) -> list[str]:
    """Return what the papers do not state, with the value of these runs."""
    sections = {name: getattr(base, name) for name in ("run", "data", "weights", "rewards", "ppo")}
    return [
        "",
        "## What the papers leave open, and our value",
        "",
        "Not found in what could be read of the papers; the values are ours.",
        "",
        "| not stated | ours |",
        "|---|---|",
        *(f"| {what} | {value.format(seeds=len(seeds), **sections)} |" for what, value in UNSET),
    ]


def reviewers(study: Study) -> list[str]:
    """Return the reviewers' points; the answer depends on which parts were run."""
    run = {part for part, _ in study}
    lines = [
        "",
        "## What reviewers of arXiv 2512.08786 asked",
        "",
        "| point | answer |",
        "|---|---|",
    ]
    for point, needs, done, otherwise in REVIEWS:
        lines.append(f"| {point} | {done if set(needs) <= run else otherwise} |")
    return lines


def failures(study: Study) -> list[str]:
    """Return every run without a final score, and why."""
    found = [
        f"- {part}, {task}, {name}, seed {seed}: {why}"
        for (part, task), arms in study.items()
        for name, arm in arms.items()
        for seed, why in arm.failed.items()
    ]
    if not found:
        return []
    return ["", "## Runs without a final score", "", *found]


def reasons(study: Study) -> list[str]:
    """Return why each part and arm is there."""
    lines = ["", "## Why each arm is there", ""]
    for name in dict.fromkeys(part for part, _ in study):
        part = PARTS[name]
        lines += [f"**{part.title}** (`{name}`): {part.why}.", ""]
        lines += [f"- {arm.name}: {arm.reason}" for arm in part.arms]
        lines.append("")
    return lines
