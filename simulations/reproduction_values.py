"""Numbers of the reproduction, read from the ledgers: means, paired differences, shares explained.

Intervals are 95 % t intervals over seeds, of means or of paired differences (a seed fixes
population, split, questions and initial adapter for all arms).  Fewer than 3 seeds give none.

*Share explained.*  With literal, mean and a control on the same seeds, the control explains

    rho = mean(control - mean) / mean(literal - mean)

of literal's difference to mean.  A ratio of two noisy means has no t interval of its own; Fieller's
(1954) is the set of all rho for which the t test of mean(x - rho y) = 0 does not reject, with
x = control - mean and y = literal - mean.  It is a bounded interval exactly when the denominator's
own interval leaves out 0; otherwise the share is not defined, and none is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedalign.config import Config
from fedalign.ledger import Ledger
from fedalign.metrics.intervals import MIN_SEEDS, Interval, paired_difference
from fedalign.report.summary import summarise
from fedalign.runfolder import LEDGER
from simulations.comparison_report import worst_at_base
from simulations.reproduce import Planned

BASE = "untouched base"
LAST = 3
"""Exchanges at the end of a run over which the sampled KL is averaged."""
CLOSED = ("closed", "jsd_base", "jsd_model", "kl_model", "kl_optimum", "mass")
SUMMARY_NAMES = ("average", "worst", "fairness_index", "gap", "option_mass")
CURVES = {
    "reward_scale": "reward-scale",
    "adaptive_share": "adaptive-branch",
    "clip_fraction": "clip-fraction",
    "reward_index": "fairness-index",
}
"""Means over all exchanges, by the name of their curve."""
ASKED = ("malformed", "unanswered", "refused", "predicted")
"""Curves that count, over all clients, what became of the rewards that were asked for."""

Values = dict[str, float]
Key = tuple[str, str]
"""(part, task)"""


@dataclass(frozen=True)
class RunResult:
    """The numbers of one finished run."""

    values: Values
    undefined: Mapping[str, str]
    """Metric that this run cannot have, and why."""


@dataclass(frozen=True)
class ArmResult:
    """What the seeds of one arm gave."""

    values: Mapping[int, Values]
    """Seed to numbers, of runs that were scored at the end."""
    failed: Mapping[int, str]
    """Seed to reason, of runs that were not."""
    low_mass: tuple[int, ...]
    """Seeds that were scored, with too little option mass or too few well-formed texts."""
    config: Config
    """Settings of the first seed."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """Metric that no run could have, and why."""

    def of(self, metric: str) -> dict[int, float]:
        """Return seed to value, of the seeds that have it."""
        return {s: v[metric] for s, v in sorted(self.values.items()) if metric in v}


Study = dict[Key, dict[str, ArmResult]]


@dataclass(frozen=True)
class Difference:
    """One arm minus another on one metric, paired by seed."""

    part: str
    task: str
    arm: str
    against: str
    metric: str
    interval: Interval | None
    points: tuple[float, ...]
    """The difference of each seed, in order of seeds."""
    missing: int
    """Seeds that are left out because one of the two runs failed."""

    @property
    def sign(self) -> int:
        """Return 1 or -1 where the interval leaves out 0, else 0."""
        if self.interval is None:
            return 0
        return int(self.interval.low > 0) - int(self.interval.high < 0)


@dataclass(frozen=True)
class Explained:
    """How much of literal's difference to mean a control gives by itself."""

    control: str
    metric: str
    difference: Interval | None
    """literal - mean."""
    points: tuple[float, ...]
    """literal - mean of each seed."""
    share: Interval | None
    """Fieller interval of the ratio; None where it is not defined."""


