"""Average against worst group: a dot a seed, a mark an arm, with intervals over seeds.

Fewer than 3 seeds give no interval: then the dots are drawn larger, and the figure says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedalign.metrics.intervals import seed_interval
from simulations.seed_text import too_few


def plot(
    path: Path,
    table: Mapping[str, Mapping[int, Mapping[str, float]]],
    extra: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Draw the figure from arm to seed to values, and the references of the first arm."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedalign"
    from matplotlib import pyplot as plt

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    figure, axes = plt.subplots(figsize=(7.5, 5.5))
    few = any(too_few(len(by_seed)) for by_seed in table.values())
    for i, (arm, by_seed) in enumerate(table.items()):
        x = [v["average"] for v in by_seed.values() if "average" in v]
        y = [v["worst"] for v in by_seed.values() if "worst" in v]
        if not x or len(x) != len(y):
            continue
        colour = colours[i % len(colours)]
        axes.scatter(
            x, y, s=34 if few else 14, color=colour, alpha=0.55 if few else 0.35, linewidths=0
        )
        ix, iy = seed_interval(x), seed_interval(y)
        axes.errorbar(
            float(np.mean(x)),
            float(np.mean(y)),
            xerr=None if ix is None else ix.high - ix.centre,
            yerr=None if iy is None else iy.high - iy.centre,
            color=colour,
            marker="os^DvP*X"[(i // len(colours)) % 8],
            capsize=2,
            lw=1.3,
            ms=6,
            label=arm,
        )
    first = next(iter(extra.values()))
    marks = (
        ("base", "base/average", "base/worst", "x"),
        ("uniform answerer", "reference/uniform/average", "reference/uniform/worst", "+"),
    )
    for label, a, w, marker in marks:
        if a in first and w in first:
            axes.scatter(
                float(np.mean(list(first[a].values()))),
                float(np.mean(list(first[w].values()))),
                marker=marker,
                color="#555555",
                s=50,
                label=label,
            )
    said = ["dots: each seed; marks: means; no interval (fewer than 3 seeds)"] if few else []
    best = (
        first.get("reference/optimum_average/average"),
        first.get("reference/optimum_worst/worst"),
    )
    if best[0] and best[1]:
        axes.axvline(float(np.mean(list(best[0].values()))), color="#999999", lw=0.8, ls=":")
        axes.axhline(float(np.mean(list(best[1].values()))), color="#999999", lw=0.8, ls=":")
        said.append("dotted: best attainable average and worst group")
    if said:
        axes.set_title("\n".join(said), fontsize=9, loc="left")
    axes.set_xlabel("average over groups (test, higher is better)")
    axes.set_ylabel("worst group (test, higher is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
