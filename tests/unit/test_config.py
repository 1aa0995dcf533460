"""The configuration: one-to-one with run-config, strict, helpful errors."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.aggregation import WEIGHT_RULES
from fedalign.config import (
    CHOICES,
    KEPT_FROM_SITES,
    NOT_IN_HASH,
    RANGES,
    Config,
    RunConfig,
    config_hash,
    differing_keys,
    flatten,
    from_flat,
    from_json,
    load_toml,
    parse_override,
    resolve_metric,
    to_flat,
    to_json,
    to_site_json,
)
from fedalign.config import WEIGHT_RULES as RULE_NAMES
from fedalign.config_docs import field_docs, markdown
from fedalign.errors import ConfigError


def test_flat_round_trip() -> None:
    config = from_flat({"run.seed": 3, "weights.rule": "afl", "data.test": 0.3})
    assert from_flat(to_flat(config)) == config
    assert from_json(to_json(config)) == config


def test_every_key_has_documentation() -> None:
    docs = field_docs()
    assert set(docs) == set(to_flat(Config()))
    assert all(len(text) > 10 for text in docs.values())


def test_choices_and_ranges_name_real_keys() -> None:
    known = set(to_flat(Config()))
    assert set(CHOICES) <= known
    assert set(RANGES) <= known
    assert set(NOT_IN_HASH) <= known
    assert set(KEPT_FROM_SITES) <= known


def test_rules_are_the_ones_that_exist() -> None:
    assert tuple(sorted(RULE_NAMES)) == tuple(sorted(WEIGHT_RULES))


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'run\.round'.*run\.rounds"):
        from_flat({"run.round": 3})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run.rounds", 0, r"outside \[1"),
        ("run.rounds", 2.5, "must be a int"),
        ("run.rounds", True, "must be a int"),
        ("run.resume", 1, "must be a bool"),
        ("run.quorum", 0.0, r"outside \(0, 1\]"),
        ("weights.rule", "fair", "not one of"),
        ("weights.temperature", float("nan"), "outside"),
        ("data.path", "relative/file", "absolute"),
        ("data.source", "polis", "needs data.path"),
        ("local.label-noise", 0.1, "no effect"),
        ("local.engine", "trl", "hard labels"),
        ("deployment.registry", "here.sqlite", "absolute"),
        ("deployment.min-sites", -1, r"outside \[0"),
        ("deployment.min-sites", 2, "no effect without deployment.registry"),
        ("deployment.audit", "/a/audit.jsonl", "no effect without deployment.registry"),
        ("deployment.wait", 0.0, r"outside \(0"),
    ],
)
def test_bad_values_are_named(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_flat({key: value})


def test_integer_for_float_is_taken() -> None:
    assert from_flat({"local.beta": 2}).local.beta == 2.0


def test_splits_must_leave_training_questions() -> None:
    with pytest.raises(ConfigError, match="no training questions"):
        from_flat({"data.validation": 0.5, "data.test": 0.5})


def test_robust_loss_needs_hard_labels() -> None:
    with pytest.raises(ConfigError, match="hard"):
        from_flat({"local.loss": "robust", "local.label-noise": 0.1})


def test_toml_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[run]\nseeed = 1\n")
    with pytest.raises(ConfigError, match=r"s\.toml.*run\.seed"):
        load_toml(path)
    path.write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run.seed=3", ("run.seed", 3)),
        ("data.groups=a,b", ("data.groups", "a,b")),
        ("local.beta=0.5", ("local.beta", 0.5)),
        ("data.skip-bad=true", ("data.skip-bad", True)),
    ],
)
def test_overrides(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@given(st.integers(0, 2**31 - 1), st.floats(1e-3, 10))
def test_hash_changes_with_what_is_computed_only(seed: int, temperature: float) -> None:
    config = from_flat({"run.seed": seed, "weights.temperature": temperature})
    elsewhere = replace(config, run=replace(config.run, out="/elsewhere", name="x", resume=True))
    assert config_hash(config) == config_hash(elsewhere)
    other = replace(config, run=RunConfig(seed=seed, rounds=99))
    assert config_hash(config) != config_hash(other)
    assert differing_keys(config, other) == ["run.rounds"]


def test_metric_follows_the_data_form() -> None:
    assert resolve_metric(Config(), "survey") == "js_divergence"
    assert resolve_metric(Config(), "pairs") == "pair_accuracy"
    with pytest.raises(ConfigError, match="does not fit"):
        resolve_metric(from_flat({"score.metric": "cosine"}), "pairs")


def test_flower_settings_are_the_default_scenario(root: Path) -> None:
    """``flwr run .`` and ``fedalign simulate`` start from the same values, key by key."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    flower = flatten(project["tool"]["flwr"]["app"]["config"])
    scenario = root / "simulations" / "scenarios" / "default.toml"
    assert from_flat(flower) == load_toml(scenario)
    assert set(flower) == set(to_flat(Config()))


def test_the_page_of_settings_is_current(root: Path) -> None:
    page = root / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run: python -m fedalign.config_docs > " + str(page)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards.score": "js_divergence"}, "every sampled letter of a question the same reward"),
        ({"rewards.task": "order", "rewards.score": "log"}, "borda, kendall, binary or auto"),
        ({"weights.rule": "uniform"}, "rewards.rule"),
        ({"run.early-stop-patience": 2}, "validation scores of every round"),
        ({"rewards.task": "order", "personal.steps": 5}, "DPO, which compares letters"),
        ({"data.form": "pairs"}, "run.mode = 'adapters'"),
        ({"score.metric": "borda"}, "does not fit rewards.task = 'letter'"),
        ({"rewards.prompts": "here.jsonl"}, "not an absolute path"),
    ],
)
def test_settings_that_cannot_work_in_mode_rewards(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_flat({"run.mode": "rewards", "personal.steps": 0} | settings)


def test_tasks_and_predictors_belong_to_their_mode() -> None:
    with pytest.raises(ConfigError, match="an objective that samples texts"):
        from_flat({"rewards.task": "order"})
    with pytest.raises(ConfigError, match="only there is a predictor trained"):
        from_flat({"site.answers": "predictor"})
    with pytest.raises(ConfigError, match=r"local\.engine = 'trl'"):
        from_flat({"local.objective": "grpo"})
    from_flat({"rewards.task": "order", "local.objective": "ppo"})


def test_a_deployment_changes_nothing_that_is_computed() -> None:
    plain = from_flat({})
    deployed = from_flat(
        {
            "deployment.registry": "/state/registry.sqlite",
            "deployment.audit": "/state/audit.jsonl",
            "deployment.min-sites": 3,
            "deployment.wait": 7,
        }
    )
    assert config_hash(plain) == config_hash(deployed)
    assert differing_keys(plain, deployed) == []


def test_sites_are_not_told_where_things_lie_at_the_coordinator() -> None:
    config = from_flat(
        {
            "run.out": "/state/runs/a",
            "data.source": "survey",
            "data.path": "/state/data.jsonl",
            "data.validation": 0.3,
            "rewards.prompts": "/state/prompts.jsonl",
            "deployment.registry": "/state/registry.sqlite",
            "deployment.min-sites": 2,
        }
    )
    text = to_site_json(config)
    assert "/state" not in text
    sent = json.loads(text)
    assert set(sent) == set(to_flat(config))
    assert (sent["deployment.min-sites"], sent["data.validation"]) == (0, 0.3)
    own = from_flat(sent | {"data.path": "/srv/mine.jsonl"})
    assert config_hash(own) != config_hash(config)
    assert own.run == replace(config.run, out="")
