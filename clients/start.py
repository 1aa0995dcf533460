"""``fedalign-client start``: trainer and SuperNode, each as its own user, kept running.

Started as root with two users, this process makes the folders belong to them and starts each child
after dropping to its user (groups, group and user are set before the program is loaded).  Started
as anybody else, both run as that user: the policy is then advisory, which is said.

A SuperNode that ends is started again after 15 s: Flower's SuperLink takes a node that died as
online for up to a minute and turns it away (exit code 305) until then.  The trainer is started
again in the same way, but one that ends at once with an error of settings or data ends everything:
the message in its log is for a person.

Children have process groups of their own.  They are asked to stop (SIGTERM), and after 20 s made
to; what they leave behind is killed (``strays.py``).  If this process is killed, the kernel sends
them SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clients.node_log import why
from clients.separation import Account, account, cannot_run, problems
from clients.site import Home, load_settings, node_settings
from clients.strays import adopt, children, end_strays
from fedalign.errors import ConfigError, FedalignError

BACK_OFF = 15.0
"""Seconds before a child that ended is started again."""
PATIENCE = 20.0
"""Seconds to end after SIGTERM."""
POLL = 0.5
READY = 120.0
"""Seconds for the trainer to listen."""
PR_SET_PDEATHSIG = 1
QUIET_TRAINER = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""One thread: small matrices run slower on many, and sums keep their order."""
STATE = "start.json"


@dataclass(frozen=True)
class Part:
    """One child: a name for log and messages, its command, user and environment."""

    name: str
    command: tuple[str, ...]
    user: Account | None
    """None: the user who started us."""
    environment: Mapping[str, str]
    fatal_codes: tuple[int, ...] = ()
    """Exit codes after which a restart is useless."""


def trainer_part(home: Home, user: Account | None, node: Account, advisory: bool) -> Part:
    """Return the resident trainer: installed code only, whatever the working directory holds."""
    command = [sys.executable, "-P", "-m", "clients.daemon", "--home", str(home.path)]
    command += ["--node-user", str(node.uid), *(["--advisory"] if advisory else [])]
    own = QUIET_TRAINER | _environment(user, home.trainer)
    return Part("trainer", tuple(command), user, own, fatal_codes=(2, 3))


def node_part(home: Home, user: Account | None, settings: Mapping[str, str]) -> Part:
    """Return Flower's SuperNode."""
    from fedalign.compat import QUIET_FLOWER

    programs = Path(sys.executable).parent
    program = programs / "flower-supernode"
    if not program.exists():
        raise ConfigError(f"{program}: no such program. Install fedalign again.")
    command = (
        str(program),
        *("--superlink", settings["gateway"]),
        *("--root-certificates", str(home.node / "ca.crt")),
        *("--auth-supernode-private-key", str(home.node / "key")),
        *("--port", str(free_port())),
        *("--node-config", f'socket="{home.socket}" site="{settings["name"]}"'),
    )
    own = _environment(user, home.node) | QUIET_FLOWER
    own |= {"FLWR_HOME": str(home.node / "flwr")}
    return Part("supernode", command, user, own)


