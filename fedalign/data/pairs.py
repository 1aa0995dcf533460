"""Preference pairs: ``prompt``, ``chosen``, ``rejected``, ``group``; JSONL, CSV or Parquet.

TRL's preference format plus a group.  Optional columns: ``id``, ``vote_share`` (share of voters who
preferred ``chosen``), ``split``.  Texts are plain strings or conversations (lists of
{``role``, ``content``}; JSON strings in CSV), one form a file.  Every other column is kept as a
string, for partition by column.

A pair and its reverse in one group are both kept: people of one group may disagree, and the rate
is reported by ``describe``.  Repeated rows are repeated votes and are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedalign.data.columns import optional_text, other_columns, required
from fedalign.data.records import Message, Pair, Text
from fedalign.data.rejects import Rejects
from fedalign.data.tables import Row, parse_json, rows
from fedalign.errors import DataError

REQUIRED = ("prompt", "chosen", "rejected", "group")
KNOWN = (*REQUIRED, "id", "vote_share", "split")


def read_pairs(path: Path, rejects: Rejects) -> list[Pair]:
    """Read a file or folder of pairs.  Raises ``DataError`` as ``rejects`` says."""
    return parse_pairs(rows(path, rejects), rejects)


def parse_pairs(table: Iterable[Row], rejects: Rejects) -> list[Pair]:
    """Turn rows into pairs and check what only shows between rows.

    Bad rows: a duplicate id; a prompt that an earlier row puts in another split; plain text where
    the first row is a conversation, or the reverse.
    """
    pairs: list[Pair] = []
    ids: dict[str, str] = {}
    splits: dict[str, Pair] = {}
    for source, number, values in table:
        with rejects.at(source):
            pair = _pair(values, source, number)
            if pair.id in ids:
                raise DataError(f"id '{pair.id}' was used before, in {ids[pair.id]}.")
            if pairs and isinstance(pair.prompt, str) != isinstance(pairs[0].prompt, str):
                raise DataError(
                    f"{_form(pair)}, but {pairs[0].source} is {_form(pairs[0])}; "
                    "use one form in a file."
                )
            other = splits.setdefault(pair.key, pair) if pair.split else pair
            if pair.split != other.split:
                raise DataError(
                    f"this prompt is in split '{pair.split}' here and in '{other.split}' in "
                    f"{other.source}; a prompt has one split."
                )
            ids[pair.id] = source
            pairs.append(pair)
    return pairs


def _pair(values: Mapping[str, Any], source: str, number: int) -> Pair:
    required(values, REQUIRED, KNOWN)
    from_csv = source.rpartition(":")[0].lower().endswith((".csv", ".csv.gz"))
    texts = {name: _text(values[name], name, from_csv) for name in REQUIRED[:3]}
    group = values["group"]
    if not isinstance(group, str):
        raise DataError(f"group must be text, not {type(group).__name__}.")
    return Pair(
        id=optional_text(values, "id") or str(number),
        prompt=texts["prompt"],
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        group=group.strip(),
        vote_share=_vote_share(values.get("vote_share")),
        split=optional_text(values, "split"),
        columns=other_columns(values, KNOWN),
        source=source,
    )


def _text(value: Any, name: str, from_csv: bool) -> Text:
    if isinstance(value, str):
        if from_csv and value.lstrip().startswith("[{"):
            value = parse_json(value)
        else:
            return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} must be text or a list of messages, not {type(value).__name__}.")
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise DataError(f"{name}: a message must be an object, not {type(turn).__name__}.")
        role, content = turn.get("role"), turn.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            raise DataError(f"{name}: a message needs the texts 'role' and 'content'.")
        messages.append(Message(role, content))
    return tuple(messages)


def _vote_share(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise DataError(f"vote_share must be a number in [0, 1], not {type(value).__name__}.")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise DataError(f"vote_share '{str(value)[:20]}' is not a number in [0, 1].") from None


def _form(pair: Pair) -> str:
    return "plain text" if isinstance(pair.prompt, str) else "a conversation"
