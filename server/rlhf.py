"""One exchange of reward federation: texts out, rewards in, one reward for each text.

Reference: federated RLHF with aggregated group rewards (arXiv 2512.08786; successor APPA, arXiv
2604.04261).  Exchange t:

1. the policy writes N texts to training questions (``policy_trainer.py``);
2. every client answers one reward and one code for each text, as its site's policy allows;
3. r_gi = mean over the answering clients of group g, those that answer from true shares before
   those that predict.  A malformed text is worth ``rewards.malformed`` to every group: the server
   parses it itself and needs nobody's word.  It counts in R alone: history and fairness index see
   well-formed texts, else a group that holds few of the questions would look badly served;
4. weights a_g from the history of t - 1, then R_i = combine(r_1i .. r_Gi)
   (``fedalign/aggregation/group_rewards.py``);
5. PPO takes its updates on R, and history takes in the mean reward of each group.

Where we differ from the published form, and why:

- *Cold start.*  The texts of exchange 1 come from the untouched base: their mean rewards are h_0,
  which the weights of exchange 1 use.  (Not stated in the papers.)
- *A reward that is missing is missing.*  A text that nobody of a group answered does not count for
  that group, and one that no group answered is left out of the update; neither is ever worth 0.
- *Reference correction* (off by default): kl * log pi_ref(text) is taken off a well-formed text's
  reward, so that the optimum is proportional to exp(R / kl), without the base's own taste.

The weight of a group in the ledger is its *influence*: the share of it in the gradient of R.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import Message, RecordDict

from fedalign import wire
from fedalign.aggregation import reward_weights
from fedalign.aggregation.group_rewards import (
    adaptive_branch,
    combine,
    kl_factor,
    mixture_scale,
    reward_index,
)
from fedalign.aggregation.records import GroupHistory, RuleState
from fedalign.config import RewardsConfig, resolve_reward
from fedalign.errors import RunFailed
from fedalign.ledger import CurveRow, ReplyRow, TimingRow, WeightRow
from fedalign.wire.predictor import encode_predictor, predictor_record
from server.asking import QuorumMissed
from server.strategy import GroupStrategy

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """N texts of the policy, and what is known of them without any group."""

    rollouts: wire.Rollouts
    well_formed: npt.NDArray[np.bool_]
    """(N,)"""
    canonical: npt.NDArray[np.bool_]
    """(N,) well formed and spelled as in training; the reference correction asks for it."""
    reference_logps: F64
    """(N,) log-probability of each text under the base, nats."""
    kl: float
    """Mean of log pi(text) - log pi_ref(text), nats a text."""
    generated_tokens: int
    seconds: Mapping[str, float]
    episodes: Any = None
    """What the policy trainer needs to take its updates."""


class Policy(Protocol):
    """The policy as the exchange sees it; torch is behind this line."""

    @property
    def kl(self) -> float:
        """Current KL coefficient, without the rule's factor."""

    @property
    def bank_hash(self) -> str:
        """Identifies the questions that may be asked."""

    def sample(self, exchange: int) -> Sampled:
        """Write the texts of an exchange; the same exchange gives the same texts."""

    def improve(
        self, exchange: int, sampled: Sampled, rewards: F64
    ) -> tuple[wire.F32, dict[str, np.ndarray[Any, Any]], dict[str, float]]:
        """Take the updates on texts with a reward (N,); return adapter, arrays and metrics.

        Nothing is changed until :meth:`adopt`, so a repeated attempt starts from the same state.
        """

    def adopt(self) -> None:
        """Make the result of the last :meth:`improve` the policy."""


@dataclass(frozen=True)
class GroupRewards:
    """What the groups said of N texts."""

    groups: tuple[str, ...]
    """Present groups, sorted; G of them."""
    rewards: F64
    """(G, N) in [0, 1]; NaN where a group did not answer."""
    codes: Mapping[str, int]
    """How often each wire code came back, by name."""
    replies: Sequence[ReplyRow]
    coverage: Mapping[str, float]
    """Share of the well-formed texts that each enrolled group answered."""
    well_formed: npt.NDArray[np.bool_]
    """(N,)"""

    @property
    def means(self) -> dict[str, float]:
        """Mean reward of each present group, over the well-formed texts it answered."""
        answered = self.rewards[:, self.well_formed]
        return {g: float(np.nanmean(row)) for g, row in zip(self.groups, answered, strict=True)}


@dataclass(frozen=True)
class Judged:
    """One reward for each text, and how it came about."""

    rewards: F64
    """(N,) as PPO takes them, reference correction included; NaN: no group answered."""
    state: RuleState
    weights: Mapping[str, float]
    influence: Mapping[str, float]
    curves: Mapping[str, float] = field(default_factory=dict)


