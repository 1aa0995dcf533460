"""Cohort training against one client after another: ratios within one run.

    python benchmarks/cohort.py --out cohort.json --plot cohort.png [--quick]

Arms run in turns in this process, on the same clients, examples and steps (``cohort_arms.py``):

- **one after another**: our lean loop over the resident base, everything prepared.  Four variants,
  one or all threads, batches whole or cut in two by length, are tried on 8 clients; the quickest
  stands for it everywhere.
- **cohort**: ``train_cohort`` as the product calls it, side by side on all threads; also on one.
- **stacked**: the same through ``StackedLayers``, the path of any model that is not merged.
- **TRL**: its DPOTrainer, one client after another.  It knows hard votes and the base as reference
  alone and takes pairs; so this comparison has one pair a prompt for every arm.

In every comparison the final adapters of all arms are held together, B A of every module and the
validation scores, and a difference beyond the tolerances ends the run with an error.  In the table
the differences beside the lean loop are its own, from a start moved by one rounding error.

Then: a cohort against its own forward, backward and optimiser steps replayed from recorded batches;
whole rounds against the same (``cohort_rounds.py``); cost per client and peak memory by number of
clients, each a fresh process (``scaling.py``); a profile; and, where there is a GPU, a random Llama
of 1 billion parameters in bfloat16 (``cohort_large.py``).  ``--quick`` is smaller and shows that it
runs; its figures mean little.  Markdown tables are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cohort_arms import (
    SCORE_ERROR,
    TYPICAL_ERROR,
    WORST_ERROR,
    World,
    bucketed,
    check,
    compare,
    in_turns,
    jobs,
    lean,
    nudged,
    summary,
    threads,
    together,
    trl,
    world,
)
from cohort_large import large
from cohort_replay import Calls, recorded, replay
from cohort_rounds import profile_table, profiled, rounds

PLAIN, COHORT, ONE, STACKED, TRL = (
    "one after another",
    "cohort",
    "cohort, one thread",
    "stacked",
    "TRL",
)
SCORED = 16
"""Clients of a comparison whose final adapters are also scored."""


def best_lean(made: World, cores: int, repeats: int) -> dict[str, Any]:
    """Return the four variants of the lean loop on 8 clients, and which is quickest."""
    local = made.config.local
    work = jobs(made, 8, local)
    variants = {
        f"{name}, {count} threads": arm(made, work, local, count)
        for count in sorted({1, cores})
        for name, arm in (("whole", lean), ("two lengths", bucketed))
    }
    seconds, _ = in_turns(variants, repeats)
    found = summary(seconds, len(work), local.steps)
    return {"variants": found, "best": min(found, key=lambda v: found[v]["ms_a_client_step"])}


def compared(
    made: World, best: str, count: int, cores: int, repeats: int, batch: int = 0, one: bool = False
) -> dict[str, Any]:
    """Time the arms on ``count`` clients, check that they agree, and return the ratios."""
    local = made.config.local
    if batch:
        local = replace(local, batch_size=batch)
    work = jobs(made, count, local)
    plain = bucketed if best.startswith("two") else lean
    arms = {
        PLAIN: plain(made, work, local, int(best.split()[-2])),
        COHORT: together(made, work, local, cores),
        STACKED: together(made, work, local, cores, stacked=True),
    }
    if one:
        arms[ONE] = together(made, work, local, 1)
    seconds, results = in_turns(arms, repeats)
    some = min(count, 64)
    control = nudged(made, work[:some], local)
    return {
        "clients": count,
        "batch_size": local.batch_size,
        **_ratios(summary(seconds, count, local.steps)),
        "differences": check(made, results, PLAIN, SCORED)
        | {PLAIN: compare(made, control, results[PLAIN][:some])},
    }


def _ratios(arms: dict[str, Any]) -> dict[str, Any]:
    base = arms[PLAIN]["ms_a_client_step"]
    return {"arms": arms, "quicker": {n: base / a["ms_a_client_step"] for n, a in arms.items()}}


def against_trl(best: str, count: int, cores: int, repeats: int) -> dict[str, Any]:
    """Time TRL, the lean loop and the cohort on a few clients with one hard pair a prompt."""
    made = world(["local.labels=hard", "local.reference=base", "local.pairs-per-question=1"])
    local = made.config.local
    work = jobs(made, count, local)
    plain = bucketed if best.startswith("two") else lean
    arms = {
        PLAIN: plain(made, work, local, int(best.split()[-2])),
        COHORT: together(made, work, local, cores),
        TRL: trl(made, work, local, int(best.split()[-2])),
    }
    seconds, results = in_turns(arms, repeats)
    return {
        "clients": count,
        "batch_size": local.batch_size,
        **_ratios(summary(seconds, count, local.steps)),
        "differences": check(made, results, PLAIN, SCORED),
    }


def replayed(made: World, count: int, cores: int, repeats: int) -> dict[str, Any]:
    """Return a cohort's time over that of its forward, backward and optimiser steps, in turns."""
    local = made.config.local
    run = together(made, jobs(made, count, local), local, cores)
    calls: Calls = []
    with recorded(calls):
        run()
    whole, alone = [], []
    for turn in range(repeats + 1):
        seconds, _ = in_turns({COHORT: run}, 1, warm=False)
        bare = replay(made, calls, local, cores)
        if turn:
            whole += seconds[COHORT]
            alone.append(bare)
    ratio = statistics.median(whole) / statistics.median(alone)
    return {"clients": count, "cohort_s": whole, "replay_s": alone, "ratio": ratio}


