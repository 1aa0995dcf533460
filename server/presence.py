"""Who of a deployment's sites is there, from round to round.

Before every attempt of a phase or round the directory is brought up to date: node ids are read anew
from Flower (a site with a renewed key has another one), a site that is offline has none, and a site
that was revoked is removed.  Where its group has no other site, the group is out of the run: it has
no weight any more, and its history stays as it was.

**Waiting.**  A site that restarts is away for a minute.  So that this does not cost a round:

- before an attempt, where the quorum cannot be met with those online, we wait for the others, at
  most ``LONGEST`` seconds (and never longer than ``run.round-timeout``).  Phases that score
  everybody once (base, final, personal) wait so for everybody;
- after an attempt below quorum we wait for those that were lost to be online again, in the same
  bounds, and at least ``PAUSE`` seconds: a site that is online may still be starting its trainer.
  What a site's own policy refused, it will refuse again: for that alone we do not wait.

An attempt draws nothing anew, so a round that is repeated with everybody back gives the adapter of
an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.serverapp import Grid

from fedalign.errors import RunFailed
from fedalign.wire import POLICY_CODES
from server.asking import REVOKED
from server.enrolled import Enrolled
from server.progress import Progress
from server.strategy import GroupStrategy

LONGEST = 60.0
"""Seconds to wait for sites to come back, before an attempt and after one."""
PAUSE = 15.0
"""Least seconds between an attempt in which a site failed and the next."""
EVERYBODY = ("base", "final", "personal")


class Presence:
    """Keeps the strategy's directory true to who is online and still enrolled."""

    def __init__(
        self,
        grid: Grid,
        enrolled: Enrolled,
        strategy: GroupStrategy,
        progress: Progress,
        poll: float,
    ) -> None:
        self.grid = grid
        self.enrolled = enrolled
        self.strategy = strategy
        self.progress = progress
        self.poll = poll
        self._longest = min(LONGEST, strategy.config.run.round_timeout)

    def before(self, phase: str, round_: int) -> None:
        """Bring the directory up to date, and wait for those without whom the round is void."""

        def enough() -> bool:
            asked = self.strategy.asked(phase, round_)
            needed = len(asked) if phase in EVERYBODY else self.strategy.needed(len(asked))
            return len(asked) - len(self._away(asked)) >= needed

        self._wait(lambda: self._away(self.strategy.asked(phase, round_)), enough, least=0.0)

    def after_failure(self, phase: str, round_: int) -> None:
        """Wait for the sites that the attempt lost; return at once where waiting cannot help."""
        lost = {
            client
            for client, reason in self.strategy.failed.items()
            if reason != REVOKED and reason not in POLICY_CODES
        }
        self._wait(
            lambda: self._away(lost),
            lambda: not self._away(lost),
            least=min(PAUSE, self._longest) if lost else 0.0,
        )

    def _away(self, clients: set[str] | tuple[str, ...]) -> list[str]:
        members = self.strategy.directory.members
        return sorted(c for c in clients if c in members and members[c].node is None)

    def _wait(
        self, away: Callable[[], list[str]], enough: Callable[[], bool], least: float
    ) -> None:
        began = time.monotonic()
        said = False
        while True:
            self._refresh()
            passed = time.monotonic() - began
            if (enough() and passed >= least) or passed >= self._longest:
                return
            if not said and away():
                said = True
                self.progress.warn(
                    f"waiting up to {self._longest:.0f} s for {', '.join(away())} to come back"
                )
            time.sleep(min(self.poll, self._longest))

    def _refresh(self) -> None:
        strategy, ledger = self.strategy, self.strategy.ledger
        before = strategy.directory
        active = self.enrolled.active()
        gone = [c for c, m in before.members.items() if active.get(c) != m.group]
        for client in gone:
            ledger.event("site-revoked", client=client)
            self.enrolled.note("site-left-run", site=client, run=strategy.config.run.name)
            self.progress.warn(f"site '{client}' is no longer enrolled; the run goes on without it")
        if len(gone) == len(before.members):
            raise RunFailed("no site of this run is enrolled any more; there is nobody to train.")
        now = before.without(gone).located(self.enrolled.online(self.grid))
        for client, member in now.members.items():
            was = before.members[client].node
            if was is not None and member.node is None:
                ledger.event("site-offline", client=client)
            elif was is None and member.node is not None:
                ledger.event("site-back", client=client)
        strategy.relocate(now)
