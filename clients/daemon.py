"""The resident trainer: a process of the data's user that answers frames on a unix socket.

``python -m clients.daemon --home HOME`` (usually by ``fedalign-client start``) runs installed code
only.  It keeps the base model and the prepared data in memory over rounds, works on one job at a
time, and never ends because of a request: what cannot be read, is not allowed or goes wrong is
answered with a status code and written to the site's audit log (``trainer/audit.jsonl``), the cause
to this process's own log.

Who may ask: processes of the node's user, as the kernel says (``SO_PEERCRED``).  What may be asked:
the message kinds of ``fedalign.wire``, one frame each (``frames.py``), within two minutes.  Of what
is refused, so many lines a minute are written and the others counted (``quiet.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from flwr.app import RecordDict

from clients.enrolled import EnrolledSite
from clients.frames import MAX_BODY, REPLY, REQUESTS, expect_end, read_frame, write_frame
from clients.lines import Line
from clients.policy_toml import load_policy
from clients.quiet import Quiet, QuietLog
from clients.separation import account, problems
from clients.site import Home, load_data, load_settings
from fedalign import wire
from fedalign.audit import AuditLog
from fedalign.errors import ConfigError, FedalignError, WireError

log = logging.getLogger("fedalign.client")

READ_SECONDS = 120.0
"""A request must have arrived in full by then, and its answer must have been taken."""
WAITING = 8
"""Connections that may wait while a job runs."""


class Trainer:
    """Listens and answers until it is told to stop."""

    def __init__(
        self, listener: socket.socket, site: EnrolledSite, audit: AuditLog, allowed: frozenset[int]
    ) -> None:
        self._listener = listener
        self._site = site
        self._audit = audit
        self._allowed = allowed
        self._quiet = Quiet()

    def run(self) -> NoReturn:
        """Answer one connection after another; only a signal ends this."""
        while True:
            connection, _ = self._listener.accept()
            with connection:
                try:
                    self._answer(connection)
                except Exception:
                    log.exception("a connection failed")

    def _answer(self, connection: socket.socket) -> None:
        uid = peer_uid(connection)
        if uid not in self._allowed:
            log.error("refused a process of uid %s", uid)
            self._refused("peer-refused", uid=uid)
            return
        line = Line(connection, READ_SECONDS)
        try:
            kind, content = read_frame(line.read, REQUESTS, MAX_BODY)
            expect_end(line.read)
        except (WireError, OSError) as error:
            reason = error.reason if isinstance(error, WireError) else "not-in-time"
            log.error("refused a frame: %s", error)
            self._refused("frame-refused", reason=reason)
            reply = wire.encode_failure((), wire.BAD_REQUEST)
        else:
            if gone(connection):
                # It waited its turn and gave up (a trainer that hung): work would be for nobody.
                self._refused("asker-gone", kind=kind)
                return
            reply = self._work(kind, content)
            del content
        answer = Line(connection, READ_SECONDS)
        try:
            write_frame(answer.write, REPLY, reply)
        except (OSError, WireError) as error:
            log.error("the answer was not taken: %s", error)
            self._refused("answer-lost", reason=type(error).__name__)

    def _refused(self, event: str, **facts: str | int | float) -> None:
        """Write down what was not done, and how many such lines were left out before."""
        before = self._quiet.take()
        if before is not None:
            self._audit.append(event, **facts, **({"left-out": before} if before else {}))

    def _work(self, kind: str, content: RecordDict) -> RecordDict:
        """Do a job; its line in the audit log is written before the answer leaves."""
        began = time.monotonic()
        try:
            reply = self._site.serve(kind, content)
            code = status_of(reply)
            event = "refused" if code in wire.POLICY_CODES else "job"
            seconds = round(time.monotonic() - began, 3)
            write = self._audit.append if code == wire.STATUS[wire.OK] else self._refused
            write(event, kind=kind, **self._site.last, code=code, seconds=seconds)
        except Exception:
            log.exception(
                "%s: nothing is answered that could not be counted and written down", kind
            )
            return wire.encode_failure((self._site.settings.name,), wire.INTERNAL_ERROR)
        return reply


def status_of(reply: RecordDict) -> str:
    """Return the status of an answer for one client; an answer to ``hello`` has none but ``ok``."""
    if "status" not in reply.metric_records:
        return wire.STATUS[wire.OK]
    status = reply.metric_records["status"]["status"]
    assert isinstance(status, list)
    return wire.STATUS[int(status[0])] if status else wire.STATUS[wire.OK]


def peer_uid(connection: socket.socket) -> int:
    """Return the user of the process at the other end, as the kernel knows it."""
    layout = struct.Struct("3i")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return int(layout.unpack(raw)[1])


def gone(connection: socket.socket) -> bool:
    """Return whether the other end is closed; one that only ended its request is still there."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLHUP and POLLERR are reported unasked
    return bool(poll.poll(0))


