"""The arms of the reproduction: what is run, and why, as plain data.

A *part* is a set of arms that are compared with each other, on one or more tasks.  An *arm* is the
settings it changes and the reason it is there.  Arms of different parts with the same settings are
one run, so a part may name its baselines again at no cost.

Settings apply in this order, last wins: scenario ``rewards``, ``TASKS``, the part, the part's task,
the arm.  ``kl_factor`` then multiplies ``ppo.kl``.

The published studies (arXiv 2512.08786, 2604.04261) leave open most of what the further parts vary;
the report lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedalign.config import Config, Scalar, from_flat, to_flat
from fedalign.errors import ConfigError

Settings = Mapping[str, Scalar]

SCENARIO = "rewards"
TASKS: dict[str, Settings] = {
    "letter": {"rewards.task": "letter"},
    # An order is five draws where a letter is one: it takes more exchanges, and a smaller
    # coefficient for an optimum as far from the base.
    "order": {"rewards.task": "order", "ppo.kl": 0.1, "run.rounds": 30},
    "shares": {"rewards.task": "shares"},
}
CONTROLS = ("mean-over-n", "mean-kl-n", "placebo")
"""Rules that keep a part of ``literal`` and leave out the aim of its weights."""

# Local optimiser steps a round at which mode `adapters` pushes about as many tokens through the
# policy as one exchange does.  The report prints the tokens of every arm where they are recorded.
DPO_STEPS = 12
PPO_STEPS = 8
# Nats a text at which part `kl-matched` holds every arm.
KL_TARGET = {"letter": 0.15, "order": 0.3}


@dataclass(frozen=True)
class Arm:
    """One column of a part."""

    name: str
    settings: Settings
    reason: str
    against: tuple[str, ...] = ()
    """Arms it is compared with; empty: the part's."""
    tasks: tuple[str, ...] = ()
    """Tasks it is run on; empty: the part's."""
    kl_factor: float = 1.0


@dataclass(frozen=True)
class Part:
    """Arms that are compared with each other."""

    title: str
    why: str
    tasks: tuple[str, ...]
    arms: tuple[Arm, ...]
    against: tuple[str, ...] = ("mean",)
    """Baselines of its differences; one that is absent is passed over."""
    settings: Settings = field(default_factory=dict)
    by_task: Mapping[str, Settings] = field(default_factory=dict)
    needs_countries: bool = False


def rule(name: str, reason: str, against: tuple[str, ...] = ()) -> Arm:
    """Return the arm that changes nothing but the rule, named after it."""
    return Arm(name, {"rewards.rule": name}, reason, against)


MEAN = rule("mean", "the published baseline", ("mean",))
MIN = rule("min", "the published pessimist: only the worst-off group counts")
MAX = rule("max", "published as best on the probability task of arXiv 2512.08786")
LITERAL = rule("literal", "the adaptive rule as published; its scale changes with the branch")
SCALED = rule("scaled", "the published rule at the scale of the mean: no scale artefact")
REWEIGHTED = rule("reweighted", "the weights alone: no switch, no log-sum-exp, no artefact")
OVER_N = rule("mean-over-n", "control: the scale of literal without its weights", ("mean",))
KL_N = rule("mean-kl-n", "control: the optimum of mean-over-n at another step size", ("mean",))
PLACEBO = rule("placebo", "control: literal with the groups' histories permuted", ("mean",))
CORE = (MEAN, MIN, MAX, LITERAL, SCALED, REWEIGHTED, OVER_N, KL_N, PLACEBO)

