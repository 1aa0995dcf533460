"""Survey rows: a question, its options, and the share of each group's people choosing each.

Two layouts, told apart by the column ``group``:

- wide, one row a question: ``question``, ``options``, ``shares`` = {group: [share, ...]};
- long, one row a question and group: ``question``, ``options``, ``group``, ``shares`` = [share].

``votes`` (counts) may stand in place of ``shares``.  Optional: ``id``, ``ordinals``, ``split``,
``topic``, ``nonresponse_options`` (indexes of options such as "don't know").  Lists and objects may
be JSON strings, as CSV needs it.  Other columns are kept as strings; in the long layout under
"column@group", because they may differ between the groups of one question.

Shares are renormalised once, here: rounding may leave their sum up to 2 % off 1; more is a bad row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedalign.data.columns import optional_text, other_columns, required
from fedalign.data.records import SurveyItem, question_key
from fedalign.data.rejects import Rejects
from fedalign.data.tables import Row, parse_json, rows
from fedalign.errors import DataError

SUM_TOLERANCE = 0.02
REQUIRED = ("question", "options", "shares")
KNOWN = (*REQUIRED, "votes", "group", "id", "ordinals", "split", "topic", "nonresponse_options")


def read_survey(path: Path, rejects: Rejects, keep_nonresponse: bool = True) -> list[SurveyItem]:
    """Read a survey file or folder.  Raises ``DataError`` as ``rejects`` says."""
    return parse_survey(rows(path, rejects), rejects, keep_nonresponse)


def parse_survey(
    table: Iterable[Row], rejects: Rejects, keep_nonresponse: bool = True
) -> list[SurveyItem]:
    """Turn rows of either layout into items, in the order of their first row."""
    items: dict[str, SurveyItem] = {}
    for source, number, values in table:
        with rejects.at(source):
            item = survey_item(values, source, number, rejects, keep_nonresponse)
            if item is None:
                continue
            seen = items.get(item.id)
            if seen is None:
                items[item.id] = item
            elif values.get("group") is not None:
                items[item.id] = _merged(seen, item)
            else:
                raise DataError(f"id '{item.id}' was used before, in {seen.source}.")
    return list(items.values())


def survey_item(
    values: Mapping[str, Any],
    source: str,
    number: int,
    rejects: Rejects,
    keep_nonresponse: bool = True,
) -> SurveyItem | None:
    """Return the item of one row; None when dropping non-response leaves nothing (noted).

    The id is the column ``id``; else the row number (wide) or the question's key (long), so that
    the rows of one question find each other.
    """
    counts = values.get("shares") is None and values.get("votes") is not None
    name = "votes" if counts else "shares"
    required(values, ("question", "options", name), KNOWN)
    question = values["question"]
    if not isinstance(question, str):
        raise DataError(f"question must be text, not {type(question).__name__}.")
    options = _options(values["options"])
    ordinals = _optional_numbers(values, "ordinals")
    columns = other_columns(values, KNOWN)
    cells = _decoded(values[name], name)
    if values.get("group") is None:
        if not isinstance(cells, Mapping):
            raise DataError(f"{name} must map each group to a list, or give a column 'group'.")
        fallback = str(number)
    else:
        group = optional_text(values, "group")
        if isinstance(cells, Mapping):
            raise DataError(f"{name} must be a list where the row has a 'group'.")
        cells = {group: cells}
        columns = {f"{key}@{group}": value for key, value in columns.items()}
        fallback = question_key(question, options)
    shares: dict[str, tuple[float, ...]] = {}
    for group, vector in cells.items():
        if not isinstance(group, str) or not group.strip():
            raise DataError(f"group {group!r} is not a name.")
        # A column of structs holds null for every group that a row does not name.
        if vector is not None:
            shares[group] = _shares(vector, counts, len(options), f"group '{group}'")
    if not shares:
        raise DataError(f"{name} names no group.")
    item = SurveyItem(
        id=optional_text(values, "id") or fallback,
        question=question,
        options=options,
        shares=shares,
        ordinals=ordinals,
        split=optional_text(values, "split"),
        topic=optional_text(values, "topic"),
        columns=columns,
        source=source,
    )
    marked = _optional_numbers(values, "nonresponse_options")
    if keep_nonresponse or not marked:
        return item
    return without_options(item, set(marked), rejects)


def without_options(item: SurveyItem, drop: set[float], rejects: Rejects) -> SurveyItem | None:
    """Return ``item`` without some options, shares renormalised over those left.

    A group with no mass left is left out, and a question with fewer than two options or no group
    left becomes None; both are noted in ``rejects``.
    """
    if not drop <= set(range(len(item.options))):
        raise DataError(f"nonresponse_options {sorted(drop)} do not index the options.")
    keep = [i for i in range(len(item.options)) if i not in drop]
    if len(keep) < 2:
        rejects.note(item.source, f"{len(keep)} options left without non-response.")
        return None
    shares: dict[str, tuple[float, ...]] = {}
    for group, vector in item.shares.items():
        mass = math.fsum(vector[i] for i in keep)
        if mass > 0:
            shares[group] = tuple(vector[i] / mass for i in keep)
        else:
            rejects.note(item.source, f"group '{group}': all its mass is on non-response.")
    if not shares:
        return None
    return replace(
        item,
        options=tuple(item.options[i] for i in keep),
        shares=shares,
        ordinals=None if item.ordinals is None else tuple(item.ordinals[i] for i in keep),
    )


def normalised(vector: list[float], counts: bool, where: str) -> tuple[float, ...]:
    """Return shares that sum to 1 from shares or counts; ``DataError`` if they cannot be."""
    if not all(math.isfinite(x) and x >= 0 for x in vector):
        raise DataError(f"{where}: must be finite and not negative, got {vector}.")
    total = sum(vector)
    if not math.isfinite(total):
        raise DataError(f"{where}: too large to add up, got {vector}.")
    if total <= 0:
        raise DataError(f"{where}: all zero; leave the group out of this row instead.")
    if not counts and abs(total - 1) > SUM_TOLERANCE:
        raise DataError(
            f"{where}: shares sum to {total:.6g}, more than {SUM_TOLERANCE:.0%} from 1. "
            "Give shares that sum to 1, or counts in a column 'votes'."
        )
    return tuple(x / total for x in vector)


def _shares(value: Any, counts: bool, k: int, where: str) -> tuple[float, ...]:
    vector = _numbers(value, where)
    if len(vector) != k:
        raise DataError(f"{where}: {len(vector)} values for {k} options.")
    return normalised(vector, counts, where)


def _merged(first: SurveyItem, more: SurveyItem) -> SurveyItem:
    """Join two long rows of one question; they must agree on everything but the group."""
    for name in ("question", "options", "ordinals", "split", "topic"):
        if getattr(first, name) != getattr(more, name):
            raise DataError(f"{name} differs from the row of the same question in {first.source}.")
    twice = set(first.shares) & set(more.shares)
    if twice:
        raise DataError(f"group '{min(twice)}' answered this question before, in {first.source}.")
    return replace(
        first,
        shares={**first.shares, **more.shares},
        columns={**first.columns, **more.columns},
    )


def _decoded(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _options(value: Any) -> tuple[str, ...]:
    value = _decoded(value, "options")
    if not isinstance(value, list) or not all(isinstance(o, str) for o in value):
        raise DataError(f"options must be a list of texts, got {json.dumps(value, default=str)}.")
    if not all(o.strip() for o in value):
        raise DataError("an option is empty.")
    return tuple(value)


def _numbers(value: Any, where: str) -> list[float]:
    number = isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in value
    )
    if not number:
        raise DataError(
            f"{where}: must be a list of numbers, got {json.dumps(value, default=str)}."
        )
    try:
        return [float(x) for x in value]
    except OverflowError:
        raise DataError(f"{where}: a number is too large.") from None


def _optional_numbers(values: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    if values.get(name) is None:
        return None
    vector = _numbers(_decoded(values[name], name), name)
    if not all(math.isfinite(x) for x in vector):
        raise DataError(f"{name} must be finite, got {vector}.")
    return tuple(vector)
