"""The resident trainer in a process of its own: same numbers, no way around it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from clients.app import forward
from clients.frames import REPLY, REQUESTS, read_frame, write_frame
from clients.handlers import SiteContext, handle
from clients.lines import Line
from clients.quiet import MOST
from clients.site import Home
from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
from fedalign.audit import verify
from fedalign.config import Config, from_flat, to_json, to_site_json
from fedalign.errors import WireError
from fedalign.models.layout import pack

SITE = "north-clinic"
A, B = 61_001, 61_002
"""Two users without an entry in the user database."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")

POLICY = "[scores]\nquestion-scores = true\n[budget]\nmax-rounds-per-day = 3\n"


class Running:
    """A trainer process, and what it says."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = Home(home)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "clients.daemon", "--home", str(home), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate(timeout=200)[1])
        return line

    def ask(self, kind: str, content: RecordDict) -> RecordDict:
        return forward(kind, content, str(self.home.socket), SITE)

    def audit(self) -> list[dict[str, object]]:
        lines = self.home.audit.read_text().splitlines()
        return [{"event": e["event"], **e["facts"]} for e in map(json.loads, lines)]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        out = self.process.communicate(timeout=200)
        assert out is not None
        return self.process.returncode


Start = Callable[..., Running]


@pytest.fixture
def start(short_tmp: Path) -> Iterator[Start]:
    running: list[Running] = []

    def begin(home: Path, *arguments: str) -> Running:
        running.append(Running(home, *arguments))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate(timeout=200)


def advisory() -> tuple[str, ...]:
    return ("--advisory", "--node-user", str(os.geteuid()))


def simulated(merged: Path, out: Path) -> Config:
    return from_flat(
        {
            "data.source": "survey",
            "data.path": str(merged),
            "data.partition": "column",
            "data.partition-column": "site",
            "model.rank": 2,
            "model.device": "cpu",
            "local.steps": 2,
            "local.batch-size": 4,
            "personal.steps": 2,
            "run.rounds": 2,
            "run.out": str(out),
            "run.round-timeout": 500.0,
        }
    )


def message(config_json: str, adapter: np.ndarray | None = None, **more: object) -> RecordDict:
    facts = {"phase": "x", "round": 1, "attempt": 1, "clients": (SITE,), **more}
    request = wire.Request(config_json=config_json, **facts)
    return wire.encode_request(request, None if adapter is None else wire.adapter_record(adapter))


def status(content: RecordDict) -> list[int]:
    return list(content.metric_records["status"]["status"])


def without_seconds(content: RecordDict) -> dict[str, dict[str, object]]:
    return {
        name: {k: v.data if hasattr(v, "data") else v for k, v in record.items() if k != "seconds"}
        for name, record in content.items()
    }


def test_same_answers_bit_by_bit_then_budget_and_kinds(start, make_home, sites, short_tmp):
    """Hello, score, train and personal are those of a simulation of all sites' data."""
    rows = sites.survey_rows()
    merged = sites.write(short_tmp / "all.jsonl", rows)
    config = simulated(merged, short_tmp / "simulated")
    trainer = start(make_home(policy=POLICY), *advisory())
    ready = trainer.wait_ready()
    assert "policy advisory" in ready

    sent = to_site_json(config)
    hello = wire.decode_hello(trainer.ask(wire.HELLO, message(sent, clients=())))
    alone = SiteContext()
    theirs = wire.decode_hello(handle(wire.HELLO, message(to_json(config), clients=()), alone))
    place = theirs.clients.index(SITE)
    assert (hello.clients, hello.groups) == ((SITE,), ("coast",))
    assert hello.manifest == theirs.manifest
    for name in ("train", "validation", "test", "size"):
        assert getattr(hello, name) == (getattr(theirs, name)[place],)

    manifest = hello.manifest
    flat = pack(initial_adapter(dict(manifest.layout), 0), manifest.layout)
    flat = flat + np.float32(0.01)
    common = {"manifest_hash": manifest.hash, "splits": ("validation", "test")}
    for kind in (wire.SCORE, wire.TRAIN, wire.PERSONAL, wire.TRAIN):
        found = trainer.ask(kind, message(sent, flat, **common))
        expected = handle(kind, message(to_json(config), flat, **common), alone)
        assert status(found) == [wire.OK]
        assert without_seconds(found) == without_seconds(expected)
    own = trainer.home.store
    assert [p.name for p in own.glob("*/personal/*")] == ["00000-north-clinic.safetensors"]
    assert (own.stat().st_mode & 0o777, next(own.iterdir()).stat().st_mode & 0o777) == (0o700,) * 2

    # Whom and what it does not know.
    other = message(sent, flat, **common, clients=("south-clinic",))
    assert status(trainer.ask(wire.TRAIN, other)) == [wire.UNKNOWN_CLIENT]
    both = message(sent, flat, **common, clients=(SITE, "south-clinic"))
    assert status(trainer.ask(wire.TRAIN, both)) == [wire.UNKNOWN_CLIENT] * 2
    wrong = message(sent, flat, **common | {"manifest_hash": "ab"})
    assert status(trainer.ask(wire.SCORE, wrong)) == [wire.MANIFEST_MISMATCH]
    broken = message("{", flat, **common)
    assert status(trainer.ask(wire.SCORE, broken)) == [wire.BAD_REQUEST]

    # The third round of the day is the last.
    third = message(sent, flat, **common, round=2)
    assert status(trainer.ask(wire.TRAIN, third)) == [wire.OK]
    assert status(trainer.ask(wire.TRAIN, third)) == [wire.BUDGET_EXHAUSTED]
    assert status(trainer.ask(wire.SCORE, third)) == [wire.OK]

    # A model that the policy does not name: the code for hello names the site.
    foreign = to_site_json(from_flat({"model.name": "org/other"}))
    with pytest.raises(WireError) as refusal:
        wire.decode_hello(trainer.ask(wire.HELLO, message(foreign, clients=())))
    assert refusal.value.reason == "refused-base-model"

    assert trainer.stop() == 0
    assert not trainer.home.socket.exists()
    events = trainer.audit()
    assert (events[0]["event"], events[-1]["event"]) == ("started", "stopped")
    jobs = [(e["kind"], e["code"]) for e in events if e["event"] == "job"]
    assert jobs[:3] == [("query.hello", "ok"), ("evaluate.score", "ok"), ("train.round", "ok")]
    refused = [(e["kind"], e["code"]) for e in events if e["event"] == "refused"]
    assert refused == [("train.round", "budget-exhausted"), ("query.hello", "refused-base-model")]
    assert verify(trainer.home.audit) == len(events)

    # What was spent is still spent after a restart.
    again = start(trainer.home.path, *advisory())
    again.wait_ready()
    assert status(again.ask(wire.TRAIN, third)) == [wire.BUDGET_EXHAUSTED]
    assert again.stop() == 0


