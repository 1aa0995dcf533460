"""The page of the reproduction: reproduction.md, .json and .svg, from the ledgers alone.

Every figure and every sentence about a result follows from the numbers by the rules in
``reproduction_values.py`` (intervals, shares explained), ``reproduction_claims.py`` (verdicts),
``reproduction_words.py``, ``reproduction_answer.py`` (the first screen) and
``reproduction_trust.py`` (plain words).  What was published and left open is in
``reproduction_context.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedalign.config import Config, to_flat
from simulations import reproduction_context as context
from simulations.comparison_report import write_text
from simulations.reproduce import Planned
from simulations.reproduce_arms import CONTROLS, arms_of
from simulations.reproduce_parts import PARTS
from simulations.reproduction_answer import answer
from simulations.reproduction_claims import (
    SMALLEST,
    Verdict,
    judge,
    published_setting,
)
from simulations.reproduction_plot import plot
from simulations.reproduction_tables import COMPARED, EXPLAINED, closed_table, part_tables
from simulations.reproduction_trust import trust
from simulations.reproduction_values import (
    ArmResult,
    Difference,
    Key,
    Study,
    difference,
    explained,
    load,
)
from simulations.reproduction_words import plain_words, text, where
from simulations.seed_text import TOO_FEW, too_few

NAME = "reproduction"


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
        *_opening(study),
        *answer(study),
        *trust(study),
        *_settings(base, study, seeds, skipped),
        *_plain(study, verdicts),
        *_claims(verdicts),
        *part_tables(study, differences, shares),
        *_figure(),
        *closed_table(study),
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


def _opening(study: Study) -> list[str]:
    real = any(published_setting(a.config) for arms in study.values() for a in arms.values())
    standing = (
        "Some runs below use a published model on the published data; a verdict on those says "
        "*reproduced*. All others *demonstrate*."
        if real
        else "No run below uses a published model on the published data. So nothing here "
        "reproduces a published figure: these runs *demonstrate* whether the mechanism does what "
        "was claimed, and what else could have done it."
    )
    return ["# Aggregating group rewards: the published comparison, with controls", "", standing]


def _settings(
    base: Config, study: Study, seeds: Sequence[int], skipped: Sequence[str]
) -> list[str]:
    few = too_few(len(seeds)) or any(
        too_few(len(arm.values)) for arms in study.values() for arm in arms.values()
    )
    lines = [
        "",
        "## What these numbers stand on",
        *(["", TOO_FEW] if few else []),
        "",
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}. Model `{_model(base)}`, data "
        f"`{base.data.source}` (world {base.data.world}), {base.run.rounds} exchanges of "
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
        shown = "<br>".join(f"{d.arm} - {d.against}, {d.metric}: {text(d)}" for d in v.differences)
        note = f" ({v.note})" if v.note else ""
        lines.append(
            f"| {v.claim.text} | {v.claim.source} | {where(v.key)} | {shown} | **{v.word}**{note} |"
        )
    if not verdicts:
        lines.append("| no claim could be judged: its arms were not run | | | | |")
    return lines


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
