"""What was published, what it left open, and what reviewers asked: literal data for the report.

The figures come from secondary summaries of the papers, not from the papers' own tables; cells that
no summary gives are None.  They were obtained with billion-parameter models and on other questions,
so only the order of rules and the sign of differences can be set beside ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of a published table."""

    label: str
    ours: str
    """The arm it corresponds to; empty where there is none."""
    average: float | None
    worst: float | None
    fairness_index: float | None


@dataclass(frozen=True)
class Table:
    """One published table and the tasks of ours it can be set beside."""

    title: str
    source: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    remark: str


TABLES = (
    Table(
        "Probability task, Gemma-2-2B-it, scored by cosine",
        "arXiv 2512.08786",
        ("shares", "letter"),
        (
            Row("SFT", "untouched base", 0.82, 0.77, 0.97),
            Row("adaptive / cosine", "literal", 0.92, 0.90, 0.99),
            Row("max / cosine", "max", 0.93, 0.91, 0.99),
            Row("min / cosine", "min", 0.92, 0.90, 0.99),
        ),
        "The row of the mean was not found. All rules lie within .01 to .02, and max is the best.",
    ),
    Table(
        "Ranking task, Gemma-2-2B-it, Borda; minimum by Kendall",
        "arXiv 2512.08786",
        ("order",),
        (
            Row("SFT", "untouched base", 0.50, 0.25, 0.87),
            Row("adaptive / Kendall", "kendall: literal", 0.47, 0.47, 0.81),
            Row("adaptive / Borda", "literal", 0.61, 0.34, 0.95),
            Row("mean / Borda", "mean", 0.58, 0.35, 0.92),
        ),
        "The published closed forms of Borda and Kendall were not found. With ours .5 is chance, "
        "and neither good nor at chance may be said of the published values.",
    ),
    Table(
        "GlobalOpinionQA, printed shares, Jensen-Shannon, Gemma-2-2B",
        "arXiv 2604.04261",
        ("shares", "letter"),
        (
            Row("mean", "mean", 0.839, 0.812, 0.9695),
            Row("min", "min", 0.834, 0.808, 0.9995),
            Row("adaptive (APPA)", "literal", 0.861, 0.843, 0.9994),
        ),
        "A fairness index of .9695 against .9994 is a spread seven times as large at nearly equal "
        "scores; the minimum shows the same drop, and it has no scale artefact.",
    ),
    Table(
        "GlobalOpinionQA, printed order, Borda, Gemma-2-2B",
        "arXiv 2604.04261",
        ("order",),
        (
            Row("mean", "mean", 0.469, 0.359, 0.8539),
            Row("min", "min", 0.475, 0.420, 0.8725),
            Row("adaptive (APPA)", "literal", 0.511, 0.461, 0.8911),
        ),
        'The headline "28 % better worst group" is .461 / .359, this cell only.',
    ),
    Table(
        "OpinionQA, printed shares, Wasserstein, Llama-3.2-3B",
        "arXiv 2604.04261",
        ("shares",),
        (
            Row("mean", "mean", 0.859, 0.824, 0.9645),
            Row("min", "min", 0.856, 0.811, 0.9937),
            Row("adaptive (APPA)", "literal", 0.872, 0.841, 0.9940),
        ),
        "OpinionQA itself is not run here.",
    ),
    Table(
        "OpinionQA, printed shares, Wasserstein, Qwen3-0.6B",
        "arXiv 2604.04261",
        ("shares",),
        (
            Row("min", "min", 0.823, 0.781, None),
            Row("adaptive (APPA)", "literal", 0.780, 0.735, None),
        ),
        "The smallest published model, and the one case in which the minimum wins.",
    ),
)

# (what the papers leave open, our value with {section.key} filled in from the settings)
UNSET = (
    (
        "KL coefficient, and whether it is held or controlled",
        "ppo.kl = {ppo.kl}, fixed; parts `kl` (half, twice) and `kl-matched` (held equal by a "
        "controller)",
    ),
    ("history before the first round, h_0", "the mean rewards of the untouched base's own texts"),
    (
        "what the decay multiplies",
        "h <- decay * h + (1 - decay) * mean reward; decay {weights.decay}, part `history`",
    ),
    ("temperature's unit", "that of the reward, in [0, 1]; T = {weights.temperature}"),
    (
        "reward scale and whitening",
        "rewards as they are; advantages standardised over an exchange "
        "(ppo.whiten = {ppo.whiten}), which keeps the ratio of reward to KL, since the KL is part "
        "of the token reward",
    ),
    (
        "closed forms of the rewards",
        "letter: 1 - ln(max(p, {rewards.floor})) / ln({rewards.floor}); shares: 1 - JSD; order: "
        "normalised Borda; others in part `scores`",
    ),
    ("reward of malformed output", "rewards.malformed = {rewards.malformed}; counted in every run"),
    (
        "over what the fairness index of the switch is taken",
        "the texts of one exchange, grouped by question; threshold {rewards.fairness_threshold}, "
        "part `threshold`",
    ),
    (
        "floor and ceiling of weights",
        "{weights.floor}/n and {weights.ceiling}/n, ours: the published softmax has none",
    ),
    (
        "PPO epochs, batch, learning rate",
        "{ppo.epochs} epochs, {ppo.minibatches} x {ppo.questions} questions x {ppo.samples} texts "
        "an exchange, learning rate {ppo.learning_rate}",
    ),
    ("number of exchanges", "{run.rounds}"),
    ("supervised fine-tuning before PPO", "none: the base knows the answer formats"),
    (
        "split",
        "by question: {data.validation:.0%} validation, {data.test:.0%} test, the rest "
        "for training; a question has one role in the whole federation",
    ),
    ("seeds", "{seeds}, paired over all arms"),
    ("countries", "part `countries`: the eight asked most often in the file that is given"),
)

# (the reviewers' point, the parts it needs, the answer when they were run, the answer otherwise)
REVIEWS = (
    (
        "Are the differences significant?",
        (),
        "Every difference has a paired 95 % interval over seeds, and a verdict by a stated rule.",
        "",
    ),
    (
        "Larger and other models?",
        (),
        "Not answered. One small model was run; the command takes any causal language model "
        "(--set model.name=...), and only such runs could reproduce the figures.",
        "",
    ),
    (
        "Human rather than model-generated preferences?",
        ("countries",),
        "Part `countries` uses survey answers of people in eight countries; all other parts use "
        "synthetic groups.",
        "Not answered: all groups here are synthetic. Part `countries` needs --countries.",
    ),
    (
        "What is one shared policy for, when groups disagree?",
        (),
        "The tables give the attainable optimum of one shared answer beside every score, and the "
        "share of it that was attained. What is above it needs personal adapters.",
        "",
    ),
    (
        "What does the preference predictor do?",
        ("predictor",),
        "Part `predictor` trains on its rewards and scores on the groups' true answers.",
        "Not answered: rewards come from the groups' own answers. Part `predictor` was not run.",
    ),
    (
        "How does it compare with FedBiscuit (arXiv 2407.03038)?",
        (),
        "Not compared: it trains selectors on pairs of free texts, which no survey holds.",
        "",
    ),
    (
        "Is it private, when the server sees each group's reward on each text?",
        (),
        "No more than its site's policy makes it: exact rewards on chosen texts give a group's "
        "shares away. docs/privacy.md measures what rounding, a query budget and the predictor "
        "leave.",
        "",
    ),
    (
        "Does it help where groups are equally hard?",
        ("balanced",),
        "Part `balanced` shows a case with nothing to gain.",
        "Not answered: part `balanced` was not run.",
    ),
)
