"""Hugging Face datasets, by hub name or local folder, fed to the same parsers as files.

The layout is told from the columns: ``prompt``, ``chosen``, ``rejected`` are pairs; ``selections``
is the published GlobalOpinionQA; else a survey.  A local folder of JSONL, CSV or Parquet works
offline.  A struct column holds null where a row has no such group; null means absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedalign.data.globalopinionqa import parse_published
from fedalign.data.pairs import parse_pairs
from fedalign.data.records import Item
from fedalign.data.rejects import Rejects
from fedalign.data.survey import parse_survey
from fedalign.data.tables import Row
from fedalign.errors import DataError


def read_hub(
    name: str, split: str, form: str, rejects: Rejects, keep_nonresponse: bool = True
) -> tuple[str, list[Item]]:
    """Return the form found (``survey`` or ``pairs``) and the items of one split.

    ``form`` is ``survey``, ``pairs`` or ``auto``.  Raises ``DataError`` when the dataset cannot be
    loaded (name, split, network), when its columns fit no layout, and for bad rows.
    """
    table, columns = _load(name, split)
    found = detect(columns) if form == "auto" else form
    if found == "pairs":
        return "pairs", list(parse_pairs(table, rejects))
    if "selections" in columns:
        return "survey", list(parse_published(table, rejects, keep_nonresponse))
    return "survey", list(parse_survey(table, rejects, keep_nonresponse))


def detect(columns: Sequence[str]) -> str:
    """Return ``survey`` or ``pairs`` from the column names; ``DataError`` when neither fits."""
    have = set(columns)
    if {"prompt", "chosen", "rejected"} <= have:
        return "pairs"
    if {"question", "options"} <= have and have & {"shares", "votes", "selections"}:
        return "survey"
    raise DataError(
        f"columns {', '.join(columns)} are neither pairs (prompt, chosen, rejected, group) nor a "
        "survey (question, options, shares or votes). Rename the columns."
    )


def _load(name: str, split: str) -> tuple[Iterator[Row], list[str]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset '{name}', split '{split}' cannot be loaded: {error} "
            "Check data.path (hub name or folder), data.hf-split and the network."
        ) from None
    table = (Row(f"{name}[{split}]:row {n + 1}", n, dict(row)) for n, row in enumerate(dataset))
    return table, list(dataset.column_names)
