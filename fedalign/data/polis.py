"""Votes on statements in public conversations (the Polis software), by opinion cluster.

A folder with ``statements.jsonl``: ``conversation``, ``sid``, ``prompt``, ``statement``, and
``agree_disagree_pass`` = {cluster: [agree, disagree, pass]}.  Where ``votes.csv`` lies beside it
(``conversation``, ``voter``, ``group``, ``votes`` = "sid:1 sid:-1 sid:0", 1 = agree), the counts
are checked against it, so that a file with the opposite sign is refused.

Clusters of different conversations have nothing in common, so a group is "conversation/cluster".
A cell counts from ``min_votes`` votes.  The clusters were computed from the same votes: groups
differ by construction, and it is statements that must be held out, not voters.

*survey*: the question is the conversation's prompt and the statement; options agree, disagree,
pass; nominal, because a pass is not a middle opinion.

*pairs*: two statements of one conversation under its prompt; ``chosen`` is the one that a larger
share of the cluster agrees with.  **Nobody compared X with Y.**  With a = agree / (agree + disagree
+ pass), the vote share is what independent votes imply,

    P(X over Y) = a_X (1 - a_Y) / (a_X (1 - a_Y) + a_Y (1 - a_X)),

the share of X among people who agree with exactly one of the two; that is Bradley-Terry with
strength logit a.  Equal shares give no pair.  A statement has one role, from the hash of its text;
pairs of statements with different roles are left out and counted.  A conversation's pairs are put
in one order drawn by seed, and each cluster takes the first it can use, at most
``MAX_PAIRS_PER_GROUP`` with the roles in their configured shares, so that clusters of one
conversation share most comparisons.

Licence of the data: CC BY 4.0.  Data was gathered using the Polis software
(compdemocracy.org/polis) and is sub-licensed under CC BY 4.0 with Attribution to The Computational
Democracy Project.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedalign.data.columns import required
from fedalign.data.records import Pair, SurveyItem
from fedalign.data.rejects import Rejects
from fedalign.data.split import SPLIT_BY, response_key, role
from fedalign.data.tables import rows
from fedalign.errors import DataError
from fedalign.randomness import generator

LICENCE = (
    "CC BY 4.0. Data was gathered using the Polis software (compdemocracy.org/polis) and is "
    "sub-licensed under CC BY 4.0 with Attribution to The Computational Democracy Project"
)
OPTIONS = ("agree", "disagree", "pass")
MAX_PAIRS_PER_GROUP = 1000
_COLUMNS = ("conversation", "sid", "prompt", "statement", "agree_disagree_pass")
VOTE = {"1": 0, "-1": 1, "0": 2}  # position in OPTIONS
_PLACE = ("train", "validation", "test")

Counts = tuple[int, int, int]


@dataclass(frozen=True)
class Statement:
    """One statement and the votes on it, per cluster of its conversation."""

    conversation: str
    sid: str
    prompt: str
    text: str
    votes: Mapping[str, Counts]
    """Cluster to (agree, disagree, pass)."""
    source: str


def read_statements(folder: Path, rejects: Rejects) -> list[Statement]:
    """Read ``statements.jsonl`` and check it against ``votes.csv`` where that is there.

    Raises ``DataError`` as ``rejects`` says: bad counts, a statement given twice, counts that the
    single votes contradict.
    """
    if not (folder / "statements.jsonl").is_file():
        raise DataError(
            f"{folder}: no statements.jsonl in it, and no published export "
            "(participants-votes.csv). Give the folder of votes as data.path."
        )
    tally = _tally(folder / "votes.csv", rejects)
    out: list[Statement] = []
    ids: dict[tuple[str, str], str] = {}
    texts: dict[tuple[str, str], str] = {}
    for source, _, values in rows(folder / "statements.jsonl", rejects):
        with rejects.at(source):
            statement = _statement(values, source)
            place = (statement.conversation, statement.sid)
            if place in ids:
                raise DataError(f"statement {place[1]} of {place[0]} was given in {ids[place]}.")
            same = (statement.conversation, response_key(statement.text))
            if same in texts:
                raise DataError(f"the same statement was given in {texts[same]}.")
            if tally is not None:
                _check_votes(statement, tally)
            ids[place] = texts[same] = source
            out.append(statement)
    return out


def survey_items(
    statements: Sequence[Statement], min_votes: int, rejects: Rejects
) -> list[SurveyItem]:
    """Return one question a statement, with the clusters that have ``min_votes`` votes on it."""
    items: list[SurveyItem] = []
    for s in statements:
        shares: dict[str, tuple[float, ...]] = {}
        for cluster, votes in s.votes.items():
            if sum(votes) >= min_votes:
                shares[_group(s, cluster)] = tuple(v / sum(votes) for v in votes)
            else:
                rejects.note(s.source, f"{_group(s, cluster)}: {sum(votes)} votes < {min_votes}.")
        if shares:
            items.append(
                SurveyItem(
                    id=f"{s.conversation}/{s.sid}",
                    question=f"{s.prompt}\nStatement: {s.text}",
                    options=OPTIONS,
                    shares=shares,
                    topic=s.conversation,
                    source=s.source,
                )
            )
    return items


def preference_pairs(
    statements: Sequence[Statement],
    min_votes: int,
    seed: int,
    validation: float,
    test: float,
    rejects: Rejects,
) -> list[Pair]:
    """Return implied preferences between statements of one conversation, with their split set.

    Notes in ``rejects``, per group: pairs left out for mixed roles, and those beyond the bound.
    """
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    bound = [max(1, round(MAX_PAIRS_PER_GROUP * shares[name])) for name in _PLACE]
    conversations: dict[str, list[Statement]] = defaultdict(list)
    for s in statements:
        conversations[s.conversation].append(s)
    pairs: list[Pair] = []
    for name, members in sorted(conversations.items()):
        roles = [role(seed, response_key(s.text), validation, test) for s in members]
        place = np.array([_PLACE.index(r) for r in roles])  # (statements,)
        first, second = np.triu_indices(len(members), k=1)  # (pairs,)
        order = generator(seed, "polis-pairs", name).permutation(len(first))
        first, second = first[order], second[order]
        same_role = place[first] == place[second]
        for cluster in sorted({c for s in members for c in s.votes}):
            agree, enough = _agreement(members, cluster, min_votes)
            usable = enough[first] & enough[second] & (agree[first] != agree[second])
            mixed = int((usable & ~same_role).sum())
            beyond = 0
            for p, most in enumerate(bound):
                found = np.flatnonzero(usable & same_role & (place[first] == p))
                beyond += max(0, len(found) - most)
                for at in found[:most]:
                    x, y = int(first[at]), int(second[at])
                    pairs.append(_pair(members, x, y, agree, cluster, roles[x]))
            where = f"{name}/{cluster}"
            if mixed:
                rejects.note(where, f"{mixed} pairs of statements with different roles left out.")
            if beyond:
                rejects.note(where, f"{beyond} pairs beyond {MAX_PAIRS_PER_GROUP} left out.")
    return pairs


def implied_share(a_x: float, a_y: float) -> float:
    """Return P(X over Y) from the agree shares of both, which must differ; in [0, 1].

    >>> round(implied_share(0.75, 0.5), 6)
    0.75
    """
    x_alone, y_alone = a_x * (1 - a_y), a_y * (1 - a_x)
    if x_alone + y_alone == 0:
        raise DataError(f"agree shares {a_x} and {a_y} are equal; they imply no preference.")
    return x_alone / (x_alone + y_alone)


def _pair(
    members: Sequence[Statement],
    x: int,
    y: int,
    agree: npt.NDArray[np.float64],
    cluster: str,
    split: str,
) -> Pair:
    if agree[x] < agree[y]:
        x, y = y, x
    chosen, rejected = members[x], members[y]
    return Pair(
        id=f"{chosen.conversation}/{cluster}:{chosen.sid}>{rejected.sid}",
        prompt=chosen.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        group=_group(chosen, cluster),
        vote_share=implied_share(float(agree[x]), float(agree[y])),
        split=split,
        columns={"conversation": chosen.conversation, SPLIT_BY: "responses"},
        source=chosen.source,
    )


def _agreement(
    members: Sequence[Statement], cluster: str, min_votes: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the agree share (0 without votes) and whether the cell counts, each (statements,)."""
    votes = np.array([s.votes.get(cluster, (0, 0, 0)) for s in members], dtype=np.float64)
    total = votes.sum(axis=1)
    return votes[:, 0] / np.maximum(total, 1), total >= max(min_votes, 1)


