"""Votes on statements: cells, implied preferences, one role a statement."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.data import polis
from fedalign.data.polis import implied_share, preference_pairs, read_statements, survey_items
from fedalign.data.rejects import Rejects
from fedalign.data.split import response_key, role
from fedalign.errors import DataError


def statement(sid: int, votes: dict[str, Any], conversation: str = "c", text: str = "") -> dict:
    return {
        "conversation": conversation,
        "sid": sid,
        "prompt": f"About {conversation}?",
        "statement": text or f"Statement {sid}",
        "agree_disagree_pass": votes,
    }


def folder(path: Path, *lines: dict[str, Any], votes: str = "") -> Path:
    (path / "statements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if votes:
        (path / "votes.csv").write_text("conversation,voter,group,votes\n" + votes)
    return path


def many(n: int, conversation: str = "c") -> list[dict[str, Any]]:
    return [
        statement(i, {"g0": [i, n - i, 1], "g1": [n - i, i, 1]}, conversation) for i in range(n)
    ]


def test_survey_form(tmp_path: Path) -> None:
    read = read_statements(
        folder(tmp_path, statement(7, {"g0": [6, 3, 1], "g1": [1, 0, 1]})), Rejects()
    )
    rejects = Rejects()
    (item,) = survey_items(read, 5, rejects)
    assert item.id == "c/7"
    assert item.question == "About c?\nStatement: Statement 7"
    assert item.options == ("agree", "disagree", "pass")
    assert item.shares == {"c/g0": (0.6, 0.3, 0.1)}
    assert item.ordinals is None
    assert [r.reason for r in rejects.rows] == ["c/g1: 2 votes < 5."]


@given(st.floats(0, 1), st.floats(0, 1))
def test_implied_share_follows_the_larger_agreement(a: float, b: float) -> None:
    if a * (1 - b) + b * (1 - a) == 0:
        with pytest.raises(DataError):
            implied_share(a, b)
    else:
        q = implied_share(a, b)
        assert 0 <= q <= 1
        assert q + implied_share(b, a) == pytest.approx(1)
        assert q >= 0.5 - 1e-9 if a >= b else q <= 0.5 + 1e-9


def test_implied_share_by_hand() -> None:
    # 0.6 * 0.8 = 0.48 agree with X alone, 0.2 * 0.4 = 0.08 with Y alone.
    assert implied_share(0.6, 0.2) == pytest.approx(0.48 / 0.56)
    assert implied_share(1.0, 0.5) == 1.0


def test_pairs_prefer_the_larger_agree_share_and_keep_roles_apart(tmp_path: Path) -> None:
    read = read_statements(folder(tmp_path, *many(40), *many(40, "d")), Rejects())
    rejects = Rejects()
    pairs = preference_pairs(read, 5, 0, 0.2, 0.2, rejects)
    agree = {(s.conversation, s.text, c): v[0] / sum(v) for s in read for c, v in s.votes.items()}
    roles: dict[str, set[str]] = defaultdict(set)
    for p in pairs:
        conversation, cluster = p.group.split("/")
        x = agree[conversation, str(p.chosen), cluster]
        y = agree[conversation, str(p.rejected), cluster]
        assert x > y
        assert p.vote_share == pytest.approx(implied_share(x, y))
        assert p.prompt == f"About {conversation}?"
        for text in (str(p.chosen), str(p.rejected)):
            roles[text].add(p.split)
            assert p.split == role(0, response_key(text), 0.2, 0.2)
    assert all(len(r) == 1 for r in roles.values())
    assert {p.split for p in pairs} == {"train", "validation", "test"}
    # Every pair of a conversation is used, or counted as mixed: C(40, 2) a cluster.
    for group in ("c/g0", "d/g1"):
        used = sum(p.group == group for p in pairs)
        (mixed,) = (int(r.reason.split()[0]) for r in rejects.rows if r.source == group)
        assert used + mixed == 40 * 39 / 2
    assert pairs == preference_pairs(read, 5, 0, 0.2, 0.2, Rejects())


def test_bound_is_counted_and_clusters_share_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polis, "MAX_PAIRS_PER_GROUP", 50)
    read = read_statements(folder(tmp_path, *many(60)), Rejects())
    rejects = Rejects()
    pairs = preference_pairs(read, 5, 1, 0.2, 0.2, rejects)
    by_group = {g: [p for p in pairs if p.group == g] for g in ("c/g0", "c/g1")}
    for group, mine in by_group.items():
        assert [sum(p.split == s for p in mine) for s in ("train", "validation", "test")] == [
            30,
            10,
            10,
        ]
        counted = [int(r.reason.split()[0]) for r in rejects.rows if r.source == group]
        assert sum(counted) + len(mine) == 60 * 59 / 2
    # g1 mirrors g0: same comparisons, every one reversed.
    first, second = ({p.comparison: p.chosen for p in mine} for mine in by_group.values())
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)


def test_cells_below_min_votes_and_ties_give_no_pair(tmp_path: Path) -> None:
    lines = [
        statement(0, {"g0": [3, 3, 0], "g1": [1, 0, 0]}),
        statement(1, {"g0": [5, 5, 0], "g1": [9, 0, 0]}),
    ]
    read = read_statements(folder(tmp_path, *lines), Rejects())
    assert preference_pairs(read, 5, 0, 0.2, 0.2, Rejects()) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (statement(1, {"g0": [1, 2]}), "cluster 'g0': [1, 2] is not [agree, disagree, pass]"),
        (statement(1, {"g0": [1, -2, 0]}), "cluster 'g0': [1, -2, 0] is not"),
        (statement(1, {"g0": [1, 0.5, 0]}), "cluster 'g0': [1, 0.5, 0] is not"),
        (statement(0, {"g0": [5, 0, 0]}, text="other"), "statement 0 of c was given in"),
        (statement(1, {"g0": [5, 0, 0]}, text="STATEMENT 0"), "the same statement was given in"),
        ({"conversation": "c", "sid": 1}, "no column 'prompt'"),
    ],
)
def test_bad_statement_is_named(tmp_path: Path, line: dict[str, Any], reason: str) -> None:
    path = folder(tmp_path, statement(0, {"g0": [5, 0, 0]}), line)
    with pytest.raises(DataError) as error:
        read_statements(path, Rejects())
    assert str(error.value).startswith(f"{path / 'statements.jsonl'}:2: {reason}")
    rejects = Rejects(skip=True)
    assert [s.sid for s in read_statements(path, rejects)] == ["0"]
    assert [r.source for r in rejects.rows] == [f"{path / 'statements.jsonl'}:2"]


def test_single_votes_must_give_the_counts(tmp_path: Path) -> None:
    line = statement(3, {"g0": [2, 1, 1]})
    good = "c,v1,g0,3:1\nc,v2,g0,3:1\nc,v3,g0,3:-1\nc,v4,g0,3:0\n"
    assert len(read_statements(folder(tmp_path, line, votes=good), Rejects())) == 1
    turned = good.replace(":1", ":x").replace(":-1", ":1").replace(":x", ":-1")
    with pytest.raises(DataError, match=r"statements\.jsonl:1: .*The sign is turned"):
        read_statements(folder(tmp_path, line, votes=turned), Rejects())
    with pytest.raises(DataError, match=r"votes\.csv counts \[1, 1, 1\]"):
        read_statements(folder(tmp_path, line, votes=good.partition("\n")[2]), Rejects())
    with pytest.raises(DataError, match=r"votes\.csv:2: vote '3:2' is not"):
        read_statements(folder(tmp_path, line, votes="c,v1,g0,3:2\n"), Rejects())


def test_folder_without_statements(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no statements\.jsonl"):
        read_statements(tmp_path, Rejects())
