"""What a study on real data says: scores on seen and unseen questions, beside untrained answerers.

*Unseen* is the test split, *seen* the training split, both scored with the base and with the final
shared adapter.  The untrained answerers are

- *uniform*: the same probability for every option (pairs: 1/2);
- *mean of groups*: for each question the mean of the groups' own shares (pairs: the majority of the
  groups' mean shares).  It looks at the answers it is scored on: an oracle, not a rival;
- *optimum*: the best shared answer, one for the average and another for the worst group.

Intervals are 95 % t intervals over seeds, of means or of paired differences.  Seeds split the same
questions anew, so their test sets overlap and the intervals are, if anything, too narrow.
``worst`` is the minimum over groups and biased down by noise; ``worst_at_base`` is the score of the
group that was worst on validation at the untouched base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fedalign.errors import FedalignError
from fedalign.ledger import Ledger, ScoreRow
from fedalign.metrics.intervals import Interval, paired_difference
from fedalign.runfolder import LEDGER
from simulations.compare import Task
from simulations.comparison_report import mean_cell, verdict, worst_at_base, write_text
from simulations.references import references

SPLITS = {"seen": "train", "unseen": "test"}
METRICS = ("average", "worst", "worst_at_base")
ANSWERERS = {
    "base": "untouched base",
    "uniform_answerer": "uniform answerer",
    "mean_of_groups": "mean of groups (oracle)",
    "optimum": "attainable optimum (average and worst: different policies)",
}
TOO_FEW = "no interval (fewer than 3 seeds)"

Values = dict[str, float]
"""``<seen or unseen>/<metric>`` or ``.../group/<name>`` to value."""
Table = dict[str, dict[int, Values]]
"""Arm or answerer to seed to values.  ``uniform`` is an arm, ``uniform_answerer`` is none."""


@dataclass(frozen=True)
class Study:
    """What a reader must know of a study besides its figures."""

    name: str
    title: str
    data: str
    licence: str
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A trained arm minus something else, paired by seed."""

    arm: str
    against: str
    split: str
    metric: str
    interval: Interval | None
    verdict: str


def write_report(
    out: Path,
    study: Study,
    tasks: Sequence[Task],
    baseline: str,
    settings: Mapping[str, Mapping[str, object]],
) -> Path:
    """Write real_data.json and real_data.md into ``out``; return the page."""
    arms = list(dict.fromkeys(t.arm for t in tasks))
    table: Table = {arm: {} for arm in arms}
    for task in tasks:
        table[task.arm][task.seed] = run_values(Path(task.config.run.out), "shared")
    for task in tasks:
        if task.arm == baseline:  # the same for every arm of a seed
            for name, values in answerers(task).items():
                table.setdefault(name, {})[task.seed] = values
    comparisons = compare_arms(table, arms, baseline)
    statuses = {f"{t.arm}, seed {t.seed}": _status(t) for t in tasks}
    clients = client_facts(tasks)
    data = {
        "study": asdict(study),
        "settings": settings,
        "baseline": baseline,
        "values": {a: {str(s): v for s, v in by.items()} for a, by in table.items()},
        "comparisons": [asdict(c) for c in comparisons],
        "statuses": statuses,
        "clients": clients,
    }
    write_text(out / "real_data.json", json.dumps(data, indent=1, sort_keys=True) + "\n")
    page = out / "real_data.md"
    write_text(page, _page(study, settings, table, arms, baseline, comparisons, statuses, clients))
    return page