def _environment(user: Account | None, folder: Path) -> dict[str, str]:
    """Return the environment of a child; another user's own, nothing of root's."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    if user is None:
        return {**os.environ, "PATH": path}
    kept = ("LANG", "LC_ALL", "TZ", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")
    place = user.home if Path(user.home).is_dir() and user.home != "/" else str(folder)
    named = {"PATH": path, "HOME": place, "USER": user.name, "LOGNAME": user.name}
    return {k: os.environ[k] for k in kept if k in os.environ} | named


def prepare(home: Home, trainer: Account | None, node: Account | None) -> None:
    """Make the folders; as root, give each to its user.

    Raises ``ConfigError`` where a folder cannot be made or given away.
    """
    try:
        home.path.mkdir(mode=0o711, parents=True, exist_ok=True)
        for folder in (home.node, home.trainer, home.run, home.logs):
            folder.mkdir(mode=0o700, exist_ok=True)
        if trainer is None or node is None:
            return
        os.chown(home.path, 0, 0)
        home.path.chmod(0o711)
        _give(home.node, node)
        _give(home.trainer, trainer)
        os.chown(home.run, trainer.uid, node.gid)
        home.run.chmod(0o2710)
        os.chown(home.logs, 0, 0)
        home.logs.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; start as root to fix it.") from None


def _give(folder: Path, user: Account) -> None:
    """Give a folder and what is in it to a user, without following links out of it.

    Whoever owns it now may be changing it meanwhile, so every file is held open while it is looked
    at and given away, and folders are gone through by descriptor, never by path.
    """
    os.chown(folder, user.uid, user.gid, follow_symlinks=False)
    folder.chmod(0o700)
    for parent, folders, files, place in os.fwalk(folder):
        for name in (*folders, *files):
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                descriptor = os.open(name, flags, dir_fd=place)
            except FileNotFoundError:
                continue
            try:
                state = os.fstat(descriptor)
                if state.st_nlink > 1 and not stat.S_ISDIR(state.st_mode):
                    raise ConfigError(
                        f"{os.path.join(parent, name)}: has a second name elsewhere; remove one of "
                        "the two."
                    )
                if not stat.S_ISLNK(state.st_mode):
                    os.chown(f"/proc/self/fd/{descriptor}", user.uid, user.gid)
            finally:
                os.close(descriptor)


class Supervisor:
    """Keeps parts running until a signal, or until one cannot run."""

    def __init__(
        self, home: Home, parts: Sequence[Part], logs: Path | None, back_off: float = BACK_OFF
    ) -> None:
        """Prepare to run ``parts``; ``logs`` None lets them write where we do."""
        self._home = home
        self._parts = parts
        self._logs = logs
        self._back_off = back_off
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._again: dict[str, float] = {}
        self._ended: dict[str, int] = {}
        """Exit code of a part's last end."""
        self._from: dict[str, int] = {}
        """Where in its log a part's last start begins."""
        self._stopping = False
        self._others: set[int] = set()

    def run(self) -> None:
        """Start every part and keep it running; returns after SIGTERM or SIGINT.

        Raises ``FedalignError`` when a part ends in a way that a restart does not help.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._others = set(children())
        adopt()
        try:
            for part in self._parts:
                self._start(part)
                if part.name == "trainer" and len(self._parts) > 1:
                    self._wait_for_trainer(part)
            while not self._stopping:
                for part in self._parts:
                    self._look_after(part)
                time.sleep(POLL)
        finally:
            self._end()

    def _start(self, part: Part) -> None:
        if self._stopping:
            return
        if part.name == "trainer":
            self._home.socket.unlink(missing_ok=True)  # what a killed trainer left behind
        drop: dict[str, Any] = {}
        if part.user is not None:
            drop = {
                "user": part.user.uid,
                "group": part.user.gid,
                "extra_groups": part.user.groups,
            }
        with _log(self._logs, part.name) as log:
            self._from[part.name] = log.tell() if log is not None else 0
            self._running[part.name] = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=dict(part.environment),
                start_new_session=True,
                preexec_fn=_end_with_parent,
                **drop,
            )
        self._again.pop(part.name, None)
        self._note()

    def _look_after(self, part: Part) -> None:
        child = self._running.get(part.name)
        if child is not None:
            code = child.poll()
            if code is None:
                return
            del self._running[part.name]
            self._ended[part.name] = code
            _end_group(child, signal.SIGKILL)  # whatever it started and left behind
            self._end_strays([part])
            if code in part.fatal_codes:
                raise self._failed(part, code)
            print(f"{part.name} ended (code {code}); again in {self._back_off:g} s", flush=True)
            if self._logs is not None:
                print(
                    f"  {why(self._logs / f'{part.name}.log', self._from[part.name])}", flush=True
                )
            self._again[part.name] = time.monotonic() + self._back_off
            self._note()
        elif time.monotonic() >= self._again.get(part.name, 0.0):
            self._start(part)

    def _wait_for_trainer(self, part: Part) -> None:
        """Wait until the trainer listens, so that the node's first message finds it."""
        end = time.monotonic() + READY
        while not self._stopping and not self._home.socket.exists():
            code = self._running[part.name].poll()
            if code is not None:
                raise self._failed(part, code)
            if time.monotonic() > end:
                raise FedalignError(f"the trainer does not listen after {READY:g} s.")
            time.sleep(0.1)

    def _failed(self, part: Part, code: int) -> FedalignError:
        where = "above" if self._logs is None else f"in {self._logs / part.name}.log"
        return FedalignError(f"the {part.name} cannot run (exit code {code}); why is {where}.")

    def _note(self) -> None:
        """Write down what runs, for ``status``."""
        if self._logs is None:
            return
        state: dict[str, Any] = {"supervisor": os.getpid()}
        state |= {n: c.pid for n, c in self._running.items()}
        state |= {n: {"code": code} for n, code in self._ended.items() if n not in self._running}
        temporary = self._logs / f"{STATE}.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self._logs / STATE)

    def _end_strays(self, parts: Sequence[Part]) -> None:
        """End what parts left behind outside of their process groups."""
        users = {os.geteuid() if part.user is None else part.user.uid for part in parts}
        known = self._others | {child.pid for child in self._running.values()}
        count = end_strays(known, users)
        if count:
            word = "process" if count == 1 else "processes"
            print(f"ended {count} {word} that a part had not ended itself", flush=True)

    def _stop(self, _: int, __: object) -> None:
        self._stopping = True

    def _end(self) -> None:
        for child in self._running.values():
            _end_group(child, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for child in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, end - time.monotonic()))
        for child in self._running.values():
            _end_group(child, signal.SIGKILL)
            child.wait()
        self._running.clear()
        self._end_strays(self._parts)
        adopt(False)
        if self._logs is not None:
            (self._logs / STATE).unlink(missing_ok=True)


