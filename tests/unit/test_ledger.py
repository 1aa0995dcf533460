"""The ledger: atomic, durable, and only committed attempts count."""

from __future__ import annotations

import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.errors import FedalignError, StorageError
from fedalign.ledger import (
    ClientRow,
    CurveRow,
    DiscardedRow,
    ItemRow,
    Ledger,
    ReferenceRow,
    ReplyRow,
    ScoreRow,
    TimingRow,
    WeightRow,
    canonical_rows,
    is_blank,
)
from fedalign.ledger_rows import SCHEMA, TABLES

ROOT = Path(__file__).resolve().parents[2]


def score(value: float | None = 0.5, client: str = "c", **other: object) -> ScoreRow:
    return ScoreRow("received", client, "g", "validation", "js_divergence", 3, value, **other)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as made:
        yield made


def test_every_field_has_its_column():
    for kind, table in TABLES.items():
        body = re.search(rf"CREATE TABLE {table} \((.*?)\) STRICT", SCHEMA, re.S).group(1)
        for f in fields(kind):
            column = "grp" if f.name == "group" else f.name
            assert re.search(rf"\b{column} (TEXT|REAL|INTEGER)", body), (table, column)


def test_every_kind_of_row_comes_back_as_it_was(ledger):
    clients = [ClientRow("c", "g", "survey", 6, 2, 2, 40)]
    references = [
        ReferenceRow("uniform", "g", 0.5),
        ReferenceRow("optimum_worst", "", None, note="pairs share no comparison"),
    ]
    given = {
        "scores": [score(), score(None, "d", status="failed", reason="non_finite_score")],
        "items": [ItemRow("shared", "c", "g", "test", "q1", 0.25)],
        "weights": [
            WeightRow("g", 1.0, 0.4, 0.5, True, 0.5),
            WeightRow("h", None, 0.3, present=False),
        ],
        "replies": [ReplyRow("c", "g", "node 1", "ok", "", 1.0, 40, 0.2, "ab", 0.69, 12)],
        "curves": [CurveRow("c", "margin", 0.1)],
        "discarded": [DiscardedRow("layers.0.q_proj", "g", 0.01)],
        "timings": [TimingRow("aggregate", 0.02)],
    }
    ledger.put_clients(clients)
    ledger.put_references(references)
    ledger.write("train", 1, 2, **given)
    ledger.commit("train", 1, 2)
    assert ledger.clients() == clients
    assert sorted(ledger.references(), key=lambda r: r.name) == sorted(
        references, key=lambda r: r.name
    )
    for name, rows in given.items():
        back = getattr(ledger, name)()
        assert [(r.phase, r.round, r.attempt) for r in back] == [("train", 1, 2)] * len(rows)
        stripped = [[getattr(r, f.name) for f in fields(r)][3:] for r in back]
        assert stripped == [[getattr(r, f.name) for f in fields(r)][3:] for r in rows]
    assert ledger.weights()[0].present is True
    assert ledger.weights()[1].present is False


def test_numpy_scalars_become_plain_numbers(ledger):
    ledger.write("base", 0, 1, scores=[score(np.float32(0.5))])
    ledger.put_clients([ClientRow("c", "g", "survey", np.int64(1), 1, 1, np.int32(4))])
    ledger.commit("base", 0, 1)
    assert ledger.scores()[0].score == 0.5
    assert type(ledger.clients()[0].size) is int


def test_only_the_committed_attempt_counts(ledger):
    ledger.write("train", 1, 1, scores=[score(0.1)], replies=[ReplyRow("c", "g")])
    ledger.write("train", 1, 2, scores=[score(0.2)], replies=[ReplyRow("c", "g")])
    assert ledger.scores() == []
    ledger.commit("train", 1, 2)
    assert [s.score for s in ledger.scores()] == [0.2]
    assert [r.attempt for r in ledger.replies()] == [2]
    assert [r.attempt for r in ledger.replies(committed=False)] == [1]
    assert ledger.attempts() == [("train", 1, 1), ("train", 1, 2)]
    ledger.commit("train", 1, 1)
    assert ledger.commits() == [("train", 1, 1)]
    assert [s.score for s in ledger.scores()] == [0.1]


def test_writing_a_triple_again_replaces_it(ledger):
    ledger.write("train", 1, 1, scores=[score(0.1)], curves=[CurveRow("c", "loss", 1.0)])
    ledger.write("train", 1, 1, scores=[score(0.3)])
    ledger.commit("train", 1, 1)
    assert [s.score for s in ledger.scores()] == [0.3]
    assert ledger.curves() == []


