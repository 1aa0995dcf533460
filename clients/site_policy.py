"""What a site allows, and the decision on each request.

The policy is a file (``policy_toml.py``) of the OS user that holds the data.  The coordinator
cannot change it and never sees it: a request that it does not allow is answered with a short code,
nothing else.  Every field is documented where it is declared.

:func:`judge` is a pure function of policy, settings, kind of request, what was spent today and the
number of training examples.  What is not refused may still leave in another form: scores rounded or
withheld (``release.py``), updates clipped and noised (``noise.py``), rewards rounded and counted
(``policy.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedalign import wire
from fedalign.config import Config, personal_stages
from fedalign.errors import ConfigError
from fedalign.wire.predictor import PREDICTOR

OBJECTIVES = ("dpo", "ppo", "rloo", "grpo", "exchange")
ROUNDS = (wire.TRAIN, wire.EXCHANGE, PREDICTOR)
"""Kinds of request that count as a round."""


@dataclass(frozen=True)
class AllowedModel:
    """A base model that may be loaded here; ``[[model]]``, once for each."""

    name: str = "pocket"
    """``pocket``, a Hugging Face name, or the absolute path of a folder on this machine."""
    revision: str = ""
    """The one revision allowed, as the run must give it. Empty: whatever the run asks for."""


@dataclass(frozen=True)
class TrainingPolicy:
    """What may be computed on the data."""

    objectives: tuple[str, ...] = ("dpo", "exchange")
    """Any of ``dpo``, ``ppo``, ``rloo``, ``grpo`` (training here) and ``exchange`` (answering what
    the server's texts are worth, and training the predictor)."""
    min_examples: int = 10
    """Least training questions or pairs; a site with fewer takes no part."""
    max_steps_per_round: int = 100
    """Most optimiser steps that a round may ask for."""
    max_personal_steps: int = 2000
    """Most optimiser steps of the personal phase, its local-only adapters included."""


@dataclass(frozen=True)
class BudgetPolicy:
    """Most that is done in a day (UTC), over all runs. 0 sets no limit."""

    max_jobs_per_day: int = 5000
    """Requests worked on, of any kind."""
    max_rounds_per_day: int = 1000
    """Rounds of training, of the predictor, and exchanges."""
    max_seconds_per_day: float = 0.0
    """Seconds of work. A job that would exceed them is stopped."""


@dataclass(frozen=True)
class ScoresPolicy:
    """What leaves of scores and losses. Status codes and counts always leave."""

    release: str = "exact"
    """``exact``, ``rounded`` (to the nearest multiple of ``rounding``) or ``withheld``."""
    rounding: float = 0.05
    """Used where ``release`` is ``rounded``; in (0, 1)."""
    question_scores: bool = False
    """Also send the score of each test question with a hash of its text, where the run asks."""


@dataclass(frozen=True)
class ExchangePolicy:
    """What rewards of sampled texts are made from. See ``clients/policy.py``."""

    answers: str = "shares"
    """What a run may ask for in ``site.answers``: ``shares`` (true answers), ``predictor``, or
    ``both`` (any of the three). A run that asks for anything else is refused."""
    rounding: float = 0.0
    """Rewards leave as multiples of this; the coarser of this and the run's ``site.rounding``."""
    query_budget: int = 0
    """Different texts a question that are ever answered in a run; 0 sets no limit. The smaller of
    this and the run's ``site.query-budget``."""


@dataclass(frozen=True)
class UpdatePolicy:
    """Clipping and noise of what training sends. Only under ``aggregation.method = frozen-a``."""

    clip: float = 0.0
    """Largest norm of the update B A - B0 A (Frobenius, all modules together, without LoRA's
    alpha / r: the unit of the ledger's update norms). 0: no clipping."""
    noise: float = 0.0
    """Gaussian noise, as a multiple of ``clip``; needs ``clip``. It is no stated privacy guarantee
    without accounting over rounds and of scores: see ``clients/noise.py``."""


@dataclass(frozen=True)
class Policy:
    """The whole policy of a site."""

    models: tuple[AllowedModel, ...] = (AllowedModel(),)
    training: TrainingPolicy = field(default_factory=TrainingPolicy)
    budget: BudgetPolicy = field(default_factory=BudgetPolicy)
    scores: ScoresPolicy = field(default_factory=ScoresPolicy)
    exchange: ExchangePolicy = field(default_factory=ExchangePolicy)
    update: UpdatePolicy = field(default_factory=UpdatePolicy)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Spent:
    """What was done today."""

    jobs: int = 0
    rounds: int = 0
    seconds: float = 0.0


def judge(policy: Policy, config: Config, kind: str, spent: Spent, examples: int) -> int | None:
    """Return the status code that refuses a request, or None where the policy allows it.

    Args:
        policy: the site's policy.
        config: the run's settings, as they arrived (but for the data).
        kind: message type of ``fedalign.wire``.  ``hello`` is judged by all that the run will ask.
        spent: what was done today before this request.
        examples: training questions or pairs of the site under the run's split.
    """
    asked = config.model
    if not any(m.name == asked.name and m.revision in ("", asked.revision) for m in policy.models):
        return wire.REFUSED_BASE_MODEL
    if not _objectives(config, kind) <= set(policy.training.objectives):
        return wire.REFUSED_OBJECTIVE
    if policy.update.clip and not _can_clip(config, kind):
        return wire.REFUSED_AGGREGATION
    if not _settings_fit(policy, config, kind):
        return wire.REFUSED_SETTINGS
    if examples < policy.training.min_examples:
        return wire.TOO_FEW_EXAMPLES
    budget = policy.budget
    over = (
        (budget.max_jobs_per_day and spent.jobs >= budget.max_jobs_per_day)
        or (
            budget.max_rounds_per_day
            and kind in ROUNDS
            and spent.rounds >= budget.max_rounds_per_day
        )
        or (budget.max_seconds_per_day and spent.seconds >= budget.max_seconds_per_day)
    )
    return wire.BUDGET_EXHAUSTED if over else None


def stricter(policy: Policy, config: Config) -> Config:
    """Return the settings with the stricter of the run's and the site's wish where they meet."""
    own = policy.exchange
    budgets = [b for b in (own.query_budget, config.site.query_budget) if b]
    site = replace(
        config.site,
        rounding=max(own.rounding, config.site.rounding),
        query_budget=min(budgets, default=0),
    )
    items = config.score.items and policy.scores.question_scores
    if policy.scores.release == "withheld":
        items = False
    return replace(config, site=site, score=replace(config.score, items=items))


def _objectives(config: Config, kind: str) -> set[str]:
    """Return what a request makes the site do; ``hello`` asks for all that the run will ask."""
    rewards = config.run.mode == "rewards"
    if kind in (wire.EXCHANGE, PREDICTOR):
        return {"exchange"}
    if kind in (wire.TRAIN, wire.PERSONAL):
        return {config.local.objective}
    wanted = {"exchange"} if rewards else {config.local.objective}
    if config.personal.steps:
        wanted.add(config.local.objective)
    return wanted


def _can_clip(config: Config, kind: str) -> bool:
    """Say whether everything that leaves by training can be clipped.

    Only an update of B under a fixed A lives in one vector space; parameters of the predictor have
    no mechanism here.
    """
    if kind == PREDICTOR:
        return False
    trains = kind == wire.TRAIN or (kind != wire.EXCHANGE and config.run.mode == "adapters")
    predicts = config.run.mode == "rewards" and config.site.answers != "shares"
    return not (trains and config.aggregation.method != "frozen-a") and not (
        predicts and kind == wire.HELLO
    )


def _settings_fit(policy: Policy, config: Config, kind: str) -> bool:
    if config.local.reference not in ("none", "base"):
        return False  # a path on this machine that the other side chose
    allowed = policy.exchange.answers
    exchanging = kind in (wire.EXCHANGE, PREDICTOR) or config.run.mode == "rewards"
    if exchanging and allowed not in ("both", config.site.answers):
        return False
    hello = kind == wire.HELLO
    steps = config.local.steps
    trains = kind == wire.TRAIN or (hello and config.run.mode == "adapters")
    if trains and steps > policy.training.max_steps_per_round:
        return False
    predicts = kind == PREDICTOR or (hello and exchanging and config.site.answers != "shares")
    if predicts and config.predictor.steps > policy.training.max_steps_per_round:
        return False
    personal = kind == wire.PERSONAL or (hello and config.personal.steps > 0)
    return not personal or _personal_steps(config) <= policy.training.max_personal_steps


def _personal_steps(config: Config) -> int:
    """Return the optimiser steps of the personal phase: its own, and those of local-only."""
    own, stages = config.personal.steps, personal_stages(config)
    total = own if "local_only" in stages else 0
    if "local_only_total" in stages:
        total = config.run.rounds * config.local.steps + own
    return own + total


def _check(policy: Policy) -> None:
    unknown = [o for o in policy.training.objectives if o not in OBJECTIVES]
    if unknown:
        raise ConfigError(
            f"training.objectives: '{unknown[0]}' is not one of {', '.join(OBJECTIVES)}."
        )
    for key, value, allowed in (
        ("scores.release", policy.scores.release, ("exact", "rounded", "withheld")),
        ("exchange.answers", policy.exchange.answers, ("shares", "predictor", "both")),
    ):
        if value not in allowed:
            raise ConfigError(f"{key} = '{value}' is not one of {', '.join(allowed)}.")
    counts = {
        "training.min-examples": policy.training.min_examples,
        "training.max-steps-per-round": policy.training.max_steps_per_round,
        "training.max-personal-steps": policy.training.max_personal_steps,
        "budget.max-jobs-per-day": policy.budget.max_jobs_per_day,
        "budget.max-rounds-per-day": policy.budget.max_rounds_per_day,
        "budget.max-seconds-per-day": policy.budget.max_seconds_per_day,
        "exchange.query-budget": policy.exchange.query_budget,
        "update.clip": policy.update.clip,
        "update.noise": policy.update.noise,
    }
    for key, number in counts.items():
        if not 0 <= number < math.inf:
            raise ConfigError(f"{key} = {number} must be a number of at least 0.")
    if not 0 < policy.scores.rounding < 1:
        raise ConfigError(f"scores.rounding = {policy.scores.rounding} is outside (0, 1).")
    if not 0 <= policy.exchange.rounding < 1:
        raise ConfigError(f"exchange.rounding = {policy.exchange.rounding} is outside [0, 1).")
    if policy.update.noise and not policy.update.clip:
        raise ConfigError("update.noise is a multiple of update.clip; set update.clip above 0 too.")
    for model in policy.models:
        path = Path(model.name)
        if model.name != "pocket" and path.parts[:1] in (("~",), (".",), ("..",)):
            raise ConfigError(f"model.name = '{model.name}': give an absolute path or a hub name.")
