"""The parts of the reproduction, as plain data; what an arm is, see ``reproduce_arms.py``."""

from __future__ import annotations

from dataclasses import replace

from fedalign.errors import ConfigError
from simulations.reproduce_arms import (
    CORE,
    DPO_STEPS,
    KL_TARGET,
    LITERAL,
    MAX,
    MEAN,
    MIN,
    OVER_N,
    PLACEBO,
    PPO_ROUNDS,
    PPO_STEPS,
    REWEIGHTED,
    SCALED,
    Arm,
    Part,
    rule,
)
from simulations.reproduce_scores import SCORES

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
    "scores": SCORES,
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
        why="a controller moves every arm towards one KL; the KL column says how near it came",
        tasks=("letter", "order"),
        # The controller is slow: arms of a quarter of the scale start at a quarter of the penalty.
        settings={"run.rounds": 60},
        arms=(
            MEAN,
            replace(LITERAL, kl_factor=0.25),
            REWEIGHTED,
            MIN,
            replace(OVER_N, kl_factor=0.25),
        ),
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
                        **rounds,
                        "weights.rule": weights,
                    },
                    why,
                    ("mean",) if weights == "uniform" else ("reweighted", f"{objective} uniform"),
                )
                for objective, steps, rounds, why in (
                    ("dpo", DPO_STEPS, {}, "preference pairs of the client's own answers"),
                    (
                        "ppo",
                        PPO_STEPS,
                        {"run.rounds": PPO_ROUNDS},
                        "the same objective, on the client's own rewards",
                    ),
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
