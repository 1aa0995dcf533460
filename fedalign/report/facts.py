"""What the ledger says, arranged by group: the one place where rows become group scores.

A group's score at a stage is the mean over its clients weighted by questions, which is the mean
over the group's questions.  A client whose score failed is left out of that mean and named in
``missing``; a group in which no client has a score has no score.

In a deployment a group may be *silent* with every right: its sites withhold their scores, or were
revoked.  Numbers over groups are then numbers over the others, the same ones at every stage, so
that stages can be compared; every page says so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedalign.ledger import WITHHELD, ClientRow, EventRow, Ledger, ReplyRow, ScoreRow
from fedalign.report.policy import PolicyFacts, gather_policy

STAGES = ("base", "shared", "personal", "local_only", "local_only_total")
REVOKED = "revoked"
"""Word for a group all of whose sites were revoked during the run."""
REFERENCES = ("uniform", "mean_of_groups", "optimum_average", "optimum_worst")
NOT_COMPUTED = "not computed in this run; it needs the answer shares of all groups in one place"

Series = Mapping[str, Mapping[int, float]]
"""Group to round to value; a round in which the group has no value is left out."""


@dataclass(frozen=True)
class StageFacts:
    """Test scores of one stage."""

    scores: Mapping[str, float]
    """Group to score."""
    option_mass: Mapping[str, float]
    uniform: Mapping[str, float]
    """Group to the score of a uniform answerer on the same questions, as its clients sent it."""
    items: Mapping[str, Mapping[str, float]]
    """Question to group to score; empty when per-question scores were not sent."""
    mass: float | None
    """Option mass over all questions of all clients; None for pairs."""
    missing: tuple[str, ...]
    """One sentence for each client or group without a score, but for silent groups."""
    withheld: frozenset[str] = frozenset()
    """Groups whose sites keep the score of this stage to themselves."""


@dataclass(frozen=True)
class ReferenceFacts:
    """Scores of an answerer that was not trained here."""

    scores: Mapping[str, float]
    fairness_index: float | None
    note: str
    """Why it is not defined, or a caution; may be empty."""


@dataclass(frozen=True)
class Facts:
    """Everything summary, page and card need."""

    run: Mapping[str, Any]
    groups: tuple[str, ...]
    sizes: Mapping[str, int]
    clients: Mapping[str, int]
    """Group to number of clients."""
    questions: Mapping[str, int]
    """Group to test questions, summed over its clients."""
    stages: Mapping[str, StageFacts]
    """Only stages of which at least one score was recorded."""
    references: Mapping[str, ReferenceFacts]
    rounds: tuple[int, ...]
    """Training rounds that count."""
    weights: Series
    """Mode ``rewards``: share of the group in the gradient of the combined reward."""
    validation: Series
    """Score of the adapter received in each round; mode ``rewards``: mean reward of its texts."""
    loss: Series
    discarded: Mapping[str, tuple[float, float]]
    """Group to (mean, largest) share of its update (Frobenius norm) that the truncation to rank r
    removed, over layers and rounds."""
    events: tuple[EventRow, ...]
    failed_replies: tuple[ReplyRow, ...]
    """Replies that were not usable, of attempts that count and of those that do not."""
    seconds: Mapping[str, float]
    policy: PolicyFacts | None = None
    """Only in mode ``rewards``."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Group to ``withheld`` or ``revoked``: it need not have a score."""

    @property
    def counted(self) -> tuple[str, ...]:
        """Groups that numbers over groups speak of: all but the silent ones."""
        return tuple(g for g in self.groups if g not in self.silent)

    @property
    def metric(self) -> str:
        """Name of the score."""
        return str(self.run.get("metric", "score"))

    @property
    def mass_name(self) -> str:
        """Return what ``option_mass`` is called: sampled texts are well formed or not."""
        return (
            "option mass" if self.setting("rewards.task", "letter") == "letter" else "format rate"
        )

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The wire manifest: base revision, layout, rank; empty when the run has none yet."""
        made: Mapping[str, Any] = json.loads(self.run.get("manifest", "{}"))
        return made

    def setting(self, key: str, default: Any = "") -> Any:
        """Return one configuration value of the run."""
        return self.run.get("config", {}).get(key, default)


def gather(ledger: Ledger) -> Facts:
    """Read the ledger once."""
    clients = ledger.clients()
    revoked = _revoked(ledger, clients)
    stages = {
        stage: made
        for stage in STAGES
        if (made := _stage(ledger, stage, {c.group for c in clients} - revoked)) is not None
    }
    withheld = frozenset().union(*(s.withheld for s in stages.values()))
    references = _references(ledger, stages)
    seen = {c.group for c in clients} | {g for s in stages.values() for g in s.scores}
    groups = tuple(sorted(seen))
    weights: dict[str, dict[int, float]] = {g: {} for g in groups}
    for w in ledger.weights():
        if w.weight is not None and w.present and w.group in weights:
            weights[w.group][w.round] = w.weight
    failed = [r for c in (True, False) for r in ledger.replies(committed=c) if r.status != "ok"]
    removed: dict[str, list[float]] = defaultdict(list)
    for d in ledger.discarded():
        if d.group:  # the empty group is the whole sum
            removed[d.group].append(d.share)
    run = ledger.run()
    policy = gather_policy(ledger, run.get("config", {}))
    seconds: dict[str, float] = defaultdict(float)
    for t in ledger.timings():
        seconds[t.name] += t.seconds
    return Facts(
        run=run,
        groups=groups,
        sizes=_total(clients, "size", groups),
        clients={g: sum(c.group == g for c in clients) for g in groups},
        questions=_total(clients, "test", groups),
        stages=stages,
        references=references,
        rounds=tuple(r for phase, r, _ in ledger.commits() if phase == "train"),
        weights=weights,
        validation=_over_rounds(
            groups,
            (
                (s.group, s.round, s.score, float(s.n))
                for s in ledger.scores("received", "validation")
                if s.score is not None
            )
            if policy is None
            else (
                (w.group, w.round, w.score, 1.0) for w in ledger.weights() if w.score is not None
            ),
        ),
        loss=_over_rounds(
            groups,
            (
                (r.group, r.round, r.loss, float(r.examples or 1))
                for r in ledger.replies()
                if r.status == "ok" and r.loss is not None and r.phase == "train"
            ),
        ),
        discarded={g: (sum(x) / len(x), max(x)) for g, x in sorted(removed.items())},
        events=tuple(ledger.events()),
        failed_replies=tuple(sorted(failed, key=lambda r: (r.round, r.attempt, r.client))),
        seconds=dict(sorted(seconds.items())),
        policy=policy,
        silent=dict.fromkeys(sorted(withheld), WITHHELD) | dict.fromkeys(sorted(revoked), REVOKED),
    )


def _revoked(ledger: Ledger, clients: Iterable[ClientRow]) -> set[str]:
    """Return the groups all of whose sites were revoked while the run went on."""
    gone = {e.client for e in ledger.events("site-revoked")}
    return {c.group for c in clients} - {c.group for c in clients if c.client not in gone}


def _stage(ledger: Ledger, stage: str, enrolled: set[str]) -> StageFacts | None:
    rows = ledger.scores(stage, "test")
    if not rows:
        return None
    last = max(row.round for row in rows)
    rows = [row for row in rows if row.round == last]
    good = [row for row in rows if row.score is not None and row.n > 0]
    missing = [
        f"{row.client} (group {row.group}): {row.reason or 'no questions'}"
        for row in rows
        if row.status != WITHHELD and (row.score is None or row.n == 0)
    ]
    scores = _weighted(good, "score")
    withheld = frozenset(r.group for r in rows if r.status == WITHHELD) - set(scores)
    missing += [f"group {g}: no score" for g in sorted(enrolled - set(scores) - withheld)]
    by_question: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in ledger.items(stage, "test"):
        if item.round == last:
            by_question[item.question][item.group].append(item.score)
    return StageFacts(
        scores=scores,
        option_mass=_weighted(good, "option_mass"),
        uniform=_weighted(good, "uniform"),
        items={
            q: {g: sum(v) / len(v) for g, v in sorted(groups.items())}
            for q, groups in sorted(by_question.items())
        },
        mass=_mass(good),
        missing=tuple(missing),
        withheld=withheld,
    )


def _mass(rows: Iterable[ScoreRow]) -> float | None:
    sent = [(row.option_mass, row.n) for row in rows if row.option_mass is not None]
    return sum(m * n for m, n in sent) / sum(n for _, n in sent) if sent else None


def _weighted(rows: Iterable[ScoreRow], name: str) -> dict[str, float]:
    """Return group to the question-weighted mean of a field over clients that have it."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        value = getattr(row, name)
        if value is not None:
            sums[row.group][0] += row.n * value
            sums[row.group][1] += row.n
    return {g: total / n for g, (total, n) in sorted(sums.items())}


