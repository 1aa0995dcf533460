"""Following a submitted run to its true end.

``flwr run`` ends with 0 once a run is accepted, whatever becomes of it, and Flower calls a run
"completed" that wrote nothing.  So what a run does is read from its own ledger (read only), and it
counts as completed only when Flower says so *and* its ledger does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedalign.compat import RunState
from fedalign.errors import FedalignError, RunFailed
from fedalign.ledger import Ledger, is_blank
from fedalign.runfolder import LEDGER, NO_OPTION_MASS, REPORT
from server.coordinator import Coordinator
from server.status_words import printable
from server.submit import Submission, stored_config
from server.superlink_admin import CONNECTION, AdminUnavailable, RunAdmin

POLL_SECONDS = 2.0
LOST_SECONDS = 180.0
"""How long the SuperLink may be silent before we stop following; the run itself may go on."""
Say = Callable[[str], None]


class Interrupted(FedalignError):
    """The operator asked for the run to be stopped.  Exit code 130."""

    exit_code = 130


class Watcher:
    """Reads what is new in a run's ledger.  Make it before the run is submitted.

    What a run did before it is resumed is no news; a run that has not begun has none.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER
        self._seen: set[tuple[str, int, int]] = set()
        self._events = 0
        self.news()

    def news(self) -> list[str]:
        """Return a line for every phase or round committed, and for every event, since before."""
        if not self._path.is_file():
            return []
        lines = []
        try:
            with Ledger(self._path, readonly=True) as ledger:
                config = ledger.run().get("config", {})
                rounds = config.get("run.rounds", "?")
                events = ledger.events()
                for event in events[self._events :]:
                    who = f" {event.client}" if event.client else ""
                    lines.append(printable(f"  {event.kind}{who} {event.detail}".rstrip()))
                self._events = len(events)
                for phase, number, attempt in ledger.commits():
                    if (phase, number, attempt) in self._seen:
                        continue
                    self._seen.add((phase, number, attempt))
                    part = f" {number}/{rounds}" if phase not in ("base", "final") else ""
                    lines.append(f"{phase}{part} done{_worst(ledger, phase, number)}")
        except FedalignError:
            return lines  # it is being made; the next look tells
        return lines

    def began(self) -> bool:
        """Say whether the run has settings in its ledger, so that it can be resumed."""
        return stored_config(self._path.parent) is not None

    def status(self) -> str:
        """Return the run's status from its ledger; empty before it began."""
        if not self._path.is_file() or is_blank(self._path):
            return ""
        with Ledger(self._path, readonly=True) as ledger:
            return str(ledger.run().get("status", ""))


def follow(
    coordinator: Coordinator, admin: RunAdmin, submission: Submission, watcher: Watcher, say: Say
) -> Path:
    """Say what the run does until it is over; return the path of its report.

    Raises ``RunFailed`` when it failed or was stopped, ``AdminUnavailable`` when the SuperLink was
    silent too long, ``Interrupted`` after Ctrl-C, when Flower was asked to stop the run.
    """
    try:
        state = _wait(admin, submission, watcher, say)
    except KeyboardInterrupt:
        try:
            stopped = admin.stop_run(submission.run_id)
            word = "Flower was asked to stop the run" if stopped else "the run was over already"
        except AdminUnavailable:
            word = "the SuperLink does not answer, so the run may go on"
        again = f"resume {submission.name}"
        if not watcher.began():
            again = f"run --name {submission.name}, with the same settings (nothing was recorded)"
        raise Interrupted(f"interrupted; {word}. Again: fedalign-server {again}") from None
    for line in watcher.news():
        say(line)
    status = watcher.status()
    if status == NO_OPTION_MASS:
        raise RunFailed(
            f"run '{submission.name}' was done to its end, and the model puts less of its "
            "probability on the answers than score.min-option-mass asks: it does not know these "
            "questions' format, so its scores mean little. What there is:\n"
            f"report: {coordinator.runs / submission.name / REPORT}\n"
            "Resuming changes nothing. Take a base model that knows the format, or train a pocket "
            "on your questions (docs/pocket.md), and let the sites' policies list it."
        )
    if state.status != "finished:completed" or status != "completed":
        reason = status.removeprefix("failed: ") if status.startswith("failed") else state.details
        again = "resume" if watcher.began() else "run --name"
        raise RunFailed(
            f"run '{submission.name}' ended as {state.status}: "
            f"{reason.rstrip('. ') or 'no reason given'}.\n"
            f"log:    FLWR_HOME={coordinator.flower_home} flwr log {submission.run_id} "
            f"{CONNECTION} --show\nagain:  fedalign-server {again} {submission.name}"
        )
    return coordinator.runs / submission.name / REPORT


def _wait(admin: RunAdmin, submission: Submission, watcher: Watcher, say: Say) -> RunState:
    lost: float | None = None
    while True:
        for line in watcher.news():
            say(line)
        try:
            state = admin.run_state(submission.run_id)
        except AdminUnavailable as error:
            now = time.monotonic()
            if lost is None:
                lost = now
                say("the SuperLink does not answer; waiting for it")
            if now - lost > LOST_SECONDS:
                raise AdminUnavailable(f"{error} The run may go on without us.") from None
        else:
            lost = None
            if state is None:
                raise RunFailed(f"the SuperLink does not know run {submission.run_id} any more.")
            if state.finished:
                return state
        time.sleep(POLL_SECONDS)


def _worst(ledger: Ledger, phase: str, number: int) -> str:
    """Say how the worst-served group stands, where scores of clients were recorded."""
    values: dict[str, list[float]] = {}
    for row in ledger.scores():
        if (row.phase, row.round) == (phase, number) and row.score is not None:
            values.setdefault(row.group, []).append(row.score)
    if not values:
        return ""
    means = {group: sum(v) / len(v) for group, v in values.items()}
    worst = min(sorted(means), key=lambda g: means[g])
    return f": worst '{worst}' {means[worst]:.4f} of {len(means)} groups"
