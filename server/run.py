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

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
from fedalign.aggregation.records import RuleState
from fedalign.config import Config, config_hash, resolve_metric, to_flat, to_json
from fedalign.errors import ConfigError, ResumeError, RunFailed
from fedalign.ledger import ClientRow, Ledger
from fedalign.models.layout import pack
from fedalign.report.html import build_report
from fedalign.runfolder import ADAPTER, CHECKPOINT, LEDGER, SPOOL
from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint
from server.directory import Directory
from server.exchange_round import open_policy, predictor_inputs, run_exchange
from server.export import write_adapter
from server.hello import ask_hello
from server.predictor import aggregate_predictor, configure_predictor, first_predictor
from server.progress import Progress
from server.rlhf import Policy, RewardStrategy
from server.strategy import GroupStrategy, QuorumMissed


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports to the command that started it."""

    folder: Path
    report: Path
    rounds: int
    option_mass_ok: bool
    option_mass: str
    """Base and final option mass in words; empty where it is not defined."""


def execute(grid: Grid, config: Config, progress: Progress, poll: float = 0.05) -> Outcome:
    """Run, or go on with, the federation described by ``config``; ``config.run.out`` is prepared.

    Raises ``RunFailed`` when a phase misses its quorum ``run.max-attempts`` times, and
    ``ResumeError`` when the folder's run has other settings.
    """
    folder = Path(config.run.out)
    with Ledger(folder / LEDGER) as ledger:
        progress.phase("hello", "loading model and data")
        directory = ask_hello(grid, config, poll)
        metric = resolve_metric(config, directory.form)
        _check_possible(config, directory, metric)
        state = _open(folder, config, directory, ledger, progress)
        kind = RewardStrategy if config.run.mode == "rewards" else GroupStrategy
        strategy = kind(config, directory, ledger, folder, metric)
        strategy.state = state.rule_state
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
        ledger.put_clients(
            [
                ClientRow(m.client, m.group, directory.form, m.train, m.validation, m.test, m.size)
                for m in directory.members.values()
            ]
        )
        progress.start(
            str(folder), len(directory.members), len(directory.groups), config.run.rounds
        )
        try:
            run = _Run(grid, config, strategy, ledger, folder, progress, poll, state)
            run.base()
            run.predictor()
            run.train()
            run.final()
            run.personal()
        except RunFailed as error:
            ledger.event("run-failed", str(error))
            ledger.put_run(status=f"failed: {error}")
            raise
        shutil.rmtree(folder / SPOOL, ignore_errors=True)
        before, after = _option_mass(ledger, "base"), _option_mass(ledger, "shared")
        mass_ok = after is None or after >= config.score.min_option_mass
        ledger.put_run(status="completed" if mass_ok else "failed: option mass")
        write_adapter(run.state, ledger, folder / ADAPTER)
    progress.phase("report")
    masses = "" if after is None else f"{after:.3f} at the end"
    if before is not None and after is not None:
        masses = f"{before:.3f} at the base, {masses}"
    return Outcome(folder, build_report(folder), run.state.round, mass_ok, masses)


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
    ) -> None:
        self.grid = grid
        self.config = config
        self.strategy = strategy
        self.ledger = ledger
        self.folder = folder
        self.progress = progress
        self.poll = poll
        self.state = state
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
        mass, least = _option_mass(self.ledger, "base"), self.config.score.min_option_mass
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
            best, since = self._early_stop({g: h.value for g, h in result.state.history.items()})
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
        for number in range(first, first + self.config.run.max_attempts):
            self.strategy.attempt = number
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
        waiting = set(self.grid.push_messages(messages))
        end = time.monotonic() + self.config.run.round_timeout
        return self._pull(waiting, end)

    def _pull(self, waiting: set[str], end: float) -> Iterator[Message]:
        while waiting and time.monotonic() < end:
            got = False
            for reply in self.grid.pull_messages(list(waiting)):
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

    def _early_stop(self, scores: dict[str, float]) -> tuple[float | None, int]:
        """Return best value and rounds since; ``scores`` are the histories of *all* groups, so that
        rounds with other clients can be compared."""
        if self.config.run.early_stop_patience == 0:
            return None, 0
        values = list(scores.values())
        worst = self.config.run.early_stop_on == "worst"
        value = min(values) if worst else sum(values) / len(values)
        if self.state.best is None or value > self.state.best:
            return value, 0
        return self.state.best, self.state.rounds_since_best + 1


def _open(
    folder: Path, config: Config, directory: Directory, ledger: Ledger, progress: Progress
) -> Checkpoint:
    """Return the checkpoint to go on from: the run's last, or a fresh start."""
    path = folder / CHECKPOINT
    if path.exists():
        if not config.run.resume:
            raise ResumeError(f"{folder} holds a run; set run.resume = true to go on with it.")
        found = checkpoints.load(path)
        for warning in checkpoints.check_resumable(
            found, config, directory.manifest, directory.versions
        ):
            progress.warn(warning)
            ledger.event("version-changed", warning)
        ledger.set_commits(found.commits)
        ledger.event("resumed", f"after {found.phase} {found.round}")
        return found
    manifest = directory.manifest
    adapter = pack(initial_adapter(dict(manifest.layout), config.run.seed), manifest.layout)
    return Checkpoint(
        config_json=to_json(config),
        config_hash=config_hash(config),
        manifest_json=manifest.to_json(),
        versions=dict(directory.versions),
        phase="",
        round=0,
        training_done=False,
        best=None,
        rounds_since_best=0,
        rule_state=RuleState(),
        commits=(),
        adapter=np.asarray(adapter, dtype=np.float32),
    )


def _check_possible(config: Config, directory: Directory, metric: str) -> None:
    if config.run.clients_per_round > len(directory.members):
        raise ConfigError(
            f"run.clients-per-round = {config.run.clients_per_round}, but there are "
            f"{len(directory.members)} clients. Use at most that many, or 0 for all."
        )
    empty = [m.client for m in directory.members.values() if not (m.train and m.validation)]
    if empty:
        raise RunFailed(f"client '{empty[0]}' has no training or no validation questions.")


def _option_mass(ledger: Ledger, stage: str) -> float | None:
    """Return the mean probability on the answer options over test questions; None for pairs."""
    rows = [(s.option_mass, s.n) for s in ledger.scores(stage, "test") if s.option_mass is not None]
    total = sum(n for _, n in rows)
    return sum(m * n for m, n in rows) / total if total else None
