"""Mode ``rewards``: how the policy was trained, from the server's curves and the closed form.

The server writes one value a name and exchange (``CurveRow`` with an empty client).  A run in mode
``adapters`` has none of this, and its report no such part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedalign.config import REWARD_RULES, from_flat, resolve_reward
from fedalign.ledger import Ledger

TASKS = {
    "letter": "the letter of one option",
    "shares": "the share of each option, in tenths",
    "order": "all options, most to least chosen",
}
RULES = {
    "mean": "mean of the groups' rewards",
    "min": "the lowest group's reward",
    "max": "the highest group's reward",
    "literal": "adaptive as published: mean, or log-mean-exp of weighted rewards when unfair",
    "scaled": "adaptive as published, at the scale of the mean",
    "reweighted": "weighted mean, more weight to groups with a history of low rewards",
    "soft-min": "soft minimum with a fixed exponent",
    "mixture": "log of the mean of exponentiated rewards",
    "multiplicative": "weighted mean, weights multiplied up while a group's reward is low",
    "placebo": "control: as published, with the groups' histories permuted",
    "mean-over-n": "control: mean divided by the number of groups",
    "mean-kl-n": "control: mean, KL coefficient times the number of groups",
}
SWITCHED = ("literal", "scaled", "placebo")
"""Rules that take the plain mean while the fairness index is high."""
WEIGHTED = ("literal", "scaled", "reweighted", "placebo")
"""Rules whose weights come from a history and a temperature."""
CLOSED_FORM = {
    "jsd_base": "Jensen-Shannon divergence, base to optimum (base 2)",
    "jsd_model": "Jensen-Shannon divergence, policy to optimum (base 2)",
    "closed": "share of that distance closed",
    "kl_model": "KL from the base, policy (nats a text)",
    "kl_optimum": "KL from the base, optimum (nats a text)",
    "mass": "probability of well-formed answers, policy",
}
FEW = 0.5
"""Below this share of rewards that came, the page warns."""
POOR_ERROR = 0.25
"""From this error on the predictor is called poor.  In the default world the predictor has .10,
copying the nearest known answer .22 and a uniform answer .33 (docs/predictor.md)."""
SCALE_MATTERS = 0.75
"""Below this mean scale, the page says that the KL term weighs more than its coefficient tells."""


@dataclass(frozen=True)
class PolicyFacts:
    """What the ledger of a run in mode ``rewards`` says of its policy."""

    task: str
    reward: str
    rule: str
    curves: Mapping[str, Mapping[int, float]]
    """Name to exchange to value."""
    group_weights: Mapping[str, Mapping[int, float]]
    """Group to exchange to the rule's own weight; empty for rules without weights."""
    answered: int
    """Rewards that counted, summed over clients and exchanges."""
    predictor_error: Mapping[str, float] = field(default_factory=dict)
    """Client to the held-out error of the final preference predictor, where one was trained."""
    closed_form: Mapping[str, float] = field(default_factory=dict)
    closed_note: str = ""
    most_clipped: float = 1.0
    """Setting ``ppo.max-clip-fraction``."""
    planned: int = 0
    """Updates of an exchange that is not cut short."""

    def total(self, name: str) -> float | None:
        """Return the sum over exchanges; None where the curve is absent."""
        values = self.curves.get(name)
        return sum(values.values()) if values else None

    def mean(self, name: str) -> float | None:
        """Return the mean over exchanges."""
        values = self.curves.get(name)
        return sum(values.values()) / len(values) if values else None

    def ends(self, name: str) -> tuple[float, float] | None:
        """Return the value of the first and of the last exchange that has one."""
        values = self.curves.get(name)
        return (values[min(values)], values[max(values)]) if values else None