def test_set_commits_follows_the_checkpoint(ledger):
    for round in (1, 2, 3):
        ledger.write("train", round, 1, scores=[score(round / 10)])
        ledger.commit("train", round, 1)
    ledger.set_commits([("train", 1, 1), ("train", 2, 1)])
    assert [s.score for s in ledger.scores()] == [0.1, 0.2]
    with pytest.raises(FedalignError, match="round 9, attempt 1 was never"):
        ledger.set_commits([("train", 9, 1)])
    assert ledger.commits() == [("train", 1, 1), ("train", 2, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_stored(ledger, bad):
    with pytest.raises(FedalignError, match="must be finite"):
        ledger.write(
            "train", 1, 1, weights=[WeightRow("g", 1.0)], scores=[score(), score(bad, "d")]
        )
    with pytest.raises(FedalignError, match="never written"):
        ledger.commit("train", 1, 1)
    assert ledger._query("SELECT count(*) FROM weights") == [(0,)]
    with pytest.raises(FedalignError, match="loss_sum"):
        ledger.put_run(loss_sum=float(bad))


def test_a_score_without_value_needs_a_failure_and_its_reason(ledger):
    for row in (score(None), score(0.5, status="failed", reason="x"), score(None, status="failed")):
        with pytest.raises(FedalignError, match="breaks a rule"):
            ledger.write("train", 1, 1, scores=[row])


def test_a_wrong_type_is_refused(ledger):
    with pytest.raises(FedalignError, match="round = 'one' is a str, not a number"):
        ledger.write("train", "one", 1, scores=[score()])
    with pytest.raises(FedalignError, match=r"score = '0\.5' is a str"):
        ledger.write("train", 1, 1, scores=[score("0.5")])
    with pytest.raises(FedalignError, match="steps"):
        ledger.write("train", 1, 1, replies=[ReplyRow("c", "g", steps=1.5)])
    with pytest.raises(FedalignError, match="is not text"):
        ledger.write("train", 1, 1, scores=[score(client=7.5)])


def test_stage_and_split_filter(ledger):
    rows = [
        ScoreRow(stage, "c", "g", split, "js_divergence", 3, 0.5)
        for stage in ("base", "shared")
        for split in ("validation", "test")
    ]
    ledger.write("final", 2, 1, scores=rows)
    ledger.commit("final", 2, 1)
    assert len(ledger.scores()) == 4
    assert len(ledger.scores(stage="base")) == 2
    assert [(s.stage, s.split) for s in ledger.scores("shared", "test")] == [("shared", "test")]


def test_run_facts_and_events(ledger):
    ledger.put_run(config={"run.seed": 3}, status="running")
    ledger.put_run(status="completed")
    assert ledger.run() == {"config": {"run.seed": 3}, "status": "completed"}
    ledger.event("retry", "quorum missed", phase="train", round=2, attempt=1, client="c")
    event = ledger.events()[0]
    assert (event.kind, event.round, event.client) == ("retry", 2, "c")
    assert ledger.events("other") == []


def test_canonical_rows_do_not_know_attempts_nodes_or_times(tmp_path):
    made = []
    for name, attempt, node in (("a", 1, "n1"), ("b", 2, "n2")):
        with Ledger(tmp_path / name) as ledger:
            if attempt == 2:
                ledger.write("train", 1, 1, scores=[score(0.9)])
                ledger.event("resumed")
            ledger.write(
                "train",
                1,
                attempt,
                scores=[score(), score(client="d")],
                replies=[ReplyRow("c", "g", node)],
                timings=[TimingRow("train", float(attempt))],
            )
            ledger.commit("train", 1, attempt)
            made.append(canonical_rows(ledger))
    assert made[0] == made[1]
    assert len(made[0]) == 3


def test_canonical_rows_see_a_changed_number(tmp_path):
    made = []
    for value in (0.5, 0.5000001):
        with Ledger(tmp_path / f"{value}") as ledger:
            ledger.write("train", 1, 1, scores=[score(value)])
            ledger.commit("train", 1, 1)
            made.append(canonical_rows(ledger))
    assert made[0] != made[1]


def test_read_only(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(FedalignError, match="no such ledger"):
        Ledger(path, readonly=True)
    with Ledger(path) as writer:
        writer.write("train", 1, 1, scores=[score()])
        writer.commit("train", 1, 1)
        with Ledger(path, readonly=True) as reader:
            assert len(reader.scores()) == 1
            with pytest.raises(FedalignError, match="cannot write"):
                reader.event("x")


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database at all, but long enough to have a header" * 20)
    with pytest.raises(FedalignError, match="cannot open"):
        Ledger(path)
    other = tmp_path / "other.sqlite"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE x (y)")
    db.commit()
    db.close()
    with pytest.raises(FedalignError, match="ledger format 0"):
        Ledger(other)


def test_a_ledger_that_was_never_made_is_blank(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.touch()
    assert is_blank(path)  # and can be begun anew
    with Ledger(path):
        assert not is_blank(path)
    path.write_bytes(b"not a database at all, but long enough to have a header" * 20)
    assert not is_blank(path)


def test_a_full_disk_is_an_error_and_the_ledger_goes_on(ledger):
    ledger.write("train", 1, 1, scores=[score()])
    ledger.commit("train", 1, 1)
    pages = ledger._query("PRAGMA page_count")[0][0]
    ledger._query(f"PRAGMA max_page_count = {pages + 1}")
    rows = [ItemRow("shared", "c", "g", "test", f"q{i}" * 20, 0.5) for i in range(5000)]
    with pytest.raises(StorageError, match=r"cannot write the ledger.*Make room"):
        ledger.write("train", 2, 1, items=rows)
    assert len(ledger.scores()) == 1
    ledger._query("PRAGMA max_page_count = 100000")
    ledger.write("train", 2, 1, items=rows)
    ledger.commit("train", 2, 1)
    assert len(ledger.items()) == 5000


KILLED = """
import os, signal, sys
from pathlib import Path
from fedalign.ledger import Ledger, ItemRow
ledger = Ledger(Path(sys.argv[1]))
rows = [ItemRow("shared", "c", "g", "test", f"q{i}", 0.5) for i in range(200)]
for round in range(1, 10_000):
    ledger.write("train", round, 1, items=rows)
    ledger.commit("train", round, 1)
    print(round, flush=True)
"""


def test_survives_kill_9(tmp_path):
    """What was committed before the kill is there, whole, and the file still takes rows."""
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if int(line) >= 5:
            os.kill(process.pid, signal.SIGKILL)
            break
    said = [int(x) for x in process.stdout.read().split()]
    process.wait()
    assert process.returncode == -signal.SIGKILL
    last = max([5, *said])
    with Ledger(path) as ledger:
        rounds = [r for _, r, _ in ledger.commits()]
        assert rounds[:last] == list(range(1, last + 1))
        counts = ledger._query("SELECT round, count(*) FROM item_scores GROUP BY round")
        assert all(count == 200 for _, count in counts)
        ledger.write("train", 10_001, 1, scores=[score()])
        ledger.commit("train", 10_001, 1)
        assert len(ledger.scores()) == 1


def test_many_threads_write_one_ledger(ledger):
    def work(round: int) -> None:
        ledger.write("train", round, 1, scores=[score(client=f"c{i}") for i in range(20)])
        ledger.commit("train", round, 1)

    threads = [threading.Thread(target=work, args=(r,)) for r in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.scores()) == 160


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "commit"]),
            st.sampled_from(["train", "final"]),
            st.integers(0, 3),
            st.integers(1, 3),
        ),
        max_size=25,
    )
)
@settings(max_examples=30, deadline=None)
def test_reads_equal_a_model_of_the_rules(actions):
    """A dictionary that follows the same rules always agrees with the ledger."""
    rows: dict[tuple[str, int, int], float] = {}
    commits: dict[tuple[str, int], int] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger(Path(folder) / "ledger.sqlite") as ledger,
    ):
        for i, (action, phase, round, attempt) in enumerate(actions):
            if action == "write":
                rows[phase, round, attempt] = float(i)
                ledger.write(phase, round, attempt, scores=[score(float(i))])
            elif (phase, round, attempt) in rows:
                commits[phase, round] = attempt
                ledger.commit(phase, round, attempt)
            else:
                with pytest.raises(FedalignError):
                    ledger.commit(phase, round, attempt)
        expected = {(p, r, a): rows[p, r, a] for (p, r), a in commits.items()}
        assert {(s.phase, s.round, s.attempt): s.score for s in ledger.scores()} == expected


def test_no_heavy_import():
    code = (
        "import sys; import fedalign.ledger; "
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'ray', 'flwr'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
