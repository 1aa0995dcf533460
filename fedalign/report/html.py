"""Build ``report.html`` and ``summary.json`` of a run folder from its ledger alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalign.export import public_base_name
from fedalign.ledger import Ledger
from fedalign.metrics.alignment import SCORE_LOW
from fedalign.report import plots, policy, tables
from fedalign.report.facts import Facts, gather
from fedalign.report.summary import summarise_facts, write_summary, write_text
from fedalign.report.template import PAGE, STYLE
from fedalign.report.verdict import judge, signed
from fedalign.report.wording import (
    READING,
    REWARD_READING,
    REWARD_WORDS,
    SAMPLED,
    SCORE_TEXTS,
    WORDS,
)
from fedalign.runfolder import LEDGER, REPORT, SUMMARY

HIGHLIGHTED = 8
"""Lines that get a colour and a label; more would not be told apart."""
SHOWN_EVENTS = 60
SHOWN_MISSING = 60
"""Longer lists are cut on the page; ``summary.json`` and the ledger have all of them."""
PATHS = (
    "data.path",
    "run.out",
    "model.name",
    "local.reference",
    "rewards.prompts",
    "deployment.registry",
    "deployment.audit",
)
"""Settings of which a page shows the last component only."""


def build_report(run_folder: Path) -> Path:
    """Write ``report.html`` and ``summary.json`` into the run folder; return the page's path.

    Works on a finished, a failed and a running run.  Raises ``FedalignError`` when the folder holds
    no ledger or cannot be written.
    """
    with Ledger(run_folder / LEDGER, readonly=True) as ledger:
        facts = gather(ledger)
    summary = summarise_facts(facts)
    page = run_folder / REPORT
    write_text(page, render(facts, summary))
    write_summary(run_folder / SUMMARY, summary)
    return page


def render(facts: Facts, summary: Mapping[str, Any]) -> str:
    """Return the page as text."""
    import jinja2
    from markupsafe import Markup

    low = SCORE_LOW.get(facts.metric, 0.0)
    config = facts.run.get("config", {})
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False
    )
    environment.filters["number"] = lambda x, digits: f"{x:.{digits}f}".replace("-", "−")
    environment.filters["signed"] = signed
    environment.filters["width"] = lambda x: f"{100 * min(1, max(0, (x - low) / (1 - low))):.1f}"
    drawings = {
        name: {"wide": Markup(d.wide), "narrow": Markup(d.narrow)} if d else None
        for name, d in _drawings(facts, summary).items()
    }
    _, hidden = _dumbbell_rows(facts)
    optimum = facts.references["optimum_average"]
    has_personal = "personal" in facts.stages
    others = [n for n in ("local_only", "local_only_total") if n in facts.stages]
    columns = ["base", "shared", "change"]
    columns += ["personal"] if has_personal else []
    columns += [tables.STAGE_NAMES[n] for n in others]
    columns += [
        "uniform answerer",
        "best for average",
        facts.mass_name,
        "claimed size",
        "clients",
    ]
    return environment.from_string(PAGE).render(
        style=Markup(STYLE),
        title=_title(facts),
        subtitle=_subtitle(facts),
        verdict=judge(facts, summary),
        cards=tables.cards(facts, summary),
        facts_list=_what_run(facts),
        has_optimum=bool(optimum.scores),
        optimum_note="" if not optimum.note else (
            optimum.note if optimum.scores else f"not defined ({optimum.note})"
        ),
        has_personal=has_personal,
        hidden=hidden,
        score_text=f"Score: {_score_text(facts)}",
        score_low=low,
        columns=[*columns, "test questions"],
        words=WORDS if facts.policy is None else REWARD_WORDS,
        policy_rows=policy.training_rows(facts.policy, config) if facts.policy else (),
        closed_rows=policy.closed_rows(facts.policy) if facts.policy else (),
        closed_note=facts.policy.closed_note if facts.policy else "",
        threshold=_threshold(facts) is not None,
        optimum_kl=facts.policy is not None and "kl_optimum" in facts.policy.closed_form,
        rows=tables.group_rows(facts, summary, others),
        others=max(0, len(facts.groups) - len(_highlight(facts))),
        loss_note="",
        fairness_columns=tables.fairness_columns(facts, summary),
        fairness=tables.fairness_rows(facts, summary),
        missing=summary["missing"][:SHOWN_MISSING],
        missing_count=len(summary["missing"]),
        failures=tables.failure_rows(facts),
        events=facts.events[-SHOWN_EVENTS:],
        event_count=len(facts.events),
        reading=READING if facts.policy is None else REWARD_READING,
        settings=[(k, _public(k, v)) for k, v in config.items()],
        seconds=[(k, f"{v:.1f} s") for k, v in facts.seconds.items()],
        **drawings,
    )  # fmt: skip


def _title(facts: Facts) -> str:
    title = f"Run {facts.setting('run.name', 'without a name')}"
    if facts.policy is not None:  # every run of the scenario has its name
        title += f": rule {facts.policy.rule}, task {facts.policy.task}"
    return title


def _subtitle(facts: Facts) -> str:
    parts = [
        f"{len(facts.groups)} groups, {sum(facts.clients.values())} clients",
        f"{len(facts.rounds)} of {facts.setting('run.rounds', '?')} {_time(facts)}s",
        f"seed {facts.setting('run.seed', '?')}",
    ]
    if facts.run.get("started"):
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.run["started"])))
    return " · ".join(parts)


def _what_run(facts: Facts) -> list[tuple[str, str]]:
    s = facts.setting
    model = public_base_name(str(s("model.name", "?")))
    if facts.run.get("parameters"):
        model += f", {facts.run['parameters']:,} parameters"
    adapter = f"LoRA rank {s('model.rank', '?')}, alpha {s('model.alpha', '?')}"
    if layout := facts.manifest.get("layout"):
        adapter += f", {sum(math.prod(shape) for _, shape in layout):,} parameters"
    if facts.policy is not None:
        return [
            ("Data", data_text(facts)),
            ("Model", model),
            ("Adapter", adapter),
            (
                "Mode",
                "rewards: the server trains one policy with PPO on what groups give its texts",
            ),
            ("Rule", policy.rule_text(facts.policy, facts.run.get("config", {}))),
            ("Rewards from", policy.sources(facts.run.get("config", {}))),
            ("Score", f"{facts.metric}: {_score_text(facts)}"),
        ]
    rule = f"{s('weights.rule', '?')}"
    if s("weights.rule") in ("adaptive", "placebo"):
        rule += f", temperature {s('weights.temperature'):g}"
    rule += f", history decay {s('weights.decay', 0.0):g}"
    if s("weights.rule") in ("adaptive", "placebo"):
        rule += f", floor {s('weights.floor'):g}/n, ceiling {s('weights.ceiling'):g}/n"
    if s("local.objective", "dpo") != "dpo":
        return [
            ("Data", data_text(facts)),
            ("Model", model),
            ("Adapter", adapter),
            ("Group weights", rule),
            ("Aggregation", _aggregation(facts)),
            (
                "Local training",
                f"{s('local.objective')} on rewards of sampled texts (task {s('rewards.task')}), "
                f"KL coefficient {s('ppo.kl'):g}, {s('local.steps', '?')} updates a round, engine "
                f"{s('local.engine', '?')}",
            ),
            ("Reference", "base (in the KL term)"),
            ("Score", f"{facts.metric}: {_score_text(facts)}"),
        ]
    loss = f"{s('local.loss', '?')}, beta {s('local.beta', 0.0):g}, {s('local.steps', '?')} steps"
    return [
        ("Data", data_text(facts)),
        ("Model", model),
        ("Adapter", adapter),
        ("Group weights", rule),
        ("Aggregation", _aggregation(facts)),
        ("Local training", f"{loss} a round, engine {s('local.engine', '?')}"),
        ("Reference", _public("local.reference", s("local.reference", "?"))),
        ("Labels", str(s("local.labels", "?"))),
        ("Score", f"{facts.metric}: {_score_text(facts)}"),
    ]


def _aggregation(facts: Facts) -> str:
    method = str(facts.setting("aggregation.method", "?"))
    if not facts.discarded:
        return method
    group, (mean, most) = max(facts.discarded.items(), key=lambda x: x[1][0])
    return (
        f"{method}; truncation removed {mean:.0%} of the updates of {group} on average over layers "
        f"and rounds (the most of any group; largest single value {most:.0%})"
    )


def data_text(facts: Facts) -> str:
    """Return what the data are, without a path of this machine."""
    source = str(facts.setting("data.source", "unknown data"))
    if facts.run.get("data_name"):
        return str(facts.run["data_name"])
    if source == "synthetic":
        return f"synthetic, world {facts.setting('data.world')}"
    path = _public("data.path", facts.setting("data.path"))
    return f"{source}, {path}" if path else source


def _score_text(facts: Facts) -> str:
    text = SCORE_TEXTS.get(facts.metric, "higher is better.")
    return text if facts.mass_name == "option mass" else text + SAMPLED


def _time(facts: Facts) -> str:
    return "round" if facts.policy is None else "exchange"


def _threshold(facts: Facts) -> float | None:
    """Return where the rule switches, if it does and the axis reaches it."""
    if facts.policy is None or facts.policy.rule not in policy.SWITCHED:
        return None
    value = float(facts.setting("rewards.fairness-threshold", 1.0))
    return value if value <= 1 else None


def _public(key: str, value: Any) -> str:
    """Return a setting as text; of a path only its last component, so that nothing leaks."""
    text = str(value)
    if key in PATHS:
        return text if text in ("", "pocket") else public_base_name(text)
    return text


def _dumbbell_rows(facts: Facts) -> tuple[list[plots.DumbbellRow], int]:
    rows = [
        plots.DumbbellRow(
            g,
            tables.score_of(facts, "base", g),
            tables.score_of(facts, "shared", g),
            tables.score_of(facts, "personal", g),
            facts.references["uniform"].scores.get(g),
            facts.references["optimum_average"].scores.get(g),
        )
        for g in facts.groups
        if tables.score_of(facts, "base", g) is not None
        or tables.score_of(facts, "shared", g) is not None
    ]
    return rows, max(0, len(rows) - plots.MOST_ROWS)


def _highlight(facts: Facts) -> list[str]:
    """Return the groups whose lines get a colour: all, or the worst served and heaviest."""
    groups = list(facts.groups)
    if len(groups) <= HIGHLIGHTED:
        return groups

    def served(g: str) -> float:
        first = tables.score_of(facts, "base", g)
        return 1.0 if first is None else first

    def weight(g: str) -> float:
        return max(facts.weights[g].values(), default=0.0)

    worst = sorted(groups, key=served)[:3]
    heaviest = sorted(groups, key=lambda g: -weight(g))[:3]
    return sorted({*worst, *heaviest})


def _policy_drawings(
    facts: Facts, trained: policy.PolicyFacts, rounds: list[int]
) -> dict[str, plots.Drawing | None]:
    made: dict[str, plots.Drawing | None] = {}
    curves = trained.curves
    kl = curves.get("sampled-kl") or curves.get("kl")
    if kl:
        target = float(facts.setting("ppo.kl-target", 0.0))
        levels = [(target, "target")] if target else []
        if "kl_optimum" in trained.closed_form:
            levels.append((trained.closed_form["kl_optimum"], "optimum"))
        made["kl"] = plots.lines(
            {"KL": kl}, rounds, ["KL"], "nats a text", zero=min(kl.values()) >= 0, time="exchange",
            levels=levels,
        )  # fmt: skip
    if curves.get("format-rate"):
        made["formats"] = plots.lines(
            {"well-formed": curves["format-rate"]}, rounds, ["well-formed"],
            "share of texts, 0 to 1 (higher is better)", bounds=(0.0, 1.0), time="exchange",
        )  # fmt: skip
    if curves.get("fairness-index"):
        threshold = _threshold(facts)
        made["evenness"] = plots.lines(
            {"fairness": curves["fairness-index"]}, rounds, ["fairness"],
            "fairness index (higher is better)",
            levels=[] if threshold is None else [(threshold, "threshold")], time="exchange",
        )  # fmt: skip
    return made


def _drawings(facts: Facts, summary: Mapping[str, Any]) -> dict[str, plots.Drawing | None]:
    score = facts.metric
    highlight, n = _highlight(facts), len(facts.groups)
    made: dict[str, plots.Drawing | None] = dict.fromkeys(
        ("dumbbells", "weights", "validation", "kl", "formats", "evenness", "loss")
    )
    rows, _ = _dumbbell_rows(facts)
    if rows:
        made["dumbbells"], _ = plots.dumbbells(rows, f"{score} on test (higher is better)")
    rounds, time = list(facts.rounds), _time(facts)
    if any(facts.weights.values()):
        axis = "group weight" if facts.policy is None else "influence"
        made["weights"] = plots.lines(
            facts.weights, rounds, highlight, f"{axis} (sum over groups is 1)",
            levels=[(1 / n, f"equal, 1/{n}")], zero=True, time=time,
        )  # fmt: skip
    if any(facts.validation.values()):
        axis = f"{score} on validation (higher is better)"
        if facts.policy is not None:
            axis = f"mean reward of sampled texts ({facts.policy.reward}, 0 to 1)"
        made["validation"] = plots.lines(
            facts.validation, rounds, highlight, axis, mean=n > 1, time=time
        )
    if facts.policy is not None:
        made |= _policy_drawings(facts, facts.policy, rounds)
    if any(facts.loss.values()):
        axis = "training loss (lower is better)"
        made["loss"] = plots.lines(facts.loss, rounds, highlight, axis, mean=n > 1)
    return made