PARTS: dict[str, Part] = {
    "core": Part(
        title="The rules",
        why="every rule and every control at the same settings",
        tasks=("letter", "order"),
        arms=CORE,
        against=("mean", "mean-over-n", "placebo"),
    ),
    "oracle": Part(
        title="Distance to the optimum",
        why="at a small KL coefficient the optimum is far from the base: does PPO get there?",
        tasks=("letter", "order"),
        arms=(MEAN, REWEIGHTED, MIN),
        by_task={
            "letter": {"ppo.kl": 0.1},
            "order": {
                "ppo.kl": 0.05,
                "run.rounds": 40,
                "ppo.minibatches": 8,
                "ppo.samples": 8,
            },
        },
    ),
    "shares": Part(
        title="The rules, with printed shares",
        why="the form of the published probability task: the policy prints numbers",
        tasks=("shares",),
        arms=CORE,
        against=("mean", "mean-over-n", "placebo"),
    ),
    "correction": Part(
        title="Reference correction",
        why="without the base's own taste among answers the optimum depends on the rewards alone",
        tasks=("letter", "order"),
        settings={"rewards.reference-correction": True},
        arms=(
            MEAN,
            MIN,
            rule("mixture", "with the correction, reward log and kl = 1/L: the mean of groups"),
            REWEIGHTED,
            LITERAL,
        ),
    ),
    "rules2": Part(
        title="Rules of other papers",
        why="fixed-exponent, mixture and multiplicative weights, which the papers do not compare",
        tasks=("letter", "order"),
        arms=(
            MEAN,
            REWEIGHTED,
            rule("soft-min", "fixed exponent (family of arXiv 2405.00254): between mean and min"),
            rule("mixture", "the policy of the mean of groups' distributions"),
            rule("multiplicative", "weights of arXiv 2405.20304: they carry the history"),
        ),
        against=("mean", "reweighted"),
    ),
    "scores": Part(
        title="Other rewards",
        why="closed forms of the published rewards are not stated; does the order of rules hold?",
        tasks=("letter", "order", "shares"),
        arms=(
            Arm("mean", {"rewards.rule": "mean"}, "the default reward of the task"),
            Arm(
                "share: mean",
                {"rewards.score": "share", "rewards.rule": "mean"},
                "reward p in place of log p",
                ("mean",),
                ("letter",),
            ),
            Arm(
                "share: literal",
                {"rewards.score": "share", "rewards.rule": "literal"},
                "the published rule on it",
                ("share: mean",),
                ("letter",),
            ),
            Arm(
                "share: reweighted",
                {"rewards.score": "share", "rewards.rule": "reweighted"},
                "the weights alone on it",
                ("share: mean",),
                ("letter",),
            ),
            Arm(
                "kendall: mean",
                {"rewards.score": "kendall", "rewards.rule": "mean"},
                "a published ranking reward",
                ("mean",),
                ("order",),
            ),
            Arm(
                "kendall: literal",
                {"rewards.score": "kendall", "rewards.rule": "literal"},
                "published: less fair than no training",
                ("kendall: mean",),
                ("order",),
            ),
            Arm(
                "kendall: reweighted",
                {"rewards.score": "kendall", "rewards.rule": "reweighted"},
                "the weights alone on it",
                ("kendall: mean",),
                ("order",),
            ),
            Arm(
                "binary: mean",
                {"rewards.score": "binary", "rewards.rule": "mean"},
                "a published ranking reward: right first option or nothing",
                ("mean",),
                ("order",),
            ),
            Arm(
                "binary: literal",
                {"rewards.score": "binary", "rewards.rule": "literal"},
                "the published rule on it",
                ("binary: mean",),
                ("order",),
            ),
            Arm(
                "binary: reweighted",
                {"rewards.score": "binary", "rewards.rule": "reweighted"},
                "the weights alone on it",
                ("binary: mean",),
                ("order",),
            ),
            Arm(
                "literal",
                {"rewards.rule": "literal"},
                "js_divergence, the default",
                tasks=("shares",),
            ),
            Arm(
                "reweighted",
                {"rewards.rule": "reweighted"},
                "js_divergence, the default",
                tasks=("shares",),
            ),
            Arm(
                "wasserstein: mean",
                {"rewards.score": "wasserstein", "rewards.rule": "mean"},
                "a published probability reward",
                ("mean",),
                ("shares",),
            ),
            Arm(
                "wasserstein: literal",
                {"rewards.score": "wasserstein", "rewards.rule": "literal"},
                "the published rule on it",
                ("wasserstein: mean",),
                ("shares",),
            ),
            Arm(
                "wasserstein: reweighted",
                {"rewards.score": "wasserstein", "rewards.rule": "reweighted"},
                "the weights alone on it",
                ("wasserstein: mean",),
                ("shares",),
            ),
            Arm(
                "cosine: mean",
                {"rewards.score": "cosine", "rewards.rule": "mean"},
                "the published probability reward with the best figures",
                ("mean",),
                ("shares",),
            ),
            Arm(
                "cosine: literal",
                {"rewards.score": "cosine", "rewards.rule": "literal"},
                "the published rule on it",
                ("cosine: mean",),
                ("shares",),
            ),
            Arm(
                "cosine: reweighted",
                {"rewards.score": "cosine", "rewards.rule": "reweighted"},
                "the weights alone on it",
                ("cosine: mean",),
                ("shares",),
            ),
        ),
    ),
    "threshold": Part(
        title="The fairness switch",
        why="published thresholds are .9 and .99; at 2 the plain mean is never taken",
        tasks=("letter", "order"),
        arms=(
            MEAN,
            Arm(
                "literal at .9",
                {"rewards.rule": "literal", "rewards.fairness-threshold": 0.9},
                "threshold of arXiv 2512.08786",
            ),
            Arm(
                "literal at .99",
                {"rewards.rule": "literal", "rewards.fairness-threshold": 0.99},
                "threshold of arXiv 2604.04261",
            ),
            Arm(
                "literal always",
                {"rewards.rule": "literal", "rewards.fairness-threshold": 2.0},
                "no switch: the artefact in every exchange",
            ),
            Arm(
                "scaled at .9",
                {"rewards.rule": "scaled", "rewards.fairness-threshold": 0.9},
                "the same switch without the artefact",
            ),
            Arm(
                "scaled at .99",
                {"rewards.rule": "scaled", "rewards.fairness-threshold": 0.99},
                "the same switch without the artefact",
            ),
            Arm(
                "scaled always",
                {"rewards.rule": "scaled", "rewards.fairness-threshold": 2.0},
                "no switch and no artefact",
            ),
        ),
    ),
    "kl": Part(
        title="The KL coefficient",
        why="not stated in the papers, and it decides how much a change of scale matters",
        tasks=("letter", "order"),
        arms=(
            MEAN,
            REWEIGHTED,
            LITERAL,
            OVER_N,
            Arm("mean, kl x .5", {"rewards.rule": "mean"}, "looser", ("mean",), kl_factor=0.5),
            Arm(
                "reweighted, kl x .5",
                {"rewards.rule": "reweighted"},
                "the weights alone, looser",
                ("mean, kl x .5",),
                kl_factor=0.5,
            ),
            Arm(
                "literal, kl x .5",
                {"rewards.rule": "literal"},
                "the published rule, looser",
                ("mean, kl x .5", "mean-over-n, kl x .5"),
                kl_factor=0.5,
            ),
            Arm(
                "mean-over-n, kl x .5",
                {"rewards.rule": "mean-over-n"},
                "its control",
                ("mean, kl x .5",),
                kl_factor=0.5,
            ),
            Arm("mean, kl x 2", {"rewards.rule": "mean"}, "tighter", ("mean",), kl_factor=2.0),
            Arm(
                "reweighted, kl x 2",
                {"rewards.rule": "reweighted"},
                "the weights alone, tighter",
                ("mean, kl x 2",),
                kl_factor=2.0,
            ),
            Arm(
                "literal, kl x 2",
                {"rewards.rule": "literal"},
                "the published rule, tighter",
                ("mean, kl x 2", "mean-over-n, kl x 2"),
                kl_factor=2.0,
            ),
            Arm(
                "mean-over-n, kl x 2",
                {"rewards.rule": "mean-over-n"},
                "its control",
                ("mean, kl x 2",),
                kl_factor=2.0,
            ),
        ),
    ),
    "kl-matched": Part(
        title="Equal distance from the base",
        why="a controller holds every arm at the same KL: scale cannot explain a difference",
        tasks=("letter", "order"),
        arms=(MEAN, LITERAL, REWEIGHTED, MIN, OVER_N),
        by_task={task: {"ppo.kl-target": nats} for task, nats in KL_TARGET.items()},
        against=("mean", "mean-over-n"),
    ),
    "history": Part(
        title="History and temperature",
        why="decay, what it multiplies and the temperature's unit are not fully stated",
        tasks=("letter", "order"),
        arms=(
            MEAN,
            *(
                Arm(
                    f"{name}, decay {decay:g}, T {temperature:g}",
                    {
                        "rewards.rule": name,
                        "weights.decay": decay,
                        "weights.temperature": temperature,
                    },
                    "grid of decay and temperature",
                )
                for name in ("reweighted", "literal")
                for decay in (0.0, 0.8)
                for temperature in (0.05, 0.1, 0.3)
            ),
        ),
    ),
    "balanced": Part(
        title="Balanced groups",
        why="a case in which adaptive weights have nothing to gain, shown on purpose",
        tasks=("letter", "order"),
        settings={"data.world": "balanced"},
        arms=(MEAN, MIN, LITERAL, SCALED, REWEIGHTED, OVER_N, PLACEBO),
        against=("mean", "mean-over-n", "placebo"),
    ),
    "countries": Part(
        title="Countries of GlobalOpinionQA",
        why="answers of real people, though not the published models",
        tasks=("letter",),
        settings={"score.metric": "js_distance"},
        arms=(MEAN, MIN, MAX, LITERAL, REWEIGHTED, OVER_N, PLACEBO),
        against=("mean", "mean-over-n", "placebo"),
        needs_countries=True,
    ),
    "predictor": Part(
        title="Rewards from the predictor",
        why="the published form: a frozen predictor answers; scored on the groups' true answers",
        tasks=("letter", "order"),
        arms=(
            MEAN,
            REWEIGHTED,
            LITERAL,
            *(
                Arm(
                    f"{name}, predictor",
                    {"rewards.rule": name, "site.answers": "predictor"},
                    "the same rule, rewards from the predictor",
                    (name,) if name == "mean" else (name, "mean, predictor"),
                )
                for name in ("mean", "reweighted", "literal")
            ),
        ),
    ),
    "adapters": Part(
        title="Clients train, the server averages adapters",
        why="the other way to align one model with groups, at about the same number of tokens",
        tasks=("letter",),
        arms=(
            MEAN,
            REWEIGHTED,
            *(
                Arm(
                    f"{objective} {weights}",
                    {
                        "run.mode": "adapters",
                        "local.objective": objective,
                        "local.steps": steps,
                        "weights.rule": weights,
                    },
                    why,
                    ("mean",) if weights == "uniform" else ("reweighted", f"{objective} uniform"),
                )
                for objective, steps, why in (
                    ("dpo", DPO_STEPS, "preference pairs of the client's own answers"),
                    ("ppo", PPO_STEPS, "the same objective, on the client's own rewards"),
                )
                for weights in ("uniform", "adaptive")
            ),
        ),
    ),
}
DEFAULT_PARTS = ("core", "oracle")


def choose(parts: str, full: bool) -> list[str]:
    """Return the names of the parts to run; ``parts`` is a comma-separated list, or empty.

    Raises ``ConfigError`` for a part that does not exist.
    """
    named = [p.strip() for p in parts.split(",") if p.strip()]
    for name in named:
        if name not in PARTS:
            raise ConfigError(f"part '{name}' is not one of {', '.join(PARTS)}.")
    chosen = named or list(PARTS if full else DEFAULT_PARTS)
    return [name for name in PARTS if name in chosen]


def arms_of(part: Part, task: str) -> list[Arm]:
    """Return the part's arms on one of its tasks."""
    return [a for a in part.arms if task in (a.tasks or part.tasks)]


def arm_config(base: Config, part: Part, task: str, arm: Arm, more: Settings) -> Config:
    """Return the configuration of an arm; ``more`` wins over everything (seed, data, model)."""
    flat = {
        **to_flat(base),
        **TASKS[task],
        **part.settings,
        **part.by_task.get(task, {}),
        **arm.settings,
        **more,
    }
    flat["ppo.kl"] = float(flat["ppo.kl"]) * arm.kl_factor
    return from_flat(flat)
