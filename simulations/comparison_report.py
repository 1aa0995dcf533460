"""What a comparison says: means, paired differences, two kinds of interval, a plot, plain words.

For each arm and metric: mean over seeds with a t interval.  For each arm against the baseline: the
mean paired difference with (a) a t interval over seeds and (b) a bootstrap interval over questions
(one resample of questions for both arms and all groups, differences averaged over seeds).  A
difference counts as *within noise* unless both intervals exclude 0 (option mass and
``worst_at_base`` have an interval over seeds only); with fewer than 3 seeds there is no interval
over seeds and no verdict, and every seed's value is shown.

``worst`` is the minimum over groups on test, which is biased down by noise.  Beside it stands
``worst_at_base``: the test score of the group that was worst on *validation* at the untouched base,
the same group for all arms of a seed and chosen without looking at test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedalign.config import Config, resolve_metric, resolve_reward, to_flat
from fedalign.ledger import Ledger
from fedalign.metrics.intervals import Interval, bootstrap_difference, paired_difference
from fedalign.runfolder import LEDGER, SUMMARY
from simulations.comparison_plot import plot
from simulations.seed_text import NO_INTERVAL, TOO_FEW, change_cell, mean_cell, too_few

__all__ = [
    "NOISE",
    "Difference",
    "Run",
    "mean_cell",
    "verdict",
    "worst_at_base",
    "write_comparison",
    "write_text",
]

METRICS = ("average", "worst", "worst_at_base", "fairness_index", "gap", "option_mass")
SHOWN = ("average", "worst", "worst_at_base", "fairness_index", "option_mass")
NOISE = "within noise"
DRAWS = 1000


@dataclass(frozen=True)
class Run:
    """One finished run."""

    arm: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class Difference:
    """One arm minus a baseline, for one metric."""

    arm: str
    baseline: str
    metric: str
    seeds: Interval | None
    """95 % t interval over seeds; None with fewer than 3."""
    points: tuple[float, ...]
    """The difference of each seed, in order of seeds."""
    questions: tuple[float, float] | None
    """95 % bootstrap interval over questions, mean over seeds."""
    verdict: str


def write_comparison(
    out: Path, runs: Sequence[Run], baselines: Sequence[str], config: Config, scenario: str
) -> Path:
    """Write comparison.json, comparison.svg, comparison.md into ``out``; return the page."""
    table = {arm: _by_seed([r for r in runs if r.arm == arm]) for arm in _arms(runs)}
    items = {(r.arm, r.seed): _items(r.folder) for r in runs}
    differences = [
        _difference(table, items, arm, baseline, metric)
        for baseline in baselines
        for arm in table
        if arm != baseline
        for metric in METRICS
        if all(metric in values for values in (*table[arm].values(), *table[baseline].values()))
    ]
    extra = {arm: _extras([r for r in runs if r.arm == arm]) for arm in table}
    data = {
        "scenario": scenario,
        "baselines": list(baselines),
        "settings": to_flat(config),
        "seeds": sorted({r.seed for r in runs}),
        "values": {a: {str(s): v for s, v in by.items()} for a, by in table.items()},
        "extras": extra,
        "differences": [asdict(d) for d in differences],
    }
    write_text(out / "comparison.json", json.dumps(data, indent=1, sort_keys=True))
    plot(out / "comparison.svg", table, extra)
    page = out / "comparison.md"
    write_text(page, _page(table, extra, differences, baselines, config, scenario))
    return page


def _arms(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(r.arm for r in runs))


def _by_seed(runs: Sequence[Run]) -> dict[int, dict[str, float]]:
    return {r.seed: _values(r.folder) for r in runs}


def _values(folder: Path) -> dict[str, float]:
    """Return the shared adapter's test metrics of one run."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    values = {
        m: float(summary[f"shared/{m}"])
        for m in METRICS
        if isinstance(summary.get(f"shared/{m}"), float)
    }
    group = worst_at_base(folder)
    key = f"shared/group/{group}/score"
    if key in summary:
        values["worst_at_base"] = float(summary[key])
    return values


def worst_at_base(folder: Path) -> str:
    """Return the group with the lowest validation score of the untouched base."""
    totals: dict[str, tuple[float, int]] = {}
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        for row in ledger.scores("base", "validation"):
            if row.score is not None:
                total, n = totals.get(row.group, (0.0, 0))
                totals[row.group] = (total + row.score * row.n, n + row.n)
    return min(sorted(totals), key=lambda g: totals[g][0] / totals[g][1])


