"""Plots of the report as inline SVG: text stays text, colours are CSS variables of the page.

Every plot is drawn twice, for a wide and a narrow screen; the page shows the one that fits.  One
drawing unit is one CSS pixel, so letters have the size they say.  Colours are from Okabe and Ito's
palette, which people with any colour vision can tell apart; the page lightens them in the dark.
Groups that stand out are labelled at the end of their line, never in a legend box.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from fedalign.report.facts import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in these colours, then replaced by var(--name); chosen so that no two are equal.
INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
BASE, SHARED, PERSONAL, LOCAL = "#050505", "#060606", "#070707", "#080808"
GROUPS = ("#110011", "#110012", "#110013", "#110014", "#110015", "#110016", "#110017", "#110018")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    BASE: "base",
    SHARED: "shared",
    PERSONAL: "personal",
    LOCAL: "local",
    **{colour: f"g{i}" for i, colour in enumerate(GROUPS)},
}
WIDE, NARROW = 1000, 340
MOST_ROWS = 26
"""Groups a dumbbell plot shows; beyond that the worst and the best served half of it each."""


@dataclass(frozen=True)
class Drawing:
    """One plot in two widths, as SVG elements."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class DumbbellRow:
    """Scores of one group; a value that does not exist is None and draws nothing."""

    group: str
    base: float | None
    shared: float | None
    personal: float | None
    uniform: float | None
    optimum: float | None


def dumbbells(rows: Sequence[DumbbellRow], axis: str) -> tuple[Drawing, int]:
    """Draw base, shared and personal score of each group on one axis; worst served on top.

    Returns the drawing and how many groups in the middle were left out.
    """
    ordered = sorted(rows, key=lambda r: (_or(r.shared, r.base), r.group))
    hidden = max(0, len(ordered) - MOST_ROWS)
    half = MOST_ROWS // 2
    shown: list[DumbbellRow | None] = list(ordered)
    if hidden:
        shown = [*ordered[:half], None, *ordered[-half:]]

    def draw(axes: Axes, width: int) -> None:
        narrow = width == NARROW
        for y, row in enumerate(shown):
            if row is None:
                text = f"… {hidden} groups between (all in the table) …"
                axes.annotate(
                    text, (0, y), xycoords=("axes fraction", "data"), va="center", color=MUTED
                )
                continue
            _dumbbell(axes, y, row, 0.62 if narrow else 1.0)
            place: dict[str, Any] = (
                {"xytext": (-8, 11), "va": "bottom", "ha": "left", "xy": (0, y)}
                if narrow
                else {"xytext": (-10, 0), "va": "center", "ha": "right", "xy": (0, y)}
            )
            axes.annotate(
                shorten(row.group, 40 if narrow else 26),
                xycoords=("axes fraction", "data"),
                textcoords="offset pixels",
                color=INK,
                annotation_clip=False,
                **place,
            )
        axes.set_ylim(len(shown) - 0.45, -0.75 if narrow else -0.55)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=RULE, linewidth=1)
        axes.margins(x=0.04)
        axes.set_xlabel(axis, color=MUTED)

    def size(width: int) -> tuple[int, int, int, int, int]:
        narrow = width == NARROW
        row = 50 if narrow else 27
        return (row * len(shown) + 60, 18 if narrow else 190, 14, 4, 44)

    return _both(draw, size, f"Scores of {len(rows)} groups before and after"), hidden


def _dumbbell(axes: Axes, y: int, row: DumbbellRow, tall: float) -> None:
    points = [v for v in (row.base, row.shared, row.personal) if v is not None]
    if points:
        axes.plot([min(points), max(points)], [y, y], color=RULE, linewidth=3, zorder=1)
    if row.base is not None and row.shared is not None and row.base != row.shared:
        axes.plot([row.base, row.shared], [y, y], color=SHARED, linewidth=3, zorder=2)
    for value, half, weight in ((row.uniform, 0.26, 1.4), (row.optimum, 0.36, 3.0)):
        if value is not None:
            axes.plot(
                [value] * 2,
                [y - half * tall, y + half * tall],
                color=INK,
                linewidth=weight,
                zorder=3,
            )
    if row.base is not None:
        axes.plot([row.base], [y], "o", ms=8, mfc=PAPER, mec=BASE, mew=2, zorder=4)
    if row.personal is not None:
        axes.plot([row.personal], [y], "D", ms=7, color=PERSONAL, mec=PAPER, mew=1, zorder=5)
    if row.shared is not None:
        axes.plot([row.shared], [y], "o", ms=10, color=SHARED, mec=PAPER, mew=1, zorder=6)


