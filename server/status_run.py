"""What a run's ledger says to the operator: how far it is, how groups fare, what went wrong.

A score or weight of a group is the ledger's row of table ``weights``, of attempts that count only.
Refused replies are shown from all attempts and say whether theirs counts: an attempt below quorum
is void, and its refusals are the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalign.errors import FedalignError
from fedalign.ledger import EventRow, Ledger, ReplyRow, WeightRow
from fedalign.runfolder import LEDGER, REPORT
from server.status_records import EventFacts, GroupFacts, ReplyFacts, RunBrief, RunFacts
from server.status_words import where

PHASES = ("hello", "base", "predictor", "train", "final", "personal")
REJECTED = ("reply-rejected", "site-refused", "claims-other-site", "claims-other-group")
"""Events that name a client and, as detail, the code of its refusal."""
SHOWN_REPLIES = 50
SHOWN_EVENTS = 50
Codes = dict[str, tuple[str, str]]
"""Client to the code of its last reply, and the phase and round of it."""
Key = tuple[int, int, int]
"""(place of the phase, round, attempt): sorts by time."""


def read_brief(folder: Path) -> RunBrief:
    """Return one line about a run folder; an unreadable ledger is a status, not an error."""
    path = folder / LEDGER
    if not path.is_file():
        return _brief(folder, "starting", "no ledger yet")
    try:
        with Ledger(path, readonly=True) as ledger:
            return _read_brief(folder, ledger)
    except FedalignError as error:
        return _brief(folder, "unreadable", str(error))


def read_run(brief: RunBrief) -> tuple[RunFacts, Codes]:
    """Return all facts of a readable run, and the last code of each client.

    Raises ``FedalignError`` when the ledger cannot be read.
    """
    with Ledger(Path(brief.folder) / LEDGER, readonly=True) as ledger:
        commits = {(p, r): a for p, r, a in ledger.commits()}
        rows = [w for w in ledger.weights() if w.phase == "train"]
        last = max((w.round for w in rows), default=None)
        clients = ledger.clients()
        base = _base_scores(ledger) if brief.mode != "rewards" else {}
        if last is None and base:
            last = 0
        counted = ledger.replies()
        replies = [*counted, *ledger.replies(committed=False)]
        events = ledger.events()
        bad = _bad_replies(replies, events, commits)
        names = sorted({c.group for c in clients} | {w.group for w in rows})
        groups = tuple(
            _group(
                name,
                sum(c.group == name for c in clients),
                [w for w in rows if w.group == name],
                base.get(name),
                last,
                [
                    r.status == "ok"
                    for r in counted
                    if (r.phase, r.round, r.group) == ("train", last, name)
                ],
            )
            for name in names
        )
        codes: dict[str, tuple[Key, str]] = {}
        scored = [s for stage in ("base", "shared") for s in ledger.scores(stage)]
        seen = [(s.client, s.phase, s.round, s.attempt, s.reason) for s in scored]
        seen += [(r.client, r.phase, r.round, r.attempt, r.reason) for r in replies]
        seen += [(b.client, b.phase, b.round, b.attempt, b.code) for b in bad]
        for client, phase, round_, attempt, code in seen:
            key = (_place(phase), round_, attempt)
            if client not in codes or key >= codes[client][0]:
                codes[client] = (key, code or "ok")
        here = {g.group: g.scores[last] for g in groups if last is not None and last in g.scores}
        worst = min(here, key=lambda g: (here[g], g)) if here else ""
        facts = RunFacts(
            brief=brief,
            metric=str(ledger.run().get("metric", "score")),
            groups=groups,
            last_round=last,
            scored=len(here),
            average=sum(here.values()) / len(here) if here else None,
            worst=worst,
            worst_score=here.get(worst),
            bad_replies=tuple(bad[-SHOWN_REPLIES:]),
            bad_total=len(bad),
            events=tuple(
                EventFacts(e.time, e.kind, where(e.phase, e.round, e.attempt), e.client, e.detail)
                for e in events[-SHOWN_EVENTS:]
            ),
        )
    return facts, {c: (code, where(PHASES[k[0]], k[1])) for c, (k, code) in codes.items()}


def _place(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else 0


def _changed(folder: Path) -> float:
    """When the ledger was last written; an empty write-ahead log is what a reader leaves."""
    places = [folder / LEDGER, folder / f"{LEDGER}-wal"]
    found = [p.stat() for p in places if p.is_file()]
    return max((s.st_mtime for s in found if s.st_size), default=folder.stat().st_mtime)


def _brief(folder: Path, status: str, reason: str, **values: Any) -> RunBrief:
    report = folder / REPORT
    given: dict[str, Any] = {
        "mode": "", "phase": "hello", "done": 0, "rounds": 0, "attempt": 0, "resumed": 0,
        "stopped_early": False, "started": None, "round_timeout": 0.0,
    }  # fmt: skip
    return RunBrief(
        name=folder.name,
        folder=str(folder),
        status=status,
        reason=reason,
        changed=_changed(folder),
        report=str(report) if report.is_file() else "",
        **{**given, **values},
    )


def _read_brief(folder: Path, ledger: Ledger) -> RunBrief:
    run = ledger.run()
    events = ledger.events()
    failures = [e.detail for e in events if e.kind == "run-failed"]
    if "config" not in run:
        # A run that fails while it asks who is there has no settings in its ledger yet.
        said = str(run.get("status", ""))
        if said.startswith("failed") or failures:
            reason = said.removeprefix("failed").lstrip(": ") or failures[-1]
            return _brief(folder, "failed", reason, started=run.get("started"))
        return _brief(folder, "starting", "asks which sites are there", started=run.get("started"))
    config = run["config"]
    status, _, reason = str(run.get("status", "running")).partition(": ")
    commits = ledger.commits()
    done = max((r for p, r, _ in commits if p == "train"), default=0)
    early = any(e.kind == "early-stop" and e.round == done for e in events)
    phase, round_ = _in_work(config, commits, done, early)
    made = max((a for p, r, a in ledger.attempts() if (p, r) == (phase, round_)), default=0)
    if status == "completed":
        phase = "done"
    return _brief(
        folder,
        status,
        reason,
        mode=str(config.get("run.mode", "adapters")),
        phase=phase,
        done=done,
        rounds=int(config.get("run.rounds", 0)),
        attempt=made + 1 if status == "running" else made,
        resumed=sum(e.kind == "resumed" for e in events),
        stopped_early=early,
        started=run.get("started"),
        round_timeout=float(config.get("run.round-timeout", 0.0)),
    )


def _in_work(
    config: Mapping[str, Any], commits: Sequence[tuple[str, int, int]], done: int, early: bool
) -> tuple[str, int]:
    """Return the phase and round after the last one that counts (order of a run: docs)."""
    phases = {p for p, _, _ in commits}
    if "final" in phases:
        return "personal", done
    if done and (early or done >= int(config.get("run.rounds", 0))):
        return "final", done
    if "base" not in phases:
        return "base", 0
    asked = max((r for p, r, _ in commits if p == "predictor"), default=0)
    # One message more than rounds brings the frozen predictor's error.
    wanted = int(config.get("predictor.rounds", 0)) + 1
    if config.get("site.answers", "shares") != "shares" and not done and asked < wanted:
        return "predictor", asked + 1
    return "train", done + 1


def _base_scores(ledger: Ledger) -> dict[str, float]:
    """Group to the untouched base's validation score: mean over its clients by questions."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for s in ledger.scores("base", "validation"):
        if s.score is not None and s.n > 0:
            sums[s.group][0] += s.n * s.score
            sums[s.group][1] += s.n
    return {g: total / n for g, (total, n) in sums.items()}