def gather_policy(ledger: Ledger, config: Mapping[str, Any]) -> PolicyFacts | None:
    """Return the policy's facts; None for a run in mode ``adapters``."""
    if config.get("run.mode", "adapters") != "rewards":
        return None
    curves: dict[str, dict[int, float]] = {}
    weights: dict[str, dict[int, float]] = {}
    errors: dict[str, float] = {}
    for row in ledger.curves():
        if row.name == "predictor-error":
            errors[row.client] = row.value  # sorted by round: the last one stays
        if row.phase != "train":
            continue
        if row.client == "":
            curves.setdefault(row.name, {})[row.round] = row.value
        elif row.client.startswith("group:") and row.name == "weight":
            weights.setdefault(row.client.removeprefix("group:"), {})[row.round] = row.value
    references = ledger.references("closed_form")
    return PolicyFacts(
        task=str(config.get("rewards.task", "letter")),
        reward=resolve_reward(from_flat(dict(config))),
        rule=str(config.get("rewards.rule", REWARD_RULES[0])),
        curves=curves,
        group_weights=weights,
        answered=sum(
            r.examples for r in ledger.replies() if r.status == "ok" and r.phase == "train"
        ),
        predictor_error=errors,
        closed_form={r.quantity: r.value for r in references if r.value is not None},
        closed_note="; ".join(sorted({r.note for r in references if r.note})),
        most_clipped=float(config.get("ppo.max-clip-fraction", 1.0)),
        planned=int(config.get("ppo.epochs", 0)) * int(config.get("ppo.minibatches", 0)),
    )