def _extras(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return base, uniform, optimum and attained shares, by seed, where they are defined."""
    names = (
        "base/average",
        "base/worst",
        "reference/uniform/average",
        "reference/uniform/worst",
        "reference/mean_of_groups/average",
        "reference/mean_of_groups/worst",
        "reference/optimum_average/average",
        "reference/optimum_worst/worst",
        "attained/average",
        "attained/worst",
    )
    out: dict[str, dict[str, float]] = {}
    for run in runs:
        summary = json.loads((run.folder / SUMMARY).read_text(encoding="utf-8"))
        for name in names:
            if isinstance(summary.get(name), float):
                out.setdefault(name, {})[str(run.seed)] = float(summary[name])
    return out


def _items(folder: Path) -> dict[str, dict[str, float]]:
    """Return question -> group -> test score of the shared adapter."""
    found: dict[str, dict[str, list[float]]] = {}
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        for row in ledger.items("shared", "test"):
            found.setdefault(row.question, {}).setdefault(row.group, []).append(row.score)
    return {q: {g: float(np.mean(v)) for g, v in by.items()} for q, by in found.items()}


def _difference(
    table: Mapping[str, Mapping[int, Mapping[str, float]]],
    items: Mapping[tuple[str, int], dict[str, dict[str, float]]],
    arm: str,
    baseline: str,
    metric: str,
) -> Difference:
    a = {s: v[metric] for s, v in table[arm].items()}
    b = {s: v[metric] for s, v in table[baseline].items()}
    seeds = paired_difference(a, b)
    points = tuple(a[s] - b[s] for s in sorted(a))
    questions = _question_interval(items, sorted(a), arm, baseline, metric)
    if seeds is None:
        return Difference(arm, baseline, metric, None, points, questions, NO_INTERVAL)
    lows, highs = [seeds.low], [seeds.high]
    if questions is not None:
        lows.append(questions[0])
        highs.append(questions[1])
    word = verdict(lows, highs, metric != "gap")
    return Difference(arm, baseline, metric, seeds, points, questions, word)


def verdict(lows: Sequence[float], highs: Sequence[float], higher_is_better: bool = True) -> str:
    """Return ``better`` or ``worse`` when every interval excludes 0 on one side, else NOISE."""
    if min(lows) > 0:
        return "better" if higher_is_better else "worse"
    if max(highs) < 0:
        return "worse" if higher_is_better else "better"
    return NOISE


def _question_interval(
    items: Mapping[tuple[str, int], dict[str, dict[str, float]]],
    seeds: Sequence[int],
    arm: str,
    baseline: str,
    metric: str,
) -> tuple[float, float] | None:
    """Average the seeds' question intervals: each seed asks its own test questions."""
    lows, highs = [], []
    for seed in seeds:
        a, b = items[(arm, seed)], items[(baseline, seed)]
        if not a or {q: set(x) for q, x in a.items()} != {q: set(x) for q, x in b.items()}:
            return None
        found = bootstrap_difference(a, b, seed, DRAWS).get(metric)
        if found is None:
            return None
        lows.append(found.low - found.centre)
        highs.append(found.high - found.centre)
    centre = float(
        np.mean(
            [
                bootstrap_difference(items[(arm, s)], items[(baseline, s)], s, 1)[metric].centre
                for s in seeds
            ]
        )
    )
    # Half-widths add in quadrature, as if seeds asked different questions.  Test sets overlap and
    # questions resemble each other, so this interval is too narrow; the one over seeds binds.
    low = float(np.sqrt(np.sum(np.square(lows)))) / len(seeds)
    high = float(np.sqrt(np.sum(np.square(highs)))) / len(seeds)
    return centre - low, centre + high


def _page(
    table: Mapping[str, Mapping[int, Mapping[str, float]]],
    extra: Mapping[str, Mapping[str, Mapping[str, float]]],
    differences: Sequence[Difference],
    baselines: Sequence[str],
    config: Config,
    scenario: str,
) -> str:
    seeds = len(next(iter(table.values())))
    local, weights = config.local, config.weights
    metric = config.score.metric
    if metric == "auto":
        metric = "js_divergence (survey) or pair_accuracy (pairs)"
    if config.run.mode == "rewards":
        how = (
            f"{config.run.rounds} exchanges. Task {config.rewards.task}, reward "
            f"{resolve_reward(config)}, KL coefficient {config.ppo.kl:g}; score "
            f"{resolve_metric(config, 'survey')}. Arms are to be read beside their KL from the "
            "base, which is in each run's report."
        )
    else:
        how = (
            f"{config.run.rounds} rounds of {local.steps} steps. Score {metric}, labels "
            f"{local.labels}, reference {local.reference}, beta {local.beta:g}, aggregation "
            f"{config.aggregation.method}."
        )
    lines = [
        f"# Comparison: {scenario}",
        "",
        f"{len(table)} arms, {seeds} seeds, {how} "
        f"Temperature {weights.temperature:g}, decay {weights.decay:g} (unless the arm's name says "
        "otherwise). "
        "Test questions, shared adapter. ± is the 95 % t interval over seeds.",
        "",
        *([TOO_FEW, ""] if too_few(seeds) else []),
        "| arm | " + " | ".join(SHOWN) + " | attained average | attained worst |",
        "|---" * (len(SHOWN) + 3) + "|",
    ]
    for arm, by_seed in table.items():
        cells = [mean_cell([v[m] for v in by_seed.values() if m in v]) for m in SHOWN]
        cells += [
            mean_cell(list(extra[arm].get(f"attained/{n}", {}).values()), 2)
            for n in ("average", "worst")
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    first = next(iter(extra.values()))
    for name, title in (
        ("base", "untouched base"),
        ("reference/uniform", "uniform answerer"),
        ("reference/mean_of_groups", "mean of groups (oracle)"),
    ):
        if f"{name}/average" in first:
            average = mean_cell(list(first[f"{name}/average"].values()))
            worst = mean_cell(list(first[f"{name}/worst"].values()))
            lines.append(f"| *{title}* | {average} | {worst} |" + " |" * len(SHOWN))
    best_average = first.get("reference/optimum_average/average")
    best_worst = first.get("reference/optimum_worst/worst")
    if best_average and best_worst:
        lines.append(
            "| *attainable optimum (average and worst: different policies)* | "
            f"{mean_cell(list(best_average.values()))} | {mean_cell(list(best_worst.values()))} |"
            + " |"
            * len(SHOWN)
        )
    lines += _low_mass(table, config.score.min_option_mass)
    lines += [
        "",
        "Below: mean paired difference, (each seed's) or [95 % over seeds], {95 % over questions}. "
        "A difference counts only when both intervals (where there are two) exclude 0.",
    ]
    for baseline in baselines:
        lines += _against(baseline, [d for d in differences if d.baseline == baseline])
    lines += ["", "![average against worst group](comparison.svg)", ""]
    return "\n".join(lines)


def _low_mass(table: Mapping[str, Mapping[int, Mapping[str, float]]], least: float) -> list[str]:
    """Name the arms with runs below the option-mass limit: those runs count as failed."""
    lines = []
    for arm, by_seed in table.items():
        low = [s for s, v in sorted(by_seed.items()) if v.get("option_mass", 1.0) < least]
        if low:
            seeds = ", ".join(map(str, low))
            lines.append(
                f"- {arm}: {len(low)} of {len(by_seed)} runs (seeds {seeds}) end with option mass "
                f"below {least:g} and count as failed; the means above include them."
            )
    return ["", *lines] if lines else []


def _against(baseline: str, differences: Sequence[Difference]) -> list[str]:
    lines = [
        "",
        f"## Against {baseline}",
        "",
        "| arm | metric | difference | verdict |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {d.arm} | {d.metric} | {_difference_cell(d)} | {d.verdict} |" for d in differences
    ]
    clear = [d for d in differences if d.verdict in ("better", "worse")]
    noise: dict[str, list[str]] = {}
    for d in differences:
        if d.verdict == NOISE:
            noise.setdefault(d.arm, []).append(d.metric)
    lines += ["", "In words:", ""]
    lines += [
        f"- {d.arm} is {d.verdict} than {baseline} on {d.metric}: "
        f"{d.seeds.centre:+.4f} [{d.seeds.low:+.4f}, {d.seeds.high:+.4f}]."
        for d in clear
        if d.seeds is not None
    ]
    lines += [
        f"- {arm} and {baseline}: no difference beyond noise on {', '.join(metrics)}."
        for arm, metrics in noise.items()
    ]
    if any(d.seeds is None for d in differences):
        lines.append("- Nothing can be said: fewer than 3 seeds give no interval over seeds.")
    elif not clear:
        lines.append("- No difference is measurable at this size.")
    return lines


def _difference_cell(d: Difference) -> str:
    questions = "" if d.questions is None else f" {{{d.questions[0]:+.4f}, {d.questions[1]:+.4f}}}"
    return change_cell(d.seeds, d.points, 4) + questions


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
