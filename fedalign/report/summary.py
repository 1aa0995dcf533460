"""One flat dictionary of a run's numbers, under the names that ``docs/metrics.md`` fixes.

A number that does not exist is an absent key and an entry of ``missing`` with its reason; NaN never
occurs.  A stage has an average, a worst group and a spread only when every enrolled group has a
score at that stage: a mean over other groups would be another quantity.  Groups that withhold their
scores or were revoked are the exception: they are left out at every stage alike, listed in
``missing``, and ``groups/counted`` says over how many groups the numbers are.

Intervals (``<name>/low``, ``<name>/high``) are 95 % percentile bootstrap over test questions: one
resample of questions for all groups and all stages, so that differences are paired.  They cover
which questions were asked, not other seeds.  Questions are resampled as if independent; where they
resemble each other (one statement in several wordings) the interval is too narrow.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalign.errors import FedalignError
from fedalign.ledger import Ledger
from fedalign.metrics import fairness, intervals
from fedalign.report.facts import REFERENCES, STAGES, Facts, StageFacts, gather
from fedalign.report.policy import put_summary
from fedalign.storage import storing

LEAST_QUESTIONS = 5
"""Fewer questions than this get no interval."""
LEAST_ROOM = 0.005
"""``attained`` is not defined when the optimum is less than this above the base."""


class _Numbers(dict[str, Any]):
    """The summary while it is made: refuses NaN, keeps reasons for what is missing."""

    def put(self, name: str, value: float | str | int) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise FedalignError(f"summary: {name} = {value} is not finite; report this as a fault.")
        self[name] = value

    def lack(self, name: str, reason: str) -> None:
        self.setdefault("missing", []).append({"name": name, "reason": reason})


def summarise(ledger: Ledger) -> dict[str, Any]:
    """Return the summary of a run: metric name to number or text, and the list ``missing``."""
    return summarise_facts(gather(ledger))


def summarise_facts(facts: Facts) -> dict[str, Any]:
    """Return the summary of facts that were gathered before."""
    out = _Numbers(missing=[])
    for group, why in facts.silent.items():
        out.lack(f"group/{group}", f"{why}; numbers over groups leave it out")
    if facts.silent:
        out.put("groups/counted", len(facts.counted))
    for stage in STAGES:
        if stage not in facts.stages:
            out.lack(f"{stage}/average", "no score of this stage is recorded")
        else:
            _stage(out, facts, stage, facts.stages[stage])
    for name in REFERENCES:
        _reference(out, facts, name)
    for name in ("average", "worst"):
        _attained(out, name)
    _intervals(out, facts)
    for group in facts.groups:
        if facts.weights[group]:
            values = list(facts.weights[group].values())
            out.put(f"weights/{group}/mean", sum(values) / len(values))
            out.put(f"weights/{group}/last", facts.weights[group][max(facts.weights[group])])
    if facts.policy is not None:
        put_summary(facts.policy, out.put)
    out.put("rounds/completed", len(facts.rounds))
    _status(out, facts)
    return dict(out)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON, under a temporary name first."""
    text = json.dumps(summary, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a part."""
    with storing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _stage(out: _Numbers, facts: Facts, stage: str, made: StageFacts) -> None:
    for note in made.missing:
        out.lack(f"{stage}/group", note)
    for group, score in made.scores.items():
        out.put(f"{stage}/group/{group}/score", score)
    scores = {g: s for g, s in made.scores.items() if g in facts.counted}
    without = [g for g in facts.counted if g not in scores]
    if without or not scores:
        out.lack(f"{stage}/average", f"no score for {', '.join(without) or 'any group'}")
        return
    _spread(out, stage, scores)
    if made.mass is not None:
        out.put(f"{stage}/option_mass", made.mass)
    else:
        out.lack(f"{stage}/option_mass", "not sent (pair data have no answer options)")
    index, reason = _index(facts, made)
    if index is None:
        out.lack(f"{stage}/fairness_index", reason)
    else:
        out.put(f"{stage}/fairness_index", index)


def _spread(out: _Numbers, prefix: str, scores: Mapping[str, float]) -> None:
    for name, statistic in fairness.STATISTICS.items():
        value = statistic(scores)
        if value is None:
            out.lack(f"{prefix}/{name}", "every group has score 0")
        else:
            out.put(f"{prefix}/{name}", value)
    out.put(f"{prefix}/worst_group", fairness.worst_group(scores))


def _index(facts: Facts, made: StageFacts) -> tuple[float | None, str]:
    if not made.items:
        return None, "per-question scores were not sent (score.items)"
    index = fairness.fairness_index(_counted(facts, made), facts.counted)
    return index.value, index.reason


def _counted(facts: Facts, made: StageFacts) -> dict[str, dict[str, float]]:
    """Return question to group to score, without silent groups."""
    if not facts.silent:
        return {q: dict(scores) for q, scores in made.items.items()}
    kept = {
        q: {g: s for g, s in scores.items() if g in facts.counted}
        for q, scores in made.items.items()
    }
    return {q: scores for q, scores in kept.items() if scores}


def _reference(out: _Numbers, facts: Facts, name: str) -> None:
    reference = facts.references[name]
    for group, score in reference.scores.items():
        out.put(f"reference/{name}/group/{group}/score", score)
    scores = {g: s for g, s in reference.scores.items() if g in facts.counted}
    without = [g for g in facts.counted if g not in scores]
    if without or not scores:
        reason = reference.note or f"no value for {', '.join(without)}"
        out.lack(f"reference/{name}/average", reason)
        return
    out.put(f"reference/{name}/average", fairness.average(scores))
    out.put(f"reference/{name}/worst", fairness.worst(scores))
    if reference.fairness_index is not None and not facts.silent:
        out.put(f"reference/{name}/fairness_index", reference.fairness_index)


def _attained(out: _Numbers, name: str) -> None:
    """(shared - base) / (optimum - base), each for the optimum made for that quantity."""
    keys = (f"base/{name}", f"shared/{name}", f"reference/optimum_{name}/{name}")
    absent = [k for k in keys if k not in out]
    if absent:
        out.lack(f"attained/{name}", f"needs {', '.join(absent)}")
        return
    base, shared, optimum = (out[k] for k in keys)
    if optimum - base < LEAST_ROOM:
        reason = f"the optimum is only {optimum - base:.4f} above the base"
        out.lack(f"attained/{name}", reason)
        return
    out.put(f"attained/{name}", (shared - base) / (optimum - base))


def _intervals(out: _Numbers, facts: Facts) -> None:
    """Put ``/low`` and ``/high`` beside each number that rests on per-question scores."""
    seed = int(facts.setting("run.seed", 0))
    items = {}
    for stage, made in facts.stages.items():
        counted = _counted(facts, made)
        covered = {g for scores in counted.values() for g in scores}
        if f"{stage}/average" not in out or not counted:
            continue
        if len(counted) < LEAST_QUESTIONS or covered != set(facts.counted):
            reason = f"{len(counted)} questions of {len(covered)} groups have scores; "
            out.lack(f"{stage}/average/low", reason + f"{LEAST_QUESTIONS} of every group needed")
            continue
        items[stage] = counted
        for name, interval in intervals.bootstrap_questions(counted, seed).items():
            if f"{stage}/{name}" in out:
                _interval(out, f"{stage}/{name}", interval)
    if "base" not in items or "shared" not in items:
        return
    if {q: set(s) for q, s in items["base"].items()} != {
        q: set(s) for q, s in items["shared"].items()
    }:
        out.lack("change/average", "base and shared were not scored on the same questions")
        return
    change = intervals.bootstrap_difference(items["shared"], items["base"], seed)
    for name in ("average", "worst"):
        if name in change:
            out.put(f"change/{name}", out[f"shared/{name}"] - out[f"base/{name}"])
            _interval(out, f"change/{name}", change[name])


def _interval(out: _Numbers, name: str, interval: intervals.Interval) -> None:
    out.put(f"{name}/low", interval.low)
    out.put(f"{name}/high", interval.high)


def _status(out: _Numbers, facts: Facts) -> None:
    """A run that finished but no longer answers (low option mass) has failed."""
    status, _, reason = str(facts.run.get("status", "running")).partition(": ")
    least = float(facts.setting("score.min-option-mass", 0.9))
    mass = out.get("shared/option_mass")
    if status != "running" and mass is not None and mass < least:
        status = "failed"
        reason = f"{facts.mass_name} {mass:.3f} is below {least:g}; " + (
            "the model no longer answers with one of the options, so its scores mean nothing"
            if facts.mass_name == "option mass"
            else "too many of its texts are no answer, so its scores mean little"
        )
    out.put("run/status", status)
    if reason:
        out.put("run/status_reason", reason)
