"""The page of the reproduction: reproduction.md, .json and .svg, from the ledgers alone.

Every figure and every sentence about a result follows from the numbers by the rules in
``reproduction_values.py`` (intervals, shares explained) and ``reproduction_claims.py`` (verdicts,
plain words).  What was published and left open is in ``reproduction_context.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedalign.config import Config, resolve_reward, to_flat
from fedalign.metrics.intervals import Interval
from simulations import reproduction_context as context
from simulations.comparison_report import mean_cell, write_text
from simulations.reproduce import Planned
from simulations.reproduce_arms import CONTROLS, arms_of
from simulations.reproduce_parts import PARTS
from simulations.reproduction_claims import (
    SMALLEST,
    Verdict,
    judge,
    plain_words,
    published_setting,
    text,
)
from simulations.reproduction_plot import plot
from simulations.reproduction_values import (
    BASE,
    ArmResult,
    Difference,
    Explained,
    Key,
    Study,
    difference,
    explained,
    load,
    with_base,
)

NAME = "reproduction"
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


def write_reproduction(
    out: Path, base: Config, runs: Sequence[Planned], skipped: Sequence[str]
) -> Path:
    """Write reproduction.json, .svg and .md into ``out``; return the page."""
    study = load(runs)
    verdicts = judge(study)
    differences = [d for key in study for d in part_differences(key, study[key])]
    shares = {
        key: [e for m in EXPLAINED for c in CONTROLS if (e := explained(study[key], c, m))]
        for key in study
    }
    seeds = sorted({r.seed for r in runs})
    data = {
        "settings": to_flat(base),
        "seeds": seeds,
        "parts": list(dict.fromkeys(r.part for r in runs)),
        "skipped": list(skipped),
        "arms": [
            {
                "part": part,
                "task": task,
                "arm": name,
                "values": {str(s): v for s, v in arm.values.items()},
                "failed": {str(s): why for s, why in arm.failed.items()},
                "low_option_mass": list(arm.low_mass),
            }
            for (part, task), arms in study.items()
            for name, arm in arms.items()
        ],
        "differences": [asdict(d) for d in differences],
        "explained": [
            {"part": p, "task": t, **asdict(e)} for (p, t), made in shares.items() for e in made
        ],
        "verdicts": [
            {
                "claim": v.claim.text,
                "source": v.claim.source,
                "part": v.key[0],
                "task": v.key[1],
                "verdict": v.word,
                "note": v.note,
                "differences": [asdict(d) for d in v.differences],
            }
            for v in verdicts
        ],
    }
    write_text(
        out / f"{NAME}.json", json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    plot(out / f"{NAME}.svg", study)
    page = out / f"{NAME}.md"
    lines = [
        *_opening(base, study, seeds, skipped),
        *_plain(study, verdicts),
        *_claims(verdicts),
        *_parts(study, differences, shares),
        *_figure(),
        *_closed(study),
        *context.beside_published(study),
        *context.left_open(base, seeds),
        *context.reviewers(study),
        *context.failures(study),
        *context.reasons(study),
    ]
    write_text(page, "\n".join(lines) + "\n")
    return page


def part_differences(key: Key, arms: Mapping[str, ArmResult]) -> list[Difference]:
    """Return each arm against its own baselines, on every metric that both have."""
    part = PARTS[key[0]]
    against = {a.name: a.against or part.against for a in arms_of(part, key[1])}
    return [
        difference(key, arms, name, other, metric)
        for name in arms
        for other in against[name]
        if other != name and other in arms
        for metric in COMPARED
        if arms[name].of(metric) and arms[other].of(metric)
    ]


def _opening(base: Config, study: Study, seeds: Sequence[int], skipped: Sequence[str]) -> list[str]:
    real = any(published_setting(a.config) for arms in study.values() for a in arms.values())
    standing = (
        "Some runs below use a published model on the published data; a verdict on those says "
        "*reproduced*. All others *demonstrate*."
        if real
        else "No run below uses a published model on the published data. So nothing here "
        "reproduces a published figure: these runs *demonstrate* whether the mechanism does what "
        "was claimed, and what else could have done it."
    )
    lines = [
        "# Aggregating group rewards: the published comparison, with controls",
        "",
        standing,
        "",
        f"{len(seeds)} seeds. Model `{_model(base)}`, data `{base.data.source}` "
        f"(world {base.data.world}), {base.run.rounds} exchanges of "
        f"{base.ppo.minibatches} x {base.ppo.questions} questions x {base.ppo.samples} texts, "
        f"KL coefficient {base.ppo.kl:g}, temperature {base.weights.temperature:g}, decay "
        f"{base.weights.decay:g}, fairness threshold {base.rewards.fairness_threshold:g}, unless "
        "a part or an arm says otherwise. Test questions. ± and [ ] are 95 % t intervals over "
        "seeds, of means and of paired differences; fewer than 3 seeds give none. KL is in nats a "
        "text, from the base to the final policy, exact on the test questions for letters and "
        "orders.",
    ]
    if skipped:
        lines += ["", f"Left out: {', '.join(skipped)} (no data given)."]
    return lines


def _model(config: Config) -> str:
    return Path(config.model.name).name if "/" in config.model.name else config.model.name


def _plain(study: Study, verdicts: Sequence[Verdict]) -> list[str]:
    return ["", "## In plain words", "", *(f"- {s}" for s in plain_words(study, verdicts))]


def _claims(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        "",
        "## Claims",
        "",
        "A claim holds when the interval of every difference it names lies on the claimed side of "
        f"0. It fails when one does not and the interval rules out {SMALLEST:g}, the smallest "
        "difference that was published. It is not decidable otherwise, with fewer than 3 seeds, or "
        "when runs failed.",
        "",
        "| claim | source | task | difference | verdict |",
        "|---|---|---|---|---|",
    ]
    for v in verdicts:
        shown = "<br>".join(
            f"{d.arm} - {d.against}, {d.metric}: {text(d.interval)}" for d in v.differences
        )
        note = f" ({v.note})" if v.note else ""
        place = v.key[1] if v.key[0] != "countries" else f"{v.key[1]}, countries"
        lines.append(
            f"| {v.claim.text} | {v.claim.source} | {place} | {shown} | **{v.word}**{note} |"
        )
    if not verdicts:
        lines.append("| no claim could be judged: its arms were not run | | | | |")
    return lines


def _parts(
    study: Study,
    differences: Sequence[Difference],
    shares: Mapping[Key, Sequence[Explained]],
) -> list[str]:
    lines: list[str] = []
    for key, arms in study.items():
        part = PARTS[key[0]]
        lines += ["", f"## {part.title}: {key[1]}", "", f"{_sentence(part.why)} {_score(arms)}"]
        lines += ["", *_table(arms), *_low(arms)]
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
        cells = [_cell(list(arm.of(m).values()), m) for m in columns]
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
            value = "–" if cell is None else text(cell.interval)
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
            whole = next(iter(own.values())).difference
            cells = [_share(own[c].share) if c in own else "–" for c in CONTROLS]
            lines.append(f"| {COLUMNS[metric]} | {text(whole)} | {' | '.join(cells)} |")
    return lines


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "not defined"
    return f"{interval.centre:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _figure() -> list[str]:
    return [
        "",
        "## Alignment against KL",
        "",
        "A rule that changes the scale of the reward moves along this axis without favouring "
        "anybody; a rule that serves a group better at the same KL lies above the others.",
        "",
        f"![alignment against KL, all runs]({NAME}.svg)",
    ]


def _closed(study: Study) -> list[str]:
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
