"""What the operator sees, as frozen records; terminal, page and ``/status.json`` show them.

Nothing here holds a token, a key or a path of a site.  Times are seconds since 1970, UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteFacts:
    """One enrolled site."""

    site: str
    group: str
    status: str
    """``pending``, ``active``, ``revoked``; where the SuperLink was asked, an active site is
    ``online`` or ``offline``."""
    enrolled: float
    last_seen: float | None
    last_code: str
    """Code of the site's last reply in the current run (``ok`` or a reason); empty: none yet."""
    last_where: str
    """Phase and round of that reply."""


@dataclass(frozen=True)
class InviteFacts:
    """An invitation that may still be used; its token is not stored anywhere."""

    site: str
    group: str
    expires: float


@dataclass(frozen=True)
class RunBrief:
    """One run folder, in one line."""

    name: str
    folder: str
    status: str
    """``starting`` (no settings recorded yet), ``running``, ``completed``, ``failed`` or
    ``unreadable``."""
    reason: str
    """Why it failed or cannot be read; else empty."""
    mode: str
    phase: str
    """The phase in work; ``done`` when completed, the phase that failed when failed."""
    done: int
    """Training rounds that count (committed)."""
    rounds: int
    attempt: int
    """Attempt in work, or the last one made when the run failed or completed; 0: none yet."""
    resumed: int
    """How often the run went on after a stop."""
    stopped_early: bool
    started: float | None
    """Start of the run, or of its last resume."""
    changed: float
    """When the ledger last changed."""
    report: str
    """Path of report.html when it exists; else empty."""
    round_timeout: float
    """Seconds a message may take (``run.round-timeout``); 0 when unknown."""


@dataclass(frozen=True)
class GroupFacts:
    """One group in the current run; every number is from committed attempts."""

    group: str
    sites: int
    score: float | None
    """Last validation score (mode ``rewards``: mean reward); None when there is none."""
    score_round: int | None
    history: float | None
    weight: float | None
    """Weight in the last committed round."""
    state: str
    """In the last committed round: ``""``, ``withheld`` (replied without a score), ``absent`` (no
    usable reply)."""
    usable: int
    asked: int
    """Replies in the last committed round."""
    scores: Mapping[int, float]
    """Round to score; round 0 is the untouched base."""
    weights: Mapping[int, float]


@dataclass(frozen=True)
class ReplyFacts:
    """A reply that was refused or never came."""

    phase: str
    round: int
    attempt: int
    client: str
    code: str
    counted: bool | None
    """Whether the attempt that it belongs to counts; None for the roll call before the run."""
    time: float | None


@dataclass(frozen=True)
class EventFacts:
    """Something that happened in the run."""

    time: float
    kind: str
    where: str
    client: str
    detail: str


@dataclass(frozen=True)
class RunFacts:
    """The current run, or the last one."""

    brief: RunBrief
    metric: str
    groups: tuple[GroupFacts, ...]
    last_round: int | None
    """Last committed training round; 0: only the base is scored; None: nothing is."""
    scored: int
    """Groups with a score in that round.  ``average`` and ``worst`` are over these only."""
    average: float | None
    worst: str
    worst_score: float | None
    bad_replies: tuple[ReplyFacts, ...]
    """The latest, in order."""
    bad_total: int
    events: tuple[EventFacts, ...]
    """The latest, in order."""


@dataclass(frozen=True)
class ProcessFacts:
    """A process that the coordinator started."""

    name: str
    pid: int
    alive: bool


@dataclass(frozen=True)
class CertificateFacts:
    """A certificate of the coordinator and when it ends."""

    name: str
    expires: float


@dataclass(frozen=True)
class AuditFacts:
    """The audit log's chain of hashes."""

    state: str
    """``none`` (no log yet), ``verified`` or ``broken``."""
    lines: int
    """Lines verified; 0 unless ``verified``."""
    problem: str


@dataclass(frozen=True)
class Attention:
    """Something the operator must look at."""

    level: str
    """``failed`` or ``warning``."""
    text: str
    todo: str
    """What to do next; may be empty."""


@dataclass(frozen=True)
class Status:
    """Everything at one moment."""

    time: float
    state: str
    sites: tuple[SiteFacts, ...]
    nodes_known: bool
    """Whether the SuperLink was asked who is online, and answered."""
    invites: tuple[InviteFacts, ...]
    runs: tuple[RunBrief, ...]
    """Latest first."""
    run: RunFacts | None
    processes: tuple[ProcessFacts, ...]
    certificates: tuple[CertificateFacts, ...]
    audit: AuditFacts
    disk_free: int
    """Bytes free where the state folder is."""
    problems: tuple[str, ...]
    """Parts that could not be read, one sentence each."""
    attention: tuple[Attention, ...] = ()
    """Most urgent first."""
