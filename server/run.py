"""The run loop: phases, attempts, early stop, resume.  Thin; the strategy's hooks do the work.

Phases, each committed by the rename of the checkpoint::

    hello     who is there (asked anew whenever a process starts; never committed)
    base      score the untouched base on validation and test; starts the histories
    predictor rounds of federated averaging of the preference predictor, where sites answer by it
    train     rounds 1..T, in mode ``rewards`` exchanges
    final     score the final adapter on validation and test
    personal  local steps that never leave the clients; only test scores come back

A commit is: rows to the ledger (one transaction) -> checkpoint written aside and renamed -> the
ledger told that the rows count.  Killed anywhere, a run resumes after the last rename; an attempt
that was not committed is repeated as a new attempt from the same keyed draws, so the result is
bit-equal to a run that was never disturbed.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedalign import wire
from fedalign.config import Config, config_hash, resolve_metric, to_flat
from fedalign.errors import FedalignError, ResumeError, RunFailed, StorageError
from fedalign.ledger import Ledger
from fedalign.report.html import build_report
from fedalign.runfolder import ADAPTER, CHECKPOINT, LEDGER, NO_OPTION_MASS, SPOOL
from server import checkpoint as checkpoints
from server import link
from server.asking import QuorumMissed
from server.checkpoint import Checkpoint
from server.enrolled import Enrolled, open_enrolled
from server.exchange_round import open_policy, predictor_inputs, run_exchange
from server.export import write_adapter
from server.hello import ask_hello
from server.opening import check_possible, client_rows, open_run, option_mass
from server.predictor import aggregate_predictor, configure_predictor, first_predictor
from server.presence import Presence
from server.progress import Progress
from server.rlhf import Policy, RewardStrategy
from server.roll_call import call_sites
from server.strategy import GroupStrategy

log = logging.getLogger("fedalign.server")


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports to the command that started it."""

    folder: Path
    report: Path
    rounds: int
    option_mass_ok: bool
    option_mass: str
    """Base and final option mass in words; empty where it is not defined."""


def execute(
    grid: Grid,
    config: Config,
    progress: Progress,
    poll: float = 0.05,
    enrolled: Enrolled | None = None,
) -> Outcome:
    """Run, or go on with, the federation described by ``config``; ``config.run.out`` is prepared.

    ``enrolled`` are the sites of a deployment; without them ``deployment.registry`` says who they
    are, and where that is empty the run is a simulation.

    Raises ``RunFailed`` when a phase misses its quorum ``run.max-attempts`` times or the disk is
    full (``StorageError``), and ``ResumeError`` when the folder's run has other settings.
    """
    folder = Path(config.run.out)
    enrolled = enrolled or open_enrolled(config.deployment)
    with Ledger(folder / LEDGER) as ledger:
        progress.phase("hello", "loading model and data")
        try:
            if enrolled is None:
                directory = ask_hello(grid, config, poll)
            else:
                directory = call_sites(grid, config, enrolled, ledger, progress, poll)
            metric = resolve_metric(config, directory.form)
            check_possible(config, directory, metric)
            state = open_run(folder, config, directory, ledger, progress)
        except ResumeError as error:
            ledger.event("not-resumed", str(error))
            raise
        except FedalignError as error:
            _failed(ledger, error)
            raise
        kind = RewardStrategy if config.run.mode == "rewards" else GroupStrategy
        strategy = kind(config, directory, ledger, folder, metric)
        strategy.state = state.rule_state
        strategy.enrolled = enrolled
        ledger.put_run(
            config=to_flat(config),
            config_hash=config_hash(config),
            metric=metric,
            form=directory.form,
            versions=dict(directory.versions),
            manifest=directory.manifest.to_json(),
            status="running",
            started=time.time(),
        )
        ledger.put_clients(client_rows(directory, ledger))
        progress.start(
            str(folder), len(directory.members), len(directory.groups), config.run.rounds
        )
        try:
            presence = (
                None if enrolled is None else Presence(grid, enrolled, strategy, progress, poll)
            )
            run = _Run(grid, config, strategy, ledger, folder, progress, poll, state, presence)
            run.base()
            run.predictor()
            run.train()
            run.final()
            run.personal()
            shutil.rmtree(folder / SPOOL, ignore_errors=True)
            write_adapter(run.state, ledger, folder / ADAPTER)
        except RunFailed as error:
            _failed(ledger, error)
            raise
        before, after = option_mass(ledger, "base"), option_mass(ledger, "shared")
        mass_ok = after is None or after >= config.score.min_option_mass
        ledger.put_run(status="completed" if mass_ok else NO_OPTION_MASS)
    progress.phase("report")
    masses = "" if after is None else f"{after:.3f} at the end"
    if before is not None and after is not None:
        masses = f"{before:.3f} at the base, {masses}"
    return Outcome(folder, build_report(folder), run.state.round, mass_ok, masses)


