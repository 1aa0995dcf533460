"""GlobalOpinionQA (arXiv 2306.16388): Pew Global Attitudes and World Values Survey, by country.

Two layouts:

- *published* (``Anthropic/llm_global_opinions``): ``question``, ``options`` (a list in Python's
  notation), ``selections`` ("defaultdict(<class 'list'>, {country: [share, ...]})"), ``source``.
  There is no id, so the row number is the id, as in the published readers.  Strings are read with
  ``ast.literal_eval``; nothing is evaluated.
- *rebuilt* (JSONL): ``qid``, ``question``, ``options``, ``nonresponse_options``, ``distribution``
  {country: [share, ...]}, and notes such as ``copies``.

Countries are per question: a country that did not answer is simply absent.  An empty or all-zero
vector counts as absent too and is noted (published readers drop the question for every country;
we drop the cell).  A vector of the wrong length is a bad row.  Sample variants such as
"India (Current national sample)" are groups of their own; nothing is merged.  "Don't know" options
stay by default.  The rebuilt layout marks them; in the published one they are known by their exact
text, listed in ``NONRESPONSE``.

Licence of the data: CC BY-NC-SA 4.0 (non-commercial).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedalign.data.columns import other_columns, required
from fedalign.data.records import SurveyItem
from fedalign.data.rejects import Rejects
from fedalign.data.survey import survey_item
from fedalign.data.tables import Row, rows
from fedalign.errors import DataError

LICENCE = "CC BY-NC-SA 4.0, Anthropic/llm_global_opinions, arXiv 2306.16388"
NONRESPONSE = frozenset(
    {"dk/refused", "dk", "refused", "don't know", "don’t know", "no answer", "don't know/refused"}
)
_PUBLISHED = ("question", "selections", "options")
_REBUILT = ("question", "distribution", "options")


def read_published(path: Path, rejects: Rejects, keep_nonresponse: bool = True) -> list[SurveyItem]:
    """Read the published layout from JSONL, CSV or Parquet."""
    return parse_published(rows(path, rejects), rejects, keep_nonresponse)


def parse_published(
    table: Iterable[Row], rejects: Rejects, keep_nonresponse: bool = True
) -> list[SurveyItem]:
    """Turn rows of the published layout into items; ids are row numbers from 0."""
    items: list[SurveyItem] = []
    for source, number, values in table:
        with rejects.at(source):
            if values.get("selections") is None and values.get("distribution") is not None:
                raise DataError(
                    "this is the rebuilt layout (column 'distribution'). Use data.source = 'goqa'."
                )
            required(values, _PUBLISHED, _PUBLISHED)
            options = _literal(values["options"], list, "options")
            generic = {
                "id": str(number),
                "question": values["question"],
                "options": options,
                "shares": _literal(values["selections"], dict, "selections"),
                "nonresponse_options": [
                    i for i, o in enumerate(options) if str(o).strip().casefold() in NONRESPONSE
                ],
                **other_columns(values, _PUBLISHED),
            }
            _append(items, generic, source, number, rejects, keep_nonresponse)
    return items


def read_rebuilt(path: Path, rejects: Rejects, keep_nonresponse: bool = True) -> list[SurveyItem]:
    """Read the rebuilt layout; ids are the column ``qid``."""
    items: list[SurveyItem] = []
    seen: dict[str, str] = {}
    for source, number, values in rows(path, rejects):
        with rejects.at(source):
            if values.get("distribution") is None and values.get("selections") is not None:
                raise DataError(
                    "this is the published layout (column 'selections'). "
                    "Use data.source = 'globalopinionqa'."
                )
            required(values, ("qid", *_REBUILT), ("qid", *_REBUILT))
            qid = str(values["qid"])
            if qid in seen:
                raise DataError(f"qid '{qid}' was used before, in {seen[qid]}.")
            seen[qid] = source
            generic = {k: v for k, v in values.items() if k not in ("qid", "distribution")}
            generic |= {"id": qid, "shares": values["distribution"]}
            _append(items, generic, source, number, rejects, keep_nonresponse)
    return items


def _append(
    items: list[SurveyItem],
    values: dict[str, Any],
    source: str,
    number: int,
    rejects: Rejects,
    keep_nonresponse: bool,
) -> None:
    cells = values["shares"]
    if not isinstance(cells, Mapping):
        raise DataError(f"the shares must map each country to a list, not {type(cells).__name__}.")
    present = {country: vector for country, vector in cells.items() if not _empty(vector)}
    for country in sorted(set(cells) - set(present)):
        rejects.note(source, f"group '{country}': empty or all-zero shares count as no answer.")
    if not present:
        rejects.note(source, "no country answered this question.")
        return
    item = survey_item({**values, "shares": present}, source, number, rejects, keep_nonresponse)
    if item is not None:
        items.append(item)


def _empty(vector: Any) -> bool:
    return vector is None or (isinstance(vector, list) and all(x == 0 for x in vector))


def _literal(value: Any, kind: type, name: str) -> Any:
    """Return a list or dict given as such or in Python's notation."""
    if isinstance(value, str):
        text = value
        if kind is dict:
            start, end = text.find("{"), text.rfind("}")
            if start < 0 or end < start:
                raise DataError(f"{name} holds no {{...}}; expected {{country: [share, ...]}}.")
            text = text[start : end + 1]
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"{name} is not a Python literal: {error}.") from None
    if not isinstance(value, kind):
        raise DataError(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")
    return value
