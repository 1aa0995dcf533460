"""Small drawings of the status page: lines over rounds and weight bars, as inline SVG.

Only numbers go in, and colours come from classes: the page's policy allows no style attributes.
"""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

WIDTH, HEIGHT, MARGIN = 120, 28, 3


def spark(values: Mapping[int, float], low: float, high: float, first: int, last: int) -> Markup:
    """Return a line over rounds ``first`` to ``last``, ``low`` at the bottom, ``high`` on top.

    A round without a value breaks the line; a value without neighbours is a dot.
    """
    if not values:
        return Markup("–")
    across = (WIDTH - 2 * MARGIN) / max(1, last - first)
    room = high - low

    def point(r: int) -> tuple[float, float]:
        up = 0.5 if room <= 0 else (values[r] - low) / room
        return MARGIN + across * (r - first), HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * up

    parts: list[list[int]] = []
    for r in sorted(values):
        if parts and parts[-1][-1] == r - 1:
            parts[-1].append(r)
        else:
            parts.append([r])
    drawn = []
    for part in parts:
        points = [point(r) for r in part]
        if len(points) > 1:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            drawn.append(f'<polyline points="{text}"/>')
        else:
            drawn.append(_dot(*points[0], 1.6))
    end = max(values)
    drawn.append(_dot(*point(end), 2.4))
    label = f"{values[min(values)]:.3f} at {min(values)}, {values[end]:.3f} at {end}"
    return Markup(
        f'<svg class="spark" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{label}"><title>{label}</title>'
        f'<line class="edge" x1="0" x2="{WIDTH}" y1="{HEIGHT - 0.5}" y2="{HEIGHT - 0.5}"/>'
        f"{''.join(drawn)}</svg>"
    )


def weight_bar(weight: float | None, groups: int, most: float) -> Markup:
    """Return a bar of a weight, full at ``most``, with a mark at the equal share 1/``groups``."""
    if weight is None:
        return Markup("")
    width, height = 72, 10
    full = max(most, 1 / groups)
    fill, even = width * weight / full, width / groups / full
    label = f"{weight:.3f}; an equal share is {1 / groups:.3f}"
    return Markup(
        f'<svg class="weight" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}"><title>{label}</title>'
        f'<rect class="room" width="{width}" height="{height}" rx="2"/>'
        f'<rect class="fill" width="{fill:.1f}" height="{height}" rx="2"/>'
        f'<line class="even" x1="{even:.1f}" x2="{even:.1f}" y1="0" y2="{height}"/></svg>'
    )


def _dot(x: float, y: float, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
