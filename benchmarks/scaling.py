"""Cost and memory against the number of clients, with the in-process grid.

    python benchmarks/scaling.py [--clients 8,64,256,1000] [--out scaling.json]

Every size is a fresh process.  Client i holds ten questions of its own (six train, two validation,
two test), taken in turn from the default world with the client's number in the text, so the work of
a client is the same at every size.  2 rounds of 4 steps, no personal phase.  Reported: seconds of
round 2 over clients, peak resident memory of the process (clients and server share it), and what
server and aggregation code held at the end of a round (tracemalloc, in a run of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

from fedalign.data.records import SurveyItem

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

FULL = 64
"""Clients of a full message, and of a full cohort on a processor."""


def write_survey(root: Path, clients: int) -> Path:
    """Write ten questions for each client; return the file."""
    from fedalign.data.synthetic import generate

    items = [i for i in generate("default", 0).items if isinstance(i, SurveyItem)]
    groups = sorted(items[0].shares)
    roles = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    path = root / "survey.jsonl"
    with path.open("w", encoding="utf-8") as f:
        for c in range(clients):
            group = groups[c % len(groups)]
            for k, role in enumerate(roles):
                item = items[(10 * c + k) % len(items)]
                row = {
                    # The number k too: a question has one role whatever its options.
                    "question": f"{item.question} (panel {c}, question {k})",
                    "options": list(item.options),
                    "group": group,
                    "shares": list(item.shares[group]),
                    "split": role,
                    "client": f"{group}-{c:05d}",
                }
                f.write(json.dumps(row) + "\n")
    return path


def peak_mb() -> float:
    """Return the peak resident memory of this process; ``ru_maxrss`` would hold the parent's."""
    (line,) = [
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")
    ]
    return int(line.split()[1]) / 1024


def one(clients: int, trace: bool) -> dict[str, float]:
    """Run one size in this process."""
    import server.run
    from clients.app import app
    from fedalign.ledger import Ledger
    from fedalign.runfolder import LEDGER, prepare
    from simulations.display import QuietProgress
    from simulations.grid import InProcessGrid
    from simulations.scenario import load

    root = Path(tempfile.mkdtemp())
    config = load(
        "default",
        [
            "personal.steps=0",
            "run.rounds=2",
            "local.steps=4",
            "data.source=survey",
            f"data.path={write_survey(root, clients)}",
            "data.partition=column",
            "data.partition-column=client",
            "data.clients-per-group=1",
        ],
    )
    server.run.build_report = lambda folder: folder / "report.html"
    try:
        config = prepare(replace(config, run=replace(config.run, out=str(root / "run"))))
        held: list[int] = []
        if trace:
            import server.strategy

            aggregate = server.strategy.GroupStrategy.aggregate_train

            def traced(self, server_round, replies):  # type: ignore[no-untyped-def]
                tracemalloc.start()
                result = aggregate(self, server_round, replies)
                snapshot = tracemalloc.take_snapshot().filter_traces(
                    [
                        tracemalloc.Filter(True, "*server*"),
                        tracemalloc.Filter(True, "*aggregation*"),
                    ]
                )
                held.append(sum(s.size for s in snapshot.statistics("filename")))
                tracemalloc.stop()
                return result

            server.strategy.GroupStrategy.aggregate_train = traced  # type: ignore[method-assign]
        began = time.perf_counter()
        server.run.execute(InProcessGrid(app), config, QuietProgress())
        total = time.perf_counter() - began
        with Ledger(Path(config.run.out) / LEDGER, readonly=True) as ledger:
            rows = [t for t in ledger.timings() if t.round == 2]
            n = len(ledger.clients())
    finally:
        shutil.rmtree(root)
    seconds = {t.name: t.seconds for t in rows}
    return {
        "clients": n,
        "total_s": total,
        "round_s": seconds["collect"] + seconds["aggregate"],
        "aggregate_s": seconds["aggregate"],
        "ms_per_client": 1000 * (seconds["collect"] + seconds["aggregate"]) / n,
        "peak_mb": peak_mb(),
        **({"server_held_mb": max(held) / 2**20} if held else {}),
    }


def main() -> None:
    """Measure every size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="8,64,256,1000")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.trace)))
        return
    results = []
    for n in (int(x) for x in arguments.clients.split(",")):
        measured: dict[str, float] = {}
        for flags in (["--trace"], []):
            command = [sys.executable, __file__, "--one", str(n), *flags]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured |= json.loads(done.stdout.splitlines()[-1])
        results.append(measured)
        print(json.dumps(results[-1]), file=sys.stderr)
    first, last = results[0], results[-1]
    full = next((r for r in results if r["clients"] >= FULL), last)
    text = json.dumps(
        {
            "sizes": results,
            "cost_per_client_last_over_first": last["ms_per_client"] / first["ms_per_client"],
            # Flat is meant from the first size that fills a message and a cohort.
            "cost_per_client_last_over_first_full": last["ms_per_client"] / full["ms_per_client"],
            "peak_last_minus_first_mb": last["peak_mb"] - first["peak_mb"],
        },
        indent=1,
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
