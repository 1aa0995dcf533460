"""What a run showed, in plain words: a level and a few sentences, the most important first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalign.report.facts import Facts
from fedalign.report.policy import cut_short, doubts

SMALLEST_LOSS = 0.005
"""A group counts as worse served when its score fell by more than this (unit of the score)."""


@dataclass(frozen=True)
class Verdict:
    """``level`` is ``failed``, ``running``, ``warning`` or ``ok``."""

    level: str
    title: str
    sentences: tuple[str, ...]


def judge(facts: Facts, summary: Mapping[str, Any]) -> Verdict:
    """Return the verdict; every number in it is in the summary or the facts."""
    sentences = [*_change(summary, "worst"), *_change(summary, "average"), *_silent(facts)]
    warnings = [
        *_impossible(summary),
        *_losers(facts),
        *_below_uniform(facts),
        *_missing(facts),
        *_group_mass(facts),
        *(doubts(facts.policy) if facts.policy else ()),
    ]
    status, reason = summary["run/status"], summary.get("run/status_reason", "")
    if status == "failed":
        title = f"Failed: {reason}." if reason else "Failed."
        # Gains of a model that no longer answers would be read as gains.
        shown = [] if reason.startswith(facts.mass_name) else sentences
        return Verdict("failed", title, (*shown, *warnings))
    if status != "completed":
        done, all_rounds = summary["rounds/completed"], facts.setting("run.rounds", "?")
        title = f"Not finished: {done} of {all_rounds} rounds done."
        return Verdict("running", title, (*sentences, *warnings))
    if not facts.counted:
        title = "Finished; no group gives a score, so nothing can be said of how well it served."
        return Verdict("warning", title, (*sentences, *warnings))
    if "shared/average" not in summary:
        return Verdict(
            "failed", "Failed: the final adapter has no complete score.", tuple(warnings)
        )
    sentences += _local_only(facts)
    sentences += [s for s in (cut_short(facts.policy),) if s] if facts.policy else []
    level = "warning" if warnings else "ok"
    return Verdict(level, _title(summary, len(_lost(facts))), (*sentences, *warnings))


def _title(summary: Mapping[str, Any], losers: int) -> str:
    title = _gains(summary)
    if losers:
        title += f" {losers} {'group' if losers == 1 else 'groups'} lost."
    return title


def _gains(summary: Mapping[str, Any]) -> str:
    if "base/worst" not in summary:
        return "Finished; the untouched base was not scored, so there is no before."
    worst = summary["shared/worst"] - summary["base/worst"]
    average = summary["shared/average"] - summary["base/average"]
    small = SMALLEST_LOSS
    if worst > small and average > small:
        return "Both the worst-served group and the average gained."
    if worst > small:
        return "The worst-served group gained; the average did not."
    if average > small:
        return "The average gained; the worst-served group did not."
    return "Neither the worst-served group nor the average gained."


def _change(summary: Mapping[str, Any], name: str) -> list[str]:
    before, after = summary.get(f"base/{name}"), summary.get(f"shared/{name}")
    if before is None or after is None:
        return []
    if name == "worst":
        who, now = summary["base/worst_group"], summary["shared/worst_group"]
        same = f"{who} before and after" if who == now else f"{who} before, {now} after"
        text = f"The worst-served group ({same}) went from {before:.3f} to {after:.3f}"
    else:
        text = f"The average over groups went from {before:.3f} to {after:.3f}"
    text += f" ({signed(after - before)}"
    low, high = summary.get(f"change/{name}/low"), summary.get(f"change/{name}/high")
    if low is not None and high is not None:
        text += f"; 95% interval {signed(low)} to {signed(high)}"
    text += ")"
    attained = summary.get(f"attained/{name}")
    if attained is not None:
        text += f", {attained:.0%} of what one shared answer could gain at best"
    text += "."
    if low is not None and high is not None and low <= 0 <= high:
        text += " The interval holds 0: these questions do not show a change."
    return [text]


def _impossible(summary: Mapping[str, Any]) -> list[str]:
    """A shared model above the attainable optimum beyond its interval: something is wrong."""
    said = []
    for name in ("average", "worst"):
        low, best = (
            summary.get(f"shared/{name}/low"),
            summary.get(f"reference/optimum_{name}/{name}"),
        )
        if low is not None and best is not None and low > best:
            said.append(
                f"The shared model's {name} is above the best that one answer can reach "
                f"({best:.3f}), beyond its interval. No shared answer can do that: look for a "
                "fault in the scores or for prompts that name the group."
            )
    return said


def _lost(facts: Facts) -> dict[str, float]:
    """Return the groups that the shared adapter serves worse than the base, and by how much."""
    base, shared = _scores(facts, "base"), _scores(facts, "shared")
    return {
        g: shared[g] - base[g]
        for g in sorted(base.keys() & shared.keys())
        if shared[g] < base[g] - SMALLEST_LOSS
    }


def _losers(facts: Facts) -> list[str]:
    lost = _lost(facts)
    if not lost:
        return []
    names = _names([f"{g} ({signed(d)})" for g, d in sorted(lost.items(), key=lambda x: x[1])])
    return [
        f"{_count(len(lost), len(facts.groups))} worse served than by the untouched base: {names}."
    ]


def _local_only(facts: Facts) -> list[str]:
    """Say how often the federation, with personal steps, beat training alone for as long."""
    personal, alone = _scores(facts, "personal"), _scores(facts, "local_only_total")
    both = sorted(personal.keys() & alone.keys())
    if not both:
        return []
    better = sum(personal[g] > alone[g] for g in both)
    return [
        "The personal adapter beats training alone for as many steps as the whole run in "
        f"{better} of {len(both)} groups."
    ]


def _below_uniform(facts: Facts) -> list[str]:
    shared, uniform = _scores(facts, "shared"), facts.references["uniform"].scores
    below = [g for g in sorted(shared.keys() & uniform.keys()) if shared[g] < uniform[g]]
    if not below:
        return []
    return [
        f"{_count(len(below), len(shared))} served worse than by an answerer that gives every "
        f"option the same chance: {_names(below)}."
    ]


def _silent(facts: Facts) -> list[str]:
    """Say whose scores are nobody's here to see, and what the numbers then speak of."""
    if not facts.silent:
        return []
    names = _names([f"{g} ({why})" for g, why in facts.silent.items()])
    rest = f"the other {len(facts.counted)}" if facts.counted else "no group"
    return [
        f"Without a score: {names}. Average, worst-served group and fairness index speak of {rest}."
    ]


def _missing(facts: Facts) -> list[str]:
    notes = [f"{stage}: {note}" for stage, s in facts.stages.items() for note in s.missing]
    return [f"Scores are missing: {_names(notes)}."] if notes else []


def _group_mass(facts: Facts) -> list[str]:
    least = float(facts.setting("score.min-option-mass", 0.9))
    stage = facts.stages.get("shared")
    low = {g: m for g, m in stage.option_mass.items() if m < least} if stage else {}
    if not low:
        return []
    names = _names([f"{g} ({m:.2f})" for g, m in sorted(low.items(), key=lambda x: x[1])])
    name = facts.mass_name.capitalize()
    return [f"{name} is below {least:g} for {names}: there the model often does not answer."]


def signed(value: float) -> str:
    """Return a change with its sign, three decimals, a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def _scores(facts: Facts, stage: str) -> Mapping[str, float]:
    return facts.stages[stage].scores if stage in facts.stages else {}


def _count(n: int, total: int) -> str:
    return f"{n} of {total} groups {'is' if n == 1 else 'are'}"


def _names(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