def training_rows(policy: PolicyFacts, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table "how the policy was trained": what, and its value."""
    rows = [
        ("Task", f"{policy.task}: {TASKS[policy.task]}"),
        ("Reward of a text", f"{policy.reward}; {_of(config, 'rewards.malformed')} if malformed"),
        ("Rule", rule_text(policy, config)),
        ("KL coefficient", _kl_coefficient(policy, config)),
    ]
    for label, names, digits in (
        ("KL from the base, nats a text", ("sampled-kl", "kl"), 3),
        ("Mean reward over groups", ("reward-mean",), 3),
        ("Well-formed texts", ("format-rate",), 3),
        ("Fairness index of the rewards", ("fairness-index",), 4),
        ("Value loss", ("value-loss",), 4),
    ):
        ends = next((e for n in names if (e := policy.ends(n)) is not None), None)
        if ends is not None:
            text = f"{ends[0]:.{digits}f} in the first exchange, {ends[1]:.{digits}f} in the last"
            rows.append((label, text))
    if policy.rule in SWITCHED and (share := policy.mean("adaptive-branch")) is not None:
        rows.append(("Adaptive branch taken", f"in {share:.0%} of the exchanges"))
    if (scale := policy.mean("reward-scale")) is not None:
        rows.append(("Scale of the combined reward", _scale(scale)))
    clipped, most = policy.mean("clip-fraction"), policy.curves.get("clip-fraction-max")
    if clipped is not None:
        text = f"{clipped:.1%} of the ratios on average"
        rows.append(("Clipped", f"{text}, {max(most.values()):.1%} at most" if most else text))
    for label, name in (
        ("Optimiser updates", "updates"),
        ("Texts sampled", "rollouts"),
        ("Tokens generated", "generated-tokens"),
        ("Tokens in updates", "updated-tokens"),
        ("Tokens through the policy, prompts included", "policy-tokens"),
    ):
        if (total := policy.total(name)) is not None:
            cut = cut_short(policy) if name == "updates" else ""
            rows.append((label, f"{total:,.0f}. {cut}" if cut else f"{total:,.0f}"))
    if policy.predictor_error:
        found = ", ".join(f"{c} {e:.3f}" for c, e in sorted(policy.predictor_error.items()))
        text = f"{found} (mean JS distance on validation questions; lower is better)"
        rows.append(("Predictor's held-out error", text))
    rows.append(("Rewards received", f"{policy.answered:,}, over all clients{_given(policy)}"))
    return rows


def cut_short(policy: PolicyFacts) -> str:
    """Say which exchanges took fewer updates than planned because most ratios were clipped."""
    updates, most = policy.curves.get("updates", {}), policy.curves.get("clip-fraction-max", {})
    cut = [
        t
        for t, n in sorted(updates.items())
        if n < policy.planned and most.get(t, 0.0) > policy.most_clipped
    ]
    if not cut:
        return ""
    taken = sum(updates[t] for t in cut) / len(cut)
    which = ", ".join(map(str, cut[:8])) + (", ..." if len(cut) > 8 else "")
    return (
        f"{len(cut)} of {len(updates)} exchanges ({which}) were cut short after {taken:.1f} of "
        f"{policy.planned} updates on average: more than {policy.most_clipped:.0%} of an update's "
        "ratios were clipped (ppo.max-clip-fraction), so its texts had become too old."
    )


def doubts(policy: PolicyFacts) -> list[str]:
    """Say what makes the rewards themselves doubtful: few of them came, or a poor predictor."""
    said = []
    without = sum(policy.total(n) or 0.0 for n in ("malformed", "unanswered", "refused"))
    if without and policy.answered < FEW * (policy.answered + without):
        share = policy.answered / (policy.answered + without)
        said.append(
            f"Only {share:.0%} of the rewards asked for came{_given(policy)}: the policy was "
            "trained on those."
        )
    poor = [c for c, e in sorted(policy.predictor_error.items()) if e >= POOR_ERROR]
    if poor:
        worst = max(policy.predictor_error.values())
        said.append(
            f"The preference predictor is poor for {len(poor)} of {len(policy.predictor_error)} "
            f"clients (held-out error up to {worst:.3f}; 0 is perfect): high rewards there do not "
            "mean that the group is well served. Scores are taken on true answers."
        )
    return said


def sources(config: Mapping[str, Any]) -> str:
    """Return what rewards are made from, and what the sites' policy takes off them."""
    text = {
        "shares": "the groups' own answers",
        "predictor": "the frozen preference predictor",
        "both": "the groups' own answers, else the frozen preference predictor",
    }[str(config.get("site.answers", "shares"))]
    if config.get("site.rounding"):
        text += f"; rounded to {_of(config, 'site.rounding')}"
    if config.get("site.query-budget"):
        text += f"; at most {_of(config, 'site.query-budget')} different texts a question"
    return text


def rule_text(policy: PolicyFacts, config: Mapping[str, Any]) -> str:
    """Return the rule with the settings that it looks at."""
    text = f"{policy.rule}: {RULES[policy.rule]}"
    if policy.rule in WEIGHTED:
        text += (
            f"; temperature {_of(config, 'weights.temperature')}, history decay "
            f"{_of(config, 'weights.decay')}, floor {_of(config, 'weights.floor')}/n, ceiling "
            f"{_of(config, 'weights.ceiling')}/n"
        )
    if policy.rule in SWITCHED:
        text += f"; fairness threshold {_of(config, 'rewards.fairness-threshold')}"
    if policy.rule == "soft-min":
        text += f"; k = {_of(config, 'rewards.sharpness')}"
    if config.get("rewards.reference-correction"):
        text += "; reference correction on"
    return text


def closed_rows(policy: PolicyFacts) -> list[tuple[str, str]]:
    """Return the closed-form quantities that are known, with their values."""
    return [
        (label, f"{policy.closed_form[name]:.3f}")
        for name, label in CLOSED_FORM.items()
        if name in policy.closed_form
    ]


def put_summary(policy: PolicyFacts, put: Any) -> None:
    """Put the policy's numbers into the summary: ``policy/...`` and ``closed_form/...``."""
    for name, values in sorted(policy.curves.items()):
        put(f"policy/{name}/mean", sum(values.values()) / len(values))
        put(f"policy/{name}/last", values[max(values)])
    for client, value in sorted(policy.predictor_error.items()):
        put(f"predictor/{client}/error", value)
    for name, value in sorted(policy.closed_form.items()):
        put(f"closed_form/{name}", value)


def _kl_coefficient(policy: PolicyFacts, config: Mapping[str, Any]) -> str:
    text = f"{_of(config, 'ppo.kl')}"
    ends = policy.ends("kl-coefficient")
    if ends is not None and f"{ends[1]:.4g}" != text:
        text += f"; {ends[1]:.4g} in the last exchange"
    if config.get("ppo.kl-target"):
        text += f", moved to hold {_of(config, 'ppo.kl-target')} nats a text"
    return text


def _scale(scale: float) -> str:
    text = f"{scale:.2f} of the rewards', on average"
    if scale < SCALE_MATTERS:
        text += f": against it the KL term weighs {1 / scale:.1f} times its coefficient"
    return text


def _given(policy: PolicyFacts) -> str:
    without = sum(policy.total(n) or 0.0 for n in ("malformed", "unanswered", "refused"))
    asked = max(1.0, policy.answered + without)
    counts = [
        f"{total:,.0f} {name} ({total / asked:.0%})"
        for name in ("predicted", "malformed", "unanswered", "refused")
        if (total := policy.total(name))
    ]
    return f" ({', '.join(counts)})" if counts else ""


def _of(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    return "?" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