def _references(ledger: Ledger, stages: Mapping[str, StageFacts]) -> dict[str, ReferenceFacts]:
    made = {}
    for name in REFERENCES:
        rows = [r for r in ledger.references(name) if r.split == "test"]
        scores = {
            r.group: r.value
            for r in rows
            if r.quantity == "score" and r.group and r.value is not None
        }
        index = [r.value for r in rows if r.quantity == "fairness_index" and r.value is not None]
        notes = sorted({r.note for r in rows if r.note})
        if name == "uniform" and not scores and stages:
            # A coordinator does not hold the answers; the clients send this score themselves.
            scores = dict(next(iter(stages.values())).uniform)
        if not scores and not notes:
            notes = [NOT_COMPUTED]
        made[name] = ReferenceFacts(scores, index[0] if index else None, "; ".join(notes))
    return made


def _over_rounds(
    groups: Iterable[str], rows: Iterable[tuple[str, int, float, float]]
) -> dict[str, dict[int, float]]:
    """Weighted means by group and round from rows (group, round, value, weight)."""
    sums: dict[str, dict[int, list[float]]] = {g: {} for g in groups}
    for group, round, value, weight in rows:
        cell = sums.setdefault(group, {}).setdefault(round, [0.0, 0.0])
        cell[0] += value * weight
        cell[1] += weight
    return {
        g: {r: total / n for r, (total, n) in sorted(by_round.items()) if n > 0}
        for g, by_round in sums.items()
    }


def _total(clients: Iterable[ClientRow], name: str, groups: Iterable[str]) -> dict[str, int]:
    made = dict.fromkeys(groups, 0)
    for client in clients:
        made[client.group] += int(getattr(client, name))
    return made
