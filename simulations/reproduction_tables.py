"""The tables of the reproduction's page, one block for each part and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedalign.config import resolve_reward
from fedalign.metrics.intervals import Interval
from simulations.reproduce_arms import CONTROLS
from simulations.reproduce_parts import PARTS
from simulations.reproduction_trust import undefined
from simulations.reproduction_values import (
    BASE,
    ArmResult,
    Difference,
    Explained,
    Key,
    Study,
    with_base,
)
from simulations.reproduction_words import text
from simulations.seed_text import change_cell, mean_cell

COLUMNS = {
    "average": "average",
    "worst": "worst group",
    "worst_at_base": "worst at base",
    "fairness_index": "fairness index",
    "gap": "gap",
    "option_mass": "option mass",
    "kl": "KL",
    "attained_average": "attained, average",
    "attained_worst": "attained, worst",
}
COMPARED = ("average", "worst", "worst_at_base", "fairness_index", "gap", "kl")
EXPLAINED = ("average", "worst", "fairness_index", "gap")
FAR = 0.10
"""The closed share is read where JSD(base, optimum) is at least this: nearer there is no room."""
REFERENCES = (
    ("uniform answerer", "uniform_average", "uniform_worst"),
    ("mean of groups (oracle)", "mean_of_groups_average", "mean_of_groups_worst"),
    ("attainable optimum (two policies)", "optimum_average_average", "optimum_worst_worst"),
)


def part_tables(
    study: Study,
    differences: Sequence[Difference],
    shares: Mapping[Key, Sequence[Explained]],
) -> list[str]:
    """Return every part's arms, differences and shares explained."""
    lines: list[str] = []
    for key, arms in study.items():
        part = PARTS[key[0]]
        lines += ["", f"## {part.title}: {key[1]}", "", f"{_sentence(part.why)} {_score(arms)}"]
        lines += ["", *_table(arms), *undefined(arms, COLUMNS), *_low(arms)]
        own = [d for d in differences if (d.part, d.task) == key]
        lines += _differences(own)
        if shares[key]:
            lines += _explained(shares[key])
    return lines


def _score(arms: Mapping[str, ArmResult]) -> str:
    config = next(iter(arms.values())).config
    kind = resolve_reward(config)
    metric = config.score.metric
    if metric == "auto":
        metric = "borda" if config.rewards.task == "order" else "js_divergence"
    mass = "option mass" if config.rewards.task == "letter" else "share of well-formed texts"
    return f"Reward `{kind}`, score `{metric}`, KL coefficient {config.ppo.kl:g}; mass: {mass}."


