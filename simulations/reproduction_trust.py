"""What the rewards of the runs are worth: the predictor's error, and texts without a reward.

*Predictor.*  In part ``predictor`` each rule runs twice, on rewards from true answers and on those
of the frozen predictor; both are scored on true answers.  The question is whether the predictor's
error changes which rule wins, so the rule with the best worst group is compared, seed by seed.

*Texts without a reward.*  Of all rewards asked for, some do not come: the text is malformed, the
group has no answer to the question, or the site's policy refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simulations.reproduce_parts import PARTS
from simulations.reproduction_values import ArmResult, Key, Study, difference
from simulations.reproduction_words import said_of, sound_study, where
from simulations.seed_text import mean_cell

SUFFIX = ", predictor"
WITHOUT = ("malformed", "unanswered", "refused")
MANY = 0.10
"""From this share of rewards on that did not come, an arm is named."""
INDEX_RULES = ("literal", "scaled", "placebo")
"""Rules that read the fairness index of an exchange's rewards."""


def trust(study: Study) -> list[str]:
    """Return the verdicts, one a line; none where there is nothing to say."""
    lines = []
    for key, arms in sound_study(study).items():
        if key[0] == "predictor" and (said := _predictor(key, arms)):
            lines.append(f"- **Does the predictor's error change which rule wins?** {said}")
    if said := _without(study):
        lines.append(f"- **Did many texts go without a reward?** {said}")
    return ["", *lines] if lines else []


def undefined(arms: Mapping[str, ArmResult], columns: Mapping[str, str]) -> list[str]:
    """Return one line for each column that no run of a part could have, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, arm in arms.items():
        for metric, why in arm.undefined.items():
            if metric in columns:
                found.setdefault((columns[metric], why), []).append(name)
    lines = []
    for (label, why), names in found.items():
        whose = "" if len(names) == len(arms) else f" ({', '.join(names)})"
        lines.append(f"- {label}{whose}: not defined: {why}.")
    if said := _index(arms):
        lines.append(f"- {said}")
    return ["", *lines] if lines else []


def _index(arms: Mapping[str, ArmResult]) -> str:
    """Say in how many exchanges the index that the switch reads was not defined."""
    shares = [
        x
        for name, arm in arms.items()
        if arm.config.run.mode == "rewards" and arm.config.rewards.rule in INDEX_RULES
        for x in arm.of("index_exchanges").values()
    ]
    if not shares or min(shares) == 1.0:
        return ""
    return (
        "fairness index of an exchange's rewards, which the switch of "
        f"{', '.join(INDEX_RULES)} reads: not defined in {1 - float(np.mean(shares)):.0%} of their "
        "exchanges: no question of such an exchange was answered by all groups (they share too few "
        "questions). The rule then weighs, as below its threshold."
    )


def _predictor(key: Key, arms: Mapping[str, ArmResult]) -> str:
    rules = [name for name in arms if f"{name}{SUFFIX}" in arms]
    errors = [x for r in rules for x in arms[f"{r}{SUFFIX}"].of("predictor_error").values()]
    if len(rules) < 2 or not errors:
        return ""
    true, predicted = ({r: arms[f"{r}{end}"].of("worst") for r in rules} for end in ("", SUFFIX))
    best, now = _best(true), _best(predicted)
    seeds = sorted(set.intersection(*(set(v) for v in (*true.values(), *predicted.values()))))
    same = [s for s in seeds if _winner(true, s) == _winner(predicted, s)]
    d = difference(key, arms, f"{now}{SUFFIX}", now, "worst")
    return (
        f"{where(key).capitalize()}: {'no' if best == now else 'yes'}. Best worst group of "
        f"{', '.join(rules)}: {best} with true answers, at "
        f"{mean_cell(list(true[best].values()))}, and {now} with the predictor's, at "
        f"{mean_cell(list(predicted[now].values()))}; seed by seed the same in {len(same)} of "
        f"{len(seeds)}. Its held-out error is {float(np.mean(errors)):.3f} ({min(errors):.3f} to "
        f"{max(errors):.3f} over runs; mean Jensen-Shannon distance, 0 is perfect, .833 the "
        f"most){_by_seed(rules, arms, seeds, same)}. What it costs {now}: worst group {said_of(d)}."
    )


def _by_seed(
    rules: Sequence[str], arms: Mapping[str, ArmResult], seeds: Sequence[int], same: Sequence[int]
) -> str:
    """Compare the error on seeds where the winner changed with that on the others."""
    other = [s for s in seeds if s not in same]
    if not same or not other:
        return ""

    def error(chosen: Sequence[int]) -> float:
        found = [arms[f"{r}{SUFFIX}"].of("predictor_error") for r in rules]
        return float(np.mean([by[s] for by in found for s in chosen if s in by]))

    return f"; {error(other):.3f} where the winner changed, {error(same):.3f} where not"


def _best(scores: Mapping[str, Mapping[int, float]]) -> str:
    return max(sorted(scores), key=lambda r: float(np.mean(list(scores[r].values()))))


def _winner(scores: Mapping[str, Mapping[int, float]], seed: int) -> str:
    return max(sorted(scores), key=lambda r: scores[r][seed])


def _without(study: Study) -> str:
    most = dict.fromkeys(WITHOUT, 0.0)
    said, named, counted = [], 0, False
    for (part, task), arms in study.items():
        means = {name: m for name, arm in arms.items() if (m := _means(arm))}
        counted = counted or bool(means)
        for m in means.values():
            most = {c: max(most[c], m[c]) for c in WITHOUT}
        many = [name for name, m in means.items() if sum(m.values()) >= MANY]
        if many:
            highest = {c: max(means[name][c] for name in many) for c in WITHOUT}
            why = ", ".join(f"{x:.0%} {c}" for c, x in highest.items() if x >= 0.005)
            whose = f"all {len(many)} arms" if len(many) == len(arms) else ", ".join(many)
            said.append(f"{PARTS[part].title}, {task}, {whose}: {why}")
            named += len(many)
    if not counted:
        return ""
    if not said:
        at_most = ", ".join(f"{m:.1%} {c}" for c, m in most.items())
        return f"No. Means over the seeds of an arm, at most: {at_most}."
    return (
        f"Yes, in {named} {'arm' if named == 1 else 'arms'} {MANY:.0%} or more of the rewards "
        "asked for did not come, and their results rest on the rest (at most, mean over seeds): "
        f"{'; '.join(said)}."
    )


def _means(arm: ArmResult) -> dict[str, float]:
    """Return the share of rewards asked for that ended in each code; empty where not counted."""
    shares = {c: list(arm.of(f"{c}_share").values()) for c in WITHOUT}
    if not any(shares.values()):
        return {}
    return {c: float(np.mean(x)) if x else 0.0 for c, x in shares.items()}
