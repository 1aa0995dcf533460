"""Part ``scores`` of the reproduction: the rules under other rewards of a text."""

from __future__ import annotations

from simulations.reproduce_arms import Arm, Part

SCORES = Part(
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
)