def _table(arms: Mapping[str, ArmResult]) -> list[str]:
    everything = with_base(arms)
    columns = dict(COLUMNS)
    if any("tokens" in v for a in arms.values() for v in a.values.values()):
        columns["tokens"] = "tokens (thousands)"
    lines = [f"| arm | {' | '.join(columns.values())} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for name in (BASE, *arms):
        arm = everything[name]
        cells = [
            "not defined" if m in arm.undefined else _cell(list(arm.of(m).values()), m)
            for m in columns
        ]
        seeds = f"{len(arm.values)} of {len(arm.values) + len(arm.failed)}"
        shown = f"*{name}*" if name == BASE else name
        lines.append(f"| {shown} | {' | '.join(cells)} | {seeds} |")
    by_seed: dict[int, dict[str, float]] = {}
    for arm in arms.values():
        for seed, values in arm.values.items():
            by_seed.setdefault(seed, values)
    for label, *names in REFERENCES:
        found = [[v[n] for v in by_seed.values() if n in v] for n in names]
        if all(found):
            blank = " |" * (len(columns) - 1)
            lines.append(f"| *{label}* | {mean_cell(found[0])} | {mean_cell(found[1])} |{blank}")
    return lines


def _cell(values: Sequence[float], metric: str) -> str:
    if not values:
        return "–"
    if metric == "tokens":
        return f"{sum(values) / len(values) / 1000:,.0f}"
    return mean_cell(values, 2 if metric.startswith("attained") else 3)


def _low(arms: Mapping[str, ArmResult]) -> list[str]:
    lines = []
    for name, arm in arms.items():
        if arm.low_mass:
            least = arm.config.score.min_option_mass
            lines.append(
                f"- {name}: {len(arm.low_mass)} of {len(arm.values)} runs (seeds "
                f"{', '.join(map(str, arm.low_mass))}) end with mass below {least:g} and count as "
                "failed; the means include them."
            )
        if arm.failed:
            lines.append(
                f"- {name}: {len(arm.failed)} runs have no final score and are not in the means."
            )
    return ["", *lines] if lines else []


def _differences(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    metrics = [m for m in COMPARED if any(d.metric == m for d in differences)]
    lines = [
        "",
        "Paired differences; **bold** where the interval leaves out 0.",
        "",
        f"| arm - baseline | {' | '.join(COLUMNS[m] for m in metrics)} |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    rows: dict[tuple[str, str], dict[str, Difference]] = {}
    for d in differences:
        rows.setdefault((d.arm, d.against), {})[d.metric] = d
    for (arm, against), cells in sorted(rows.items(), key=lambda x: x[0][1]):
        shown = []
        for m in metrics:
            cell = cells.get(m)
            value = "–" if cell is None else text(cell)
            shown.append(f"**{value}**" if cell is not None and cell.sign else value)
        lines.append(f"| {arm} - {against} | {' | '.join(shown)} |")
    return lines


def _explained(shares: Sequence[Explained]) -> list[str]:
    lines = [
        "",
        "How much of literal's difference to mean a control gives by itself: "
        "(control - mean) / (literal - mean), with Fieller's interval. 1 is all of it.",
        "",
        f"| metric | literal - mean | {' | '.join(CONTROLS)} |",
        "|---" * (len(CONTROLS) + 2) + "|",
    ]
    for metric in EXPLAINED:
        own = {e.control: e for e in shares if e.metric == metric}
        if own:
            first = next(iter(own.values()))
            whole = change_cell(first.difference, first.points)
            cells = [_share(own[c].share) if c in own else "–" for c in CONTROLS]
            lines.append(f"| {COLUMNS[metric]} | {whole} | {' | '.join(cells)} |")
    return lines


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "not defined"
    return f"{interval.centre:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def closed_table(study: Study) -> list[str]:
    """Return the distances to the closed-form optimum, of part ``oracle``."""
    keys = [k for k in study if k[0] == "oracle"]
    lines: list[str] = []
    for key in keys:
        for name, arm in study[key].items():
            far = {s: v for s, v in arm.values.items() if v.get("jsd_base", 0.0) >= FAR}
            known = [s for s, v in arm.values.items() if "jsd_base" in v]
            cells = [
                _cell([v[q] for v in far.values() if q in v], q)
                for q in ("jsd_base", "jsd_model", "closed", "kl_model", "kl_optimum", "mass")
            ]
            lines.append(
                f"| {key[1]} | {name} | {' | '.join(cells)} | {len(far)} of {len(known)} |"
            )
    if not lines:
        return []
    return [
        "",
        "## Distance to the closed-form optimum",
        "",
        "The optimum of reward minus KL is known: proportional to base * exp(R / kl) over all "
        "answers. *Closed* is (JSD(base, optimum) - JSD(policy, optimum)) / JSD(base, optimum), "
        f"on test questions, over the runs in which JSD(base, optimum) is at least {FAR:g}; nearer "
        "the base there is nothing to close.",
        "",
        "| task | rule | JSD(base, optimum) | JSD(policy, optimum) | closed | KL(policy, base) | "
        "KL(optimum, base) | mass | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + ("" if words.endswith("?") else ".")
