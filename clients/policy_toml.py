"""``policy.toml``: the site's policy as a file, strict, and documented by its own declarations.

A key that is not known is an error that names the nearest one, never ignored: a misspelt limit
would be no limit.  :func:`template` writes the file with every field's documentation and default.
"""

from __future__ import annotations

import ast
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from clients import site_policy
from clients.site_policy import (
    AllowedModel,
    BudgetPolicy,
    ExchangePolicy,
    Policy,
    ScoresPolicy,
    TrainingPolicy,
    UpdatePolicy,
)
from fedalign.errors import ConfigError

SECTIONS: dict[str, type] = {
    "training": TrainingPolicy,
    "budget": BudgetPolicy,
    "scores": ScoresPolicy,
    "exchange": ExchangePolicy,
    "update": UpdatePolicy,
}


def load_policy(path: Path) -> Policy:
    """Read ``policy.toml``.  Raises ``ConfigError`` that names the file and what is wrong."""
    try:
        with path.open("rb") as f:
            return parse_policy(tomllib.load(f))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no policy. Write the defaults with `fedalign-client policy`, read "
            "them, change what you want."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_policy(tables: Mapping[str, Any]) -> Policy:
    """Return the policy of a parsed file; what is left out has its default."""
    parts: dict[str, Any] = {}
    for name, table in tables.items():
        if name == "model":
            if not isinstance(table, list) or not all(isinstance(t, Mapping) for t in table):
                raise ConfigError("write each base model as a table [[model]] with a name.")
            models = tuple(_section("model", AllowedModel, t) for t in table)
            if any("name" not in t for t in table):
                raise ConfigError("a [[model]] has no name.")
            parts["models"] = models
        elif name in SECTIONS:
            if not isinstance(table, Mapping):
                raise ConfigError(f"'{name}' must be a table: [{name}].")
            parts[name] = _section(name, SECTIONS[name], table)
        else:
            raise ConfigError(f"unknown section '{name}'.{_nearest(name, ('model', *SECTIONS))}")
    return Policy(**parts)


def template() -> str:
    """Return ``policy.toml`` with the defaults, each field with its documentation."""
    docs = _docs()
    lines = ["# What this site allows. Only the user who holds the data should be able to write"]
    lines += ["# this file. Start the trainer again after a change.", ""]
    default = Policy()
    for header, value in [
        ("[[model]]", default.models[0]),
        *((f"[{name}]", getattr(default, name)) for name in SECTIONS),
    ]:
        kind = type(value)
        lines += [f"# {docs[kind.__name__]}", header]
        for f in fields(kind):
            lines += [f"# {docs[f'{kind.__name__}.{f.name}']}"]
            lines += [f"{f.name.replace('_', '-')} = {_toml(getattr(value, f.name))}"]
        lines.append("")
    return "\n".join(lines)


def _section(name: str, kind: type, table: Mapping[str, Any]) -> Any:
    known = {f.name.replace("_", "-"): f for f in fields(kind)}
    default = kind()
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"unknown key '{name}.{key}'.{_nearest(key, tuple(known))}")
        attribute = known[key].name
        values[attribute] = _typed(f"{name}.{key}", value, getattr(default, attribute))
    return kind(**values)


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif isinstance(default, float):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is type(default):
        return value
    wanted = "list of texts" if isinstance(default, tuple) else type(default).__name__
    raise ConfigError(f"{key} = {value!r} is a {type(value).__name__}; it must be a {wanted}.")


def _nearest(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{v}"' for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _docs() -> dict[str, str]:
    """Return the docstrings of the sections and fields of the policy, each on one line."""
    docs: dict[str, str] = {}
    for node in ast.parse(Path(site_policy.__file__).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs[node.name] = " ".join((ast.get_docstring(node) or "").split())
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                text = " ".join(str(after.value.value).split())
                docs[f"{node.name}.{statement.target.id}"] = text
    return docs
