"""``fedalign-server status``: the facts of a state folder, and what needs attention first.

:func:`facts` reads, never writes: registry, ledgers, certificates, audit log, process ids.  A part
that cannot be read is named in ``problems``, and the rest is still shown.  Who is online is known
to the SuperLink alone; the caller passes ``nodes`` to ask it.  :func:`print_status` draws it for a
terminal, :mod:`server.status_page` for a browser.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fedalign.compat import RunState
from fedalign.errors import ConfigError, FedalignError
from server.status_attention import attention
from server.status_host import (
    disk_free,
    read_audit,
    read_certificates,
    read_processes,
    read_registry,
)
from server.status_records import (
    AuditFacts,
    InviteFacts,
    RunBrief,
    RunFacts,
    SiteFacts,
    Status,
)
from server.status_run import Codes, read_brief, read_run
from server.status_terminal import print_status
from server.submit import read_submission
from server.superlink_admin import NodeEntry

__all__ = ["AskRun", "Nodes", "facts", "print_status"]

RUNS = "runs"
Nodes = Callable[[], Sequence[NodeEntry]]
"""Asks the SuperLink: ``connect(coordinator).nodes``.  Raises ``FedalignError`` for no answer."""
AskRun = Callable[[int], RunState | None]
"""Asks the SuperLink for a run by Flower's id: ``connect(coordinator).run_state``."""
Part = TypeVar("Part")


def facts(
    state: Path,
    *,
    nodes: Nodes | None = None,
    run_state: AskRun | None = None,
    now: float | None = None,
) -> Status:
    """Return the status of a coordinator's state folder at this moment.

    ``run_state`` tells a run that goes on from one whose process died: the ledger of both says
    ``running``.  Raises ``ConfigError`` when there is no such folder.
    """
    if not state.is_dir():
        raise ConfigError(f"{state}: no such folder. Make it: fedalign-server init.")
    moment = time.time() if now is None else now
    problems: list[str] = []

    def part(read: Callable[[], Part], otherwise: Part) -> Part:
        try:
            return read()
        except (FedalignError, OSError) as error:
            problems.append(str(error))
            return otherwise

    present: Sequence[NodeEntry] | None = None if nodes is None else part(nodes, None)
    nobody: tuple[tuple[SiteFacts, ...], tuple[InviteFacts, ...]] = ((), ())
    sites, invites = part(lambda: read_registry(state, moment, present), nobody)
    no_runs: tuple[RunBrief, ...] = ()
    runs = part(lambda: _runs(state / RUNS), no_runs)
    if run_state is not None:
        told = run_state
        runs = part(lambda: tuple(_with_flower(b, state, told) for b in runs), runs)
    no_run: tuple[RunFacts | None, Codes] = (None, {})
    run, codes = part(lambda: _current(runs), no_run)
    status = Status(
        time=moment,
        state=str(state),
        sites=tuple(
            replace(s, last_code=codes[s.site][0], last_where=codes[s.site][1])
            if s.site in codes
            else s
            for s in sites
        ),
        nodes_known=present is not None,
        invites=invites,
        runs=runs,
        run=run,
        processes=part(lambda: read_processes(state), ()),
        certificates=part(lambda: read_certificates(state), ()),
        audit=part(lambda: read_audit(state), AuditFacts("none", 0, "")),
        disk_free=disk_free(state),
        problems=tuple(problems),
    )
    return replace(status, attention=attention(status))


def _runs(folder: Path) -> tuple[RunBrief, ...]:
    if not folder.is_dir():
        return ()
    briefs = [read_brief(f) for f in folder.iterdir() if f.is_dir() and not f.is_symlink()]
    return tuple(sorted(briefs, key=lambda b: (-(b.started or b.changed), b.name)))


def _with_flower(brief: RunBrief, state: Path, ask: AskRun) -> RunBrief:
    """Call a run failed when its ledger says that it goes on and Flower that it is over."""
    if brief.status not in ("running", "starting"):
        return brief
    submission = read_submission(state / "apps" / f"{brief.name}.json")
    said = None if submission is None else ask(submission.run_id)
    if said is None or not said.finished:
        return brief
    # It may have ended well between the two looks.
    again = read_brief(Path(brief.folder))
    if again.status not in ("running", "starting"):
        return again
    reason = f"its process ended without a word (Flower says {said.status}). See logs/superexec.log"
    return replace(again, status="failed", reason=reason)


def _current(runs: tuple[RunBrief, ...]) -> tuple[RunFacts | None, Codes]:
    """Read the run in work, else the last one that has settings."""
    readable = [b for b in runs if b.status in ("running", "completed", "failed") and b.rounds]
    in_work = [b for b in readable if b.status == "running"]
    chosen = (in_work or readable)[:1]
    return read_run(chosen[0]) if chosen else (None, {})
