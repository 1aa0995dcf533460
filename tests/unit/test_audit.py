"""The audit log: its chain, many writers, crashes, and what tampering looks like."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedalign.audit import FIRST, AuditLog, last_hash, verify
from fedalign.errors import DataError


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    log = AuditLog(tmp_path / "audit.jsonl")
    for i in range(5):
        log.append("site.enrolled", site=f"site-{i}", n=i, seconds=0.5)
    return log


def lines(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def test_events_are_chained_and_private(log: AuditLog) -> None:
    records = [json.loads(line) for line in lines(log)]
    assert [r["n"] for r in records] == [1, 2, 3, 4, 5]
    assert records[0]["previous"] == FIRST
    assert all(b["previous"] == a["hash"] for a, b in itertools.pairwise(records))
    assert records[2]["facts"] == {"site": "site-2", "n": 2, "seconds": 0.5}
    assert verify(log.path) == 5
    assert last_hash(log.path) == records[-1]["hash"]
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_no_log_yet_is_an_empty_one(tmp_path: Path) -> None:
    assert verify(tmp_path / "none") == 0
    assert last_hash(tmp_path / "none") == FIRST


def test_values_are_cut_and_printable(log: AuditLog) -> None:
    log.append("x", text="a\nb\x1b[31m\u202e" + "y" * 500)
    fact = json.loads(lines(log)[-1])["facts"]["text"]
    assert fact == "a?b?[31m?" + "y" * 191
    assert lines(log)[-1].isascii()
    assert verify(log.path) == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, ["list"]])
def test_a_fact_that_is_none_is_a_mistake_in_the_program(log: AuditLog, bad: object) -> None:
    with pytest.raises(ValueError, match="fact 'value'"):
        log.append("x", value=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name of an event"):
        log.append("Bad event")
    assert verify(log.path) == 5


def test_a_changed_line_is_named(log: AuditLog) -> None:
    found = lines(log)
    found[2] = found[2].replace(b"site-2", b"site-9")
    log.path.write_bytes(b"".join(found))
    with pytest.raises(DataError, match="line 3: its hash is wrong"):
        verify(log.path)


def test_a_line_hashed_anew_breaks_the_next(log: AuditLog, tmp_path: Path) -> None:
    other = AuditLog(tmp_path / "other")
    for i in range(3):
        other.append("site.enrolled", site=f"site-{i + 7}")
    found = lines(log)
    found[:3] = lines(other)
    log.path.write_bytes(b"".join(found))
    with pytest.raises(DataError, match="line 4: does not follow"):
        verify(log.path)


@pytest.mark.parametrize("change", ["drop", "swap", "insert", "first"])
def test_missing_added_and_moved_lines_are_found(log: AuditLog, change: str) -> None:
    found = lines(log)
    if change == "drop":
        del found[2]
    elif change == "swap":
        found[2], found[3] = found[3], found[2]
    elif change == "insert":
        found.insert(2, found[1])
    else:
        del found[0]
    log.path.write_bytes(b"".join(found))
    with pytest.raises(DataError, match=r"line \d: holds event"):
        verify(log.path)


def test_spelling_is_part_of_the_line(log: AuditLog) -> None:
    found = lines(log)
    found[1] = found[1].replace(b'{"n": 2', b'{"n": 9, "n": 2')
    log.path.write_bytes(b"".join(found))
    with pytest.raises(DataError, match="line 2: not as it was written"):
        verify(log.path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_is_found(log: AuditLog, position: int, value: int) -> None:
    whole = b"".join(lines(log))
    position %= len(whole)
    changed = whole[:position] + bytes([value]) + whole[position + 1 :]
    other = log.path.with_name("changed")
    other.write_bytes(changed)
    if changed == whole:
        assert verify(other) == 5
    else:
        with pytest.raises(DataError):
            verify(other)


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_line_torn_by_a_crash_is_taken_away_and_logged(log: AuditLog, cut: int) -> None:
    good = log.path.read_bytes()
    torn = (good.splitlines()[0] * 60)[:cut]
    log.path.write_bytes(good + torn)
    with pytest.raises(DataError, match="line 6: cut off"):
        verify(log.path)
    log.append("after")
    assert verify(log.path) == 7
    event = json.loads(lines(log)[5])
    assert event["event"] == "audit.torn-line"
    assert event["facts"] == {"bytes": cut}
    assert log.path.read_bytes().startswith(good)


def test_a_torn_first_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.path.write_bytes(b'{"n": 1')
    log.append("x")
    assert verify(log.path) == 2


def test_nothing_is_added_after_a_changed_last_line(log: AuditLog) -> None:
    changed = log.path.read_bytes().replace(b"site-4", b"site-5")
    log.path.write_bytes(changed)
    with pytest.raises(DataError, match="last line was changed"):
        log.append("x")
    assert log.path.read_bytes() == changed


def test_threads_and_processes_share_a_log(log: AuditLog) -> None:
    script = (
        "import sys; from pathlib import Path; from fedalign.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]))\n"
        "for i in range(20): log.append('process', i=i)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(log.path)], env=dict(os.environ))
        for _ in range(2)
    ]
    threads = [
        threading.Thread(target=lambda: [log.append("thread", i=i) for i in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [p.wait(60) for p in processes] == [0, 0]
    assert verify(log.path) == 5 + 40 + 80
