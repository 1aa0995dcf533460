"""The enrolled site: one client, its own data, its policy, its budget.

What :func:`clients.handlers.handle` asks of a site is answered here with distrust: settings are
replaced where they are the site's own (``site.py``), judged (``site_policy.py``) and counted
(``budget.py``) before any work; what leaves is rounded, withheld, clipped (``release.py``,
``noise.py``).

While a job runs, a timer writes down how long it took so far, and stops it when the seconds of the
day are used up.  It interrupts whatever Python code runs, so what the trainer held in memory is
then made anew.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import RecordDict

from clients import release
from clients.budget import Budget
from clients.handlers import Refused, SiteContext, handle
from clients.noise import load_key, protect
from clients.site import Home, SiteSettings, local_flat, own_client
from clients.site_policy import Policy, judge, stricter
from fedalign import wire
from fedalign.aggregation.adapters import ROW_NORM
from fedalign.config import Config, DataConfig, config_hash, from_flat, resolve_metric
from fedalign.data.records import ClientData
from fedalign.errors import ConfigError, WireError
from fedalign.metrics.alignment import SCORE_LOW
from fedalign.wire.predictor import PredictorReply

if TYPE_CHECKING:
    from clients.trainer import ResidentTrainer

log = logging.getLogger("fedalign.client")

TICK = 5.0
"""Seconds between two notes of how long a job has run."""


class OutOfTime(BaseException):
    """The seconds of the day are used up; no handler of ordinary errors may swallow it."""


class EnrolledSite(SiteContext):
    """The one client of this site, as its policy lets it take part.

    ``last`` says of the last request what the audit log keeps: run (a prefix of the hash of its
    settings) and round.
    """

    def __init__(
        self,
        home: Home,
        settings: SiteSettings,
        policy: Policy,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.policy = policy
        self.last: dict[str, str | int] = {}
        self._home = home
        self._clock = clock
        self._budget = Budget(home.budget)
        self._key = load_key(home.trainer / "noise.key") if policy.update.noise else b""
        self._client: tuple[tuple[DataConfig, int], ClientData] | None = None
        self._config: Config | None = None
        self._job: int | None = None
        self._began = 0.0
        self._seconds_before = 0.0

    def serve(self, kind: str, content: RecordDict) -> RecordDict:
        """Return the answer to one request; what it cost is on disk before this returns.

        Raises ``DataError`` where the budget cannot be kept.
        """
        self.last = {}
        try:
            return handle(kind, content, self)
        except OutOfTime:
            log.error("%s: stopped, the seconds of the day are used up", kind)
            self._forget()
            return wire.encode_failure((self.settings.name,), wire.BUDGET_EXHAUSTED)
        finally:
            self._settle()

    # --- what handlers ask ----------------------------------------------------------------------

    def config(self, kind: str, request: wire.Request) -> Config:
        """Return the run's settings as they hold here; counts the job as begun."""
        self.last = {"round": request.round}
        mine = (self.settings.name,)
        if request.clients != mine and not (kind == wire.HELLO and not request.clients):
            raise Refused(wire.UNKNOWN_CLIENT)
        config = self._local(request.config_json)
        self.last["run"] = config_hash(config)[:16]
        spent = self._budget.spent(self._clock())
        least = self.policy.training.min_examples
        status = judge(self.policy, config, kind, spent, least)
        if status is None and kind == wire.PERSONAL and not 0 <= request.round <= config.run.rounds:
            status = wire.REFUSED_SETTINGS
        if status is not None:
            raise Refused(status)
        self._start(kind, spent.seconds)
        # Reading the data under another split is work: without end, if it were not counted.
        if len(self._own(config).train) < least:
            raise Refused(wire.TOO_FEW_EXAMPLES)
        self._config = stricter(self.policy, config)
        return self._config

    def answering(self, kind: str, clients: tuple[str, ...]) -> tuple[str, ...]:
        """Return whom a failure is reported for: to ``hello`` always this site."""
        return clients if clients and kind != wire.HELLO else (self.settings.name,)

    def hosted(self, config: Config) -> tuple[str, ...]:
        """Return the site's one client."""
        return (self.settings.name,)

    def trainer(self, config: Config) -> ResidentTrainer:
        """Return the trainer of this run; base and prepared data stay in memory over rounds."""
        from clients.trainer import resident_trainer

        return resident_trainer(config, self._own(config))

    def release_scores(self, replies: Sequence[wire.ScoreReply]) -> list[wire.ScoreReply]:
        """Round or withhold scores."""
        return release.release_scores(self.policy.scores, replies, self._low())

    def release_training(
        self, round_: int, replies: Sequence[wire.TrainReply], received: wire.F32, updates: wire.F32
    ) -> tuple[list[wire.TrainReply], wire.F32]:
        """Round or withhold scores and losses; clip and noise updates."""
        out = [release.release_training(self.policy.scores, r, self._low()) for r in replies]
        settings = self.policy.update
        if not settings.clip:
            return out, updates
        if self._config is None or self._config.aggregation.method != "frozen-a":
            raise Refused(wire.REFUSED_AGGREGATION)
        sent = np.zeros_like(updates)
        for i, reply in enumerate(replies):
            if reply.status == wire.OK:
                sent[i] = protect(settings, self._key, round_, received, updates[i])
        return out, sent

    def largest_change(self) -> float | None:
        """Return the bound of ``update.clip`` on the factors; noise goes over it by its nature."""
        own = self.policy.update
        return own.clip / ROW_NORM if own.clip and not own.noise else None

    def release_predictor(self, replies: Sequence[PredictorReply]) -> list[PredictorReply]:
        """Round or withhold errors and losses."""
        return [release.release_predictor(self.policy.scores, r) for r in replies]

    # --- data and settings ----------------------------------------------------------------------

    def _local(self, config_json: str) -> Config:
        """Return the run's settings with everything replaced that is the site's own."""
        try:
            flat = json.loads(config_json)
            if not isinstance(flat, dict):
                raise WireError("bad-settings")
            config = from_flat(local_flat(flat, self.settings, self._home.store))
        except (ValueError, TypeError, RecursionError, ConfigError) as error:
            raise WireError("bad-settings", str(error)) from None
        out = self._home.store / config_hash(config)[:16]
        return replace(config, run=replace(config.run, out=str(out)))

    def _own(self, config: Config) -> ClientData:
        """Return the site's client under the run's split; the last one is kept."""
        key = (config.data, config.run.seed)
        if self._client is None or self._client[0] != key:
            self._client = (key, own_client(self.settings, config)[0])
        return self._client[1]

    def _low(self) -> float:
        assert self._config is not None
        return SCORE_LOW[resolve_metric(self._config, self._own(self._config).form)]

    # --- time -----------------------------------------------------------------------------------

    def _start(self, kind: str, seconds_before: float) -> None:
        self._job = self._budget.begin(kind, self._clock())
        self._began = time.monotonic()
        self._seconds_before = seconds_before
        most = self.policy.budget.max_seconds_per_day
        first = min(TICK, max(0.01, most - seconds_before)) if most else TICK
        signal.signal(signal.SIGALRM, self._tick)
        signal.setitimer(signal.ITIMER_REAL, first, TICK)

    def _tick(self, _: int, __: FrameType | None) -> None:
        if self._job is None:
            return
        seconds = time.monotonic() - self._began
        self._budget.worked(self._job, seconds)
        most = self.policy.budget.max_seconds_per_day
        if most and self._seconds_before + seconds >= most:
            raise OutOfTime

    def _settle(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if self._job is not None:
            number, self._job = self._job, None
            self._budget.worked(number, time.monotonic() - self._began)

    @staticmethod
    def _forget() -> None:
        from clients.resident import forget_base
        from clients.trainer import forget

        forget()
        forget_base()
