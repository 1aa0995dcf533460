"""The site's policy: rounding, query budget, and a record that survives a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.policy import SITE, Asked, Released, decide, policy_file, release, rounded
from fedalign.config import SiteConfig
from fedalign.errors import ConfigError, DataError
from fedalign.wire import FROM_SHARES, PREDICTED

BUDGET = SiteConfig(query_budget=2)


def ask(answer: str, reward: float = 0.5, question: str = "q", code: int = FROM_SHARES) -> Asked:
    return Asked(question, answer, reward, code)


# --- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "multiple", "expected"),
    [
        (0.337, 0.0, 0.337),
        (0.337, 0.1, 0.3),
        (0.35, 0.1, 0.4),
        (0.15, 0.1, 0.2),
        (0.124, 0.25, 0.0),
        (0.125, 0.25, 0.25),
        (1.0, 0.3, 0.9),
        (1.0, 0.6, 1.0),
        (0.0, 0.25, 0.0),
    ],
)
def test_rounding_by_hand(reward, multiple, expected):
    assert rounded(reward, multiple) == pytest.approx(expected, abs=1e-12)


@given(st.floats(0, 1), st.floats(0.001, 0.999))
def test_rounding_stays_in_range_near_and_still(reward, multiple):
    once = rounded(reward, multiple)
    assert 0.0 <= once <= 1.0
    assert abs(once - reward) <= multiple / 2 + 1e-8 or once == 1.0
    if once < 1.0:
        assert rounded(once, multiple) == pytest.approx(once, abs=1e-12)


@pytest.mark.parametrize("reward", [float("nan"), -0.1, 1.1])
def test_a_reward_out_of_range_never_leaves(reward):
    with pytest.raises(ValueError, match="outside"):
        rounded(reward, 0.0)


# --- the budget, as a pure function -------------------------------------------------------------


def test_budget_by_hand():
    """Two different texts a question; the third is refused, known ones are free."""
    queue = [ask("A", 0.1), ask("B", 0.2), ask("A", 0.1), ask("C", 0.3), ask("C", 0.4, "other")]
    given_, out = release(BUDGET, {}, queue)
    assert [o and o.reward for o in out] == [0.1, 0.2, 0.1, None, 0.4]
    assert set(given_) == {("q", "A"), ("q", "B"), ("other", "C")}
    _, again = release(BUDGET, given_, [ask("C"), ask("B", 0.9, code=PREDICTED)])
    assert again == [None, Released(0.2, FROM_SHARES)]


def test_no_budget_answers_everything():
    _, out = release(SiteConfig(), {}, [ask(str(i)) for i in range(50)])
    assert all(o is not None for o in out)


def test_a_text_is_answered_as_it_was_rounded_first():
    given_, _ = release(SiteConfig(query_budget=1, rounding=0.25), {}, [ask("A", 0.3)])
    _, out = release(SiteConfig(query_budget=1), given_, [ask("A", 0.3)])
    assert out == [Released(0.25, FROM_SHARES)]


queues = st.lists(
    st.builds(
        ask, st.sampled_from("ABCDE"), st.floats(0, 1), st.sampled_from(["q", "r"])
    ),
    max_size=20,
)  # fmt: skip


@given(queues, st.integers(1, 4), st.integers(0, 20))
def test_budget_holds_however_the_texts_are_dealt_to_exchanges(queue, budget, cut):
    """Order decides, not the number of exchanges; asking it all again changes nothing."""
    site = SiteConfig(query_budget=budget)
    whole, out = release(site, {}, queue)
    half, first = release(site, {}, queue[:cut])
    both, second = release(site, half, queue[cut:])
    assert both == whole
    assert first + second == out
    assert release(site, whole, queue) == (whole, out)
    for question in ("q", "r"):
        assert sum(q == question for q, _ in whole) <= budget


# --- the record ---------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return policy_file(str(tmp_path), 3, "coast/ 1é")


def test_the_file_is_named_readably_and_only_the_owner_reads_it(path, tmp_path):
    assert path == tmp_path / SITE / "00003-coast-1.sqlite"
    decide(BUDGET, path, "c", [ask("A")])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_budget_outlives_the_process(path):
    assert decide(BUDGET, path, "c", [ask("A", 0.125), ask("B")])[0] == Released(0.125, FROM_SHARES)
    assert decide(BUDGET, path, "c", [ask("C"), ask("A", 0.125)]) == [
        None,
        Released(0.125, FROM_SHARES),
    ]


@settings(max_examples=15, deadline=None)
@given(queues, st.integers(1, 3))
def test_the_record_gives_what_the_pure_function_gives(tmp_path_factory, queue, budget):
    site = SiteConfig(query_budget=budget, rounding=0.1)
    file = tmp_path_factory.mktemp("record") / "c.sqlite"
    for cut in (queue[:5], queue[5:], queue):
        last = decide(site, file, "c", cut)
    assert last == release(site, {}, queue)[1]


def test_without_a_run_folder_there_is_no_budget():
    with pytest.raises(ConfigError, match=r"run\.out"):
        policy_file("", 0, "c")


def test_another_clients_file_is_refused(path):
    decide(BUDGET, path, "c", [ask("A")])
    with pytest.raises(DataError, match="belongs to"):
        decide(BUDGET, path, "d", [ask("A")])


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path):
    path.write_bytes(b"not a database " * 400)


def another_table(path):
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.close()


def impossible_reward(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE given SET reward = 7")
    connection.close()


def text_for_a_reward(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE given SET reward = 'x'")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [empty, truncated, overwritten, another_table, impossible_reward, text_for_a_reward],
)
def test_a_damaged_record_is_an_error_and_stays_as_it_is(path, damage):
    decide(BUDGET, path, "c", [ask("A")])
    damage(path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(DataError):
            decide(BUDGET, path, "c", [ask("B")])
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_answers_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DataError, match="cannot be made"):
        decide(BUDGET, policy_file(str(blocked), 0, "c"), "c", [ask("A")])


KILLED = """
import sys
from pathlib import Path
from clients.policy import Asked, decide
from fedalign.config import SiteConfig
for i in range(10**6):
    decide(SiteConfig(query_budget=10**6), Path(sys.argv[1]), "c", [Asked("q", str(i), 0.5, 0)])
    print(i, flush=True)
"""


def test_what_left_before_a_kill_is_remembered(path, root):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=root, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert child.stdout is not None
    left = [child.stdout.readline() for _ in range(20)]
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    left += child.stdout.readlines()
    child.wait()
    answered = [line for line in left if line.endswith(b"\n")]
    assert len(answered) >= 20
    site = SiteConfig(query_budget=1)
    out = decide(site, path, "c", [ask(str(int(i)), 0.9) for i in answered])
    assert out == [Released(0.5, FROM_SHARES)] * len(answered)
    assert decide(site, path, "c", [ask("never asked")]) == [None]