def raw_exchange(path: Path, data: bytes, finish: bool = True) -> RecordDict | None:
    """Send bytes; return the answer, None where there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        line = Line(connection, 30)
        try:
            line.write(data)
            if finish:
                line.finish()
            return read_frame(line.read, (REPLY,))[1]
        except (OSError, WireError):
            return None


def framed(kind: str, content: RecordDict) -> bytes:
    pieces: list[bytes] = []
    write_frame(pieces.append, kind, content)
    return b"".join(pieces)


def test_forged_frames_change_nothing(start, make_home):
    trainer = start(make_home(), *advisory())
    trainer.wait_ready()
    path = trainer.home.socket
    good = framed(wire.HELLO, message("{}", clients=()))
    oversized = bytearray(good)
    oversized[12:20] = (1 << 40).to_bytes(8, "big")
    for forged in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        good[:-1],
        good + b"x",
        bytes(oversized),
        framed("train.everything", message("{}")),
        framed(REPLY, message("{}")),
    ):
        answer = raw_exchange(path, forged)
        assert answer is None or status(answer) == []
    # A message that is no request of the contract gets a code, whatever its kind.
    for kind in REQUESTS:
        assert status(trainer.ask(kind, RecordDict())) == [wire.BAD_REQUEST]
        assert status(trainer.ask(kind, message("[]"))) == [wire.BAD_REQUEST]
        assert status(trainer.ask(kind, message('{"run.sede": 1}'))) == [wire.BAD_REQUEST]
    assert trainer.process.poll() is None
    assert trainer.stop() == 0
    reasons = [e["reason"] for e in trainer.audit() if e["event"] == "frame-refused"]
    assert len(reasons) == 7
    assert set(reasons) <= {"frame-truncated", "bad-frame", "frame-too-large", "unknown-kind"}


def test_nothing_is_done_for_who_has_gone(start, make_home):
    """A trainer that hung finds requests whose askers gave up: they cost nothing."""
    trainer = start(make_home(), *advisory())
    trainer.wait_ready()
    request = framed(wire.HELLO, message(to_site_json(Config()), clients=()))
    trainer.process.send_signal(signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(trainer.home.socket))
        connection.sendall(request)
    trainer.process.send_signal(signal.SIGCONT)
    assert status(trainer.ask(wire.HELLO, RecordDict())) == [wire.BAD_REQUEST]
    assert trainer.stop() == 0
    events = [e["event"] for e in trainer.audit()]
    assert events.count("asker-gone") == 1
    jobs = [e for e in trainer.audit() if e["event"] == "job"]
    assert [j["code"] for j in jobs] == ["bad-request"]


def test_a_flood_of_forged_frames_fills_no_disk(start, make_home):
    trainer = start(make_home(), *advisory())
    trainer.wait_ready()
    for _ in range(2 * MOST):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(trainer.home.socket))
    assert status(trainer.ask(wire.HELLO, RecordDict())) == [wire.BAD_REQUEST]
    # Two answers to empty connections may be lost at the turn of a minute, no more.
    assert len(trainer.audit()) <= 2 * MOST + 2
    assert verify(trainer.home.audit) >= MOST
    trainer.process.send_signal(signal.SIGTERM)
    said = trainer.process.communicate(timeout=200)[1]
    assert said.count("refused a frame") <= 2 * MOST


def test_it_does_not_start_beside_another_nor_unseparated(start, make_home):
    home = make_home()
    first = start(home, *advisory())
    first.wait_ready()
    second = start(home, *advisory())
    assert "another trainer" in second.process.communicate(timeout=200)[1]
    assert second.process.returncode == 2
    third = start(home, "--node-user", str(os.geteuid()))
    text = third.process.communicate(timeout=200)[1]
    assert "advisory" in text
    assert "same user" in text
    assert third.process.returncode == 2
    assert first.stop() == 0


def test_bad_data_stops_it_with_file_and_line(start, make_home, sites):
    rows = [r for r in sites.survey_rows() if r["site"] == SITE]
    rows[2]["group"] = "inland"
    broken = start(make_home(rows), *advisory())
    assert "data.jsonl:3" in broken.process.communicate(timeout=200)[1]
    assert broken.process.returncode == 3


def as_user(uid: int, work: Callable[[], bool]) -> bool:
    """Return what ``work`` says in a child that has become another user."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    _, state = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(state) in (0, 1), "the child failed"
    return os.waitstatus_to_exitcode(state) == 0


