"""Progress on the terminal: phase, round, groups, weights, time left; one line each."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

SHOWN = 6
"""Groups printed in a round's line; the others are counted."""


class TerminalProgress:
    """Prints one line for each phase and round, with an estimate of the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._began = time.monotonic()
        self._training: float | None = None
        self._first_round: int | None = None
        self.folder = ""
        """Run folder, once it is known."""

    def start(self, out: str, clients: int, groups: int, rounds: int) -> None:
        """Print where the output goes."""
        self.folder = out
        self.console.print(f"run folder  {escape(out)}", soft_wrap=True)
        self.console.print(f"population  {clients} clients in {groups} groups, {rounds} rounds")

    def phase(self, name: str, detail: str = "") -> None:
        """Print the phase with the time since the start."""
        elapsed = time.monotonic() - self._began
        self.console.print(f"[dim]{elapsed:6.1f}s[/]  {name:<10}  {escape(detail)}")
        self._training = time.monotonic()

    def round(
        self, round_: int, rounds: int, scores: Mapping[str, float], weights: Mapping[str, float]
    ) -> None:
        """Print the groups, worst served first, with their weights."""
        now = time.monotonic()
        if self._first_round is None:
            self._first_round = round_
        done = round_ - self._first_round + 1
        left = (now - (self._training or now)) / done * (rounds - round_)
        ranked = sorted(scores, key=lambda g: (scores[g], g))
        text = "  ".join(
            f"{escape(g)} {scores[g]:.3f} [dim]w {weights.get(g, 0.0):.2f}[/]"
            for g in ranked[:SHOWN]
        )
        more = f"  [dim]+{len(ranked) - SHOWN} groups[/]" if len(ranked) > SHOWN else ""
        elapsed = now - self._began
        self.console.print(
            f"[dim]{elapsed:6.1f}s[/]  round {round_:>2}/{rounds}  {text}{more}  "
            f"[dim]~{left:.0f}s left[/]",
            soft_wrap=True,
        )

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"[yellow]warning[/]  {escape(text)}", soft_wrap=True)


class QuietProgress:
    """Shows nothing; comparisons print a line for each run instead."""

    def start(self, out: str, clients: int, groups: int, rounds: int) -> None:
        """Ignore."""

    def phase(self, name: str, detail: str = "") -> None:
        """Ignore."""

    def round(
        self, round_: int, rounds: int, scores: Mapping[str, float], weights: Mapping[str, float]
    ) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Ignore."""