def _group(
    name: str,
    sites: int,
    rows: Sequence[WeightRow],
    base: float | None,
    last: int | None,
    usable: Sequence[bool],
) -> GroupFacts:
    scores = {} if base is None else {0: base}
    scores |= {w.round: w.score for w in rows if w.score is not None}
    latest = next((w for w in rows if w.round == last), None)
    state = ""
    if latest is not None and latest.score is None:
        state = "withheld" if latest.present else "absent"
    histories = [w.history for w in rows if w.history is not None]
    return GroupFacts(
        group=name,
        sites=sites,
        score=scores[max(scores)] if scores else None,
        score_round=max(scores) if scores else None,
        history=histories[-1] if histories else None,
        weight=None if latest is None else latest.weight,
        state=state,
        usable=sum(usable),
        asked=len(usable),
        scores=scores,
        weights={w.round: w.weight for w in rows if w.weight is not None},
    )


def _bad_replies(
    replies: Sequence[ReplyRow],
    events: Sequence[EventRow],
    commits: Mapping[tuple[str, int], int],
) -> list[ReplyFacts]:
    """Return refused and missing replies, oldest first.

    A reply of a round has a row; one to a score message has an event only; events have the time.
    """
    found: dict[tuple[str, int, int, str], tuple[str, float | None]] = {}
    for r in replies:
        if r.status != "ok":
            found[r.phase, r.round, r.attempt, r.client] = (r.reason, None)
    for e in events:
        if e.kind in REJECTED:
            found[e.phase, e.round, e.attempt, e.client] = (e.detail, e.time)
    return [
        ReplyFacts(p, r, a, client, code, None if p == "hello" else commits.get((p, r)) == a, time)
        for (p, r, a, client), (code, time) in sorted(
            found.items(), key=lambda x: (_place(x[0][0]), *x[0][1:])
        )
    ]