def load(runs: Iterable[Planned]) -> Study:
    """Read every run's ledger once; runs that failed or never began are kept with their reason."""
    read: dict[Path, RunResult | str] = {}
    found: dict[Key, dict[str, list[Planned]]] = {}
    for run in runs:
        found.setdefault((run.part, run.task), {}).setdefault(run.arm, []).append(run)
        if run.folder not in read:
            read[run.folder] = run_result(run.folder)
    return {
        key: {name: _arm(made, read) for name, made in arms.items()} for key, arms in found.items()
    }


def _arm(runs: Sequence[Planned], read: Mapping[Path, RunResult | str]) -> ArmResult:
    values: dict[int, Values] = {}
    failed: dict[int, str] = {}
    undefined: dict[str, str] = {}
    for run in runs:
        got = read[run.folder]
        if isinstance(got, str):
            failed[run.seed] = got
        else:
            values[run.seed] = got.values
            undefined = {**got.undefined, **undefined}
    undefined = {m: why for m, why in undefined.items() if not any(m in v for v in values.values())}
    least = runs[0].config.score.min_option_mass
    low = tuple(s for s, v in sorted(values.items()) if v.get("option_mass", 1.0) < least)
    return ArmResult(values, failed, low, runs[0].config, undefined)


def run_result(folder: Path) -> RunResult | str:
    """Return the numbers of a finished run, or why there are none."""
    if not (folder / LEDGER).exists():
        return "it did not begin"
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        status = str(ledger.run().get("status", "it stopped before it began"))
        if not status.startswith(("completed", "failed: option mass")):
            return status.removeprefix("failed: ")
        summary = summarise(ledger)
        if "shared/average" not in summary:
            return "the final adapter has no complete score"
        values = {
            f"{prefix}{name}": float(summary[f"{stage}/{name}"])
            for stage, prefix in (("base", "base_"), ("shared", ""))
            for name in SUMMARY_NAMES
            if f"{stage}/{name}" in summary
        }
        for name in ("uniform", "mean_of_groups", "optimum_average", "optimum_worst"):
            for number in ("average", "worst"):
                key = f"reference/{name}/{number}"
                if key in summary:
                    values[f"{name}_{number}"] = float(summary[key])
        for number in ("average", "worst"):
            if f"attained/{number}" in summary:
                values[f"attained_{number}"] = float(summary[f"attained/{number}"])
        values |= _policy_values(ledger)
        undefined = {
            metric: str(lack["reason"])
            for metric in SUMMARY_NAMES
            for lack in summary["missing"]
            if lack["name"] == f"shared/{metric}"
        }
        validated = bool(ledger.scores("base", "validation"))
    if validated:
        group = worst_at_base(folder)
        for stage, name in (("base", "base_worst_at_base"), ("shared", "worst_at_base")):
            if f"{stage}/group/{group}/score" in summary:
                values[name] = float(summary[f"{stage}/group/{group}/score"])
    return RunResult(values, undefined)


def _policy_values(ledger: Ledger) -> Values:
    values: Values = {}
    for row in ledger.references("closed_form"):
        if row.quantity in CLOSED and row.value is not None:
            values[row.quantity] = row.value
    curves: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    tokens = 0.0
    for curve in ledger.curves():
        if curve.name == "predictor-error":
            errors[curve.client] = curve.value  # sorted by round: the last one stays
        if curve.client == "":
            curves.setdefault(curve.name, []).append(curve.value)
        if curve.name in ("tokens", "policy-tokens"):
            tokens += curve.value
    for name, curve_name in CURVES.items():
        if curve_name in curves:
            values[name] = float(np.mean(curves[curve_name]))
    if "format-rate" in curves:
        values["last_format_rate"] = curves["format-rate"][-1]
    if tokens:
        values["tokens"] = tokens
    if errors:
        values["predictor_error"] = float(np.mean(list(errors.values())))
    if "reward-mean" in curves:
        values["index_exchanges"] = len(curves.get("fairness-index", ())) / len(
            curves["reward-mean"]
        )
    values |= _shares_asked(ledger, curves)
    if "kl_model" in values:
        values["kl"] = values["kl_model"]
    elif "kl" in curves:
        values["kl"] = float(np.mean(curves["kl"][-LAST:]))
    return values