def run_values(folder: Path, stage: str) -> Values:
    """Return what one run scored at ``base`` or ``shared``, on both splits.

    Keys: ``<split>/average``, ``/worst``, ``/worst_at_base``, ``/group/<name>`` and, for survey
    data, ``/option_mass``.  Raises ``FedalignError`` when a client has no score.
    """
    watched = worst_at_base(folder)
    values: Values = {}
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        for name, split in SPLITS.items():
            rows = ledger.scores(stage, split)
            failed = [r.client for r in rows if r.score is None]
            if failed or not rows:
                raise FedalignError(
                    f"{folder}: no {split} score at stage '{stage}' for {failed or 'any client'}; "
                    "the study needs score.seen = true and a score of every client."
                )
            values |= _summarised(name, _by_group(rows, "score"), watched)
            masses = _by_group(rows, "option_mass")
            if masses and rows[0].metric != "pair_accuracy":  # pairs have no options
                values[f"{name}/option_mass"] = float(np.mean(list(masses.values())))
    return values


def answerers(task: Task) -> dict[str, Values]:
    """Return what needs no training, for the seed of a task: answerer to values."""
    from clients.store import population

    folder = Path(task.config.run.out)
    watched = worst_at_base(folder)
    clients = population(task.config)
    found: dict[str, Values] = {"base": run_values(folder, "base")}
    for name, split in SPLITS.items():
        asked = [replace(c, test=c.split(split)) for c in clients]
        scores: dict[str, dict[str, float]] = {}
        for row in references(task.config, asked):
            if row.group and row.value is not None:
                scores.setdefault(row.name, {})[row.group] = row.value
        for key, reference in (("uniform_answerer", "uniform"), ("mean_of_groups",) * 2):
            found.setdefault(key, {}).update(_summarised(name, scores[reference], watched))
        found.setdefault("optimum", {})[f"{name}/average"] = float(
            np.mean(list(scores["optimum_average"].values()))
        )
        found["optimum"][f"{name}/worst"] = min(scores["optimum_worst"].values())
    return found


def compare_arms(table: Table, arms: Sequence[str], baseline: str) -> list[Comparison]:
    """Compare the other arms with the baseline, and every arm with the untrained answerers."""
    out = []
    for arm in arms:
        others = (baseline,) if arm != baseline else ()
        for against in (*others, "base", "uniform_answerer", "mean_of_groups"):
            for name in (f"{split}/{metric}" for split in SPLITS for metric in METRICS):
                interval = paired_difference(
                    {s: v[name] for s, v in table[arm].items()},
                    {s: v[name] for s, v in table[against].items()},
                )
                said = TOO_FEW if interval is None else verdict([interval.low], [interval.high])
                split, metric = name.split("/")
                out.append(Comparison(arm, against, split, metric, interval, said))
    return out


