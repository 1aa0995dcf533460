"""The site's policy: the decision table, and a strict file."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from clients.policy_toml import load_policy, parse_policy, template
from clients.site_policy import (
    AllowedModel,
    BudgetPolicy,
    ExchangePolicy,
    Policy,
    ScoresPolicy,
    Spent,
    TrainingPolicy,
    UpdatePolicy,
    judge,
    stricter,
)
from fedalign import wire
from fedalign.config import Config, from_flat
from fedalign.errors import ConfigError
from fedalign.wire.predictor import PREDICTOR

ALL = (wire.HELLO, wire.SCORE, wire.TRAIN, wire.PERSONAL, wire.EXCHANGE, PREDICTOR)
REWARDS = {"run.mode": "rewards", "personal.steps": 0}
FROZEN = {"aggregation.method": "frozen-a"}


def policy(**parts: object) -> Policy:
    return replace(Policy(), **parts)


@pytest.mark.parametrize(
    ("given", "settings", "kind", "expected"),
    [
        (Policy(), {}, wire.HELLO, None),
        (Policy(), {}, wire.TRAIN, None),
        (Policy(), {}, wire.PERSONAL, None),
        (Policy(), REWARDS, wire.HELLO, None),
        (Policy(), REWARDS, wire.EXCHANGE, None),
        # base model
        (Policy(), {"model.name": "gpt2"}, wire.HELLO, wire.REFUSED_BASE_MODEL),
        (Policy(), {"model.name": "/etc"}, wire.SCORE, wire.REFUSED_BASE_MODEL),
        (policy(models=()), {}, wire.HELLO, wire.REFUSED_BASE_MODEL),
        (policy(models=(AllowedModel("gpt2"),)), {"model.name": "gpt2"}, wire.HELLO, None),
        (
            policy(models=(AllowedModel("gpt2", "abc"),)),
            {"model.name": "gpt2", "model.revision": "abd"},
            wire.TRAIN,
            wire.REFUSED_BASE_MODEL,
        ),
        (
            policy(models=(AllowedModel("gpt2", "abc"),)),
            {"model.name": "gpt2", "model.revision": "abc"},
            wire.TRAIN,
            None,
        ),
        # objective
        (Policy(), {"local.objective": "ppo"}, wire.TRAIN, wire.REFUSED_OBJECTIVE),
        (Policy(), {"local.objective": "ppo"}, wire.HELLO, wire.REFUSED_OBJECTIVE),
        (
            policy(training=TrainingPolicy(objectives=("exchange",))),
            {},
            wire.TRAIN,
            wire.REFUSED_OBJECTIVE,
        ),
        (
            policy(training=TrainingPolicy(objectives=("exchange",))),
            REWARDS,
            wire.TRAIN,
            wire.REFUSED_OBJECTIVE,
        ),
        (policy(training=TrainingPolicy(objectives=("exchange",))), REWARDS, wire.HELLO, None),
        (
            policy(training=TrainingPolicy(objectives=("exchange",))),
            {"run.mode": "rewards"},
            wire.HELLO,
            wire.REFUSED_OBJECTIVE,  # its personal phase trains by DPO
        ),
        (
            policy(training=TrainingPolicy(objectives=("dpo",))),
            {},
            wire.EXCHANGE,
            wire.REFUSED_OBJECTIVE,
        ),
        (policy(training=TrainingPolicy(objectives=("dpo",))), {}, wire.SCORE, None),
        # clipping
        (policy(update=UpdatePolicy(clip=1.0)), {}, wire.HELLO, wire.REFUSED_AGGREGATION),
        (policy(update=UpdatePolicy(clip=1.0)), {}, wire.TRAIN, wire.REFUSED_AGGREGATION),
        (policy(update=UpdatePolicy(clip=1.0)), FROZEN, wire.TRAIN, None),
        (policy(update=UpdatePolicy(clip=1.0)), FROZEN, wire.HELLO, None),
        (policy(update=UpdatePolicy(clip=1.0)), REWARDS, wire.HELLO, None),
        (policy(update=UpdatePolicy(clip=1.0)), REWARDS, wire.TRAIN, wire.REFUSED_AGGREGATION),
        (policy(update=UpdatePolicy(clip=1.0)), FROZEN, PREDICTOR, wire.REFUSED_AGGREGATION),
        (
            policy(update=UpdatePolicy(clip=1.0), exchange=ExchangePolicy(answers="both")),
            REWARDS | {"site.answers": "both"},
            wire.HELLO,
            wire.REFUSED_AGGREGATION,
        ),
        # settings
        (Policy(), {"local.reference": "/srv/adapter"}, wire.HELLO, wire.REFUSED_SETTINGS),
        (Policy(), {"local.steps": 101}, wire.TRAIN, wire.REFUSED_SETTINGS),
        (Policy(), {"local.steps": 101}, wire.HELLO, wire.REFUSED_SETTINGS),
        (Policy(), {"local.steps": 101, "personal.steps": 0}, wire.SCORE, None),
        (Policy(), {"personal.steps": 2000}, wire.PERSONAL, wire.REFUSED_SETTINGS),
        (Policy(), {"personal.steps": 2000}, wire.HELLO, wire.REFUSED_SETTINGS),
        (Policy(), {"personal.steps": 900, "run.rounds": 100}, wire.HELLO, wire.REFUSED_SETTINGS),
        (Policy(), REWARDS | {"site.answers": "both"}, wire.HELLO, wire.REFUSED_SETTINGS),
        (Policy(), REWARDS | {"site.answers": "both"}, PREDICTOR, wire.REFUSED_SETTINGS),
        (
            policy(exchange=ExchangePolicy(answers="predictor")),
            REWARDS,
            wire.EXCHANGE,
            wire.REFUSED_SETTINGS,
        ),
        (
            policy(exchange=ExchangePolicy(answers="both")),
            REWARDS | {"site.answers": "predictor"},
            wire.EXCHANGE,
            None,
        ),
        (
            policy(exchange=ExchangePolicy(answers="both")),
            REWARDS | {"site.answers": "predictor", "predictor.steps": 101},
            wire.HELLO,
            wire.REFUSED_SETTINGS,
        ),
    ],
)
def test_judge_by_hand(given, settings, kind, expected):
    assert judge(given, from_flat(settings), kind, Spent(), 100) == expected


@pytest.mark.parametrize("kind", ALL)
def test_too_few_examples(kind):
    given = policy(training=TrainingPolicy(min_examples=30), exchange=ExchangePolicy("both"))
    assert judge(given, Config(), kind, Spent(), 29) == wire.TOO_FEW_EXAMPLES
    assert judge(given, Config(), kind, Spent(), 30) is None


@pytest.mark.parametrize(
    ("limits", "spent", "kind", "over"),
    [
        (BudgetPolicy(3, 0, 0.0), Spent(2, 9, 1e9), wire.SCORE, False),
        (BudgetPolicy(3, 0, 0.0), Spent(3, 0, 0.0), wire.SCORE, True),
        (BudgetPolicy(0, 2, 0.0), Spent(9, 2, 0.0), wire.SCORE, False),
        (BudgetPolicy(0, 2, 0.0), Spent(9, 2, 0.0), wire.TRAIN, True),
        (BudgetPolicy(0, 2, 0.0), Spent(9, 1, 0.0), wire.EXCHANGE, False),
        (BudgetPolicy(0, 0, 10.0), Spent(9, 9, 9.9), wire.TRAIN, False),
        (BudgetPolicy(0, 0, 10.0), Spent(0, 0, 10.0), wire.HELLO, True),
        (BudgetPolicy(0, 0, 0.0), Spent(10**6, 10**6, 1e9), wire.TRAIN, False),
    ],
)
def test_budget_by_hand(limits, spent, kind, over):
    found = judge(policy(budget=limits), Config(), kind, spent, 100)
    assert found == (wire.BUDGET_EXHAUSTED if over else None)


def test_the_stricter_of_two_wishes():
    run = from_flat({**REWARDS, "site.rounding": 0.1, "site.query-budget": 5})
    own = policy(exchange=ExchangePolicy("shares", 0.25, 0))
    assert (stricter(own, run).site.rounding, stricter(own, run).site.query_budget) == (0.25, 5)
    own = policy(exchange=ExchangePolicy("shares", 0.0, 3))
    assert (stricter(own, run).site.rounding, stricter(own, run).site.query_budget) == (0.1, 3)
    assert not stricter(Policy(), run).score.items
    told = policy(scores=ScoresPolicy(question_scores=True))
    assert stricter(told, run).score.items
    assert not stricter(told, from_flat({"score.items": False})).score.items
    silent = policy(scores=ScoresPolicy("withheld", question_scores=True))
    assert not stricter(silent, run).score.items


def test_the_template_is_the_default():
    assert parse_policy(tomllib.loads(template())) == Policy()
    assert template().count("\n# ") > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nmin-exampels = 3", "unknown key 'training.min-exampels'.*min-examples"),
        ("[trainings]\nmin-examples = 3", "unknown section 'trainings'.*training"),
        ("[training]\nmin-examples = '3'", "must be a int"),
        ("[training]\nmin-examples = true", "must be a int"),
        ("[training]\nmin-examples = -1", "at least 0"),
        ("[training]\nobjectives = 'dpo'", "list of texts"),
        ("[training]\nobjectives = ['sft']", "'sft' is not one of"),
        ("[scores]\nrelease = 'none'", "not one of exact"),
        ("[scores]\nrounding = 0.0", "outside"),
        ("[scores]\nquestion-scores = 'no'", "must be a bool"),
        ("[exchange]\nanswers = 'all'", "not one of"),
        ("[exchange]\nrounding = 1.0", "outside"),
        ("[update]\nnoise = 1.0", "set update.clip"),
        ("[update]\nclip = inf", "at least 0"),
        ("[[model]]\nrevision = 'a'", "no name"),
        ("[model]\nname = 'pocket'", r"\[\[model\]\]"),
        ("[[model]]\nname = '~/base'", "absolute path"),
        ("training = 3", "must be a table"),
        ("[training", "not valid TOML"),
    ],
)
def test_a_file_that_is_not_clear_is_refused(tmp_path, text, message):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_policy(path)
    assert str(path) in str(error.value)


def test_no_file_is_no_policy(tmp_path):
    with pytest.raises(ConfigError, match="fedalign-client policy"):
        load_policy(tmp_path / "policy.toml")


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(
        "[[model]]\nname = 'pocket'\n[[model]]\nname = 'org/base'\nrevision = 'abc'\n"
        "[training]\nobjectives = ['ppo']\nmin-examples = 7\n[budget]\nmax-seconds-per-day = 60\n"
        "[scores]\nrelease = 'rounded'\n[update]\nclip = 1\nnoise = 0.5\n"
    )
    found = load_policy(path)
    assert found.models == (AllowedModel("pocket"), AllowedModel("org/base", "abc"))
    assert found.training == TrainingPolicy(("ppo",), 7)
    assert found.budget.max_seconds_per_day == 60.0
    assert found.update == UpdatePolicy(1.0, 0.5)
