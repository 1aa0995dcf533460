"""Alignment against KL to the base: a light dot a run of any part, a mark with intervals a rule.

One row of panels for each task, average left and worst group right, each as the change against the
untouched base of the same seed, so that the level of a seed's population is not in the way.  Dots
have the colour of the rule they ran; runs in mode ``adapters`` have no KL and are not drawn, nor
are other populations.  Fewer than 3 seeds give no interval: then the dots are drawn larger, and the
figure says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedalign.metrics.intervals import seed_interval
from simulations.reproduction_claims import POPULATIONS
from simulations.reproduction_values import Study
from simulations.seed_text import too_few

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette first; controls are open marks.
STYLES = {
    "mean": ("#000000", "o"),
    "min": ("#0072B2", "v"),
    "max": ("#56B4E9", "^"),
    "literal": ("#D55E00", "s"),
    "scaled": ("#E69F00", "D"),
    "reweighted": ("#009E73", "P"),
    "mean-over-n": ("#666666", "o"),
    "mean-kl-n": ("#666666", "s"),
    "placebo": ("#CC79A7", "X"),
    "soft-min": ("#7B5EA7", "<"),
    "mixture": ("#8C6D31", ">"),
    "multiplicative": ("#17A2A2", "p"),
}
OPEN = ("mean-over-n", "mean-kl-n", "placebo")
OTHER_POPULATIONS = ("countries", "balanced")


def plot(path: Path, study: Study) -> None:
    """Draw the figure; a study without a KL gives a figure that says so."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fedalign"
    from matplotlib import pyplot as plt

    tasks = list(
        dict.fromkeys(
            task for (_, task), arms in study.items() if any(arm.of("kl") for arm in arms.values())
        )
    )
    few = any(
        too_few(len(arm.values))
        for (part, _), arms in study.items()
        for arm in arms.values()
        if part in POPULATIONS
    )
    figure, grid = plt.subplots(
        max(1, len(tasks)), 2, figsize=(10.5, 4.2 * max(1, len(tasks))), squeeze=False
    )
    if not tasks:
        grid[0][0].set_title("no run with a KL to the base is finished", loc="left", fontsize=10)
    for row, task in zip(grid, tasks, strict=False):
        for axes, metric, label in zip(
            row, ("average", "worst"), ("average over groups", "worst group"), strict=True
        ):
            _panel(axes, study, task, metric, 34 if few else 10)
            axes.set_title(f"{task}: {label}", loc="left", fontsize=10)
            axes.set_xlabel("KL to the base (nats a text)")
            axes.set_ylabel("change against the untouched base (test)")
            axes.spines[["top", "right"]].set_visible(False)
    found: dict[str, Any] = {}
    for axes in grid.ravel():
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        figure.legend(
            list(found.values()), list(found), loc="center left", bbox_to_anchor=(0.86, 0.5),
            frameon=False, fontsize=8,
        )  # fmt: skip
    if few:
        figure.text(
            0.01,
            0.995,
            "dots: each run; marks: means; no interval where there are fewer than 3 seeds",
            va="top",
            fontsize=9,
        )
    figure.tight_layout(rect=(0, 0, 0.86, 0.97 if few else 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axes: Axes, study: Study, task: str, metric: str, size: int) -> None:
    for (part, its_task), arms in study.items():
        if its_task != task or part in OTHER_POPULATIONS:
            continue
        for name, arm in arms.items():
            rule = arm.config.rewards.rule
            colour, marker = STYLES[rule]
            kl, after, before = arm.of("kl"), arm.of(metric), arm.of(f"base_{metric}")
            seeds = sorted(kl.keys() & after.keys() & before.keys())
            if not seeds:
                continue
            x = [kl[s] for s in seeds]
            y = [after[s] - before[s] for s in seeds]
            axes.scatter(x, y, s=size, color=colour, alpha=0.3, linewidths=0)
            if part in POPULATIONS and name == rule:
                _mark(axes, x, y, rule, colour, marker)
    axes.scatter([0], [0], marker="*", s=90, color="#444444", label="untouched base", zorder=5)


def _mark(axes: Axes, x: list[float], y: list[float], rule: str, colour: str, marker: str) -> None:
    ix, iy = seed_interval(x), seed_interval(y)
    axes.errorbar(
        float(np.mean(x)),
        float(np.mean(y)),
        xerr=None if ix is None else ix.high - ix.centre,
        yerr=None if iy is None else iy.high - iy.centre,
        color=colour,
        marker=marker,
        mfc="white" if rule in OPEN else colour,
        capsize=2,
        lw=1.1,
        ms=6.5,
        label=rule,
        zorder=4,
    )
