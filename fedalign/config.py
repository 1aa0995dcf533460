"""One typed, frozen configuration; the same keys in a TOML file and in Flower's run-config.

A key is ``section.key-name`` in TOML and on the command line, ``Config.section.key_name`` in
Python.  Every value is a string, an integer, a float or a boolean, because Flower's run-config
allows nothing else; lists are written as comma-separated strings.  The sections themselves are in
``config_sections.py``.

Unknown keys, wrong types and values out of range are ``ConfigError`` and name the nearest key or
the allowed range.  Nothing is coerced silently, except an integer given for a float.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedalign.config_rules import (
    CHOICES,
    RANGES,
    REWARD_RULES,
    SURVEY_METRICS,
    WEIGHT_RULES,
    Scalar,
    check,
)
from fedalign.config_sections import (
    AggregationConfig,
    Config,
    DataConfig,
    DeploymentConfig,
    LocalConfig,
    ModelConfig,
    PersonalConfig,
    PpoConfig,
    PredictorConfig,
    RewardsConfig,
    RunConfig,
    ScoreConfig,
    SiteConfig,
    WeightsConfig,
)
from fedalign.errors import ConfigError

# Where output goes, who is enrolled and how long to wait do not change what is computed.
NOT_IN_HASH = (
    "run.name",
    "run.out",
    "run.resume",
    "run.round-timeout",
    "run.max-attempts",
    "local.threads",
    "deployment.registry",
    "deployment.audit",
    "deployment.min-sites",
    "deployment.wait",
)
KEPT_FROM_SITES = (
    "run.out",
    "data.path",
    "rewards.prompts",
    "local.threads",
    "deployment.registry",
    "deployment.audit",
    "deployment.min-sites",
    "deployment.wait",
)
"""Settings that speak of the coordinator's own machine: a deployed site is sent their defaults."""


def to_flat(config: Config) -> dict[str, Scalar]:
    """Return ``{"section.key-name": value}`` for every field, in declaration order."""
    out: dict[str, Scalar] = {}
    for section, values in asdict(config).items():
        for key, value in values.items():
            out[f"{section}.{key.replace('_', '-')}"] = value
    return out


def from_flat(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """Return ``base`` (default: the defaults) with the given flat keys replaced, validated."""
    base = base or Config()
    known = to_flat(base)
    changes: dict[str, dict[str, Scalar]] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key '{key}'.{_nearest(key, known)}")
        section, name = key.split(".", 1)
        changes.setdefault(section, {})[name.replace("-", "_")] = _typed(key, value, known[key])
    sections = {s: replace(getattr(base, s), **new) for s, new in changes.items()}
    config = replace(base, **sections)
    check(to_flat(config))
    return config


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten ``{section: {key: value}}`` (a parsed TOML file) to dotted keys."""
    out: dict[str, Any] = {}
    for section, values in nested.items():
        if isinstance(values, Mapping):
            out.update({f"{section}.{key}": value for key, value in values.items()})
        else:
            out[section] = values
    return out


def load_toml(path: Path, base: Config | None = None) -> Config:
    """Read a scenario file; errors name the file."""
    try:
        with path.open("rb") as f:
            return from_flat(flatten(tomllib.load(f)), base)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give the path of a TOML scenario.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_override(text: str) -> tuple[str, Scalar]:
    """Parse one ``--set section.key=value``; the value is read as TOML, else as plain text."""
    key, separator, raw = text.partition("=")
    if not separator:
        raise ConfigError(f"'{text}' is not an override. Write --set section.key=value.")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    return key.strip(), value


def resolve_metric(config: Config, form: str) -> str:
    """Return the run's one score for a data form (``survey`` or ``pairs``)."""
    metric = config.score.metric
    if config.rewards.task == "order":
        return "borda" if metric == "auto" else metric
    if metric == "auto":
        return "js_divergence" if form == "survey" else "pair_accuracy"
    if (metric == "pair_accuracy") != (form == "pairs"):
        allowed = SURVEY_METRICS if form == "survey" else ("pair_accuracy",)
        raise ConfigError(
            f"score.metric = '{metric}' does not fit {form} data; use {', '.join(allowed)} or auto."
        )
    return metric


def resolve_reward(config: Config) -> str:
    """Return what a sampled text is scored by: ``rewards.score``, or the task's own default."""
    if config.rewards.score != "auto":
        return config.rewards.score
    return {"letter": "log", "shares": "js_divergence", "order": "borda"}[config.rewards.task]


def personal_stages(config: Config) -> tuple[str, ...]:
    """Return the stages of the personal phase, in order."""
    if not config.personal.local_only:
        return ("personal",)
    if config.run.mode == "rewards":
        return ("personal", "local_only")
    return ("personal", "local_only", "local_only_total")


def config_hash(config: Config) -> str:
    """Return the SHA-256 (hex) of every setting that changes what is computed."""
    flat = {k: v for k, v in to_flat(config).items() if k not in NOT_IN_HASH}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def differing_keys(a: Config, b: Config) -> list[str]:
    """Return the keys that count for the hash and differ, sorted."""
    fa, fb = to_flat(a), to_flat(b)
    return sorted(k for k in fa if fa[k] != fb[k] and k not in NOT_IN_HASH)


def to_json(config: Config) -> str:
    """Return the flat configuration as JSON, as it travels in a message."""
    return json.dumps(to_flat(config), sort_keys=True)


def to_site_json(config: Config) -> str:
    """Return what :func:`to_json` does without the coordinator's own paths, for a deployed site.

    ``data.path`` is empty in it, so :func:`from_json` refuses it where ``data.source`` needs a
    path: a site puts its own data settings over the parsed JSON, then calls :func:`from_flat`.
    """
    defaults = to_flat(Config())
    kept = {key: defaults[key] for key in KEPT_FROM_SITES}
    return json.dumps(to_flat(config) | kept, sort_keys=True)


def from_json(text: str) -> Config:
    """Inverse of :func:`to_json`."""
    return from_flat(json.loads(text))


def _typed(key: str, value: Any, default: Scalar) -> Scalar:
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, float):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, str):
        return value
    elif isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a number given for text such as clients-per-group
    raise ConfigError(
        f"{key} = {value!r} is a {type(value).__name__}; it must be a {type(default).__name__}."
    )


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known sections: {', '.join(sorted({k.split('.')[0] for k in known}))}."


__all__ = [
    "CHOICES",
    "KEPT_FROM_SITES",
    "NOT_IN_HASH",
    "RANGES",
    "REWARD_RULES",
    "SURVEY_METRICS",
    "WEIGHT_RULES",
    "AggregationConfig",
    "Config",
    "DataConfig",
    "DeploymentConfig",
    "LocalConfig",
    "ModelConfig",
    "PersonalConfig",
    "PpoConfig",
    "PredictorConfig",
    "RewardsConfig",
    "RunConfig",
    "Scalar",
    "ScoreConfig",
    "SiteConfig",
    "WeightsConfig",
    "config_hash",
    "differing_keys",
    "flatten",
    "from_flat",
    "from_json",
    "load_toml",
    "parse_override",
    "personal_stages",
    "resolve_metric",
    "resolve_reward",
    "to_flat",
    "to_json",
    "to_site_json",
]