def _group(statement: Statement, cluster: str) -> str:
    return f"{statement.conversation}/{cluster}"


def _statement(values: Mapping[str, Any], source: str) -> Statement:
    required(values, _COLUMNS, _COLUMNS)
    texts = {name: str(values[name]).strip() for name in ("prompt", "statement", "conversation")}
    for name, text in texts.items():
        if not text:
            raise DataError(f"empty {name}.")
    cells = values["agree_disagree_pass"]
    if not isinstance(cells, Mapping):
        raise DataError("agree_disagree_pass must map each cluster to [agree, disagree, pass].")
    votes: dict[str, Counts] = {}
    for cluster, cell in cells.items():
        whole = isinstance(cell, list) and all(type(v) is int and v >= 0 for v in cell)
        if not whole or len(cell) != 3:
            raise DataError(f"cluster '{cluster}': {cell} is not [agree, disagree, pass] counts.")
        votes[cluster] = (cell[0], cell[1], cell[2])
    return Statement(
        conversation=texts["conversation"],
        sid=str(values["sid"]),
        prompt=texts["prompt"],
        text=texts["statement"],
        votes=votes,
        source=source,
    )


_Tally = dict[tuple[str, str, str], list[int]]


def _tally(path: Path, rejects: Rejects) -> _Tally | None:
    """Count single votes by (conversation, sid, cluster); None where there is no such file."""
    if not path.is_file():
        return None
    tally: _Tally = defaultdict(lambda: [0, 0, 0])
    for source, _, values in rows(path, rejects):
        with rejects.at(source):
            required(values, ("conversation", "group"), ("conversation", "voter", "group", "votes"))
            for vote in values.get("votes", "").split():
                sid, _, sign = vote.rpartition(":")
                if sign not in VOTE or not sid:
                    raise DataError(f"vote '{vote}' is not 'sid:1', 'sid:-1' or 'sid:0'.")
                tally[values["conversation"], sid, values["group"]][VOTE[sign]] += 1
    return tally


def _check_votes(statement: Statement, tally: _Tally) -> None:
    for cluster, votes in statement.votes.items():
        counted = tally.get((statement.conversation, statement.sid, cluster), [0, 0, 0])
        if list(votes) != counted:
            turned = (
                " The sign is turned: 1 must be agree."
                if (counted == [votes[1], votes[0], votes[2]])
                else ""
            )
            raise DataError(
                f"cluster '{cluster}' has {list(votes)} here, but votes.csv counts "
                f"{counted}.{turned}"
            )
