"""What the page's cards and tables hold, cell by cell, as text or numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedalign.report.facts import Facts
from fedalign.report.verdict import signed

STAGE_NAMES = {
    "base": "base",
    "shared": "shared",
    "personal": "personal",
    "local_only": "local only, same steps",
    "local_only_total": "local only, all steps",
}
REFERENCE_NAMES = {
    "uniform": "uniform answerer",
    "mean_of_groups": "mean of groups",
    "optimum_average": "best for average",
    "optimum_worst": "best for worst",
}
NUMBERS = {
    "average": ("average over groups", "higher"),
    "worst": ("worst group", "higher"),
    "worst_k20": ("worst fifth of groups", "higher"),
    "gap": ("gap, best to worst group", "lower"),
    "std": ("standard deviation over groups", "lower"),
    "fairness_index": ("fairness index", "higher"),
    "jain_group_means": ("Jain index of group scores", "higher"),
    "cov_group_means": ("coefficient of variation", "lower"),
    "gini_group_means": ("Gini coefficient", "lower"),
    "option_mass": ("option mass", "higher"),
}


def cards(facts: Facts, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the four headline cards."""
    cards = []
    for name, label in (("average", "Average over groups"), ("worst", "Worst-served group")):
        base, shared = summary.get(f"base/{name}"), summary.get(f"shared/{name}")
        lines = []
        if name == "worst" and shared is not None:
            lines.append(summary["shared/worst_group"])
        if facts.silent:
            lines.append(f"over {len(facts.counted)} of {len(facts.groups)} groups")
        if f"change/{name}/low" in summary:
            low, high = summary[f"change/{name}/low"], summary[f"change/{name}/high"]
            change = signed(summary[f"change/{name}"])
            lines.append(f"{change} (95% {signed(low)} to {signed(high)})")
        if shared is None:
            lines.append("the final adapter is not scored" if base is not None else "no scores")
        cards.append(_card(label, base, shared, lines))
    attained = [summary.get(f"attained/{n}") for n in ("average", "worst")]
    reason = facts.references["optimum_average"].note or "; ".join(
        m["reason"] for m in summary["missing"] if m["name"] == "attained/average"
    )
    lines = ["average; of the gain one shared answer could bring"]
    if attained[1] is not None:
        lines.append(f"worst group: {attained[1]:.0%}")
    cards.append(
        {
            "label": "Attained",
            "before": None,
            "after": "not defined" if attained[0] is None else f"{attained[0]:.0%}",
            "lines": lines if attained[0] is not None else [reason],
        }
    )
    mass = [summary.get(f"{s}/option_mass") for s in ("base", "shared")]
    least = facts.setting("score.min-option-mass", 0.9)
    pairs = facts.run.get("form") == "pairs"
    lines = ["pair data have no options"] if pairs else [f"must stay above {least:g}"]
    cards.append(_card(facts.mass_name.capitalize(), mass[0], mass[1], lines, digits=2))
    return cards


def _card(
    label: str,
    before: float | None,
    after: float | None,
    lines: list[str],
    digits: int = 3,
) -> dict[str, Any]:
    return {
        "label": label,
        "before": None if before is None else f"{before:.{digits}f}",
        "after": "–" if after is None else f"{after:.{digits}f}",
        "lines": lines,
    }


def score_of(facts: Facts, stage: str, group: str) -> float | None:
    """Return a group's score at a stage; None when there is none."""
    return facts.stages[stage].scores.get(group) if stage in facts.stages else None


def group_rows(
    facts: Facts, summary: Mapping[str, Any], others: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row for each group, worst served first."""
    least = float(facts.setting("score.min-option-mass", 0.9))
    rows = []
    for g in facts.groups:
        base, shared = score_of(facts, "base", g), score_of(facts, "shared", g)
        low = summary.get(f"shared/group/{g}/score/low")
        mass = [facts.stages[s].option_mass.get(g) for s in ("shared", "base") if s in facts.stages]
        rows.append(
            {
                "group": g,
                "absent": facts.silent.get(g, "–"),
                "base": base,
                "shared": shared,
                "change": None if base is None or shared is None else shared - base,
                "interval": "" if low is None else
                f"{low:.3f} to {summary[f'shared/group/{g}/score/high']:.3f}",
                "personal": score_of(facts, "personal", g),
                "others": [
                    *(score_of(facts, s, g) for s in others),
                    facts.references["uniform"].scores.get(g),
                    facts.references["optimum_average"].scores.get(g),
                ],
                "mass": mass[0] if mass else None,
                "low_mass": bool(mass) and mass[0] is not None and mass[0] < least,
                "size": f"{facts.sizes[g]:,}",
                "clients": facts.clients[g],
                "questions": facts.questions[g],
            }
        )  # fmt: skip
    return sorted(rows, key=lambda r: (2.0 if r["shared"] is None else r["shared"], r["group"]))


def fairness_columns(facts: Facts, summary: Mapping[str, Any]) -> list[str]:
    """Return the column heads: stages, then references that are defined."""
    return [
        *(label for stage, label in STAGE_NAMES.items() if stage in facts.stages),
        *(label for n, label in REFERENCE_NAMES.items() if f"reference/{n}/average" in summary),
    ]


def fairness_rows(facts: Facts, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each number over groups, a cell for each column."""
    prefixes = [
        *(stage for stage in STAGE_NAMES if stage in facts.stages),
        *(f"reference/{n}" for n in REFERENCE_NAMES if f"reference/{n}/average" in summary),
    ]
    rows = []
    for key, (name, better) in NUMBERS.items():
        cells = []
        for prefix in prefixes:
            value, low = summary.get(f"{prefix}/{key}"), summary.get(f"{prefix}/{key}/low")
            # Four digits: indices near 1 differ only there.
            digits = 4 if key in ("fairness_index", "jain_group_means") else 3
            interval = ""
            if low is not None:
                interval = f"{low:.{digits}f} to {summary[f'{prefix}/{key}/high']:.{digits}f}"
            text = "–" if value is None else f"{value:.{digits}f}"
            cells.append({"text": text, "interval": interval})
        name = facts.mass_name if key == "option_mass" else name
        rows.append({"name": name, "better": f"{better} is better", "cells": cells})
    return rows


def failure_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return unusable replies counted by reason, most frequent first."""
    by_reason: dict[str, list[Any]] = defaultdict(list)
    for reply in facts.failed_replies:
        by_reason[f"{reply.status}: {reply.reason}"].append(reply)
    return [
        {
            "reason": reason,
            "replies": len(replies),
            "clients": len({r.client for r in replies}),
            "rounds": _some(sorted({r.round for r in replies})),
        }
        for reason, replies in sorted(by_reason.items(), key=lambda x: -len(x[1]))
    ]


def _some(rounds: Sequence[int], most: int = 10) -> str:
    text = ", ".join(str(r) for r in rounds[:most])
    return text + (f" and {len(rounds) - most} more" if len(rounds) > most else "")