def _shares_asked(ledger: Ledger, curves: Mapping[str, Sequence[float]]) -> Values:
    """Return which share of all rewards asked for came back as each code, 0 to 1."""
    counts = {name: sum(curves[name]) for name in ASKED if name in curves}
    if not counts:
        return {}
    rewarded = sum(r.examples for r in ledger.replies() if r.phase == "train" and r.status == "ok")
    asked = rewarded + sum(n for name, n in counts.items() if name != "predicted")
    return {f"{name}_share": n / asked for name, n in counts.items()} if asked else {}


def with_base(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
    """Return the arms and, as one more, the untouched base (the same for all arms of a seed)."""
    values: dict[int, Values] = {}
    for arm in arms.values():
        for seed, found in arm.values.items():
            if seed not in values:
                base = {
                    k.removeprefix("base_"): v for k, v in found.items() if k.startswith("base_")
                }
                values[seed] = {**base, "kl": 0.0}
    first = next(iter(arms.values()))
    untouched = ArmResult(dict(sorted(values.items())), {}, (), first.config, first.undefined)
    return {**arms, BASE: untouched}


def difference(
    key: Key, arms: Mapping[str, ArmResult], arm: str, against: str, metric: str
) -> Difference:
    """Return ``arm`` minus ``against`` over the seeds on which both were scored."""
    a, b = arms[arm].of(metric), arms[against].of(metric)
    both = sorted(a.keys() & b.keys())
    asked = {*arms[arm].values, *arms[arm].failed, *arms[against].values, *arms[against].failed}
    interval = paired_difference({s: a[s] for s in both}, {s: b[s] for s in both})
    points = tuple(a[s] - b[s] for s in both)
    return Difference(*key, arm, against, metric, interval, points, len(asked) - len(both))


def explained(arms: Mapping[str, ArmResult], control: str, metric: str) -> Explained | None:
    """Return the share of (literal - mean) that the control gives; None where an arm is absent."""
    if any(name not in arms for name in (control, "literal", "mean")):
        return None
    of = {name: arms[name].of(metric) for name in (control, "literal", "mean")}
    both = sorted(set.intersection(*(set(v) for v in of.values())))
    if not both:
        return None
    x = [of[control][s] - of["mean"][s] for s in both]
    y = [of["literal"][s] - of["mean"][s] for s in both]
    plain = paired_difference(dict(enumerate(y)), dict.fromkeys(range(len(y)), 0.0))
    return Explained(control, metric, plain, tuple(y), ratio_of_means(x, y))


def ratio_of_means(x: Sequence[float], y: Sequence[float], level: float = 0.95) -> Interval | None:
    """Return mean(x) / mean(y) with Fieller's interval; None where it is unbounded.

    Args:
        x: numerators, one a seed.
        y: denominators of the same seeds.
        level: coverage.

    Returns:
        The ratio with its interval, or None when fewer than 3 seeds are given or the t interval of
        mean(y) covers 0.
    """
    n = len(y)
    if n < MIN_SEEDS:
        return None
    from scipy.stats import t

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    mx, my = float(a.mean()), float(b.mean())
    k = float(t.ppf(0.5 + level / 2, n - 1)) ** 2 / n
    (vx, vxy), (_, vy) = np.cov(a, b, ddof=1)
    # (mx - rho my)^2 <= k var(x - rho y), as A rho^2 - 2 B rho + C <= 0.
    big_a, big_b, big_c = my**2 - k * vy, mx * my - k * vxy, mx**2 - k * vx
    if big_a <= 0:
        return None
    root = math.sqrt(max(0.0, big_b**2 - big_a * big_c))
    return Interval(mx / my, float((big_b - root) / big_a), float((big_b + root) / big_a), n)
