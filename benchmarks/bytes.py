"""What a round costs on the link, and what fewer bytes cost in alignment.

    python benchmarks/bytes.py --out docs/results/bytes.json --plot docs/results/bytes.svg

For every rank, frozen A or not, and every precision of ``wire.upload`` and ``wire.download``:

- *bytes*: the length of the serialised message (Flower's protobuf of the RecordDict) to a client
  and from it in a round of training, one client a message as with real sites, counted in a run of
  one round; the mean over clients.  Everything of the content counts: arrays, scores, the run's
  settings.  Flower's envelope, its polling and TLS do not.
- *alignment*: test scores of the shared adapter of whole runs of the default scenario, without
  personal phase, over seeds; mean, and 95 % t intervals of differences paired by seed.
- *seconds on a slow link*: arithmetic, not measured: both messages, one after the other, at
  1 Mbit/s without latency.

Results are kept in ``--work`` as they come: started again, the command goes on where it was.  One
thread a run; ``--workers`` runs at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

LINK = 1_000_000 / 8
"""Bytes a second of the slow link."""
RANKS = (8, 4, 2, 1)
COMMON = ("personal.steps=0", "score.items=false", "local.threads=1")
SHORT = ("run.rounds=1", "local.steps=1", "data.questions=60", "run.clients-per-message=1")


@dataclass(frozen=True)
class Arm:
    """One way to send adapters."""

    rank: int
    method: str
    upload: str = "float32"
    download: str = "float32"
    feedback: bool = False

    @property
    def name(self) -> str:
        """Short and unique; a file name."""
        words = [f"r{self.rank}", self.method, self.upload, self.download]
        return "-".join([*words, "feedback"] if self.feedback else words)

    @property
    def settings(self) -> tuple[str, ...]:
        """Of the scenario; the update stays alpha / r = 2 times B A at every rank."""
        return (
            f"model.rank={self.rank}",
            f"model.alpha={2 * self.rank}",
            f"aggregation.method={self.method}",
            f"wire.upload={self.upload}",
            f"wire.download={self.download}",
            f"wire.feedback={str(self.feedback).lower()}",
        )

    @property
    def exact(self) -> Arm:
        """The same adapter in float32."""
        return Arm(self.rank, self.method)


DEFAULT = Arm(8, "product")


def arms(ranks: Iterable[int]) -> list[Arm]:
    """Return what is compared: seven ways a rank, and at rank 8 a coarse upload alone."""
    found = []
    for rank in ranks:
        found += [Arm(rank, "product", p, p) for p in ("float32", "bfloat16", "int8")]
        found += [Arm(rank, "frozen-a", p, p) for p in ("float32", "bfloat16", "int8")]
        found += [Arm(rank, "frozen-a", "int8", "int8", True)]
        if rank == DEFAULT.rank:
            found += [Arm(rank, "product", "int8"), Arm(rank, "frozen-a", "int8", "float32", True)]
    return found


def run(
    arm: Arm, seed: int, more: Sequence[str] = ()
) -> tuple[dict[str, Any], list[int], list[int]]:
    """Run a federation; return its summary, and the sizes of its messages of training each way."""
    from flwr.common.serde import recorddict_to_proto

    import server.run
    from clients.app import app
    from fedalign.ledger import Ledger
    from fedalign.report.summary import summarise
    from fedalign.runfolder import LEDGER, prepare
    from simulations.display import QuietProgress
    from simulations.grid import InProcessGrid
    from simulations.scenario import load

    down: list[int] = []
    up: list[int] = []

    class Counting(InProcessGrid):
        def _handle(self, message):  # type: ignore[no-untyped-def]
            reply = super()._handle(message)
            if message.metadata.message_type == "train.round":
                for sizes, one in ((down, message), (up, reply)):
                    sizes.append(len(recorddict_to_proto(one.content).SerializeToString()))
            return reply

    server.run.build_report = lambda folder: folder / "report.html"
    folder = Path(tempfile.mkdtemp(prefix="fedalign-bytes-"))
    try:
        config = load("default", [*COMMON, *arm.settings, f"run.seed={seed}", *more])
        config = replace(config, run=replace(config.run, out=str(folder / "run")))
        config = prepare(config)
        server.run.execute(Counting(app), config, QuietProgress())
        with Ledger(Path(config.run.out) / LEDGER, readonly=True) as ledger:
            return summarise(ledger), down, up
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work(task: tuple[Arm, int | None, Path]) -> str:
    """Do one task unless its file is there; seed None counts bytes."""
    arm, seed, folder = task
    path = folder / f"{arm.name}-{'bytes' if seed is None else seed}.json"
    if path.exists():
        return path.name
    logging.disable(logging.INFO)
    if seed is None:
        _, down, up = run(arm, 0, SHORT)
        found = {"down": statistics.mean(down), "up": statistics.mean(up)}
    else:
        summary = run(arm, seed)[0]
        found = {name: summary[f"shared/{name}"] for name in ("worst", "average")}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return path.name


def gather(every: Sequence[Arm], seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Return a row for each arm whose files are all there; the others are named on stderr."""
    from fedalign.metrics.intervals import paired_difference

    scores: dict[Arm, dict[int, dict[str, float]]] = {}
    sizes: dict[Arm, dict[str, float]] = {}
    for arm in every:
        try:
            sizes[arm] = json.loads((folder / f"{arm.name}-bytes.json").read_text())
            scores[arm] = {
                s: json.loads((folder / f"{arm.name}-{s}.json").read_text()) for s in seeds
            }
        except FileNotFoundError as error:
            print(f"left out: {arm.name} (no {Path(error.filename).name})", file=sys.stderr)
    rows = []
    for arm in (a for a in every if a in scores):
        down, up = sizes[arm]["down"], sizes[arm]["up"]
        row: dict[str, Any] = {
            "name": arm.name,
            **arm.__dict__,
            "bytes_down": down,
            "bytes_up": up,
            "seconds_at_1_mbit": (down + up) / LINK,
        }
        for value in ("worst", "average"):
            mine = {s: v[value] for s, v in scores[arm].items()}
            row[value] = statistics.mean(mine.values())
            row[f"{value}_by_seed"] = mine
            for label, other in (("default", DEFAULT), ("float32", arm.exact)):
                if other == arm or other not in scores:
                    continue
                against = {s: v[value] for s, v in scores[other].items()}
                interval = paired_difference(mine, against)
                if interval is not None:
                    half = interval.high - interval.centre
                    row[f"{value}_minus_{label}"] = [interval.centre, half]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows in markdown; differences are in thousandths."""
    lines = [
        "| adapter | up | down | bytes up | bytes down | s at 1 Mbit/s | worst | average | worst - "
        "default | average - default | worst - its float32 | average - its float32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        method = "frozen A" if r["method"] == "frozen-a" else "product"
        cells = [
            f"{method}, rank {r['rank']}",
            r["upload"] + (" + feedback" if r["feedback"] else ""),
            r["download"],
            f"{r['bytes_up']:,.0f}",
            f"{r['bytes_down']:,.0f}",
            f"{r['seconds_at_1_mbit']:.2f}",
            f"{r['worst']:.4f}",
            f"{r['average']:.4f}",
            *(
                _difference(r.get(key))
                for key in (
                    "worst_minus_default",
                    "average_minus_default",
                    "worst_minus_float32",
                    "average_minus_float32",
                )
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{1000 * pair[0]:+.2f} ± {1000 * pair[1]:.2f}"


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw worst-group alignment against the bytes of a client's round."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedalign"
    from matplotlib import pyplot as plt

    colours = {"float32": "#000000", "bfloat16": "#0072B2", "int8": "#D55E00"}
    figure, axes = plt.subplots(figsize=(7.5, 5.0))
    labelled: set[str] = set()
    for r in rows:
        feedback = " + feedback" if r["feedback"] else ""
        label = f"{r['method']}, {r['upload']}{feedback}"
        mark = "s" if r["method"] == "product" else ("*" if r["feedback"] else "o")
        x = (r["bytes_up"] + r["bytes_down"]) / 1000
        axes.plot(
            x,
            r["worst"],
            mark,
            color=colours[r["upload"]],
            ms=9 if mark == "*" else 6,
            mfc="none" if mark == "o" else colours[r["upload"]],
            ls="none",
            label=None if label in labelled else label,
        )
        axes.annotate(
            str(r["rank"]), (x, r["worst"]), xytext=(4, 4), textcoords="offset points", fontsize=7
        )
        labelled.add(label)
    axes.set_xscale("log")
    axes.set_xlabel("kB to and from a client in a round")
    axes.set_ylabel("worst-group alignment on test, mean over seeds")
    axes.set_title("Numbers beside marks are LoRA ranks", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="8,4,2,1")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fedalign-bytes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--gather", action="store_true", help="report what is there; run nothing")
    options = parser.parse_args()
    every = arms(int(r) for r in options.ranks.split(","))
    seeds = [int(s) for s in options.seeds.split(",")]
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.gather:
        tasks: list[tuple[Arm, int | None, Path]] = [(a, None, options.work) for a in every]
        tasks += [(a, seed, options.work) for a in every for seed in seeds]
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for done, name in enumerate(pool.imap_unordered(work, tasks), start=1):
                print(f"{done}/{len(tasks)} {name}", file=sys.stderr, flush=True)
    rows = gather(every, seeds, options.work)
    print(table(rows))
    if options.out:
        text = json.dumps({"link_bytes_per_second": LINK, "seeds": seeds, "rows": rows}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(options.plot, rows)


if __name__ == "__main__":
    main()