class RewardStrategy(GroupStrategy):
    """Scores, quorum and recording as in adapter federation; rounds are exchanges."""

    def configure_exchange(
        self, round_: int, rollouts: wire.Rollouts, predictor: wire.F32 | None
    ) -> Iterable[Message]:
        """Ask the sampled clients what the texts are worth to them."""
        chosen = self.asked("train", round_)
        shared = None if predictor is None else predictor_record(predictor)

        def build(request: wire.Request) -> RecordDict:
            content = wire.encode_rollouts(wire.encode_request(request), rollouts)
            return content if shared is None else encode_predictor(content, shared)

        return self.messages(wire.EXCHANGE, "train", round_, chosen, build)

    def aggregate_exchange(
        self, round_: int, replies: Iterable[Message], sampled: Sampled
    ) -> GroupRewards:
        """Check every reply, form group rewards; raises :class:`QuorumMissed` below quorum."""
        n = len(sampled.rollouts.texts)
        usable: dict[str, wire.RewardReply] = {}
        failed: dict[str, str] = {}

        def decode(message: Message, clients: Sequence[str]) -> None:
            for row in wire.decode_rewards(message.content, clients, n):
                if row.status == wire.OK:
                    usable[row.client] = row
                else:
                    failed[row.client] = wire.STATUS[row.status]

        self.collect(replies, decode, failed)
        try:
            self.check_quorum("train", round_, usable, failed)
            return group_rewards(
                usable,
                {c: m.group for c, m in self.directory.members.items()},
                sampled.rollouts.question_of,
                sampled.well_formed,
                self.config.rewards.malformed,
                self.recorder.failures(failed),
            )
        except QuorumMissed:
            rows = self.recorder.failures(failed)
            self.ledger.write("train", round_, self.attempt, replies=rows)
            raise

    def judge(self, round_: int, given: GroupRewards, sampled: Sampled, kl: float) -> Judged:
        """Turn group rewards into one reward a text; ``kl`` is the policy's coefficient."""
        settings = self.config.rewards
        means = given.means
        before = with_newcomers(self.state, means)
        state, weights = reward_weights.group_weights(
            settings.rule, self.settings, before, given.groups, round_
        )
        formed = np.flatnonzero(sampled.well_formed)
        question_of = np.asarray(sampled.rollouts.question_of)[formed]
        index = reward_index(given.rewards[:, formed], question_of.tolist())
        adaptive = adaptive_branch(index, settings.fairness_threshold)
        combined = combine(
            settings.rule,
            given.rewards,
            np.array([weights[g] for g in given.groups]),
            adaptive=adaptive,
            sharpness=settings.sharpness,
            log_scale=mixture_scale(resolve_reward(self.config), settings.floor),
        )
        rewards = combined.values
        if settings.reference_correction:
            factor = kl * kl_factor(settings.rule, len(self.directory.groups))
            correction = np.where(sampled.canonical, factor * sampled.reference_logps, 0.0)
            rewards = rewards - correction
        state = reward_weights.observe(
            settings.rule, self.settings, state, means, self.directory.groups, round_
        )
        curves = {
            "reward-mean": float(np.mean(list(means.values()))),
            "adaptive-branch": float(adaptive),
            "reward-scale": float(combined.scale),
            "format-rate": float(sampled.well_formed.mean()),
            "sampled-kl": sampled.kl,
            "rollouts": float(len(rewards)),
            "generated-tokens": float(sampled.generated_tokens),
            **{name: float(count) for name, count in given.codes.items()},
        }
        if index is not None:
            curves["fairness-index"] = index
        influence = dict(zip(given.groups, combined.influence.tolist(), strict=True))
        return Judged(rewards, state, weights, influence, curves)

    def record_exchange(
        self,
        round_: int,
        given: GroupRewards,
        judged: Judged,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> None:
        """Write the exchange's rows in one transaction."""
        means = given.means
        curves = [CurveRow(client="", name=n, value=v) for n, v in judged.curves.items()]
        curves += [CurveRow(client="", name=n, value=v) for n, v in metrics.items()]
        for g in given.groups:
            curves += [
                CurveRow(client=f"group:{g}", name="weight", value=judged.weights[g]),
                CurveRow(client=f"group:{g}", name="influence", value=judged.influence[g]),
            ]
        self.ledger.write(
            "train",
            round_,
            self.attempt,
            replies=list(given.replies),
            weights=[
                WeightRow(
                    group=g,
                    weight=judged.influence.get(g),
                    history=judged.state.history[g].value if g in judged.state.history else None,
                    score=means.get(g),
                    present=g in means,
                    coverage=given.coverage[g],
                )
                for g in self.directory.groups
            ],
            curves=curves,
            timings=[TimingRow(name=n, seconds=s) for n, s in seconds.items()],
        )


def group_rewards(
    replies: Mapping[str, wire.RewardReply],
    group_of: Mapping[str, str],
    question_of: Sequence[int],
    well_formed: npt.NDArray[np.bool_],
    malformed: float,
    failures: Sequence[ReplyRow] = (),
) -> GroupRewards:
    """Form (G, N) group rewards from usable replies.

    Args:
        replies: client to reply, N rewards and codes each.
        group_of: group of every enrolled client.
        question_of: (N,) the question of each text.
        well_formed: (N,) which texts the server could parse.
        malformed: what a malformed text is worth to every group, in [0, 1].
        failures: rows of clients without a usable reply.

    Raises:
        QuorumMissed: no group answered any text.
    """
    enrolled = sorted(set(group_of.values()))
    counts = dict.fromkeys(wire.CODES, 0)
    rows: list[F64] = []
    present: list[str] = []
    coverage: dict[str, float] = dict.fromkeys(enrolled, 0.0)
    answered: dict[str, int] = {}
    for group in enrolled:
        row = np.full(len(well_formed), np.nan)
        # True shares win: a text that one client answered needs no other client's prediction.
        for code in (wire.PREDICTED, wire.FROM_SHARES):
            total, number = np.zeros(len(well_formed)), np.zeros(len(well_formed))
            for client, reply in sorted(replies.items()):
                if group_of[client] == group:
                    counted = (reply.codes == code) & well_formed
                    answered[client] = answered.get(client, 0) + int(counted.sum())
                    total += np.where(counted, reply.rewards.astype(np.float64), 0.0)
                    number += counted
            row[number > 0] = total[number > 0] / number[number > 0]
        if np.isfinite(row).any():
            rows.append(row)
            present.append(group)
            coverage[group] = float(np.isfinite(row).sum() / well_formed.sum())
    for reply in replies.values():
        for code, name in enumerate(wire.CODES):
            counts[name] += int((reply.codes == code).sum())
    if not rows:
        raise QuorumMissed(
            "no client has a reward for any of the texts: none answered these questions, or the "
            "sites' policies refuse. What came back: "
            + (", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing")
            + "."
        )
    rewards = np.stack(rows)
    rewards[:, ~well_formed & _asked_of_somebody(rewards, question_of, well_formed)] = malformed
    usable = [ReplyRow(client=c, group=group_of[c], examples=answered[c]) for c in sorted(replies)]
    return GroupRewards(
        tuple(present), rewards, counts, [*usable, *failures], coverage, well_formed
    )


def _asked_of_somebody(
    rewards: F64, question_of: Sequence[int], well_formed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return (N,) whether the question of a text was answered, or had no well-formed text at all.

    A question that nobody holds teaches nothing, not even its format.
    """
    questions = np.asarray(question_of)
    answered = np.isin(questions, questions[np.isfinite(rewards).any(0)])
    return answered | ~np.isin(questions, questions[well_formed])


def with_newcomers(state: RuleState, means: Mapping[str, float]) -> RuleState:
    """Give every group without history its own mean reward as one: h_0 of that group."""
    fresh = {g: GroupHistory(value, 0, 0) for g, value in means.items() if g not in state.history}
    return replace(state, history={**state.history, **fresh})


def check_alive(settings: RewardsConfig, max_kl: float, sampled: Sampled, round_: int) -> None:
    """Raise ``RunFailed`` when the policy has collapsed: no answers, or far off the base."""
    rate = float(sampled.well_formed.mean())
    if rate < settings.min_format_rate:
        whose = "the untouched base writes" if round_ == 1 else "the policy collapsed: it writes"
        raise RunFailed(
            f"exchange {round_}: {whose} a well-formed answer in {rate:.0%} of its texts, below "
            f"rewards.min-format-rate = {settings.min_format_rate:g}. "
            + (
                "Fine-tune the base on the task's format first, or choose another rewards.task."
                if round_ == 1
                else "Lower ppo.learning-rate or raise ppo.kl."
            )
        )
    if not sampled.kl <= max_kl:
        raise RunFailed(
            f"exchange {round_}: the policy collapsed: it is {sampled.kl:.1f} nats a text away "
            f"from the base, above ppo.max-kl = {max_kl:g}. Lower ppo.learning-rate or raise "
            "ppo.kl."
        )
