"""When what happened to a message, seen from outside: logs, processes, audit logs of the sites.

A thread looks every 10 ms at the end of each SuperNode's log and at the children of its SuperExec;
that is how exact the times are.  Begin and end of a job come from the site's audit log (the
resident trainer writes its end and its seconds) or from ``run/jobs.jsonl`` (the benchmark's own
ClientApps), commits of the coordinator from the time of its checkpoint file.

A round is split along the site whose answer came last, since the others are waited for in its
shadow.  The parts of a round add up to its wall time.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

LOOK = 0.01
PARTS = (
    ("between", "coordinator between rounds: ledger, checkpoint, who is online, sending"),
    ("poll", "until the SuperNode asks (every 3 s)"),
    ("download", "message to the site"),
    ("dispatch", "until the SuperExec starts a process (looks every 1 s)"),
    ("start", "start of that process: Python, Flower, bundle"),
    ("imports", "imports of torch, transformers, peft"),
    ("job", "the job: score and train (fresh: and load data and model)"),
    ("answer", "answer to the SuperNode (looks every .5 s)"),
    ("upload", "answer to the coordinator"),
    ("collect", "until the ServerApp asks (every .5 s; stock: 3 s)"),
    ("aggregate", "weights and aggregation"),
)
"""Name and meaning of each part of a round, in order of time."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ROUND = re.compile(r"\[RUN (\d+), ROUND (\S+)\]")
_WORDS = {"Receiving:": "pulled", "Received successfully": "received"}
_WORDS |= {"Sending:": "sending", "Sent successfully": "sent"}


@dataclass
class Site:
    """What is watched of one site."""

    log: Path
    audit: Path
    jobs: Path
    superexec: int
    """Process id; its children are the ClientApps."""
    offset: int = 0
    current: tuple[int, str] = (0, "")
    seen: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    """By run and message group: the time of each event."""
    children: set[str] = field(default_factory=set)


class Watch(threading.Thread):
    """Watches sites until told to stop."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        """Begin at the present end of every log."""
        super().__init__(daemon=True)
        self.sites = sites
        self.commits: dict[Path, list[float]] = {}
        """Times at which a checkpoint was written, for each one that is to be watched."""
        self._stop_now = threading.Event()
        for site in sites.values():
            site.offset = site.log.stat().st_size
            site.children = _children(site.superexec)

    def run(self) -> None:
        """Look until :meth:`stop`."""
        while not self._stop_now.wait(LOOK):
            now = time.time()
            for site in self.sites.values():
                self._look(site, now)
            for path, times in list(self.commits.items()):
                try:
                    written = path.stat().st_mtime
                except FileNotFoundError:
                    continue
                if not times or times[-1] != written:
                    times.append(written)

    def stop(self) -> None:
        """Stop looking."""
        self._stop_now.set()
        self.join(10)

    @staticmethod
    def _look(site: Site, now: float) -> None:
        children = _children(site.superexec)
        if children - site.children:
            site.seen.setdefault(site.current, {}).setdefault("spawned", now)
        site.children = children
        if site.log.stat().st_size == site.offset:
            return
        with site.log.open("rb") as f:
            f.seek(site.offset)
            new = f.read()
        end = new.rfind(b"\n") + 1
        site.offset += end
        for line in _COLOUR.sub("", new[:end].decode(errors="replace")).splitlines():
            found = _ROUND.search(line)
            if found:
                site.current = (int(found[1]), found[2])
            for word, event in _WORDS.items():
                if word in line:
                    site.seen.setdefault(site.current, {}).setdefault(event, now)


def _children(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except FileNotFoundError:
        return set()


def jobs(site: Site) -> list[tuple[float, float, float]]:
    """Return begin, end of imports and end of every job of a site; the resident imports nothing."""
    found = []
    for line in site.audit.read_text().splitlines():
        row = json.loads(line)
        if row["event"] == "job":
            ended = datetime.datetime.fromisoformat(row["time"]).timestamp()
            began = ended - row["facts"]["seconds"]
            found.append((began, began, ended))
    if site.jobs.exists():
        for line in site.jobs.read_text().splitlines():
            row = json.loads(line)
            found.append((row["began"], row["imported"], row["ended"]))
    return sorted(found)


def split(
    sites: Mapping[str, Site],
    run: int,
    group: str,
    times: tuple[float, float, float, float],
) -> tuple[str, dict[str, float]]:
    """Return the site that answered last and the seconds of each part of a round.

    Args:
        sites: what was watched.
        run: Flower's number of the run.
        group: Flower's group id of the round's messages.
        times: the round before was over; messages were sent; all replies were here; round over.
    """
    before, pushed, replied, over = times
    seen = {name: site.seen[(run, group)] for name, site in sites.items()}
    last = max(seen, key=lambda name: seen[name]["sent"])
    at = seen[last]
    inside = [j for j in jobs(sites[last]) if at["pulled"] <= j[0] and j[2] <= at["sent"] + 0.05]
    if len(inside) != 1:
        raise RuntimeError(f"{last}, {group}: {len(inside)} jobs between pull and answer")
    ((began, imported, ended),) = inside
    # The SuperExec may start a process while the message's content is still on its way.
    received = min(at["received"], at["spawned"])
    marks = (
        *(before, pushed, at["pulled"], received, at["spawned"]),
        *(began, imported, ended, at["sending"], at["sent"], replied, over),
    )
    names = [name for name, _ in PARTS]
    return last, {n: b - a for n, (a, b) in zip(names, pairwise(marks), strict=True)}