@needs_root
def test_only_the_nodes_user_is_answered_and_it_cannot_read_the_data(start, make_home):
    home = make_home()
    os.chown(home / "node", A, A)
    trainer = start(home)  # the owner of node/ may ask
    assert "policy enforced" in trainer.wait_ready()
    path = trainer.home.socket
    hello = framed(wire.HELLO, RecordDict())

    def asks() -> bool:
        answer = raw_exchange(path, hello)
        return answer is not None and status(answer) == [wire.BAD_REQUEST]

    def reads() -> bool:
        for secret in ("data.jsonl", "policy.toml", "audit.jsonl", "budget.sqlite", ""):
            try:
                os.stat(home / "trainer" / secret) if secret else os.listdir(home / "trainer")
                open(home / "trainer" / (secret or "lock")).close()
                return True
            except PermissionError:
                continue
        return False

    def replaces() -> bool:
        for move in (
            lambda: os.rename(home / "trainer", home / "moved"),
            lambda: os.unlink(path),
            lambda: os.mkdir(home / "new"),
        ):
            try:
                move()
                return True
            except PermissionError:
                continue
        return False

    assert as_user(A, asks)
    assert not as_user(B, asks)
    assert not asks()  # not even root
    assert not as_user(A, reads)
    assert not as_user(A, replaces)
    assert trainer.stop() == 0
    refused = [e["uid"] for e in trainer.audit() if e["event"] == "peer-refused"]
    assert refused == [B, 0]


@needs_root
def test_data_that_others_can_read_are_not_served(start, make_home):
    home = make_home()
    os.chown(home / "node", A, A)
    (home / "trainer").chmod(0o755)
    (home / "trainer" / "data.jsonl").chmod(0o644)
    refused = start(home)
    text = refused.process.communicate(timeout=200)[1]
    assert "data.jsonl can be read by others (mode 0644)" in text
    assert refused.process.returncode == 2
    served = start(home, "--advisory")
    assert "policy advisory" in served.wait_ready()
    assert served.stop() == 0


def test_a_slow_peer_does_not_hold_the_line(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Line(ours, 0.3)
        began = time.monotonic()
        theirs.send(b"x")
        assert line.read(10) == b"x"
        with pytest.raises(TimeoutError):
            line.read(10)
        assert time.monotonic() - began < 5
        with pytest.raises(TimeoutError):
            line.write(b"x" * 50_000_000)
