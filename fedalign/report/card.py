"""The model card of an exported adapter, made from the ledger alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedalign.export import public_base_name
from fedalign.ledger import Ledger
from fedalign.report.facts import Facts, gather
from fedalign.report.html import data_text
from fedalign.report.summary import summarise_facts
from fedalign.report.verdict import judge

POCKET = "fedalign pocket (trained from scratch)"
SHOWN_SETTINGS = (
    "run.seed",
    "run.rounds",
    "local.loss",
    "local.beta",
    "local.reference",
    "local.labels",
    "local.steps",
    "local.batch-size",
    "local.learning-rate",
    "model.rank",
    "model.alpha",
    "weights.rule",
    "weights.temperature",
    "weights.decay",
    "weights.floor",
    "weights.ceiling",
    "aggregation.method",
)
SHOWN_POLICY_SETTINGS = (
    "run.seed",
    "run.rounds",
    "rewards.task",
    "rewards.score",
    "rewards.rule",
    "rewards.fairness-threshold",
    "rewards.reference-correction",
    "site.answers",
    "ppo.kl",
    "ppo.kl-target",
    "ppo.questions",
    "ppo.samples",
    "ppo.minibatches",
    "ppo.epochs",
    "ppo.learning-rate",
    "model.rank",
    "model.alpha",
    "weights.temperature",
    "weights.decay",
    "weights.floor",
    "weights.ceiling",
)


def model_card(ledger: Ledger) -> str:
    """Return ``README.md``: front matter for model hubs, scores by group, settings, limits.

    No path of this machine is in it: a local base model is named by its last path component.
    """
    facts = gather(ledger)
    summary = summarise_facts(facts)
    parts = [
        _front_matter(facts),
        f"# LoRA adapter aligned with {len(facts.groups)} groups by fedalign",
        _opening(facts),
        _verdict(facts, summary),
        "## Scores by group",
        _scores(facts),
        _summary_lines(facts, summary),
        "## How it was trained",
        _settings(facts),
        "## How to load it",
        _loading(facts),
        "## Limits",
        _limits(facts, summary),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _base(facts: Facts) -> str:
    name = str(facts.setting("model.name", "unknown"))
    return POCKET if name == "pocket" else public_base_name(name)


def _front_matter(facts: Facts) -> str:
    licence = facts.run.get("data_licence")
    note = "see the licence of the base model" + (f"; data: {licence}" if licence else "")
    lines = [
        "---",
        f"base_model: {_quoted(_base(facts))}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("lora", "federated-learning", "alignment", "pluralistic")),
        "license: other",
        f"license_name: {_quoted(note)}",
        "---",
    ]
    return "\n".join(lines)


def _opening(facts: Facts) -> str:
    revision = facts.manifest.get("base_revision", "")
    base = _plain(_base(facts)) + (f", revision `{revision[:16]}`" if revision else "")
    return (
        f"Base model: {base}. Data: {_plain(data_text(facts))}. {_how(facts)} Score: "
        f"`{facts.metric}`, higher is better."
    )


def _how(facts: Facts) -> str:
    rounds, clients = len(facts.rounds), sum(facts.clients.values())
    if facts.policy is None:
        return f"{rounds} rounds over {clients} clients; their preferences never left them."
    return (
        f"PPO on the server, {rounds} exchanges of sampled texts for rewards with {clients} "
        "clients. Their answers were not sent; what each text was worth to them was, and exact "
        "rewards on chosen texts give answers away."
    )


def _verdict(facts: Facts, summary: Mapping[str, Any]) -> str:
    verdict = judge(facts, summary)
    return " ".join([f"**{_plain(verdict.title)}**", *map(_plain, verdict.sentences)])


def _scores(facts: Facts) -> str:
    stages = [s for s in ("base", "shared") if s in facts.stages]
    references = [
        (n, label)
        for n, label in (("uniform", "uniform answerer"), ("optimum_average", "best for average"))
        if facts.references[n].scores
    ]
    head = ["group", "claimed size", *stages, *(label for _, label in references), "mean weight"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for g in facts.groups:
        weights = list(facts.weights[g].values())
        cells = [
            *(facts.stages[s].scores.get(g) for s in stages),
            *(facts.references[n].scores.get(g) for n, _ in references),
            sum(weights) / len(weights) if weights else None,
        ]
        shown = [
            (facts.silent.get(g, "–") if i < len(stages) else "–") if c is None else f"{c:.3f}"
            for i, c in enumerate(cells)
        ]
        lines.append("| " + " | ".join([_plain(g), str(facts.sizes[g]), *shown]) + " |")
    return "\n".join(lines)


def _summary_lines(facts: Facts, summary: Mapping[str, Any]) -> str:
    names = ("average", "worst", "gap", "fairness_index", "option_mass")
    stages = [s for s in ("base", "shared") if f"{s}/average" in summary]
    if not stages:
        return ""
    lines = ["| number | " + " | ".join(stages) + " |", "|---|" + "---:|" * len(stages)]
    for name in names:
        values = [summary.get(f"{s}/{name}") for s in stages]
        shown = ["–" if v is None else f"{v:.4f}" for v in values]
        label = facts.mass_name.replace(" ", "_") if name == "option_mass" else name
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _settings(facts: Facts) -> str:
    lines = ["| setting | value |", "|---|---|"]
    for key in SHOWN_SETTINGS if facts.policy is None else SHOWN_POLICY_SETTINGS:
        value = str(facts.setting(key, "–"))
        value = public_base_name(value) if key == "local.reference" else value
        lines.append(f"| `{key}` | {_plain(value)} |")
    return "\n".join(lines)


def _loading(facts: Facts) -> str:
    base = _base(facts)
    source = f'"{base}"' if _base(facts) == str(facts.setting("model.name")) else "base_folder"
    note = "" if source != "base_folder" else f"`base_folder` is your copy of {_plain(base)}.\n\n"
    return (
        f"{note}```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({source})\n"
        'model = PeftModel.from_pretrained(model, "path/of/this/folder")\n'
        "```"
    )


def _limits(facts: Facts, summary: Mapping[str, Any]) -> str:
    lines = [
        "- One shared model cannot agree with groups that disagree; the shared answer that is best "
        "for the average is as far as one answer can go on average.",
        "- Scores hold for questions like the test questions, in the answer format that was "
        "scored. They say nothing about free text, facts or safety.",
        "- A group is what the data call a group. No score speaks for any one person in it.",
        "- Scores and sizes were reported by the clients themselves.",
        "- The adapter was trained on private preferences. Nothing here bounds what it may "
        "reveal about them.",
    ]
    if not facts.references["optimum_average"].scores:
        note = facts.references["optimum_average"].note
        lines.append(f"- The best shared answer is not defined: {_plain(note)}.")
    missing = {m["name"] for m in summary["missing"]} & {"shared/average", "base/average"}
    if missing:
        lines.append(f"- Not scored: {', '.join(sorted(missing))}.")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A YAML double-quoted string is a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Return text that cannot break a table or start markup: group names come from data."""
    flat = " ".join(text.split())
    for mark in "\\`*_|<>[]":
        flat = flat.replace(mark, "\\" + mark)
    return flat
