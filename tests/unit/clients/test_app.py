"""The ClientApp forwards without torch, and turns every failure into a status code."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clients.app import forward
from clients.frames import MAGIC, REPLY, REQUESTS, read_frame, write_frame
from clients.lines import Line
from fedalign import wire

FORWARD = """
import sys
from fedalign.compat import become_flower_process
become_flower_process()
from flwr.app import Context, Message, RecordDict
from clients.app import app
from fedalign import wire
context = Context(1, 1, {"socket": sys.argv[1], "site": "north-clinic"}, RecordDict(), {})
content = wire.encode_request(wire.Request("round", 1, 1, ("north-clinic",), "{}"))
message = Message(content, 1, wire.TRAIN)
message.metadata.__dict__["_message_id"] = "m1"
reply = app(message, context).content
print("status", list(reply.metric_records["status"]["status"]))
print("clients", list(reply.config_records["reply"]["clients"]))
heavy = {"torch", "transformers", "peft", "scipy", "clients.trainer", "clients.handlers"}
print("loaded", sorted(heavy & set(sys.modules)))
"""


def test_it_forwards_without_torch(short_tmp: Path, root: Path) -> None:
    path = short_tmp / "s"
    answers = Answering(path, wire.encode_failure(("north-clinic",), wire.NO_DATA))
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, str(path)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=200,
        check=False,
    )
    answers.join()
    assert "status [2]\nclients ['north-clinic']" in done.stdout, done.stderr
    assert "loaded []" in done.stdout
    assert answers.kind == wire.TRAIN


class Answering(threading.Thread):
    """A trainer that gives one answer."""

    def __init__(self, path: Path, reply: object) -> None:
        super().__init__(daemon=True)
        self.kind = ""
        self._reply = reply
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(200)
        self.start()

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            line = Line(connection, 30)
            self.kind, _ = read_frame(line.read, REQUESTS)
            if isinstance(self._reply, bytes):
                line.write(self._reply)
            elif self._reply is not None:
                write_frame(line.write, REPLY, self._reply)


REQUEST = wire.encode_request(wire.Request("round", 1, 1, ("a", "b"), '{"run.round-timeout": 0.5}'))
FAILED = [wire.INTERNAL_ERROR] * 2


def status(path: Path) -> list[int]:
    reply = forward(wire.TRAIN, REQUEST, str(path), "a")
    assert list(reply.config_records["reply"]["clients"]) == ["a", "b"]
    return list(reply.metric_records["status"]["status"])


def test_no_socket(short_tmp, caplog):
    assert status(short_tmp / "absent") == FAILED
    assert "no answer from the resident trainer" in caplog.text


def test_a_socket_that_nobody_listens_on(short_tmp):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_tmp / "s"))
    assert status(short_tmp / "s") == FAILED


@pytest.mark.parametrize("answer", [None, b"", b"nonsense" * 10, MAGIC + b"\0\0\0\1"])
def test_an_answer_that_is_none(short_tmp, answer):
    Answering(short_tmp / "s", answer)
    assert status(short_tmp / "s") == FAILED


def test_no_answer_in_time(short_tmp):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(short_tmp / "s"))
        silent.listen(1)
        assert status(short_tmp / "s") == FAILED


def test_hello_fails_for_the_site(short_tmp):
    hello = wire.encode_request(wire.Request("hello", 0, 1, (), "{}"))
    reply = forward(wire.HELLO, hello, str(short_tmp / "absent"), "north-clinic")
    assert list(reply.config_records["reply"]["clients"]) == ["north-clinic"]
