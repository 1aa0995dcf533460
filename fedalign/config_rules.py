"""Allowed values and combinations of settings; every refusal says what is allowed.

Works on flat keys (``section.key-name``), the form in which settings arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedalign.errors import ConfigError

Scalar = str | int | float | bool

SURVEY_METRICS = ("js_divergence", "js_distance", "js_distance_base2", "wasserstein", "cosine")
WEIGHT_RULES = ("uniform", "size", "adaptive", "worst", "afl", "qffl", "placebo")
REWARD_RULES = (
    "mean",
    "min",
    "max",
    "literal",
    "scaled",
    "reweighted",
    "soft-min",
    "mixture",
    "multiplicative",
    "placebo",
    "mean-over-n",
    "mean-kl-n",
)
PRECISIONS = ("float32", "bfloat16", "int8")
TASKS = ("letter", "shares", "order")
ORDER_METRICS = ("borda", "kendall", "binary")
SHARES_METRICS = ("js_divergence", "js_distance", "wasserstein", "cosine")
TASK_SCORES = {"letter": ("log", "share"), "shares": SHARES_METRICS, "order": ORDER_METRICS}

CHOICES: dict[str, tuple[str, ...]] = {
    "run.mode": ("adapters", "rewards"),
    "run.early-stop-on": ("worst", "average"),
    "data.source": ("synthetic", "survey", "pairs", "globalopinionqa", "goqa", "polis", "hf"),
    "data.form": ("auto", "survey", "pairs"),
    "data.world": ("default", "balanced", "many"),
    "data.partition": ("group", "sizes", "dirichlet", "column"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.gradient-checkpointing": ("auto", "on", "off"),
    "local.engine": ("torch", "trl"),
    "local.objective": ("dpo", "ppo", "rloo", "grpo"),
    "local.loss": ("sigmoid", "ipo", "conservative", "robust"),
    "local.labels": ("shares", "hard"),
    "local.schedule": ("cosine", "constant"),
    "weights.rule": WEIGHT_RULES,
    "weights.within-group": ("size", "equal"),
    "aggregation.method": ("product", "frozen-a", "factor-mean"),
    "wire.upload": PRECISIONS,
    "wire.download": PRECISIONS,
    "rewards.task": TASKS,
    "rewards.score": ("auto", "log", "share", *SHARES_METRICS, *ORDER_METRICS),
    "rewards.rule": REWARD_RULES,
    "predictor.loss": ("cross-entropy", "gaussian"),
    "site.answers": ("shares", "predictor", "both"),
    "score.metric": ("auto", *SURVEY_METRICS, "pair_accuracy", *ORDER_METRICS),
}

# key: (low, high, low allowed, high allowed)
RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "run.seed": (0, 2**31 - 1, True, True),
    "run.rounds": (1, 1_000_000, True, True),
    "run.clients-per-round": (0, 1_000_000, True, True),
    "run.clients-per-message": (1, 100_000, True, True),
    "run.round-timeout": (0, 30 * 86400, False, True),
    "run.quorum": (0, 1, False, True),
    "run.max-attempts": (1, 100, True, True),
    "run.early-stop-patience": (0, 1_000_000, True, True),
    "data.max-groups": (0, 1_000_000, True, True),
    "data.questions": (0, 10**9, True, True),
    "data.min-votes": (1, 10**9, True, True),
    "data.validation": (0, 1, False, False),
    "data.test": (0, 1, False, False),
    "data.dirichlet-alpha": (0, 1e6, False, True),
    "model.max-length": (8, 10**7, True, True),
    "model.rank": (1, 4096, True, True),
    "model.alpha": (0, 1e6, False, True),
    "local.beta": (0, 1e3, False, True),
    "local.label-noise": (0, 0.5, True, False),
    "local.pairs-per-question": (0, 10**6, True, True),
    "local.steps": (1, 10**9, True, True),
    "local.batch-size": (1, 10**6, True, True),
    "local.learning-rate": (0, 10, False, True),
    "local.max-grad-norm": (0, 1e9, True, True),
    "local.cohort-size": (0, 100_000, True, True),
    "local.threads": (0, 1024, True, True),
    "weights.temperature": (0, 1e6, False, True),
    "weights.decay": (0, 1, True, False),
    "weights.floor": (0, 1, True, True),
    "weights.ceiling": (1, 1e6, True, True),
    "weights.step": (0, 1e6, False, True),
    "weights.q": (0, 100, True, True),
    "rewards.floor": (0, 1, False, False),
    "rewards.malformed": (0, 1, True, True),
    "rewards.fairness-threshold": (0, 2, True, True),
    "rewards.sharpness": (-1e4, 0, True, False),
    "rewards.min-format-rate": (0, 1, True, True),
    "ppo.kl": (0, 1e3, False, True),
    "ppo.kl-target": (0, 1e3, True, True),
    "ppo.questions": (1, 10**5, True, True),
    "ppo.samples": (1, 10**4, True, True),
    "ppo.minibatches": (1, 10**4, True, True),
    "ppo.epochs": (1, 100, True, True),
    "ppo.clip": (0, 1, False, False),
    "ppo.value-clip": (0, 1e3, True, True),
    "ppo.gamma": (0, 1, False, True),
    "ppo.lam": (0, 1, True, True),
    "ppo.learning-rate": (0, 10, False, True),
    "ppo.value-learning-rate": (0, 10, False, True),
    "ppo.max-grad-norm": (0, 1e9, True, True),
    "ppo.max-clip-fraction": (0, 1, False, True),
    "ppo.max-kl": (0, 1e6, False, True),
    "predictor.rounds": (1, 10**6, True, True),
    "predictor.steps": (1, 10**6, True, True),
    "predictor.width": (4, 8192, True, True),
    "predictor.layers": (1, 100, True, True),
    "predictor.heads": (1, 128, True, True),
    "predictor.context": (1, 10**5, True, True),
    "predictor.targets": (1, 10**5, True, True),
    "predictor.learning-rate": (0, 10, False, True),
    "site.rounding": (0, 1, True, False),
    "site.query-budget": (0, 10**6, True, True),
    "score.samples": (1, 10**4, True, True),
    "score.min-option-mass": (0, 1, True, True),
    "personal.steps": (0, 10**9, True, True),
    "personal.learning-rate": (0, 10, False, True),
    "deployment.min-sites": (0, 100_000, True, True),
    "deployment.wait": (0, 30 * 86400, False, True),
}


def check(flat: Mapping[str, Scalar]) -> None:
    """Raise ``ConfigError`` for a value out of range or a combination that cannot work."""
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise ConfigError(f"{key} = '{flat[key]}' is not one of {', '.join(allowed)}.")
    for key, (low, high, low_in, high_in) in RANGES.items():
        value = float(flat[key])
        inside = (low <= value if low_in else low < value) and (
            value <= high if high_in else value < high
        )
        if not inside:
            left, right = "[" if low_in else "(", "]" if high_in else ")"
            raise ConfigError(f"{key} = {flat[key]} is outside {left}{low:g}, {high:g}{right}.")
    held_out = float(flat["data.validation"]) + float(flat["data.test"])
    if held_out >= 1:
        raise ConfigError(
            f"data.validation + data.test = {held_out:g} leaves no training questions; their sum "
            "must be below 1."
        )
    if flat["data.source"] != "synthetic" and not flat["data.path"]:
        raise ConfigError(f"data.source = '{flat['data.source']}' needs data.path.")
    if flat["data.partition"] == "column" and not flat["data.partition-column"]:
        raise ConfigError("data.partition = 'column' needs data.partition-column.")
    _check_wire(flat)
    _check_rewards(flat)
    objective = flat["local.objective"]
    if objective in ("rloo", "grpo") and flat["local.engine"] != "trl":
        raise ConfigError(f"local.objective = '{objective}' needs local.engine = 'trl'.")
    if objective == "ppo" and flat["local.engine"] == "trl":
        raise ConfigError("TRL has no PPO trainer any more: use local.engine = 'torch' for ppo.")
    dpo_by_trl = flat["local.engine"] == "trl" and objective == "dpo"
    if dpo_by_trl and flat["local.labels"] != "hard":
        raise ConfigError(
            "local.engine = 'trl' takes hard labels only (TRL has no per-pair vote shares). "
            "Set local.labels = 'hard', or use local.engine = 'torch'."
        )
    if dpo_by_trl and flat["local.reference"] != "base":
        raise ConfigError("local.engine = 'trl' needs local.reference = 'base'.")
    if flat["local.loss"] == "robust" and flat["local.labels"] == "shares":
        raise ConfigError(
            "local.loss = 'robust' corrects flipped hard labels; it has no meaning on vote "
            "shares. Set local.labels = 'hard'."
        )
    if flat["local.label-noise"] and flat["local.loss"] not in ("conservative", "robust"):
        raise ConfigError(
            f"local.label-noise = {flat['local.label-noise']} has no effect on loss "
            f"'{flat['local.loss']}'. Use loss 'conservative' or 'robust', or set it to 0."
        )
    paths = ["rewards.prompts", "run.out", "deployment.registry", "deployment.audit"]
    if flat["data.source"] != "hf":
        paths.append("data.path")
    stray = [k for k in ("deployment.audit", "deployment.min-sites") if flat[k]]
    if stray and not flat["deployment.registry"]:
        raise ConfigError(
            f"{stray[0]} = {flat[stray[0]]} has no effect without deployment.registry: a "
            "simulation has no enrolled sites."
        )
    for name in paths:
        given = str(flat[name])
        if given and not Path(given).is_absolute():
            raise ConfigError(
                f"{name} = '{given}' is not an absolute path; a runner may work elsewhere."
            )


def _check_wire(flat: Mapping[str, Scalar]) -> None:
    """Refuse precisions that have no effect, and feedback in a basis that does not stay."""
    upload, download = flat["wire.upload"], flat["wire.download"]
    if (upload, download) != ("float32", "float32") and flat["run.mode"] == "rewards":
        raise ConfigError(
            "wire.upload and wire.download have no effect in mode 'rewards': no adapter travels. "
            "Leave them at float32."
        )
    if download != "float32" and upload == "float32":
        raise ConfigError(
            f"wire.download = '{download}' needs wire.upload = 'bfloat16' or 'int8': only a change "
            "can be added to the exact adapter, of which clients then hold a coarse copy."
        )
    if not flat["wire.feedback"]:
        return
    if upload == "float32":
        raise ConfigError(
            "wire.feedback has no effect with wire.upload = 'float32': nothing is lost. Set "
            "wire.upload to 'bfloat16' or 'int8', or wire.feedback = false."
        )
    method = flat["aggregation.method"]
    if method != "frozen-a":
        raise ConfigError(
            f"wire.feedback needs aggregation.method = 'frozen-a', not '{method}': what a client "
            "keeps are entries of factors, and their basis must be the same in the next round."
        )


def _check_rewards(flat: Mapping[str, Scalar]) -> None:
    """Refuse rewards that cannot tell one sampled text from another, and unfitting scores."""
    task, score, metric = (str(flat[k]) for k in ("rewards.task", "rewards.score", "score.metric"))
    sampled = flat["run.mode"] == "rewards" or flat["local.objective"] != "dpo"
    if score != "auto" and score not in TASK_SCORES[task]:
        why = ""
        if task == "letter" and score in SHARES_METRICS:
            why = (
                " A distance between option probabilities gives every sampled letter of a question "
                "the same reward, so there is nothing to learn from; it is for evaluation only."
            )
        raise ConfigError(
            f"rewards.score = '{score}' does not fit rewards.task = '{task}'; use "
            f"{', '.join(TASK_SCORES[task])} or auto.{why}"
        )
    if not sampled and task != "letter":
        raise ConfigError(
            f"rewards.task = '{task}' needs an objective that samples texts: run.mode = 'rewards', "
            "or local.objective = 'ppo'. DPO compares letters."
        )
    if (metric in ORDER_METRICS) != (task == "order") and metric != "auto":
        raise ConfigError(
            f"score.metric = '{metric}' does not fit rewards.task = '{task}'; use auto or "
            f"{', '.join(ORDER_METRICS if task == 'order' else SURVEY_METRICS)}."
        )
    if flat["run.mode"] == "rewards" and flat["weights.rule"] != "adaptive":
        raise ConfigError(
            f"weights.rule = '{flat['weights.rule']}' has no effect in mode 'rewards'. Choose how "
            "rewards are combined with rewards.rule (mean, reweighted, min, ...), and leave "
            "weights.rule alone."
        )
    if flat["run.mode"] == "rewards" and flat["run.early-stop-patience"]:
        raise ConfigError(
            "run.early-stop-patience watches validation scores of every round, which mode "
            "'rewards' does not take. Set it to 0."
        )
    if task != "letter" and flat["local.objective"] == "dpo" and flat["personal.steps"]:
        raise ConfigError(
            f"personal.steps = {flat['personal.steps']} trains by DPO, which compares letters, but "
            f"rewards.task = '{task}'. Set personal.steps = 0, or local.objective = 'ppo'."
        )
    if sampled and flat["data.form"] == "pairs":
        raise ConfigError(
            "sampled texts are scored against survey answers, not against pairs. Use run.mode = "
            "'adapters' with local.objective = 'dpo' for pairs."
        )
    if float(flat["predictor.width"]) % float(flat["predictor.heads"]):
        raise ConfigError("predictor.width must be a multiple of predictor.heads.")
    if flat["site.answers"] != "shares" and flat["run.mode"] != "rewards":
        raise ConfigError(
            f"site.answers = '{flat['site.answers']}' needs run.mode = 'rewards': only there "
            "is a predictor trained."
        )
