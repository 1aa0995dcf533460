"""Round time of a deployment with three sites, where it goes, and what Flower takes for nothing.

    python benchmarks/deployment.py --out deployment.json [--rounds 8] [--repeats 2] [--plot FILE]

One coordinator and three sites (``loopback.py``: real processes, TLS, keys) on this machine, the
default model, the default settings but for the personal phase.  Arms take turns on the same
SuperLink and SuperNodes; in each a round is one message to every site and one back:

- *resident*: the product, ``fedalign-server run``.  The ClientApp hands the message to the site's
  resident trainer, which has torch, model and data in memory.
- *fresh*: the same run, messages, settings and jobs, but the bundle's ClientApp is
  ``deployment_apps/fresh_app.py``, which does the job in the process that Flower starts for the
  message: it imports, reads the data, loads the model, trains and ends.  The product has no such
  path on an enrolled site, so the bundle is the benchmark's.  The final adapter must be bit-equal.
- *floor*: ``deployment_apps/floor_app.py``, a ServerApp and ClientApp of numpy alone that send an
  array of the adapter's size back and forth, with our pause between looks for replies (.5 s).
- *stock*: the same through Flower's own ``Grid.send_and_receive`` (3 s).

The first round of a run is reported apart.  A round is split along the site that answered last
(``deployment_watch.py``), so parts of waits that depend on the phase of a poll are averages.
Prints the table of ``docs/benchmarks.md`` and writes JSON with every round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from deployment_watch import PARTS, Site, Watch, split
from loopback import Federation, wait

from fedalign.config import Scalar, to_flat
from fedalign.ledger import Ledger
from fedalign.runfolder import CHECKPOINT, LEDGER
from server.bundle import PROJECT, make_app_folder, project_text
from server.checkpoint import load as load_checkpoint
from server.coordinator import load
from server.places import keep_files, shorten
from server.submit import new_run, read_submission
from server.submit import settings as scenario_settings
from server.superlink_admin import CONNECTION, connect, flower_environment, flwr, write_connection

APPS = Path(__file__).resolve().parent / "deployment_apps"
ARMS = ("resident", "fresh", "floor", "stock")
POLLS = {
    "SuperNode, for messages": "3 s (Flower, fixed)",
    "SuperExec, for tasks": "1 s (Flower's default)",
    "SuperNode, for the ClientApp's answer": "0.5 s (Flower, fixed)",
    "ServerApp, for replies": "resident, fresh, floor: 0.5 s; stock: 3 s",
}
LONGEST = 1200.0
"""Seconds that a run may take."""


class Bench:
    """Runs the arms over one federation and times their rounds."""

    def __init__(self, federation: Federation, rounds: int) -> None:
        """Watch the sites of a federation that is up."""
        self.federation = federation
        self.rounds = rounds
        self.coordinator = load(federation.state)
        self.admin = connect(self.coordinator)
        self.environment = flower_environment(self.coordinator)
        write_connection(self.coordinator)
        self.watch = Watch({name: self._site(name) for name in federation.sites})
        self.watch.start()
        self.floats = 0

    def _site(self, name: str) -> Site:
        home = self.federation.home(name)
        pids = json.loads((home / "logs" / "start.json").read_text())
        node = int(pids["supernode"])
        (superexec,) = Path(f"/proc/{node}/task/{node}/children").read_text().split()
        return Site(
            log=home / "logs" / "supernode.log",
            audit=home / "trainer" / "audit.jsonl",
            jobs=home / "run" / "jobs.jsonl",
            superexec=int(superexec),
        )

    def arm(self, arm: str, name: str) -> list[dict[str, Any]]:
        """Do one run of an arm; return its rounds."""
        if arm in ("floor", "stock"):
            return self._floor(name, 0.5 if arm == "floor" else 0.0)
        checkpoint = self.federation.result(name) / CHECKPOINT
        self.watch.commits[checkpoint] = []
        run = self._resident(name) if arm == "resident" else self._fresh(name)
        commits = self.watch.commits.pop(checkpoint)
        return self._from_ledger(name, run, commits)

    # --- the product's run, by its own command and with the benchmark's ClientApp ----------------

    def _settings(self) -> list[str]:
        return [f"run.rounds={self.rounds}", "run.quorum=1.0", "personal.steps=0"]

    def _resident(self, name: str) -> int:
        done = self.federation.run(name, *self._settings())
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        submission = read_submission(self.coordinator.apps / f"{name}.json")
        assert submission is not None
        return submission.run_id

    def _fresh(self, name: str) -> int:
        flat = scenario_settings("default", self._settings())
        full = to_flat(new_run(self.coordinator, flat, name))
        keep_files(full, self.coordinator.state, name)
        folder = make_app_folder(
            self.coordinator.apps / name, shorten(full, self.coordinator.state)
        )
        text = (folder / PROJECT).read_text()
        changes = {"clientapp": '"fresh_app:app"'}
        packages = re.search(r"fab-include = \[(.*)\]", text)
        assert packages is not None
        changes["fab-include"] = f'["fresh_app.py", {packages[1]}]'
        (folder / PROJECT).write_text(_changed(text, changes))
        (folder / "fresh_app.py").write_text((APPS / "fresh_app.py").read_text())
        return self._submit(folder)

    def _from_ledger(self, name: str, run: int, commits: list[float]) -> list[dict[str, Any]]:
        """Return the rounds of a run of ours: base, then every round, left one commit each."""
        with Ledger(self.federation.result(name) / LEDGER, readonly=True) as ledger:
            spent = {(t.round, t.name): t.seconds for t in ledger.timings() if t.phase == "train"}
            attempts = [c for c in ledger.commits() if c[0] == "train"]
        if attempts != [("train", t, 1) for t in range(1, self.rounds + 1)]:
            raise RuntimeError(f"{name}: rounds were repeated: {attempts}")
        rounds = []
        for t in range(1, self.rounds + 1):
            replied = commits[t] - spent[t, "aggregate"]
            pushed = replied - spent[t, "collect"]
            rounds.append(self._round(run, t, (commits[t - 1], pushed, replied, commits[t])))
        return rounds

    # --- Flower alone ----------------------------------------------------------------------------

    def _floor(self, name: str, poll: float) -> list[dict[str, Any]]:
        folder = self.coordinator.apps / name
        folder.mkdir()
        out = self.federation.folder / f"{name}.json"
        config: dict[str, Scalar] = {
            "bench.floats": self.floats,
            "bench.rounds": self.rounds,
            "bench.nodes": len(self.federation.sites),
            "bench.poll": poll,
            "bench.out": str(out),
        }
        changes = {
            "serverapp": '"floor_app:server"',
            "clientapp": '"floor_app:client"',
            "fab-include": '["floor_app.py"]',
        }
        (folder / PROJECT).write_text(_changed(project_text(name, config), changes))
        (folder / "floor_app.py").write_text((APPS / "floor_app.py").read_text())
        run = self._submit(folder)
        marks = json.loads(out.read_text())
        starts = [began for began, _ in marks]
        return [
            self._round(run, t, (before, before, replied, replied))
            for t, (before, (_, replied)) in enumerate(zip(starts, marks, strict=True), 1)
        ]

    def _submit(self, folder: Path) -> int:
        answer = flwr(self.environment, "run", str(folder), CONNECTION, "--format", "json")
        if not answer.get("success"):
            raise RuntimeError(f"{folder.name}: {answer}")
        run = int(answer["run-id"])

        def over() -> bool:
            state = self.admin.run_state(run)
            return state is not None and state.finished

        wait(over, f"run {folder.name}", LONGEST)
        state = self.admin.run_state(run)
        if state is None or state.status != "finished:completed":
            raise RuntimeError(f"{folder.name}: {state}")
        return run

    def _round(
        self, run: int, number: int, times: tuple[float, float, float, float]
    ) -> dict[str, Any]:
        time.sleep(2 * 0.01)  # let the watch read the last line
        slowest, parts = split(self.watch.sites, run, f"train-{number}-1", times)
        seconds = times[3] - times[0]
        return {"round": number, "seconds": seconds, "slowest": slowest, "parts": parts}


def _changed(text: str, changes: dict[str, str]) -> str:
    """Return a bundle's ``pyproject.toml`` with other values of keys, each there once."""
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        if count != 1:
            raise RuntimeError(f"{key} is {count} times in {PROJECT}")
    return text


