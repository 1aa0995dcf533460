"""The table of groups that a run ends with on the terminal, read from ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedalign.runfolder import SUMMARY

STAGES = (
    ("base", "base"),
    ("shared", "shared"),
    ("personal", "personal"),
    ("local_only", "local only"),
)
SHOWN = 20
SUFFIX = "/score"


def print_groups(folder: Path, console: Console | None = None) -> None:
    """Print test scores by group, worst served first, then average and worst with intervals."""
    console = console or Console(highlight=False)
    values = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    prefix = "shared/group/"
    groups = sorted(
        (
            k[len(prefix) : -len(SUFFIX)]
            for k in values
            if k[: len(prefix)] == prefix and k.endswith(SUFFIX)
        ),
        key=lambda g: values[prefix + g + SUFFIX],
    )
    stages = [(s, title) for s, title in STAGES if f"{s}/average" in values]
    table = Table(title="Alignment on test questions (higher is better)")
    table.add_column("group")
    for _, title in stages:
        table.add_column(title, justify="right")
    table.add_column("uniform answers", justify="right")
    table.add_column("mean weight", justify="right")
    for group in groups[:SHOWN]:
        table.add_row(
            escape(group),
            *[_number(values.get(f"{s}/group/{group}/score")) for s, _ in stages],
            _number(values.get(f"reference/uniform/group/{group}/score")),
            _number(values.get(f"weights/{group}/mean")),
        )
    if len(groups) > SHOWN:
        table.add_row(f"... {len(groups) - SHOWN} more in the report", *[""] * (len(stages) + 2))
    for name in ("average", "worst"):
        table.add_row(
            f"[bold]{name}[/]",
            *[_number(values.get(f"{s}/{name}")) for s, _ in stages],
            _number(values.get(f"reference/uniform/{name}")),
            "",
        )
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
