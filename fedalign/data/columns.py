"""Columns of a row: those that must be there, those that may, and the rest kept as strings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedalign.errors import DataError


def nearest(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or nothing."""
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean '{lowered[close[0]]}'?" if close else ""


def required(values: Mapping[str, Any], names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``DataError`` for a column that is missing; names the one it may be misspelt as."""
    for name in names:
        if values.get(name) is None:
            others = [c for c in values if c not in known]
            close = difflib.get_close_matches(name, [c.lower() for c in others], n=1, cutoff=0.6)
            spelt = next((c for c in others if close and c.lower() == close[0]), None)
            if spelt is not None:
                raise DataError(f"no column '{name}'; is it '{spelt}'? Rename it.")
            raise DataError(
                f"no column '{name}', or it is empty. Needed: {', '.join(names)}; "
                f"found: {', '.join(values)}."
            )


def optional_text(values: Mapping[str, Any], name: str) -> str:
    """Return an optional column as text; empty when it is not given."""
    value = values.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{name} must be text, not {type(value).__name__}.")


def other_columns(values: Mapping[str, Any], known: Sequence[str]) -> dict[str, str]:
    """Return the remaining columns as strings (JSON for anything but text); nulls are left out."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for key, value in values.items()
        if key not in known and value is not None
    }
