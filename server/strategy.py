"""The strategy: whom to ask, what a reply is worth, how adapters combine.  Flower's hooks only.

One round of adapter federation:

1. ``configure_train`` sends the global adapter to the sampled clients;
2. each client scores the adapter *as received* on its validation questions, trains, and replies;
3. ``aggregate_train`` checks every reply against the wire contract.  Usable updates go to the
   spool, everything else is recorded with its reason and left out;
4. below quorum the round is void (:class:`QuorumMissed`): the adapter and the histories stay as
   they were.  Otherwise: group scores -> rule -> group weights -> client weights -> aggregate.

The score of the received adapter is known before aggregation, so the weights of round t use a
history that includes round t.  **Absent groups**: a group none of whose replies is usable keeps its
history bit for bit and has weight 0 in the round; the others share the whole weight.

The loop around the hooks is in ``run.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedalign import wire
from fedalign.aggregation import WEIGHT_RULES, adapters, history
from fedalign.aggregation.clients import client_weights, group_score
from fedalign.aggregation.records import (
    GroupObservation,
    Observation,
    RuleState,
    WeightSettings,
)
from fedalign.config import Config, personal_stages, to_json
from fedalign.errors import RunFailed, WireError
from fedalign.ledger import ItemRow, Ledger, ScoreRow
from fedalign.metrics.alignment import SCORE_LOW
from fedalign.models.layout import pack, unpack
from fedalign.runfolder import SPOOL
from server.directory import Directory
from server.recording import Combined, Recorder
from server.spool import Spool


class QuorumMissed(RunFailed):
    """Too few usable replies; the attempt is void and may be tried again."""


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


class GroupStrategy(Strategy):
    """Reweights groups by how well they have been served so far."""

    def __init__(
        self, config: Config, directory: Directory, ledger: Ledger, folder: Path, metric: str
    ) -> None:
        self.config = config
        self.directory = directory
        self.ledger = ledger
        self.folder = folder
        self.recorder = Recorder(ledger, directory, metric)
        self.score_low = SCORE_LOW[metric]
        self.splits = (
            ("validation", "test", "train") if config.score.seen else ("validation", "test")
        )
        self.state = RuleState()
        self.attempt = 1
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
        self._config_json = to_json(config)
        self._sent: list[tuple[Message, tuple[str, ...]]] = []
        self._received: wire.F32 = np.zeros(0, dtype=np.float32)

    # --- hooks ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled clients to score and train the global adapter."""
        chosen = self.directory.sample(
            self.config.run.seed, server_round, self.config.run.clients_per_round
        )
        self._received = np.asarray(arrays["adapter"].numpy(), dtype=np.float32)
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

        def decode(message: Message, clients: Sequence[str]) -> None:
            assert self.spool is not None
            rows, updates = wire.decode_train(
                message.content, clients, self.directory.manifest, self.score_low
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
            self.check_quorum("train", server_round, len(usable), failed)
        except QuorumMissed:
            self.ledger.write(
                "train", server_round, self.attempt, replies=self.recorder.failures(failed)
            )
            self.spool.delete()
            raise
        observation = self._observe(server_round, {c: r.score for c, r in usable.items()})
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
        scores = {g: float(o.score) for g, o in observation.groups.items() if o.score is not None}
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
        metrics = {"worst": min(scores.values()), "average": sum(scores.values()) / len(scores)}
        return wire.adapter_record(combined.adapter), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all clients to score an adapter; ``config`` names phase and splits."""
        splits = tuple(str(config["splits"]).split(","))
        everyone = tuple(self.directory.members)
        return self.messages(
            wire.SCORE, str(config["phase"]), server_round, everyone, with_adapter(arrays), splits
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record the scores of phase ``base`` or ``final``; the base starts the histories."""
        phase = "base" if server_round == 0 else "final"
        stage = "base" if server_round == 0 else "shared"
        rows = self._score_rows(phase, server_round, replies, self.splits)
        scores: list[ScoreRow] = []
        items: list[ItemRow] = []
        for row in rows:
            for split, score in row.scores.items():
                scores.append(self.recorder.score_row(stage, row.client, split, score))
                items += self.recorder.item_rows(stage, row.client, split, score)
        self.ledger.write(phase, server_round, self.attempt, scores=scores, items=items)
        observation = self._observe(
            server_round, {r.client: r.scores.get("validation") for r in rows}
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
        found = [o.score for o in observation.groups.values() if o.score is not None]
        return MetricRecord({"worst": min(found), "average": sum(found) / len(found)})

    def summary(self) -> None:
        """Say nothing: the command that runs shows settings and progress."""

    # --- the personal phase: not one of Flower's hooks, same shape ----------------------------

    def configure_personal(self, server_round: int, arrays: ArrayRecord) -> Iterable[Message]:
        """Ask all clients to train on from the final adapter; nothing but scores comes back."""
        everyone = tuple(self.directory.members)
        return self.messages(
            wire.PERSONAL, "personal", server_round, everyone, with_adapter(arrays)
        )

    def aggregate_personal(self, server_round: int, replies: Iterable[Message]) -> None:
        """Record the test scores of the personal and local-only adapters."""
        stages = personal_stages(self.config)
        rows = self._score_rows("personal", server_round, replies, stages)
        scores = [
            self.recorder.score_row(stage, r.client, "test", s)
            for r in rows
            for stage, s in r.scores.items()
        ]
        items = [
            item
            for r in rows
            for stage, s in r.scores.items()
            for item in self.recorder.item_rows(stage, r.client, "test", s)
        ]
        self.ledger.write("personal", server_round, self.attempt, scores=scores, items=items)

    # --- sending ----------------------------------------------------------------------------

    def messages(
        self,
        kind: str,
        phase: str,
        round_: int,
        clients: Sequence[str],
        build: Callable[[wire.Request], RecordDict],
        splits: tuple[str, ...] = (),
    ) -> list[Message]:
        """Return a message for each node and ``clients-per-message`` of its clients.

        ``build`` makes the content from the request; :meth:`collect` reads the replies to these.
        """
        self._sent = []
        for node, names in self.directory.jobs(clients, self.config.run.clients_per_message):
            request = wire.Request(
                phase,
                round_,
                self.attempt,
                names,
                self._config_json,
                self.directory.manifest.hash,
                splits,
            )
            message = Message(
                build(request),
                node,
                kind,
                ttl=self.config.run.round_timeout,
                group_id=f"{phase}-{round_}-{self.attempt}",
            )
            self._sent.append((message, names))
        return [m for m, _ in self._sent]

    # --- receiving --------------------------------------------------------------------------

    def collect(
        self,
        replies: Iterable[Message],
        decode: Callable[[Message, Sequence[str]], None],
        failed: dict[str, str],
    ) -> None:
        """Hand each reply to ``decode``; note why the clients of a lost or broken one failed."""
        waiting = {m.metadata.message_id: names for m, names in self._sent}
        for reply in replies:
            names = waiting.pop(reply.metadata.reply_to_message_id, None)
            if names is None:
                self.ledger.event("stray-reply", attempt=self.attempt)
                continue
            if reply.has_error():
                # The error's text may quote private data: only its code is kept.
                failed.update(dict.fromkeys(names, f"flower-error-{reply.error.code}"))
                continue
            try:
                decode(reply, names)
            except WireError as error:
                failed.update(dict.fromkeys(names, error.reason))
        for names in waiting.values():
            failed.update(dict.fromkeys(names, "no-reply"))

    def check_quorum(self, phase: str, round_: int, usable: int, failed: dict[str, str]) -> None:
        """Note every failed client; raise :class:`QuorumMissed` when too few are usable."""
        for client, reason in sorted(failed.items()):
            self.ledger.event(
                "reply-rejected",
                reason,
                phase=phase,
                round=round_,
                attempt=self.attempt,
                client=client,
            )
        asked = usable + len(failed)
        needed = max(1, math.ceil(self.config.run.quorum * asked - 1e-9))
        if usable < needed:
            reasons = ", ".join(sorted(set(failed.values())))
            raise QuorumMissed(
                f"{phase} {round_}, attempt {self.attempt}: {usable} of {asked} clients usable, "
                f"{needed} needed (run.quorum = {self.config.run.quorum:g}); reasons: {reasons}."
            )

    def _score_rows(
        self, phase: str, round_: int, replies: Iterable[Message], stages: Sequence[str]
    ) -> list[wire.ScoreReply]:
        rows: list[wire.ScoreReply] = []
        failed: dict[str, str] = {}

        def decode(message: Message, clients: Sequence[str]) -> None:
            for row in wire.decode_scores(message.content, clients, stages, self.score_low):
                if row.status == wire.OK:
                    rows.append(row)
                else:
                    failed[row.client] = wire.STATUS[row.status]

        self.collect(replies, decode, failed)
        self.check_quorum(phase, round_, len(rows), failed)
        return sorted(rows, key=lambda r: r.client)

    # --- the round ----------------------------------------------------------------------------

    def _observe(self, round_: int, scores: dict[str, wire.Score | None]) -> Observation:
        """Group scores from their usable clients; a group without any is absent."""
        groups: dict[str, GroupObservation] = {}
        sizes = self.directory.group_sizes()
        for group in self.directory.groups:
            found = [
                (s.score, s.n)
                for c, s in sorted(scores.items())
                if s is not None and self.directory.members[c].group == group
            ]
            value = group_score([s for s, _ in found], [n for _, n in found]) if found else None
            groups[group] = GroupObservation(value is not None, value, sizes[group])
        return Observation(round_, groups, self.score_low)

    def _combine(self, shares: dict[str, float]) -> Combined:
        manifest = self.directory.manifest
        scale = manifest.alpha / manifest.rank
        previous = unpack(self._received, manifest.layout)
        norms: dict[str, float] = {}

        def contributions() -> Iterator[adapters.Contribution]:
            assert self.spool is not None
            for client, update in self.spool.read():
                tensors = dict(previous) | unpack(update, manifest.upload)
                norms[client] = scale * adapters.update_norm(tensors, previous)
                group = self.directory.members[client].group
                yield adapters.Contribution(client, group, shares[client], tensors)

        aggregate = adapters.aggregate(self.config.aggregation.method, contributions(), previous)
        discarded = [
            (module, group, share)
            for module, groups in aggregate.discarded_by_group.items()
            for group, share in groups.items()
        ]
        discarded += [(module, "", share) for module, share in aggregate.discarded.items()]
        return Combined(pack(aggregate.tensors, manifest.layout), discarded, norms)