def start(home: Home, only: str = "", trainer_user: str = "", node_user: str = "") -> None:
    """Run the trainer, the SuperNode, or both, until a signal.

    Args:
        home: the site's folder.
        only: ``trainer`` or ``supernode``; empty runs both.
        trainer_user: user of the trainer (root only).
        node_user: user of the SuperNode (root only).

    A part that runs alone, without root, writes its log where this process does.
    """
    if only not in ("", "trainer", "supernode"):
        raise ConfigError(f"--only {only} is not one of trainer, supernode.")
    if (trainer_user or node_user) and os.geteuid() != 0:
        raise ConfigError(
            "--trainer-user and --node-user need root, which drops to these users. Start as root, "
            "or start each part as its own user with --only."
        )
    if bool(trainer_user) != bool(node_user):
        raise ConfigError("give both --trainer-user and --node-user, or neither.")
    trainer = account(trainer_user) if trainer_user else None
    node = account(node_user) if node_user else None
    for user in filter(None, (trainer, node)):
        if reason := cannot_run(user):
            raise ConfigError(f"{reason}.")
    together = not only or node is not None
    if together:
        prepare(home, trainer, node)
    parts = []
    if only != "supernode":
        parts.append(_checked_trainer(home, trainer, node))
    if only != "trainer":
        parts.append(node_part(home, node, node_settings(home)))
    names = " and ".join(p.name for p in parts)
    print(f"starting {names}; stop with Ctrl-C or SIGTERM", flush=True)
    Supervisor(home, parts, home.logs if together else None).run()
    print("stopped", flush=True)


def _checked_trainer(home: Home, trainer: Account | None, node: Account | None) -> Part:
    """Return the trainer's part; says it where the policy is advisory."""
    settings = load_settings(home.settings)
    runs_as = trainer or account(str(os.geteuid()))
    asks = node or account(str(home.node.stat().st_uid if home.node.is_dir() else os.geteuid()))
    open_points = problems(home, settings, runs_as.uid, asks.uid)
    listed = "\n".join(f"  - {point}" for point in open_points)
    # With one user there is nothing to enforce; with two, a gap is a mistake.
    advisory = runs_as.uid == asks.uid
    if open_points and not advisory:
        raise ConfigError(f"code from the coordinator could reach the data, because\n{listed}")
    if advisory:
        print("THE POLICY IS ADVISORY: it binds an honest coordinator only, because")
        print(listed, flush=True)
    return trainer_part(home, trainer, asks, advisory)


def free_port() -> int:
    """Return a port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Let the kernel end this process when the supervisor is gone (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _end_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _log(folder: Path | None, name: str) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """Open a log for adding, private; an old one of more than 10 MB is put aside."""
    if folder is None:
        return contextlib.nullcontext()
    path = folder / f"{name}.log"
    if path.exists() and path.stat().st_size > 10_000_000:
        shutil.move(path, path.with_suffix(".log.1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