def scaling(counts: list[int]) -> list[dict[str, float]]:
    """Measure each number of clients in a process of its own."""
    script = str(Path(__file__).with_name("scaling.py"))
    found = []
    for count in counts:
        command = [sys.executable, script, "--one", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


# --- what is shown ----------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """Return the figures as markdown."""
    lines = ["| clients | batch | arm | ms a client's step | quicker by | typical | worst |"]
    lines += ["|---:|---:|---|---:|---:|---:|---:|"]
    for row in [*result["sizes"], *result["batches"]]:
        lines += _rows(row)
    lines += ["", "One hard pair a prompt, so that TRL can take it:", "", *lines[:2]]
    lines += _rows(result["trl"])
    again = result["replay"]
    lines += ["", f"Cohort over its bare steps, {again['clients']} clients: {again['ratio']:.2f}."]
    lines += [
        "",
        "| rounds | clients | all, s | training | scores | aggregation | rest | bare steps |",
    ]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for r in result["rounds"]:
        parts = ("total", "train_cohort", "scores", "aggregate", "rest", "replay")
        cells = " | ".join(f"{r[p + '_s']:.2f}" for p in parts)
        lines.append(f"| {r['rounds']} | {r['clients']} | {cells} |")
    lines += ["", "| clients | ms a client and round | of which aggregation | peak memory, MB |"]
    lines += ["|---:|---:|---:|---:|"]
    for r in result["scaling"]["sizes"]:
        aggregate = 1000 * r["aggregate_s"] / r["clients"]
        cells = f"{r['ms_per_client']:.1f} | {aggregate:.1f} | {r['peak_mb']:.0f}"
        lines.append(f"| {r['clients']:.0f} | {cells} |")
    lines += ["", *profile_table(result["profile"])]
    found = result["large"]
    note = "" if found["device"] != "cpu" else " (no GPU: code path only)"
    lines += ["", f"Llama {found['llama']}, {found['dtype']}, {found['device']}{note}:", ""]
    lines += ["| clients | arm | tokens a second | share of matmul rate | peak GiB |"]
    lines += ["|---:|---|---:|---:|---:|"]
    for r in found["rows"]:
        peak = "" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        share = f"{100 * r['share_of_matmul_rate']:.0f} %"
        cells = f"{r['arm']} | {r['tokens_a_second']:.0f} | {share} | {peak}"
        lines.append(f"| {r['clients']} | {cells} |")
    return "\n".join(lines)


def _rows(row: dict[str, Any]) -> list[str]:
    out = []
    for name, arm in row["arms"].items():
        differs = row["differences"].get(name)
        shown = " | " if not differs else f"{differs['typical']:.1e} | {differs['worst']:.1e}"
        cells = f"{arm['ms_a_client_step']:.2f} | {row['quicker'][name]:.2f} | {shown}"
        out.append(f"| {row['clients']} | {row['batch_size']} | {name} | {cells} |")
    return out


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draw time by clients, time by batch size, and cost per client with memory."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedalign"
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    count = result["batches"][0]["clients"]
    same = [r for r in [*result["batches"], *result["sizes"]] if r["clients"] == count]
    batches = sorted((r["batch_size"], r) for r in same)
    for name, marker in ((PLAIN, "o"), (STACKED, "^"), (COHORT, "s")):
        of = [r["arms"][name]["ms_a_client_step"] for r in result["sizes"]]
        left.plot([r["clients"] for r in result["sizes"]], of, marker=marker, label=name)
        of = [r["arms"][name]["ms_a_client_step"] for _, r in batches]
        middle.plot([b for b, _ in batches], of, marker=marker, label=name)
    for axes, label in ((left, "clients (batch 16)"), (middle, "batch size, prompts")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
    left.set_ylabel("ms a client's step")
    left.set_xticks([r["clients"] for r in result["sizes"]])
    middle.set_title(f"{count} clients", fontsize=10)
    middle.set_xticks([b for b, _ in batches])
    for axes in (left, middle):
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    left.legend(fontsize=8, frameon=False)
    sizes = result["scaling"]["sizes"]
    sizes_of = [r["clients"] for r in sizes]
    right.plot(
        sizes_of, [r["ms_per_client"] for r in sizes], marker="o", label="ms a client and round"
    )
    right.plot(sizes_of, [r["peak_mb"] / 10 for r in sizes], marker="s", label="peak memory, 10 MB")
    right.set_xscale("log")
    right.set_xticks(sizes_of)
    right.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.minorticks_off()
    right.set_ylim(bottom=0)
    right.set_xlabel("clients of a whole round (scaling.py)")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    plt.close(figure)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Cohort training against one after another.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small; shows that it runs")
    given = parser.parse_args()
    quick, repeats = given.quick, 1 if given.quick else given.repeats
    cores = min(8, len(os.sched_getaffinity(0)))
    load_before = os.getloadavg()
    with threads(1):
        made = world(["local.steps=3"] if quick else [])
        chosen = best_lean(made, cores, repeats)
        best, middle = chosen["best"], 16 if quick else 64
        sizes = [
            compared(made, best, n, cores, repeats if n < 256 else 2, one=n == middle)
            for n in ((8, 16) if quick else (8, 64, 256))
        ]
        batches = [compared(made, best, middle, cores, repeats, batch=b) for b in (4, 1)]
        result: dict[str, Any] = {
            "machine": {
                "cores": cores,
                "python": platform.python_version(),
                "torch": version("torch"),
                "trl": version("trl"),
                "load_before": load_before,
            },
            "quick": quick,
            "steps": made.config.local.steps,
            "tolerances": {"typical": TYPICAL_ERROR, "worst": WORST_ERROR, "score": SCORE_ERROR},
            "lean": chosen,
            "sizes": sizes,
            "batches": batches,
            "replay": replayed(made, middle, cores, repeats),
            "profile": profiled(
                together(made, jobs(made, middle, made.config.local), made.config.local, 1), 1
            ),
            "trl": against_trl(best, 1 if quick else 4, cores, repeats),
            "rounds": [
                rounds(each, 2 if quick else 8, cores)
                for each in ("coast=3,valley=2,hills=2,isles=1", "8")
            ],
        }
    found = scaling([8, 16] if quick else [8, 64, 256, 1000])
    full = next(r for r in found if r["clients"] >= min(64, found[-1]["clients"]))
    ratio = found[-1]["ms_per_client"] / full["ms_per_client"]
    result["scaling"] = {"sizes": found, "last_over_first_full_cohort": ratio}
    if torch.cuda.is_available():
        device, counts = torch.device("cuda"), [1, 8] if quick else [1, 8, 32, 128]
        result["large"] = large("1b", device, "bfloat16", counts, repeats)
    else:
        result["large"] = large("10m", torch.device("cpu"), "bfloat16", [1, 2], 1)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    if given.plot:
        plot(given.plot, result)


if __name__ == "__main__":
    main()
