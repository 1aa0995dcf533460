"""The strategy: whom to ask, what a reply is worth, how adapters combine.  Flower's hooks only.

One round of adapter federation:

1. ``configure_train`` sends the global adapter to the sampled clients;
2. each client scores the adapter *as received* on its validation questions, trains, and replies;
3. ``aggregate_train`` checks every reply against the wire contract (``asking.py``).  Usable updates
   go to the spool, everything else is recorded with its reason and left out;
4. below quorum the round is void (``QuorumMissed``): the adapter and the histories stay as they
   were.  Otherwise: group scores -> rule -> group weights -> client weights -> aggregate.

The score of the received adapter is known before aggregation, so the weights of round t use a
history that includes round t.  **Absent groups**: a group none of whose replies is usable keeps its
history bit for bit and has weight 0 in the round; the others share the whole weight.  **Withheld
scores**: a site may train and not say how well it is served; its update counts, its group's history
stays as it is (``fedalign/aggregation/history.py``).  Only a site's own policy does that; in a
simulation a group without a defined score is an error.

The loop around the hooks is in ``run.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedalign import wire
from fedalign.aggregation import WEIGHT_RULES, history
from fedalign.aggregation.clients import client_weights, group_score
from fedalign.aggregation.records import (
    GroupObservation,
    Observation,
    RuleState,
    WeightSettings,
)
from fedalign.config import Config, personal_stages
from fedalign.errors import RunFailed
from fedalign.ledger import ItemRow, Ledger, ScoreRow
from fedalign.metrics.alignment import SCORE_LOW
from fedalign.runfolder import SPOOL
from server.asking import Asking, QuorumMissed
from server.combining import combine
from server.directory import Directory
from server.recording import Combined, Recorder
from server.spool import Spool


@dataclass(frozen=True)
class RoundResult:
    """What a closed round leaves behind."""

    adapter: wire.F32
    state: RuleState
    scores: dict[str, float]
    """By present group: validation score of the received adapter, or mean reward."""
    weights: dict[str, float]
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """What else the checkpoint must keep (mode ``rewards``)."""


def with_adapter(arrays: ArrayRecord) -> Callable[[wire.Request], RecordDict]:
    """Return a maker of messages that carry the global adapter, shared between them."""
    return lambda request: wire.encode_request(request, arrays)


class GroupStrategy(Asking, Strategy):
    """Reweights groups by how well they have been served so far."""

    def __init__(
        self, config: Config, directory: Directory, ledger: Ledger, folder: Path, metric: str
    ) -> None:
        super().__init__(config, directory, ledger)
        self.folder = folder
        self.recorder = Recorder(ledger, directory, metric)
        self.score_low = SCORE_LOW[metric]
        self.splits = (
            ("validation", "test", "train") if config.score.seen else ("validation", "test")
        )
        self.state = RuleState()
        self.spool: Spool | None = None
        self.result: RoundResult | None = None
        """Of the last ``aggregate_train``; read by the run loop."""
        w = config.weights
        self.settings = WeightSettings(
            temperature=w.temperature,
            decay=w.decay,
            floor=w.floor,
            ceiling=w.ceiling,
            step=w.step,
            q=w.q,
            seed=config.run.seed,
        )
        self._received: wire.F32 = np.zeros(0, dtype=np.float32)

    def relocate(self, directory: Directory) -> None:
        """Work with another directory from now on: sites have moved, left or come back."""
        self.directory = self.recorder.directory = directory

    # --- hooks ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled clients to score and train the global adapter."""
        chosen = self.asked("train", server_round)
        self._received = np.asarray(arrays["adapter"].numpy(), dtype=np.float32)
        download = self.config.wire.download
        if download != wire.FLOAT32:
            arrays = wire.broadcast_record(self._received, self.directory.manifest, download)
        return self.messages(wire.TRAIN, "train", server_round, chosen, with_adapter(arrays))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, spool, weight, combine.  Raises :class:`QuorumMissed` below quorum."""
        started = time.perf_counter()
        self.spool = Spool(self.folder / SPOOL / f"round-{server_round:06d}-{self.attempt}")
        usable: dict[str, wire.TrainReply] = {}
        hashes: dict[str, str] = {}
        failed: dict[str, str] = {}
        manifest, upload = self.directory.manifest, self.config.wire.upload
        # A change is added to the exact factors, whatever copy of them the clients got.
        received = self._received[manifest.upload_mask()]

        def decode(message: Message, clients: Sequence[str]) -> None:
            assert self.spool is not None
            rows, updates = wire.decode_train(
                message.content, clients, manifest, self.score_low, upload, received
            )
            for i, row in enumerate(rows):
                if row.status == wire.OK:
                    usable[row.client] = row
                    hashes[row.client] = self.spool.write(row.client, updates[i])
                else:
                    failed[row.client] = wire.STATUS[row.status]

        self.collect(replies, decode, failed)
        received_at = time.perf_counter()
        try:
            self.check_quorum("train", server_round, usable, failed)
        except QuorumMissed:
            self.ledger.write(
                "train", server_round, self.attempt, replies=self.recorder.failures(failed)
            )
            self.spool.delete()
            raise
        for client in hashes.keys() - usable.keys():
            self.spool.drop(client)
        withheld = {c for c, r in usable.items() if r.score is None}
        observation = self._observe(server_round, {c: r.score for c, r in usable.items()}, withheld)
        state, weights = WEIGHT_RULES[self.config.weights.rule](
            self.settings, self.state, observation
        )
        shares = client_weights(
            weights,
            [(c, self.directory.members[c].group, self.directory.members[c].size) for c in usable],
            self.config.weights.within_group,
        )
        combined = self._combine(shares)
        if not np.isfinite(combined.adapter).all():
            raise RunFailed(
                f"round {server_round}: the combined adapter is not finite; nothing was committed."
            )
        scores = observation.scores()
        self.recorder.train_round(
            server_round,
            self.attempt,
            observation,
            state,
            weights,
            shares,
            combined,
            usable,
            hashes,
            failed,
            (received_at - started, time.perf_counter() - received_at),
        )
        self.state = state
        self.result = RoundResult(combined.adapter, state, scores, weights)
        return wire.adapter_record(combined.adapter), _summary(scores)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all clients to score an adapter; ``config`` names phase and splits."""
        splits = tuple(str(config["splits"]).split(","))
        phase = str(config["phase"])
        everyone = self.asked(phase, server_round)
        return self.messages(
            wire.SCORE, phase, server_round, everyone, with_adapter(arrays), splits
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record the scores of phase ``base`` or ``final``; the base starts the histories."""
        phase = "base" if server_round == 0 else "final"
        stage = "base" if server_round == 0 else "shared"
        rows = self._score_rows(phase, server_round, replies, self.splits)
        self._write_scores(phase, server_round, rows, {s: (stage, s) for s in self.splits})
        # Also a site that keeps back validation alone: its gap is no reason to stop the others.
        withheld = {
            r.client for r in rows if self.directory.enrolled and "validation" not in r.scores
        }
        observation = self._observe(
            server_round, {r.client: r.scores.get("validation") for r in rows}, withheld
        )
        if not observation.present():
            raise QuorumMissed(f"{phase} {server_round}: no client scored a validation question.")
        mute = {self.directory.members[r.client].group for r in rows} - set(observation.present())
        if mute:
            raise RunFailed(
                f"group '{min(mute)}' has no validation question with a defined score "
                f"({self.recorder.metric}). Choose another score.metric, or leave the group out "
                "with data.groups."
            )
        if phase == "base" and self.config.run.mode == "adapters":
            self.state = history.cold_start(self.settings, observation)
        return _summary(observation.scores())

    def summary(self) -> None:
        """Say nothing: the command that runs shows settings and progress."""

    # --- the personal phase: not one of Flower's hooks, same shape ----------------------------

    def configure_personal(self, server_round: int, arrays: ArrayRecord) -> Iterable[Message]:
        """Ask all clients to train on from the final adapter; nothing but scores comes back."""
        everyone = self.asked("personal", server_round)
        return self.messages(
            wire.PERSONAL, "personal", server_round, everyone, with_adapter(arrays)
        )

    def aggregate_personal(self, server_round: int, replies: Iterable[Message]) -> None:
        """Record the test scores of the personal and local-only adapters."""
        stages = personal_stages(self.config)
        rows = self._score_rows("personal", server_round, replies, stages)
        self._write_scores("personal", server_round, rows, {s: (s, "test") for s in stages})

    # --- scores -----------------------------------------------------------------------------

    def withholds(self, reply: wire.ScoreReply) -> bool:
        """Say whether a site keeps its scores to itself, as only a deployed one may."""
        return self.directory.enrolled and not reply.scores

    def _write_scores(
        self,
        phase: str,
        round_: int,
        rows: Sequence[wire.ScoreReply],
        meaning: Mapping[str, tuple[str, str]],
    ) -> None:
        """Record scores; ``meaning`` gives stage and split of each name in a reply."""
        scores: list[ScoreRow] = []
        items: list[ItemRow] = []
        for row in rows:
            if self.withholds(row):
                scores += [
                    self.recorder.withheld_row(s, row.client, p) for s, p in meaning.values()
                ]
            for name, score in row.scores.items():
                stage, split = meaning[name]
                scores.append(self.recorder.score_row(stage, row.client, split, score))
                items += self.recorder.item_rows(stage, row.client, split, score)
        self.ledger.write(phase, round_, self.attempt, scores=scores, items=items)

    def _score_rows(
        self, phase: str, round_: int, replies: Iterable[Message], stages: Sequence[str]
    ) -> list[wire.ScoreReply]:
        usable: dict[str, wire.ScoreReply] = {}
        failed: dict[str, str] = {}

        def decode(message: Message, clients: Sequence[str]) -> None:
            for row in wire.decode_scores(message.content, clients, stages, self.score_low):
                if row.status == wire.OK:
                    usable[row.client] = row
                else:
                    failed[row.client] = wire.STATUS[row.status]

        self.collect(replies, decode, failed)
        self.check_quorum(phase, round_, usable, failed)
        return [usable[c] for c in sorted(usable)]

    # --- the round ----------------------------------------------------------------------------

    def _observe(
        self, round_: int, scores: Mapping[str, wire.Score | None], withheld: Collection[str]
    ) -> Observation:
        """Group scores from their usable clients; a group without any is withheld or absent."""
        members = self.directory.members
        groups: dict[str, GroupObservation] = {}
        sizes = self.directory.group_sizes()
        for group in self.directory.groups:
            found = [
                (s.score, s.n)
                for c, s in sorted(scores.items())
                if s is not None and members[c].group == group
            ]
            value = group_score([s for s, _ in found], [n for _, n in found]) if found else None
            kept = value is None and any(members[c].group == group for c in withheld)
            groups[group] = GroupObservation(value is not None or kept, value, sizes[group], kept)
        return Observation(round_, groups, self.score_low)

    def _combine(self, shares: dict[str, float]) -> Combined:
        assert self.spool is not None
        groups = {client: self.directory.members[client].group for client in shares}
        method, manifest = self.config.aggregation.method, self.directory.manifest
        return combine(method, self.spool, manifest, self._received, shares, groups)


def _summary(scores: Mapping[str, float]) -> MetricRecord:
    """Return worst and average over the groups that give a score; empty when none does."""
    if not scores:
        return MetricRecord()
    return MetricRecord(
        {"worst": min(scores.values()), "average": sum(scores.values()) / len(scores)}
    )