def _failed(ledger: Ledger, error: FedalignError) -> None:
    try:
        ledger.event("run-failed", str(error))
        ledger.put_run(status=f"failed: {error}")
    except StorageError as full:
        # The disk that failed the run cannot take the note either; the error itself goes on.
        log.error("%s", full)


class _Run:
    """One process's part of a run: every method does what is left of its phase."""

    def __init__(
        self,
        grid: Grid,
        config: Config,
        strategy: GroupStrategy,
        ledger: Ledger,
        folder: Path,
        progress: Progress,
        poll: float,
        state: Checkpoint,
        presence: Presence | None,
    ) -> None:
        self.grid = grid
        self.config = config
        self.strategy = strategy
        self.ledger = ledger
        self.folder = folder
        self.progress = progress
        self.poll = poll
        self.state = state
        self.presence = presence
        self._arrays = wire.adapter_record(state.adapter)
        self._policy: Policy | None = None
        self._predictor: wire.F32 = np.zeros(0, dtype=np.float32)

    def base(self) -> None:
        """Score the untouched base; its validation scores are the histories' cold start."""
        if self.state.commits:
            return
        self.progress.phase("base", "scoring the untouched base")
        self._evaluate("base", 0)
        self._commit("base", 0, rule_state=self.strategy.state)
        mass, least = option_mass(self.ledger, "base"), self.config.score.min_option_mass
        if mass is not None and mass < least:
            what = (
                f"puts only {mass:.2f} of its probability on the answer options"
                if self.config.rewards.task == "letter"
                else f"writes a well-formed answer in only {mass:.0%} of its texts"
            )
            self.progress.warn(
                f"the untouched base {what} "
                f"(score.min-option-mass = {least:g}): it does not know these questions' format. "
                "Train a pocket on your survey (docs/pocket.md) or choose another model."
            )

    def predictor(self) -> None:
        """Train the preference predictor, where the sites' policy lets one answer."""
        strategy, config = self.strategy, self.config
        if config.site.answers == "shares" or self.state.phase not in ("base", "predictor"):
            return
        # One message more than rounds: it trains nothing and brings the frozen predictor's error.
        for round_ in range(self._done("predictor") + 1, config.predictor.rounds + 2):
            if round_ == 1:
                self.progress.phase("predictor", "federated averaging of the preference predictor")
            flat = self.state.arrays.get("predictor")
            if flat is None:
                flat = first_predictor(strategy, predictor_inputs(config))

            def attempt(r: int, flat: wire.F32 = flat) -> None:
                replies = self._exchange(configure_predictor(strategy, r, flat))
                self._predictor = aggregate_predictor(strategy, r, flat, replies)

            self._attempts("predictor", round_, attempt)
            self._commit("predictor", round_, arrays={"predictor": self._predictor})

    def train(self) -> None:
        """Do the rounds that are left."""
        one_round = self._exchange_round if self.config.run.mode == "rewards" else self._train_round
        while not self.state.training_done:
            round_ = self.state.round + 1
            self._attempts("train", round_, one_round)
            result = self.strategy.result
            assert result is not None
            histories = result.state.history
            best, since = self._early_stop(
                [histories[g].value for g in self.strategy.directory.groups if g in histories]
            )
            patience = self.config.run.early_stop_patience
            stop = patience > 0 and since >= patience
            self._commit(
                "train",
                round_,
                round=round_,
                adapter=result.adapter,
                rule_state=result.state,
                best=best,
                rounds_since_best=since,
                training_done=stop or round_ >= self.config.run.rounds,
                arrays={**self.state.arrays, **result.arrays},
            )
            if self.strategy.spool is not None:
                self.strategy.spool.delete()
            if self._policy is not None:
                self._policy.adopt()
            self._arrays = wire.adapter_record(result.adapter)
            if stop:
                self.ledger.event("early-stop", phase="train", round=round_)
            self.progress.round(round_, self.config.run.rounds, result.scores, result.weights)

    def final(self) -> None:
        """Score the final shared adapter."""
        if self.state.phase not in ("train",):
            return
        self.progress.phase("final", "scoring the shared adapter on test")
        self._evaluate("final", self.state.round)
        self._commit("final", self.state.round)

    def personal(self) -> None:
        """Let every client adapt on its own; nothing but test scores comes back."""
        if self.state.phase != "final" or self.config.personal.steps == 0:
            return
        self.progress.phase("personal", "local steps that stay with the clients")
        self._attempts("personal", self.state.round, self._personal)
        self._commit("personal", self.state.round)

    # --- one attempt --------------------------------------------------------------------------

    def _train_round(self, round_: int) -> None:
        messages = self.strategy.configure_train(round_, self._arrays, ConfigRecord(), self.grid)
        self.strategy.aggregate_train(round_, self._exchange(messages))

    def _exchange_round(self, round_: int) -> None:
        strategy = self.strategy
        assert isinstance(strategy, RewardStrategy)
        if self._policy is None:
            self._policy = open_policy(self.config, strategy, self.state, self.ledger)
        run_exchange(
            strategy, self._policy, round_, self.state.arrays, self._exchange, self.progress.warn
        )

    def _personal(self, round_: int) -> None:
        messages = self.strategy.configure_personal(round_, self._arrays)
        self.strategy.aggregate_personal(round_, self._exchange(messages))

    def _evaluate(self, phase: str, round_: int) -> None:
        config = ConfigRecord({"phase": phase, "splits": ",".join(self.strategy.splits)})

        def attempt(r: int) -> None:
            messages = self.strategy.configure_evaluate(r, self._arrays, config, self.grid)
            self.strategy.aggregate_evaluate(r, self._exchange(messages))

        self._attempts(phase, round_, attempt)

    def _attempts(self, phase: str, round_: int, attempt: Callable[[int], None]) -> None:
        first = self._next_attempt(phase, round_)
        last = first + self.config.run.max_attempts - 1
        for number in range(first, last + 1):
            self.strategy.attempt = number
            if self.presence is not None:
                self.presence.before(phase, round_)
            try:
                attempt(round_)
                return
            except QuorumMissed as error:
                if (phase, round_, number) not in self.ledger.attempts():
                    self.ledger.write(phase, round_, number)
                self.ledger.event(
                    "round-void", str(error), phase=phase, round=round_, attempt=number
                )
                self.progress.warn(str(error))
                failure = error
                if self.presence is not None and number < last:
                    self.presence.after_failure(phase, round_)
        raise RunFailed(f"gave up after {self.config.run.max_attempts} attempts. {failure}")

    def _done(self, phase: str) -> int:
        """Rounds of a phase that are committed."""
        return max((r for p, r, _ in self.state.commits if p == phase), default=0)

    def _next_attempt(self, phase: str, round_: int) -> int:
        """Attempts are numbered on over restarts: one more than any the ledger has rows of."""
        return 1 + max(
            (a for p, r, a in self.ledger.attempts() if (p, r) == (phase, round_)), default=0
        )

    def _exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Push all messages now; yield replies as they come, until the round's time is over."""
        try:
            waiting = link.push(self.grid, messages)
        except link.NotSent as error:
            raise self.strategy.not_sent(error) from error
        end = time.monotonic() + self.config.run.round_timeout
        return self._pull(waiting, end)

    def _pull(self, waiting: set[str], end: float) -> Iterator[Message]:
        while waiting and time.monotonic() < end:
            got = False
            for reply in link.pull(self.grid, waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                got = True
                yield reply
            if not got and waiting:
                time.sleep(self.poll)

    # --- commit -------------------------------------------------------------------------------

    def _commit(self, phase: str, round_: int, **changes: object) -> None:
        triple = (phase, round_, self.strategy.attempt)
        self.state = replace(
            self.state,
            phase=phase,
            commits=(*self.state.commits, triple),
            **changes,  # type: ignore[arg-type]
        )
        checkpoints.save(self.folder / CHECKPOINT, self.state)
        self.ledger.commit(*triple)

    def _early_stop(self, values: list[float]) -> tuple[float | None, int]:
        """Return best value and rounds since; ``values`` are the histories of *all* groups, so that
        rounds with other clients can be compared.  Where every group withholds, nothing stops."""
        if self.config.run.early_stop_patience == 0 or not values:
            return None, 0
        worst = self.config.run.early_stop_on == "worst"
        value = min(values) if worst else sum(values) / len(values)
        if self.state.best is None or value > self.state.best:
            return value, 0
        return self.state.best, self.state.rounds_since_best + 1
