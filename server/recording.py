"""What the strategy writes to the ledger: rows from replies, weights and what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalign import wire
from fedalign.aggregation.records import Observation, RuleState
from fedalign.ledger import (
    WITHHELD,
    CurveRow,
    DiscardedRow,
    ItemRow,
    Ledger,
    ReplyRow,
    ScoreRow,
    TimingRow,
    WeightRow,
)
from server.directory import Directory


@dataclass(frozen=True)
class Combined:
    """A new global adapter and what was lost on the way to it."""

    adapter: wire.F32
    discarded: Sequence[tuple[str, str, float]]
    """(layer, group, relative norm that truncation removed); group "" is the whole sum."""
    norms: dict[str, float]
    """Frobenius norm of each client's update in product space."""


class Recorder:
    """Turns what happened in an attempt into rows; one transaction for each attempt."""

    def __init__(self, ledger: Ledger, directory: Directory, metric: str) -> None:
        self.ledger = ledger
        self.directory = directory
        self.metric = metric

    def train_round(
        self,
        round_: int,
        attempt: int,
        observation: Observation,
        state: RuleState,
        weights: Mapping[str, float],
        shares: Mapping[str, float],
        combined: Combined,
        usable: Mapping[str, wire.TrainReply],
        hashes: Mapping[str, str],
        failed: Mapping[str, str],
        seconds: tuple[float, float],
    ) -> None:
        """Write a closed round; ``seconds`` are for collecting and for aggregating."""
        members = self.directory.members
        replies = [
            ReplyRow(
                client=c,
                group=members[c].group,
                weight=shares[c],
                examples=r.pairs,
                norm=combined.norms[c],
                array_hash=hashes[c],
                loss=r.loss,
                steps=r.steps,
            )
            for c, r in sorted(usable.items())
        ]
        examples = dict.fromkeys(self.directory.groups, 0)
        for m in members.values():
            examples[m.group] += m.train
        replied = dict.fromkeys(examples, 0)
        for c in usable:
            replied[members[c].group] += members[c].train
        self.ledger.write(
            "train",
            round_,
            attempt,
            replies=replies + self.failures(failed),
            scores=[
                self.withheld_row("received", c, "validation")
                if r.score is None
                else self.score_row("received", c, "validation", r.score)
                for c, r in sorted(usable.items())
            ],
            weights=[
                WeightRow(
                    group=g,
                    weight=weights.get(g),
                    history=state.history[g].value if g in state.history else None,
                    score=o.score,
                    present=o.present,
                    coverage=replied[g] / examples[g],
                )
                for g, o in sorted(observation.groups.items())
            ],
            curves=[
                CurveRow(client=c, name=name, value=value)
                for c, r in sorted(usable.items())
                for name, value in (
                    ("loss-first", r.loss_first),
                    ("loss-last", r.loss_last),
                    ("tokens", float(r.tokens)),
                )
            ],
            discarded=[
                DiscardedRow(layer=layer, group=group, share=share)
                for layer, group, share in combined.discarded
            ],
            timings=[
                TimingRow(name="collect", seconds=seconds[0]),
                TimingRow(name="aggregate", seconds=seconds[1]),
                TimingRow(name="client-training", seconds=sum(r.seconds for r in usable.values())),
            ],
        )

    def failures(self, failed: Mapping[str, str]) -> list[ReplyRow]:
        """Return a row for each client whose reply was not usable, with the reason."""
        return [
            ReplyRow(
                client=c, group=self.directory.members[c].group, status="rejected", reason=reason
            )
            for c, reason in sorted(failed.items())
        ]

    def score_row(self, stage: str, client: str, split: str, score: wire.Score) -> ScoreRow:
        """Return the row of one client's score."""
        return ScoreRow(
            stage=stage,
            client=client,
            group=self.directory.members[client].group,
            split=split,
            metric=self.metric,
            n=score.n,
            score=score.score,
            option_mass=score.option_mass if self.directory.form == "survey" else None,
            uniform=score.uniform,
        )

    def withheld_row(self, stage: str, client: str, split: str) -> ScoreRow:
        """Return the row of a client whose site keeps its score to itself: it has no value."""
        return ScoreRow(
            stage=stage,
            client=client,
            group=self.directory.members[client].group,
            split=split,
            metric=self.metric,
            n=0,
            status=WITHHELD,
            reason=WITHHELD,
        )

    def item_rows(self, stage: str, client: str, split: str, score: wire.Score) -> list[ItemRow]:
        """Return a row for each question whose score came along."""
        group = self.directory.members[client].group
        return [
            ItemRow(stage=stage, client=client, group=group, split=split, question=q, score=v)
            for q, v in score.items
        ]
