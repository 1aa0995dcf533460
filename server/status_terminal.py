"""The status in a terminal of 80 columns: what needs attention first, then run, sites, host.

Names come from data and from other people: they are shown as plain text, never as markup, and
control characters are replaced.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.status_records import GroupFacts, RunFacts, Status
from server.status_words import (
    ago,
    clock,
    counted,
    group_note,
    number,
    over_groups,
    printable,
    progress,
    score_name,
    size,
    step,
    until,
    where,
)

SHOWN_RUNS = 5
SHOWN_BAD = 6
SHOWN_EVENTS = 5
BARS = "▁▂▃▄▅▆▇█"
SPARK = 10
"""Latest rounds in a sparkline."""
LEVELS = {"failed": ("!!", "bold red"), "warning": ("! ", "yellow")}
STATES = {
    "online": "green",
    "running": "cyan",
    "failed": "bold red",
    "offline": "yellow",
    "pending": "yellow",
    "unreadable": "bold red",
    "revoked": "dim",
}


def print_status(status: Status, console: Console) -> None:
    """Print everything an operator asks first; widths fit 80 columns."""
    console.print(_text(f"Coordinator at {clock(status.time)}", "bold"))
    console.print(_text(status.state, "dim"), overflow="fold")
    console.print()
    _print_attention(status, console)
    if status.run is not None:
        _print_run(status.run, console)
    _print_sites(status, console)
    _print_runs(status, console)
    _print_host(status, console)


def sparkline(values: dict[int, float], low: float, high: float) -> str:
    """Return the last values as bars between ``low`` and ``high``; a round without one is blank."""
    if not values:
        return ""
    end = max(values)
    rounds = range(max(min(values), end - SPARK + 1), end + 1)
    room = high - low
    return "".join(
        " "
        if r not in values
        else BARS[round((values[r] - low) / room * (len(BARS) - 1))]
        if room > 0
        else BARS[0]
        for r in rounds
    )


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def _table(title: str, *columns: str, numbers: tuple[int, ...] = ()) -> Table:
    table = Table(
        title=_text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        show_edge=False,
    )  # fmt: skip
    for i, column in enumerate(columns):
        right = i in numbers
        table.add_column(
            column, justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return table


def _print_attention(status: Status, console: Console) -> None:
    if not status.attention:
        console.print(_text("Nothing needs attention.", "green"))
    for a in status.attention:
        mark, style = LEVELS[a.level]
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(_text(mark, style), _text(a.text, style))
        if a.todo:
            line.add_row("", _text(a.todo, "dim"))
        console.print(line)
    console.print()


def _print_run(run: RunFacts, console: Console) -> None:
    brief = run.brief
    heading = _text(f"Run {brief.name}: ", "bold")
    heading.append_text(_text(f"{brief.status}", STATES.get(brief.status, "")))
    heading.append_text(_text(f", {progress(brief)}"))
    console.print(heading)
    if run.average is not None:
        line = f"{score_name(run)}, {step(run, run.last_round or 0)}: average {number(run.average)}"
        if run.scored > 1:
            line += f", worst {number(run.worst_score)} ({run.worst})"
        console.print(_text(f"{line}, {over_groups(run)}"))
    else:
        console.print(_text("No score is recorded yet.", "dim"))
    console.print()
    if run.groups:
        console.print(_groups(run))
        console.print()
    if run.bad_replies:
        _print_bad(run, console)
    if run.events:
        console.print(_text("Last events", "bold"))
        for e in run.events[-SHOWN_EVENTS:]:
            place = " · ".join(x for x in (e.where, e.client) if x)
            line = f"  {clock(e.time)[:16]}  {e.kind}" + (f" ({place})" if place else "")
            console.print(_text(line + (f": {e.detail}" if e.detail else "")), overflow="fold")
        console.print()


def _groups(run: RunFacts) -> Table:
    every = [v for g in run.groups for v in g.scores.values()]
    table = _table(
        "Groups", "group", "score", "history", "over rounds", "weight", "replies", "",
        numbers=(1, 2, 4, 5),
    )  # fmt: skip

    def key(g: GroupFacts) -> tuple[bool, float, str]:
        return (g.score is None, g.score or 0.0, g.group)

    for g in sorted(run.groups, key=key):
        note = group_note(g, run)
        worst = note == "worst served"
        table.add_row(
            _text(g.group),
            _text(number(g.score)),
            _text(number(g.history)),
            _text(sparkline(dict(g.scores), min(every), max(every)) if every else ""),
            _text(number(g.weight)),
            _text(f"{g.usable}/{g.asked}" if g.asked else "–"),
            _text(note, "yellow" if worst else "dim"),
        )
    return table


def _print_bad(run: RunFacts, console: Console) -> None:
    console.print(_text(f"Refused or missing replies: {run.bad_total}", "bold"))
    for b in run.bad_replies[-SHOWN_BAD:]:
        place = f"{where(b.phase, b.round, b.attempt)}; {counted(b)}"
        console.print(_text(f"  {b.client}: {b.code} ({place})"), overflow="fold")
    console.print()


def _print_sites(status: Status, console: Console) -> None:
    if not status.sites:
        console.print(_text("No site has joined yet.", "bold"))
        console.print(_text("Run: fedalign-server invite --site NAME --group GROUP"))
        console.print()
    if status.sites:
        table = _table("Sites", "site", "group", "status", "last seen", "last reply")
        for s in status.sites:
            reply = f"{s.last_code} ({s.last_where})" if s.last_code else "–"
            table.add_row(
                _text(s.site),
                _text(s.group),
                _text(s.status, STATES.get(s.status, "")),
                _text(ago(s.last_seen, status.time)),
                _text(reply),
            )
        console.print(table)
        if not status.nodes_known:
            console.print(_text("Who is online is not known: the SuperLink was not asked.", "dim"))
        console.print()
    if status.invites:
        table = _table("Open invites", "site", "group", "ends")
        for i in status.invites:
            table.add_row(_text(i.site), _text(i.group), _text(until(i.expires, status.time)))
        console.print(table)
        console.print()


def _print_runs(status: Status, console: Console) -> None:
    if not status.runs:
        console.print(_text("No run yet. Run: fedalign-server run"))
        console.print()
        return
    table = _table("Runs", "run", "status", "where", "changed")
    for b in status.runs[:SHOWN_RUNS]:
        table.add_row(
            _text(b.name),
            _text(b.status, STATES.get(b.status, "")),
            _text(progress(b)),
            _text(ago(b.changed, status.time)),
        )
    console.print(table)
    if len(status.runs) > SHOWN_RUNS:
        console.print(_text(f"and {len(status.runs) - SHOWN_RUNS} older runs", "dim"))
    console.print()
    for b in status.runs[:1]:
        console.print(_text(f"Run folder {b.folder}", "dim"), overflow="fold")
        if b.report:
            console.print(_text(f"Report {b.report}", "dim"), overflow="fold")
    console.print()


def _print_host(status: Status, console: Console) -> None:
    console.print(_text("Host", "bold"))
    up = [f"{p.name} {'up' if p.alive else 'NOT running'}" for p in status.processes]
    lines = [("processes", ", ".join(up) or "none started by fedalign-server start")]
    lines += [
        (c.name, f"ends {clock(c.expires)[:10]} ({until(c.expires, status.time)})")
        for c in status.certificates
    ]
    lines.append(("audit log", audit_text(status)))
    lines.append(("disk", f"{size(status.disk_free)} free"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in lines:
        grid.add_row(_text(name), _text(text))
    console.print(grid)


def audit_text(status: Status) -> str:
    """Return what the check of the audit log's chain found."""
    audit = status.audit
    if audit.state == "none":
        return "no entries yet"
    if audit.state == "verified":
        return f"chain verified up to line {audit.lines}"
    return f"chain broken: {audit.problem}"
