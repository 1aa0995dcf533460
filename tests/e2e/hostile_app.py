"""What a hostile coordinator ships to a site in the place of ``clients/app.py``.

It runs as the node's user, told by the coordinator where everything lies, and tries everything:
files, processes, privileges, forged frames, jobs that the policy refuses, jobs beyond the budget.
What came of each goes home as its reply.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.frames import (
    HEAD,
    MAGIC,
    MAX_HEADER,
    MAX_VALUES,
    REPLY,
    VERSION,
    read_frame,
    write_frame,
)
from clients.lines import Line
from fedalign import wire
from fedalign.config import Config, to_site_json

PTRACE_ATTACH = 16
DONE = "done"

app = ClientApp()


@app.query("hello")
def attack(message: Message, context: Context) -> Message:
    """Try everything; bring home what came of it."""
    known: dict[str, Any] = json.loads(message.content.config_records["known"]["json"])
    trainer = Path(str(context.node_config["socket"]))
    found = {
        "user": [os.getuid(), os.getgid(), *os.getgroups()],
        "files": files(known, trainer.parent.parent),
        "processes": processes(known["trainer-user"], known["supervisor"]),
        "frames": frames(trainer),
        "policy": refusals(trainer, known),
        "budget": spend(trainer, known),
        "stray": stay(),
    }
    return Message(
        RecordDict({"loot": ConfigRecord({"json": json.dumps(found)})}), reply_to=message
    )


def attempt(work: Callable[[], object]) -> str:
    """Return ``done``, or the name of the error that the kernel answered."""
    try:
        work()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return DONE


# --- files, processes ---------------------------------------------------------------------------


def files(known: dict[str, Any], home: Path) -> dict[str, str]:
    """Try to read, change, link and replace what is not the node's."""
    mine = home / "node"
    found: dict[str, str] = {}
    folder = home / "trainer"
    names = ("", "policy.toml", "trainer.toml", "audit.jsonl", "budget.sqlite", "noise.key")
    private = [folder / n if n else folder for n in (*names, "store", "lock")]
    for path in (*private, Path(known["data"]), home / "logs", home / "logs" / "trainer.log"):
        link = mine / f"link.{len(found)}"
        tries: dict[str, Callable[[], object]] = {
            "list": lambda path=path: os.listdir(path),
            "read": lambda path=path: path.open("rb").read(1),
            "write": lambda path=path: path.open("r+b").close(),
            "chmod": lambda path=path: path.chmod(0o777),
            "hard-link": lambda path=path, link=link: os.link(path, link),
            "through-link": lambda path=path, link=link: (
                os.symlink(path, link),
                link.open("rb").read(1) if not path.is_dir() else os.listdir(link),
            ),
        }
        for name, work in tries.items():
            found[f"{name} {path}"] = attempt(work)
    moves: dict[str, Callable[[], object]] = {
        "move trainer": lambda: folder.rename(mine / "trainer"),
        "move run": lambda: (home / "run").rename(mine / "run"),
        "new beside": lambda: (home / "other").mkdir(),
        "remove socket": lambda: (home / "run" / "trainer.sock").unlink(),
        "new in run": lambda: (home / "run" / "x").touch(),
        "change code": lambda: Path(known["code"]).open("r+b").close(),
        "add code": lambda: (Path(known["code"]).parent / "hostile.py").touch(),
    }
    return found | {name: attempt(work) for name, work in moves.items()}


def processes(user: int, supervisor: int) -> dict[str, str]:
    """Try to reach into the trainer and the supervisor, and to become somebody else."""
    found: dict[str, str] = {}
    libc = ctypes.CDLL(None, use_errno=True)
    pids = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    for entry in (p for p in pids if owner(p) == user or p.name == str(supervisor)):
        pid = int(entry.name)

        def trace(pid: int = pid) -> None:
            if libc.ptrace(PTRACE_ATTACH, pid, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "ptrace")

        for name in ("mem", "environ", "maps"):
            found[f"{name} {pid}"] = attempt(lambda e=entry, n=name: (e / n).open("rb").read(1))
        for name in ("fd", "cwd", "root"):
            found[f"{name} {pid}"] = attempt(lambda e=entry, n=name: os.listdir(e / n))
        found[f"trace {pid}"] = attempt(trace)
        for number in (signal.SIGTERM, signal.SIGSTOP):
            found[f"{number.name} {pid}"] = attempt(lambda p=pid, n=number: os.kill(p, n))
    become: dict[str, Callable[[], object]] = {
        "setuid root": lambda: os.setuid(0),
        "setuid trainer": lambda: os.setuid(user),
        "setgroups": lambda: os.setgroups([user, 0]),
        "chroot": lambda: os.chroot("/"),
    }
    return found | {name: attempt(work) for name, work in become.items()}


def stay() -> int:
    """Leave a process behind that is in no group of ours and outlives this one."""
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


def owner(process: Path) -> int:
    try:
        return process.stat().st_uid
    except OSError:
        return -1


# --- the socket ---------------------------------------------------------------------------------


