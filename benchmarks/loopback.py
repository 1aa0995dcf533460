"""A federation of real processes on this machine: coordinator and sites, joined over TLS.

Used by the end-to-end tests and by ``deployment.py``.  Everything lies in one folder.  The data are
rows of the synthetic population: what is run here can be run in simulation too, on
:attr:`Federation.merged`, with ``data.partition = column`` and ``data.partition-column = site``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fedalign.config import DataConfig
from fedalign.data.load import load_dataset
from fedalign.data.records import SurveyItem

SITES = {"coast-a": "coast", "coast-b": "coast", "isles-a": "isles"}
READY_SECONDS = 300.0


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free ports.

    Two processes that ask at the same time look at different ones first: nothing is bound yet.
    """
    for base in range(20000 + os.getpid() % 3000 * count, 60000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


def wait(good: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    """Wait until ``good()``; ``TimeoutError`` names what did not come."""
    end = time.monotonic() + seconds
    while not good():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


def site_rows(sites: Mapping[str, str]) -> dict[str, list[dict[str, object]]]:
    """Return the rows of each site: its group's questions, dealt over the sites of the group."""
    dataset = load_dataset(DataConfig(source="synthetic"), seed=0)
    dealt: dict[str, list[dict[str, object]]] = {site: [] for site in sites}
    for group in sorted(set(sites.values())):
        names = [s for s, g in sites.items() if g == group]
        own = [
            (number, item)
            for number, item in enumerate(dataset.items)
            if isinstance(item, SurveyItem) and group in item.shares
        ]
        for place, (number, item) in enumerate(own):
            row: dict[str, object] = {
                "id": str(number),
                "question": item.question,
                "options": list(item.options),
                "group": group,
                "shares": list(item.shares[group]),
                "topic": item.topic,
                "site": names[place % len(names)],
            }
            dealt[names[place % len(names)]].append(row)
    return dealt


class Federation:
    """Processes of one coordinator and its sites; stops them all when left."""

    def __init__(
        self,
        folder: Path,
        sites: Mapping[str, str] = SITES,
        policies: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Prepare data and coordinator in ``folder``; nothing runs yet.

        ``policies`` names, by site, lines of the policy template and what stands there instead.
        """
        self.folder = folder
        self.sites = dict(sites)
        self.policies = {site: dict(lines) for site, lines in (policies or {}).items()}
        self.state = folder / "coordinator"
        self.merged = folder / "merged.jsonl"
        self.coordinator: subprocess.Popen[bytes] | None = None
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._port = free_ports(4)
        rows = site_rows(self.sites)
        for site, own in rows.items():
            self._write(folder / f"{site}.jsonl", own)
        everything = [row for own in rows.values() for row in own]
        # Questions in one order everywhere: the order of a client's rows decides its minibatches.
        everything.sort(key=lambda row: int(str(row["id"])))
        self._write(self.merged, everything)

    def __enter__(self) -> Federation:
        """Make and start the coordinator, enroll and start every site."""
        try:
            self.check("server.cli", "init", "--host", "localhost", "--port", str(self._port))
            self.start_coordinator()
            for site in self.sites:
                self.join(site)
                self.start_site(site)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything."""
        self._stop()

    # --- coordinator ----------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until it is ready."""
        out = self.folder / "start.txt"
        out.write_bytes(b"")
        self.coordinator = self.spawn(out, "server.cli", "start")
        wait(lambda: "ready:" in out.read_text() or self._gone(self.coordinator), "the coordinator")
        if self._gone(self.coordinator):
            raise RuntimeError(out.read_text())

    def run(self, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
        """Do one run to its end; return what the command printed."""
        words = ("run", "--name", name, *assigned(settings))
        return self.command("server.cli", *words, timeout=1200.0)

    def begin(self, name: str, *settings: str) -> subprocess.Popen[bytes]:
        """Start one run; its output goes to ``NAME.txt``."""
        out = self.folder / f"{name}.txt"
        return self.spawn(out, "server.cli", "run", "--name", name, *assigned(settings))

    def result(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.state / "runs" / name

    def pids(self) -> dict[str, int]:
        """Return the coordinator's process ids."""
        return dict(json.loads((self.state / "pids.json").read_text()))

    # --- sites ----------------------------------------------------------------------------------

    def home(self, site: str) -> Path:
        """Return a site's folder."""
        return self.folder / "sites" / site

    def join(self, site: str) -> None:
        """Invite and enroll a site, and tell it where its data are."""
        made = self.check("server.cli", "invite", "--site", site, "--group", self.sites[site])
        home = self.home(site)
        home.mkdir(parents=True, exist_ok=True)
        self.check("clients.cli", "join", made.strip(), "--home", str(home))
        with (home / "trainer" / "trainer.toml").open("a") as f:
            f.write(f'\n[data]\nsource = "survey"\npath = "{self.folder / site}.jsonl"\n')
        (self.folder / f"{site}.jsonl").chmod(0o600)
        self._change_policy(home / "trainer" / "policy.toml", self.policies.get(site, {}))

    def launch_site(self, site: str, *options: str, **environment: str) -> Path:
        """Start a site's trainer and node; return the file that takes what the command prints."""
        out = self.folder / f"{site}.txt"
        words = ("start", "--home", str(self.home(site)), *options)
        self.running[site] = self.spawn(out, "clients.cli", *words, **environment)
        return out

    def start_site(self, site: str, *options: str, **environment: str) -> None:
        """Start a site's trainer and node, and wait until the coordinator sees it."""
        out = self.launch_site(site, *options, **environment)
        wait(lambda: self.online(site) or self._gone(self.running[site]), f"site {site}")
        if self._gone(self.running[site]):
            raise RuntimeError(out.read_text())

    def online(self, site: str) -> bool:
        """Say whether the SuperLink takes a site as online."""
        from server.coordinator import load
        from server.superlink_admin import connect

        nodes = connect(load(self.state)).nodes()
        return any(n.name.startswith(f"{site}@") and n.status == "online" for n in nodes)

    def stop_site(self, site: str) -> None:
        """Stop a site as its operator does."""
        process = self.running.pop(site)
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def kill_site(self, site: str) -> None:
        """Kill a site's processes at once, as a power cut would."""
        process = self.running.pop(site)
        kill_tree(process.pid)
        process.wait(30)

    # --- processes ------------------------------------------------------------------------------

    def command(
        self, module: str, *words: str, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", module, *words],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def check(self, module: str, *words: str) -> str:
        """Run a command that must succeed; return its standard output."""
        done = self.command(module, *words)
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def spawn(
        self, out: Path, module: str, *words: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a command, its output in a file; ``environment`` comes on top of ours."""
        with out.open("ab") as f:
            return subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env={**self._environment(), **environment},
                stdout=f,
                stderr=subprocess.STDOUT,
            )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "FEDALIGN_STATE": str(self.state), "OMP_NUM_THREADS": "1"}

    def _stop(self) -> None:
        everything = [*self.running.values(), *([self.coordinator] if self.coordinator else [])]
        for process in everything:
            process.send_signal(signal.SIGTERM)
        for process in everything:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                process.wait(10)

    @staticmethod
    def _change_policy(path: Path, changes: Mapping[str, str]) -> None:
        lines = path.read_text().splitlines()
        for old, new in changes.items():
            if lines.count(old) != 1:
                raise ValueError(f"{path}: the line {old!r} is there {lines.count(old)} times")
            lines[lines.index(old)] = new
        path.write_text("\n".join(lines) + "\n")

    @staticmethod
    def _gone(process: subprocess.Popen[bytes] | None) -> bool:
        return process is None or process.poll() is not None

    @staticmethod
    def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def assigned(settings: Sequence[str]) -> list[str]:
    """Return ``--set`` options."""
    return [word for text in settings for word in ("--set", text)]


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children, theirs and so on (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and everything under it with SIGKILL."""
    for one in (pid, *descendants(pid)):
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue
