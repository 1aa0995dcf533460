"""What a person sees while a run goes on.  The run loop calls these; the command draws them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

log = logging.getLogger("fedalign.server")


class Progress(Protocol):
    """Receives what happens, in order.  Must not fail: a display never stops a run."""

    def start(self, out: str, clients: int, groups: int, rounds: int) -> None:
        """The federation is known; training can begin."""

    def phase(self, name: str, detail: str = "") -> None:
        """A named phase begins."""

    def round(
        self, round_: int, rounds: int, scores: Mapping[str, float], weights: Mapping[str, float]
    ) -> None:
        """A round is committed."""

    def warn(self, text: str) -> None:
        """Something went wrong that the run survives."""


class LogProgress:
    """Plain log lines, for ``flwr run`` and for tests."""

    def start(self, out: str, clients: int, groups: int, rounds: int) -> None:
        """Log where the output goes."""
        log.info("run folder %s: %d clients in %d groups, %d rounds", out, clients, groups, rounds)

    def phase(self, name: str, detail: str = "") -> None:
        """Log the phase."""
        log.info("phase %s %s", name, detail)

    def round(
        self, round_: int, rounds: int, scores: Mapping[str, float], weights: Mapping[str, float]
    ) -> None:
        """Log the worst-served group of the round, of those that give a score."""
        if not scores:
            log.info("round %d/%d: every site withholds its score", round_, rounds)
            return
        worst = min(scores, key=lambda g: scores[g])
        log.info(
            "round %d/%d: worst '%s' %.4f, its weight %.3f",
            round_,
            rounds,
            worst,
            scores[worst],
            weights.get(worst, 0.0),
        )

    def warn(self, text: str) -> None:
        """Log a warning."""
        log.warning("%s", text)