def listen(home: Home, node_gid: int) -> socket.socket:
    """Return a socket that the node's user can reach.

    In a folder of the node's group (``start`` as root makes one) the socket is for that group
    alone; else everybody may connect and :func:`peer_uid` decides.
    """
    path = home.socket
    if len(os.fsencode(path)) > 107:
        raise ConfigError(f"{path}: too long for a socket; choose a shorter --home.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        home.run.mkdir(parents=True, exist_ok=True)
        shared = home.run.stat()
        if shared.st_uid == os.geteuid() and shared.st_gid != node_gid:
            home.run.chmod(0o711)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        if shared.st_gid == node_gid and path.stat().st_gid != node_gid:
            os.chown(path, -1, node_gid)
        path.chmod(0o660 if path.stat().st_gid == node_gid else 0o666)
        listener.listen(WAITING)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{path}: cannot listen there ({error.strerror}). {home.run} must belong to the "
            "trainer's user; `fedalign-client start` as root makes it."
        ) from None
    return listener


def serve(home: Home, node_user: str, advisory: bool) -> None:
    """Check the site, then answer until SIGTERM.

    Args:
        home: the site's folder.
        node_user: name or number of the user that may ask; empty takes the owner of ``node/``.
        advisory: serve although data and bundle code are not separated.

    Raises ``ConfigError`` or ``DataError`` for what keeps the site from serving.
    """
    os.umask(0o077)
    settings, policy = load_settings(home.settings), load_policy(home.policy)
    if not node_user:
        if not home.node.is_dir():
            raise ConfigError(f"{home.node}: no such folder. Join first, or give --node-user.")
        node_user = str(home.node.stat().st_uid)
    node = account(node_user)
    open_points = problems(home, settings, os.geteuid(), node.uid)
    if open_points and not advisory:
        raise ConfigError(
            "the policy would be advisory, because\n"
            + "\n".join(f"  - {point}" for point in open_points)
            + "\nChange that, or start with --advisory to serve all the same."
        )
    with _alone(home):
        rows = len(load_data(settings, settings.data, 0).items)
        audit = AuditLog(home.audit)
        site = EnrolledSite(home, settings, policy)
        listener = listen(home, node.gid)
        mode = "advisory" if open_points else "enforced"
        try:
            audit.append("started", site=settings.name, policy=mode, rows=rows, node=node.uid)
            print(f"ready: site {settings.name}, policy {mode}, {home.socket}", flush=True)
            Trainer(listener, site, audit, frozenset({node.uid})).run()
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                home.socket.unlink()
            audit.append("stopped", site=settings.name)


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Hold the site's lock: two trainers would spend one budget side by side."""
    descriptor = os.open(home.trainer / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{home.trainer}: another trainer is running here.") from None
        yield
    finally:
        os.close(descriptor)


def _stop(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m clients.daemon", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--node-user", default="")
    parser.add_argument("--advisory", action="store_true")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(QuietLog(Quiet()))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        serve(Home(given.home.expanduser().resolve()), given.node_user, given.advisory)
    except FedalignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