def frames(path: Path) -> dict[str, str]:
    """Send what is no frame, or none that may be; ``answer`` says what came back."""
    good = framed(wire.HELLO, request(settings(), ()))
    values = b'{"a": "' + b"x" * (MAX_VALUES + 1) + b'"}'
    record = {"type": "config", "name": "c", "bytes": len(values)}
    pickled = json.dumps({"kind": wire.TRAIN, "records": [{"type": "pickle", "name": "x"}]})
    forged = {
        "nothing": b"",
        "http": b"GET / HTTP/1.1\r\n\r\n",
        "noise": os.urandom(500),
        "cut off": good[:-1],
        "a byte too many": good + b"x",
        "another version": MAGIC + struct.pack(">I", VERSION + 1) + good[8:],
        "huge header": HEAD.pack(MAGIC, VERSION, MAX_HEADER + 1, 0) + b"x" * (MAX_HEADER + 1),
        "huge body": HEAD.pack(MAGIC, VERSION, 2, 1 << 40) + b"{}",
        "huge values": raw(json.dumps({"kind": wire.TRAIN, "records": [record]}).encode(), values),
        "deep header": raw(b"[" * 100_000),
        "pickle": raw(pickled.encode()),
        "unknown kind": framed("train.everything", request(settings(), ())),
        "a reply": framed(REPLY, request(settings(), ())),
    }
    found = {name: exchange(path, data) for name, data in forged.items()}
    for kind in (wire.HELLO, wire.SCORE, wire.TRAIN, wire.PERSONAL, wire.EXCHANGE):
        found[f"empty {kind}"] = exchange(path, framed(kind, RecordDict()))
    ours, theirs = os.pipe()
    passed = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs]))
    found["a descriptor"] = exchange(path, framed(wire.TRAIN, RecordDict()), [passed])
    os.close(theirs)
    # At its end at once: nobody over there kept the descriptor.
    os.set_blocking(ours, False)
    found["the descriptor's other end"] = attempt(lambda: os.read(ours, 1))
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as gone, suppress(OSError):
            enter(gone, path)
            gone.send(good[:30])
    return found


def refusals(path: Path, known: dict[str, Any]) -> dict[str, str]:
    """Ask for what no policy of this site allows, and for what is no setting at all."""
    free, site = known["free"], (known["site"],)
    asked: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "another model": ({"model.name": "org/other"}, site),
        "a folder as model": ({"model.name": "/etc"}, site),
        "another objective": ({"local.objective": "ppo"}, site),
        "too many steps": ({"local.steps": 10**6}, site),
        "a reference path": ({"local.reference": known["data"]}, site),
        "without clipping": ({"aggregation.method": "product"}, site),
        "another client": ({}, ("inner-b",)),
        "two clients": ({}, (*site, "inner-b")),
        "no setting": ({"run.sede": 1}, site),
        "a setting of another type": ({"local.steps": "many"}, site),
    }
    found = {}
    for name, (changes, clients) in asked.items():
        content = request(settings() | changes, clients)
        found[name] = exchange(path, framed(wire.TRAIN, content))
    # Settings that would write, and read, where the coordinator likes.
    paths = {
        "run.out": f"{free}/out",
        "data.path": known["data"],
        "rewards.prompts": known["data"],
        "deployment.registry": f"{free}/registry",
        "deployment.audit": f"{free}/audit",
    }
    found["paths"] = exchange(path, framed(wire.SCORE, request(settings() | paths, site)))
    return found


def spend(path: Path, known: dict[str, Any]) -> list[str]:
    """Ask for more jobs than a day has."""
    hello = framed(wire.HELLO, request(settings(), ()))
    return [exchange(path, hello) for _ in range(known["jobs"] + 10)]


def settings() -> dict[str, Any]:
    """Return flat settings that the policy allows."""
    return {**json.loads(to_site_json(Config())), "aggregation.method": "frozen-a"}


def request(flat: dict[str, Any], clients: tuple[str, ...]) -> RecordDict:
    return wire.encode_request(wire.Request("x", 1, 1, clients, json.dumps(flat)))


def framed(kind: str, content: RecordDict) -> bytes:
    pieces: list[bytes] = []
    write_frame(pieces.append, kind, content)
    return b"".join(pieces)


def raw(header: bytes, body: bytes = b"") -> bytes:
    return HEAD.pack(MAGIC, VERSION, len(header), len(body)) + header + body


def exchange(path: Path, data: bytes, passed: list[Any] | None = None) -> str:
    """Send bytes; return the codes that came back, ``answer`` for more than codes, or ``none``."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        enter(connection, path)
        line = Line(connection, 60)
        with suppress(OSError):
            if passed:
                connection.sendmsg([data[:1]], passed)
                data = data[1:]
            line.write(data)
            line.finish()
        try:
            content = read_frame(line.read, (REPLY,))[1]
        except Exception:
            return "none"
    if not set(content) <= {"reply", "status"}:
        return "answer"
    codes = content.metric_records["status"]["status"]
    return ",".join(wire.STATUS[int(code)] for code in codes) or "refused"


def enter(connection: socket.socket, path: Path) -> None:
    """Connect; where the queue of waiting callers is full, wait for a place in it."""
    end = time.monotonic() + 60
    while True:
        try:
            connection.connect(str(path))
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
