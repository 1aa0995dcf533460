"""What the operator must look at, and what to do about it: failures first, then warnings."""

from __future__ import annotations

from fedalign.runfolder import NO_OPTION_MASS
from server.status_records import Attention, Status
from server.status_words import DAY, HOUR, ago, progress, size, span, time_word

DISK_LOW = 2**30
"""Bytes free below which the operator is warned: a round's spool and ledger must fit."""
CERTIFICATE_DAYS = 30
PENDING_LONG = 1 * HOUR
STARTING_LONG = 600.0
"""Seconds; the roll call ends after deployment.wait and one message."""
RENEW = "Server certificate: fedalign-server renew-certificate, then start again."


def attention(status: Status) -> tuple[Attention, ...]:
    """Return what the operator must look at, failures before warnings."""
    found = [
        *(Attention("failed", p, "") for p in status.problems),
        *_host(status),
        *_sites(status),
        *_run(status),
    ]
    return tuple(sorted(found, key=lambda a: a.level != "failed"))


def _host(status: Status) -> list[Attention]:
    found = []
    if status.audit.state == "broken":
        found.append(
            Attention(
                "failed",
                f"The audit log's chain is broken: {status.audit.problem}",
                "Somebody or something changed audit.jsonl. Keep it, and compare with a copy.",
            )
        )
    if not status.processes and status.certificates:  # initialised, and stopped or not started
        found.append(
            Attention(
                "warning",
                "The coordinator is not running: no site can connect.",
                "fedalign-server start",
            )
        )
    watched = any(p.name == "supervisor" and p.alive for p in status.processes)
    for p in status.processes:
        if not p.alive:
            found.append(
                Attention(
                    "failed",
                    f"{p.name} is not running (process {p.pid} is gone).",
                    f"It is started again; see logs/{p.name}.log"
                    if watched
                    else "See logs/, then: fedalign-server start",
                )
            )
    for c in status.certificates:
        left = c.expires - status.time
        if left <= 0:
            found.append(
                Attention(
                    "failed",
                    f"The {c.name} ended {span(-left)} ago: no site can connect.",
                    RENEW,
                )
            )
        elif left < CERTIFICATE_DAYS * DAY:
            found.append(Attention("warning", f"The {c.name} ends in {span(left)}.", RENEW))
    if status.disk_free < DISK_LOW:
        text = f"Only {size(status.disk_free)} are free where the state folder is."
        found.append(Attention("warning", text, "A run stops when it cannot write. Free space."))
    return found


def _sites(status: Status) -> list[Attention]:
    found = []
    for s in status.sites:
        if s.status == "offline":
            seen = "" if s.last_seen is None else f", last seen {ago(s.last_seen, status.time)}"
            found.append(
                Attention(
                    "warning",
                    f"Site {s.site} ({s.group}) is offline{seen}.",
                    "On the site: fedalign-client status",
                )
            )
        elif s.status == "pending" and status.time - s.enrolled > PENDING_LONG:
            found.append(
                Attention(
                    "warning",
                    f"Site {s.site} ({s.group}) began to join {span(status.time - s.enrolled)} "
                    "ago and did not finish.",
                    "Join again on the site with the same invite; expired: invite it anew.",
                )
            )
    return found


def _run(status: Status) -> list[Attention]:
    found = [
        Attention("warning", f"Run {b.name} cannot be read: {b.reason}", "")
        for b in status.runs
        if b.status == "unreadable"
    ]
    if status.runs and status.runs[0].status == "failed":
        last_run = status.runs[0]
        remedy = f"Mend the cause, then: fedalign-server resume {last_run.name}"
        if last_run.reason == NO_OPTION_MASS.removeprefix("failed: "):
            remedy = "Its report is there; take a base model that knows the questions' format"
        found.append(
            Attention(
                "failed",
                f"Run {last_run.name} {progress(last_run)}: {last_run.reason}",
                remedy,
            )
        )
    for b in status.runs[:1]:
        if b.status == "starting" and status.time - b.changed > STARTING_LONG:
            found.append(
                Attention(
                    "warning",
                    f"Run {b.name} has not begun; nothing was recorded for "
                    f"{span(status.time - b.changed)}.",
                    "See logs/superexec.log",
                )
            )
    run = status.run
    if run is None or run.brief.status != "running":
        return found
    brief = run.brief
    quiet = status.time - brief.changed
    if brief.round_timeout and quiet > brief.round_timeout:
        found.append(
            Attention(
                "warning",
                f"Run {brief.name} says it is running, but nothing was recorded for {span(quiet)}, "
                f"longer than run.round-timeout ({span(brief.round_timeout)}).",
                f"If its process is gone: fedalign-server resume {brief.name}",
            )
        )
    late = [b for b in run.bad_replies if b.phase == "train" and b.round >= (run.last_round or 1)]
    if late:
        last = max((b.round, b.attempt) for b in late)
        named = [f"{b.client} ({b.code})" for b in late if (b.round, b.attempt) == last]
        shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        found.append(
            Attention(
                "warning",
                f"Replies not usable in {time_word(brief)} {last[0]}: {shown}.",
                "",
            )
        )
    return found