def lines(
    series: Series,
    rounds: Sequence[int],
    highlight: Sequence[str],
    axis: str,
    *,
    levels: Sequence[tuple[float, str]] = (),
    mean: bool = False,
    zero: bool = False,
    bounds: tuple[float, float] | None = None,
    time: str = "round",
) -> Drawing:
    """Draw one line a group over rounds; ``highlight`` groups are coloured and labelled.

    ``levels`` are horizontal lines and their labels; ``mean`` adds the mean over groups; ``zero``
    lets the axis begin at 0, ``bounds`` sets both its ends; ``time`` names a round; a round in
    which a group has no value breaks its line.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = {g: _broken(series[g], rounds) for g in sorted(series) if set(rounds) & set(series[g])}
    shown = [g for g in highlight if g in drawn]

    def draw(axes: Axes, width: int) -> None:
        labels: list[tuple[float, str, str]] = []
        few = len(rounds) <= 15
        for group, values in drawn.items():
            if group not in shown:
                # A point between two gaps has no line, so broken lines get dots.
                dots = "." if any(math.isnan(v) for v in values) else ""
                axes.plot(
                    rounds, values, marker=dots, ms=3, color=BASE, lw=0.8, alpha=0.45, zorder=1
                )
        for i, group in enumerate(shown):
            colour = GROUPS[i % len(GROUPS)]
            marker = "o" if few or any(math.isnan(v) for v in drawn[group]) else ""
            axes.plot(
                rounds, drawn[group], color=colour, linewidth=2, marker=marker, ms=4, zorder=3
            )
            labels.append((_last(drawn[group]), group, colour))
        if mean:
            values = _mean(drawn, len(rounds))
            axes.plot(rounds, values, color=INK, linewidth=2.6, zorder=4)
            labels.append((_last(values), "mean", INK))
        for height, label in levels:
            axes.axhline(height, color=MUTED, linewidth=1, dashes=(4, 3), zorder=2)
            labels.append((height, label, MUTED))
        if zero:
            axes.set_ylim(bottom=0)
        if bounds is not None:
            low, high = bounds
            axes.set_ylim(low, high + 0.03 * (high - low))  # a line at the top keeps its width
        axes.set_xlim(rounds[0] - 0.25, rounds[-1] + 0.25)
        axes.xaxis.set_major_locator(MaxNLocator(6 if width == NARROW else 12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.set_xlabel(time, color=MUTED)
        axes.set_title(axis, loc="left", color=MUTED, fontsize=12, pad=10, x=0)
        _label_ends(axes, labels, 15 if width == NARROW else 24)

    def size(width: int) -> tuple[int, int, int, int, int]:
        count = len(shown) + mean + len(levels)
        height = max(230 if width == NARROW else 280, 17 * count + 90)
        return (height, 44, 118 if width == NARROW else 190, 34, 44)

    return _both(draw, size, axis)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], longest: int) -> None:
    """Write each label right of the plot at its line's end, pushed apart so that none overlap."""
    low, high = axes.get_ylim()
    box = axes.get_window_extent()
    step = 17 / box.height
    wanted = sorted(((v - low) / (high - low), text, colour) for v, text, colour in labels)
    places: list[float] = []
    for place, _, _ in wanted:
        places.append(max(place, places[-1] + step) if places else place)
    # Whatever was pushed out of the top comes back down, label under label.
    limit = 1.0
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], limit)
        limit = places[i] - step
    for (true, text, colour), place in zip(wanted, places, strict=True):
        axes.annotate(
            shorten(text, longest),
            xy=(1, true),
            xytext=(1 + 14 / box.width, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 2, "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _both(
    draw: Callable[[Axes, int], None],
    size: Callable[[int], tuple[int, int, int, int, int]],
    label: str,
) -> Drawing:
    return Drawing(*(_svg(draw, width, size(width), label) for width in (WIDE, NARROW)))


def _svg(
    draw: Callable[[Axes, int], None],
    width: int,
    size: tuple[int, int, int, int, int],
    label: str,
) -> str:
    """Return an SVG element; ``size`` is (height, left, right, top, bottom) in pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    height, left, right, top, bottom = size
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{label}{width}",
        "text.parse_math": False,
        "font.size": 12.5,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": RULE,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.unicode_minus": True,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.major.size": 4,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser brings its own fonts: a letter that this one lacks is no problem here.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes(
            (
                left / width,
                bottom / height,
                (width - left - right) / width,
                (height - top - bottom) / height,
            )
        )
        draw(axes, width)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _clean(buffer.getvalue(), width, height, quoteattr(label))


def _clean(svg: str, width: int, height: int, label: str) -> str:
    """Keep the drawing only: no prologue, no unused ids, page colours, the page's own font."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    used = set(re.findall(r"#([A-Za-z_][\w-]*)", body))
    body = re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in used else "", body)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label={label} '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )


def shorten(text: str, longest: int) -> str:
    """Return the text, or its beginning and an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _broken(values: Mapping[int, float], rounds: Sequence[int]) -> list[float]:
    # Not a number is matplotlib's way to break a line; it never leaves this file.
    return [values.get(r, math.nan) for r in rounds]


def _last(values: Sequence[float]) -> float:
    return next(v for v in reversed(values) if not math.isnan(v))


def _mean(drawn: Mapping[str, Sequence[float]], n: int) -> list[float]:
    means = []
    for i in range(n):
        here = [values[i] for values in drawn.values() if not math.isnan(values[i])]
        means.append(sum(here) / len(here) if here else math.nan)
    return means


def _or(first: float | None, second: float | None) -> float:
    return first if first is not None else second if second is not None else -1.0
