"""The published export of a Polis conversation: one folder of CSV files a conversation.

``data.path`` is such a folder, or a folder of them; a conversation is named after its folder.

- ``participants-votes.csv``: participant, group-id, n-agree, n-disagree, ..., then one column for
  each comment id with 1 = agree, -1 = disagree, 0 = pass, blank = not voted (which is no pass).
  Every row is checked against its own n-agree and n-disagree, so that an export with the opposite
  sign is refused instead of turned round.
- ``comments.csv``: comment-id, moderated, comment-body.  Comments with moderated = -1 were rejected
  by a moderator and are left out.
- ``summary.csv``: key,value lines; ``topic`` (and ``conversation-description``) make the prompt.

Columns vary by export and are read by name.  Participants without a group are left out, and all of
these are counted.  ``votes.csv`` is not read: it repeats votes that people changed.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalign.data.columns import required
from fedalign.data.polis import VOTE, Statement
from fedalign.data.rejects import Rejects
from fedalign.data.tables import rows
from fedalign.errors import DataError

PARTICIPANTS = "participants-votes.csv"


def export_folders(path: Path) -> list[Path]:
    """Return the conversation folders at ``path``, sorted; empty when it is no export."""
    if (path / PARTICIPANTS).is_file():
        return [path]
    if not path.is_dir():
        return []
    return sorted(f for f in path.iterdir() if (f / PARTICIPANTS).is_file())


def read_export(folder: Path, rejects: Rejects) -> list[Statement]:
    """Return the statements of one exported conversation with the votes of each group.

    Raises ``DataError`` as ``rejects`` says: an unknown vote, counts that contradict the votes, a
    comment without text; always for a missing file or topic.
    """
    prompt = _prompt(folder / "summary.csv")
    votes = _votes(folder / PARTICIPANTS, rejects)
    out: list[Statement] = []
    seen: set[str] = set()
    texts: dict[str, str] = {}
    for source, _, values in rows(folder / "comments.csv", rejects):
        with rejects.at(source):
            required(values, ("comment-id", "comment-body"), ("comment-id", "comment-body"))
            sid, text = str(values["comment-id"]), str(values["comment-body"]).strip()
            if sid in seen:
                raise DataError(f"comment {sid} was given before.")
            seen.add(sid)
            if values.get("moderated") == "-1":
                rejects.note(source, f"comment {sid} was rejected by a moderator.")
                continue
            if text in texts:
                raise DataError(f"the same comment was given in {texts[text]}.")
            texts[text] = source
            cells = {g: (n["1"], n["-1"], n["0"]) for g, n in sorted(votes.get(sid, {}).items())}
            out.append(Statement(folder.name, sid, prompt, text, cells, source))
    return out


def _prompt(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; its line 'topic,...' is the prompt of the pairs.")
    with path.open(encoding="utf-8-sig", newline="") as f:
        summary = {line[0]: line[1].strip() for line in csv.reader(f) if len(line) > 1}
    if not summary.get("topic"):
        raise DataError(f"{path}: no line 'topic,...'; it is the prompt of the pairs.")
    parts = (summary["topic"], summary.get("conversation-description", ""))
    return "\n".join(p for p in parts if p)


def _votes(path: Path, rejects: Rejects) -> Mapping[str, Mapping[str, Counter[str]]]:
    """Return comment id to group to the number of each vote."""
    votes: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    alone = 0
    for source, _, values in rows(path, rejects):
        with rejects.at(source):
            mine = {c: v for c, v in values.items() if c.isdigit()}
            _check(values, mine)
            group = values.get("group-id")
            if group is None:
                alone += 1
                continue
            for comment, vote in mine.items():
                votes[comment][f"g{group}"][vote] += 1
    if alone:
        rejects.note(str(path), f"{alone} participants have no group.")
    return votes


def _check(values: Mapping[str, Any], votes: Mapping[str, str]) -> None:
    required(values, ("n-agree", "n-disagree"), tuple(values))
    for comment, vote in votes.items():
        if vote not in VOTE:
            raise DataError(f"comment {comment}: vote '{vote}' is not 1, -1, 0 or blank.")
    counts = Counter(votes.values())
    if [str(counts["1"]), str(counts["-1"])] != [values["n-agree"], values["n-disagree"]]:
        raise DataError(
            f"{counts['1']} votes of 1 and {counts['-1']} of -1, but n-agree = "
            f"{values['n-agree']} and n-disagree = {values['n-disagree']}; 1 must be agree."
        )