def measure(folder: Path, rounds: int, repeats: int) -> dict[str, Any]:
    """Do every arm ``repeats`` times, in turns; return all rounds by arm and run."""
    runs: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in ARMS}
    difference = 0.0
    with Federation(folder) as federation:
        bench = Bench(federation, rounds)
        try:
            for repeat in range(repeats):
                shift = repeat % 2
                for arm in ("resident", *(ARMS[1:][::-1] if shift else ARMS[1:])):
                    name = f"{arm}-{repeat}"
                    runs[arm].append(bench.arm(arm, name))
                    shown = " ".join(f"{r['seconds']:.1f}" for r in runs[arm][-1])
                    print(f"{name}: {shown} s", flush=True)
                    if arm == "resident":
                        mine = load_checkpoint(federation.result(name) / CHECKPOINT).adapter
                        bench.floats = mine.size
                    elif arm == "fresh":
                        other = load_checkpoint(federation.result(name) / CHECKPOINT).adapter
                        difference = max(difference, float(np.abs(mine - other).max()))
        finally:
            bench.watch.stop()
    return {"floats": bench.floats, "runs": runs, "adapter_difference": difference}


def summarise(runs: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return seconds and parts of each arm over all rounds but the first of a run, and ratios."""
    arms: dict[str, Any] = {}
    for arm, repeats in runs.items():
        later = [r for rounds in repeats for r in rounds[1:]]
        seconds = [r["seconds"] for r in later]
        arms[arm] = {
            "first": [rounds[0]["seconds"] for rounds in repeats],
            "rounds": len(seconds),
            "median": statistics.median(seconds),
            "mean": statistics.fmean(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "parts": {n: statistics.fmean(r["parts"][n] for r in later) for n, _ in PARTS},
        }
    median = {arm: found["median"] for arm, found in arms.items()}
    ratios = {
        "fresh/resident": median["fresh"] / median["resident"],
        "resident/floor": median["resident"] / median["floor"],
        "stock/floor": median["stock"] / median["floor"],
    }
    return {"arms": arms, "ratios": ratios}


def table(summary: dict[str, Any]) -> str:
    """Return the markdown table; parts are means, because they add up."""
    arms = summary["arms"]
    lines = [f"| seconds | {' | '.join(ARMS)} |", f"|---|{'---|' * len(ARMS)}"]

    def row(what: str, cells: list[str]) -> None:
        lines.append(f"| {what} | {' | '.join(cells)} |")

    row("**a round, median**", [f"**{arms[a]['median']:.1f}**" for a in ARMS])
    row("least to most", [f"{arms[a]['least']:.1f} to {arms[a]['most']:.1f}" for a in ARMS])
    row("the first round", [", ".join(f"{s:.1f}" for s in arms[a]["first"]) for a in ARMS])
    row("a round, mean, of which", [f"{arms[a]['mean']:.2f}" for a in ARMS])
    for name, meaning in PARTS:
        row(meaning, [f"{arms[a]['parts'][name]:.2f}" for a in ARMS])
    said = "; ".join(f"{name} {value:.2f}" for name, value in summary["ratios"].items())
    return "\n".join([*lines, "", f"Ratios of medians: {said}."])


def plot(path: Path, summary: dict[str, Any]) -> None:
    """Draw a bar an arm, its parts in order of time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedalign"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    left = np.zeros(len(ARMS))
    for (name, _), colour in zip(PARTS, plt.get_cmap("tab20").colors, strict=False):  # type: ignore[attr-defined]
        width = np.array([summary["arms"][a]["parts"][name] for a in ARMS])
        axes.barh(ARMS, width, left=left, label=name, color=colour)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a round (mean over rounds after the first)")
    axes.legend(ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    plt.close(figure)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.rounds < 2 or given.repeats < 1:
        parser.error("at least 2 rounds (the first is apart) and 1 repeat")
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary), given.rounds, given.repeats)
    summary = summarise(found["runs"])
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "flwr": version("flwr"),
        "torch": version("torch"),
        "load_before": load_before,
    }
    result = {"machine": machine, "polls": POLLS, "messages_a_round": 1, **summary, **found}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(summary))
    print(f"final adapters, resident and fresh, differ by at most {found['adapter_difference']:g}")
    if given.plot:
        plot(given.plot, summary)


if __name__ == "__main__":
    main()