def client_facts(tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Return group -> means over seeds: questions by split, and weight by arm (mean of rounds)."""
    found: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        with Ledger(Path(task.config.run.out) / LEDGER, readonly=True) as ledger:
            for c in ledger.clients():
                group = found.setdefault(c.group, {})
                group.setdefault("seen", []).append(c.train)
                group.setdefault("unseen", []).append(c.test)
            for w in ledger.weights():
                if w.weight is not None:
                    found[w.group].setdefault(f"weight/{task.arm}", []).append(w.weight)
    return {
        g: {k: float(np.mean(v)) for k, v in sorted(facts.items())}
        for g, facts in sorted(found.items())
    }


def _by_group(rows: Sequence[ScoreRow], quantity: str) -> dict[str, float]:
    """Return the mean of a column over a group's clients, each counted by its questions."""
    totals: dict[str, tuple[float, int]] = {}
    for row in rows:
        value = row.score if quantity == "score" else row.option_mass
        if value is not None:
            total, n = totals.get(row.group, (0.0, 0))
            totals[row.group] = (total + value * row.n, n + row.n)
    return {group: total / n for group, (total, n) in sorted(totals.items())}


def _summarised(split: str, groups: Mapping[str, float], watched: str) -> Values:
    return {
        f"{split}/average": float(np.mean(list(groups.values()))),
        f"{split}/worst": min(groups.values()),
        f"{split}/worst_at_base": groups[watched],
        **{f"{split}/group/{g}": score for g, score in groups.items()},
    }


def _status(task: Task) -> str:
    with Ledger(Path(task.config.run.out) / LEDGER, readonly=True) as ledger:
        return str(ledger.run()["status"])


# --- the page -------------------------------------------------------------------------------------


def _page(
    study: Study,
    settings: Mapping[str, Mapping[str, object]],
    table: Table,
    arms: Sequence[str],
    baseline: str,
    comparisons: Sequence[Comparison],
    statuses: Mapping[str, str],
    clients: Mapping[str, Mapping[str, float]],
) -> str:
    run = settings["run"]
    failed = {name: s for name, s in statuses.items() if s != "completed"}
    lines = [
        f"# {study.title}",
        "",
        study.data,
        "",
        f"{len(table[baseline])} seeds; {run['run.rounds']} rounds of {run['local.steps']} steps; "
        f"score {run['score.metric']}, higher is better; labels {run['local.labels']}, reference "
        f"{run['local.reference']}, beta {run['local.beta']}; temperature "
        f"{run['weights.temperature']}, decay {run['weights.decay']}; aggregation "
        f"{run['aggregation.method']}. "
        f"{len(statuses) - len(failed)} of {len(statuses)} runs completed.",
        *(f"- {name}: {status}" for name, status in failed.items()),
        "",
        study.licence,
    ]
    for split in ("unseen", "seen"):
        lines += ["", f"## {split.capitalize()} questions", "", *_scores(table, arms, split)]
    lines += [
        "",
        f"## Against the arm {baseline}",
        "",
        "Mean paired difference over seeds, [95 % t interval].",
        "",
        "| arm | questions | metric | difference | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {c.arm} | {c.split} | {c.metric} | {_cell(c.interval)} | {c.verdict} |"
            for c in comparisons
            if c.against == baseline
        ),
        "",
        f"## The arm {baseline} against untrained answerers",
        "",
        "| against | questions | metric | difference | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {ANSWERERS[c.against]} | {c.split} | {c.metric} | {_cell(c.interval)} "
            f"| {c.verdict} |"
            for c in comparisons
            if c.arm == baseline and c.metric != "worst_at_base"
        ),
        "",
        "## Groups, unseen questions",
        "",
        "Means over seeds. Weight: mean over rounds and seeds.",
        "",
        *_groups(table, arms, clients),
        "",
        "## Read with care",
        "",
        *(f"- {text}" for text in study.caveats),
        "- Seeds split the same questions anew, so their test sets overlap and the intervals are, "
        "if anything, too narrow.",
        "",
    ]
    return "\n".join(lines)


def _scores(table: Table, arms: Sequence[str], split: str) -> list[str]:
    columns = (*METRICS, "option_mass")
    lines = ["| | average | worst group | worst at base | option mass |", "|---|---|---|---|---|"]
    for key in (*arms, *ANSWERERS):
        cells = [
            mean_cell(found) if found else "-"
            for found in (
                [v[f"{split}/{m}"] for v in table[key].values() if f"{split}/{m}" in v]
                for m in columns
            )
        ]
        title = f"*{ANSWERERS[key]}*" if key in ANSWERERS else key
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _groups(
    table: Table, arms: Sequence[str], clients: Mapping[str, Mapping[str, float]]
) -> list[str]:
    answered = ("base", "uniform_answerer", "mean_of_groups")
    head = [
        "group",
        "seen",
        "unseen",
        *(ANSWERERS[a] for a in answered),
        *arms,
        *(f"weight {a}" for a in arms),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group, facts in clients.items():
        scores = [
            float(np.mean([v[f"unseen/group/{group}"] for v in table[key].values()]))
            for key in (*answered, *arms)
        ]
        cells = [f"{facts['seen']:.0f}", f"{facts['unseen']:.0f}"]
        cells += [f"{x:.3f}" for x in (*scores, *(facts[f"weight/{a}"] for a in arms))]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return lines


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "no interval"
    return f"{interval.centre:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
