"""``docs/configuration.md``, made from the docstrings of the settings.

python -m fedalign.config_docs > docs/configuration.md
"""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

from fedalign import config_sections
from fedalign.config import CHOICES, NOT_IN_HASH, RANGES, Config, to_flat


def field_docs() -> dict[str, str]:
    """Return ``{"section.key": docstring}`` read from the source of the settings."""
    docs: dict[str, str] = {}
    names = {type(getattr(Config(), f.name)).__name__: f.name for f in fields(Config)}
    for node in ast.parse(Path(config_sections.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            for statement, after in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and isinstance(statement.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    key = f"{names[node.name]}.{statement.target.id.replace('_', '-')}"
                    docs[key] = " ".join(str(after.value.value).split())
    return docs


def markdown() -> str:
    """Return the page: one table a section, with default, allowed values and meaning."""
    docs, defaults = field_docs(), to_flat(Config())
    lines = [
        "# Settings",
        "",
        "Made by `python -m fedalign.config_docs`; do not edit. The same keys work in a scenario's",
        "TOML file (`[run]`, `rounds = 8`), with `--set run.rounds=8`, and in Flower's",
        '`--run-config "run.rounds=8"`. Lists are comma-separated strings. Keys marked * do not',
        "count for the configuration hash: a run can be resumed with other values.",
    ]
    for section in dict.fromkeys(key.split(".")[0] for key in defaults):
        lines += [
            "",
            f"## {section}",
            "",
            "| key | default | allowed | meaning |",
            "|---|---|---|---|",
        ]
        for key, value in defaults.items():
            if key.split(".")[0] == section:
                star = "*" if key in NOT_IN_HASH else ""
                shown = (
                    ""
                    if value == ""
                    else f"`{str(value).lower() if isinstance(value, bool) else value}`"
                )
                meaning = docs[key].replace("``", "`").replace("|", "\\|")
                lines.append(f"| `{key}`{star} | {shown} | {_allowed(key)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _allowed(key: str) -> str:
    if key in CHOICES:
        return ", ".join(f"`{c}`" for c in CHOICES[key])
    if key in RANGES:
        low, high, low_in, high_in = RANGES[key]
        return f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
    return ""


if __name__ == "__main__":
    print(markdown(), end="")
