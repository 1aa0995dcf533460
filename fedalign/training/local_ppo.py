"""PPO as a client's local objective: the client samples texts and scores them by its own shares.

A job starts from the received adapter and takes a number of optimiser updates.  It goes in batches:
draw training questions, sample texts from the policy of the moment, reward each text by the group's
own shares (``fedalign.rewards.text``), measure, improve (``fedalign.training.policy``; Schulman et
al., arXiv 1707.06347, with the divergence from the base in the reward as in Ziegler et al., arXiv
1909.08593).  The aim of a client is thereby, for every question,

    pi*(text)  proportional to  pi_base(text) exp(reward(text) / ppo.kl).

Nothing but the adapter belongs to the federation: value head and optimiser start fresh in every
job.  A batch holds ``ppo.minibatches * ppo.questions`` questions, and gives ``minibatches *
epochs`` updates.  A job whose steps are no multiple of that ends with a smaller batch; so does the
stretch before a snapshot, which is why a snapshot is what a job of that many steps would return.
A client with fewer questions than a batch asks each of them once in it, in fewer minibatches.

``tokens`` counts what the policy computed (``policy_tokens.py``), to compare objectives at equal
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedalign.config import Config, PpoConfig, resolve_reward
from fedalign.data.records import SurveyItem
from fedalign.errors import ConfigError, DataError, RunFailed, WireError
from fedalign.metrics.alignment import is_defined
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.randomness import Key, generator, keyed_seed
from fedalign.rewards.text import reward
from fedalign.training import policy, tasks
from fedalign.training.encode import Ids
from fedalign.training.generate import generate
from fedalign.training.loop import TrainResult
from fedalign.training.policy_tokens import forward_tokens

DIVERGED, NOT_FINITE = "divergence_above_max_kl", "loss_not_finite"


@dataclass(frozen=True)
class PolicyJob:
    """Work for one client whose objective samples texts."""

    client: str
    group: str
    """The group whose shares the items carry and the rewards use."""
    adapter: Array
    """(P,) float32, the received adapter."""
    items: tuple[SurveyItem, ...]
    """The client's own training questions."""
    steps: int
    """Optimiser updates, at least 1."""
    learning_rate: float
    key: tuple[Key, ...]
    """Key of every draw, for instance (round, client)."""
    snapshots: tuple[int, ...] = ()
    """Update counts after which a copy of the adapter is kept, each in 1..steps."""


@dataclass(frozen=True)
class Scored:
    """Rewards of sampled texts."""

    rewards: np.ndarray
    """(N,) float32, in [0, 1]."""
    well_formed: np.ndarray
    """(N,) bool."""


@dataclass(frozen=True)
class Batch:
    """Questions that are asked and learnt from together."""

    settings: PpoConfig
    """With the epochs and minibatches of this batch."""
    asked: list[SurveyItem]
    prompts: list[Ids]
    """Of each question."""
    longest: list[int]
    """Limit of an answer's tokens, of each question."""
    draws: int
    """Seed of the texts."""
    key: tuple[Key, ...]
    """Of the order of minibatches."""


class Course:
    """One job under way: which questions it asks next, what it has counted, what comes of it.

    Attributes:
        job: the job.
        items: the questions it learns from.
        done, batch, tokens: updates, batches and tokens so far.
    """

    def __init__(self, resident: ResidentModel, job: PolicyJob, config: Config, seed: int) -> None:
        """Raise ``ConfigError``, ``WireError`` or ``DataError`` for a job that cannot be run."""
        check_policy_job(job)
        self.job = job
        self.items = learnable(job, config)
        self.done = self.batch = self.tokens = 0
        self._resident, self._config, self._seed = resident, config, seed
        self._questions = question_stream(len(self.items), seed, job.key)
        self._history: dict[str, list[float]] = {}
        self._snapshots: dict[int, Array] = {}

    def next(self) -> Batch:
        """Return the next batch; the stream of questions moves on."""
        until = min(s for s in (*self.job.snapshots, self.job.steps) if s > self.done)
        settings = next_batch(self._config.ppo, until - self.done)
        size = min(settings.minibatches * settings.questions, len(self.items))
        asked = [self.items[next(self._questions)] for _ in range(size)]
        resident, task = self._resident, self._config.rewards.task
        key = (*self.job.key, self.batch)
        return Batch(
            settings,
            asked,
            [tasks.task_prompt(resident, task, i.question, i.options) for i in asked],
            [tasks.max_new_tokens(resident, task, i.options) for i in asked],
            keyed_seed(self._seed, "local-texts", *key),
            ("local-ppo", *key),
        )

    def read(
        self, batch: Batch, sampled: Sequence[tuple[Ids, bool]]
    ) -> tuple[policy.Episodes, Scored]:
        """Return the sampled texts, question-major, and their rewards."""
        samples = self._config.ppo.samples
        known = {
            key: tasks.decode(self._resident, self._config.rewards.task, *key)
            for key in set(sampled)
        }
        scored = score_texts(
            self._config, self.job.group, batch.asked, [known[key] for key in sampled]
        )
        repeated = tuple(p for p in batch.prompts for _ in range(samples))
        return policy.Episodes(repeated, tuple(tokens for tokens, _ in sampled)), scored

    def record(
        self,
        batch: Batch,
        episodes: policy.Episodes,
        scored: Scored,
        kl: float,
        values: Mapping[str, float],
        adapter: Callable[[], Array],
    ) -> None:
        """Note a batch that is over; ``values`` are those of ``policy.improve``."""
        updates = int(values["updates"])
        self.tokens += forward_tokens(self._resident, episodes, batch.settings.questions, updates)
        self.done += updates
        self.batch += 1
        for name, value in {
            "loss": values["policy-loss"],
            "value_loss": values["value-loss"],
            "clip_fraction": values["clip-fraction"],
            "grad_norm": values["grad-norm"],
            "reward": float(scored.rewards.mean()),
            "format_rate": float(scored.well_formed.mean()),
            "kl": kl,
        }.items():
            self._history.setdefault(name, []).append(value)
        if self.done in self.job.snapshots:
            self._snapshots[self.done] = adapter()

    def failed(self, code: str) -> TrainResult:
        """Return a recorded failure."""
        return TrainResult(self.job.client, None, {}, self.done, code)

    def result(self, adapter: Array) -> TrainResult:
        """Return what came of the job, whose last adapter this is."""
        if not np.isfinite(adapter).all():
            return self.failed("adapter_not_finite")
        history = self._history
        summary = {name: float(np.mean(series)) for name, series in history.items()}
        summary |= {"loss_first": history["loss"][0], "loss_last": history["loss"][-1]}
        summary["tokens"] = float(self.tokens)
        return TrainResult(self.job.client, adapter, summary, self.done, snapshots=self._snapshots)


def train_ppo(
    resident: ResidentModel, jobs: Sequence[PolicyJob], config: Config, seed: int
) -> list[TrainResult]:
    """Train each job from its own adapter; results in the order of the jobs.

    Metrics: ``loss`` (policy loss, mean over batches), ``loss_first``, ``loss_last``, ``reward``,
    ``kl`` (nats a text, at sampling), ``format_rate``, ``value_loss``, ``clip_fraction``,
    ``grad_norm`` (means over batches) and ``tokens`` (a sum).

    A loss or gradient that is not finite, or a divergence above ``ppo.max_kl``, is a recorded
    failure of that job alone.  Raises ``DataError`` for a client without a question to learn from.
    """
    return [_train_one(resident, job, config, seed) for job in jobs]


def _train_one(resident: ResidentModel, job: PolicyJob, config: Config, seed: int) -> TrainResult:
    course = Course(resident, job, config, seed)
    state = policy.start(resident, job.adapter, config.ppo, config.ppo.kl)
    while course.done < job.steps:
        batch = course.next()
        resident.load(state.adapter)
        try:
            sampled = generate(
                resident, batch.prompts, config.ppo.samples, batch.longest, batch.draws
            )
            episodes, scored = course.read(batch, sampled)
            measured = policy.measure(resident, state, episodes)
            kl = float(np.mean(measured.kl))
            if kl > config.ppo.max_kl:
                return course.failed(DIVERGED)
            state, values = policy.improve(
                resident,
                state,
                episodes,
                measured,
                scored.rewards,
                batch.settings,
                seed,
                batch.key,
                learning_rate=job.learning_rate,
            )
        except RunFailed:
            return course.failed(NOT_FINITE)
        course.record(batch, episodes, scored, kl, values, state.adapter.copy)
    return course.result(state.adapter.copy())


def next_batch(settings: PpoConfig, left: int) -> PpoConfig:
    """Return the settings of a batch that takes at most ``left`` updates, at least 1.

    Whole batches while they fit; then fewer passes over as many questions; then fewer questions.
    """
    epochs = min(settings.epochs, left // settings.minibatches)
    if epochs:
        return replace(settings, epochs=epochs)
    return replace(settings, epochs=1, minibatches=left)


def question_stream(count: int, seed: int, key: tuple[Key, ...]) -> Iterator[int]:
    """Yield indices of questions without end: keyed permutations of ``range(count)`` joined."""
    epoch = 0
    while True:
        yield from generator(seed, "local-questions", *key, epoch).permutation(count).tolist()
        epoch += 1


def score_texts(
    config: Config, group: str, items: Sequence[SurveyItem], texts: Sequence[str]
) -> Scored:
    """Reward texts (N,) by a group's shares; ``items`` holds each question once, in order.

    N is a multiple of the number of items: the texts of one question stand together.  A malformed
    text gets ``rewards.malformed``.
    """
    kind = resolve_reward(config)
    samples = len(texts) // len(items)
    found = [
        reward(
            config.rewards,
            kind,
            text,
            items[n // samples].shares[group],
            items[n // samples].ordinals,
        )
        for n, text in enumerate(texts)
    ]
    values = [config.rewards.malformed if r is None else r for r in found]
    return Scored(np.array(values, dtype=np.float32), np.array([r is not None for r in found]))


def learnable(job: PolicyJob, config: Config) -> tuple[SurveyItem, ...]:
    """Return the job's questions that its group answered and whose reward is defined."""
    kind = resolve_reward(config)
    items = tuple(i for i in job.items if job.group in i.shares and is_defined(kind, i.ordinals))
    if not items:
        raise DataError(
            f"client '{job.client}' has {len(job.items)} training questions and none that "
            f"rewards.score = '{kind}' is defined for."
        )
    return items


def check_policy_job(job: PolicyJob) -> None:
    """Raise unless the job's steps, snapshots and adapter can be trained on."""
    if job.steps < 1 or any(not 1 <= s <= job.steps for s in job.snapshots):
        raise ConfigError(
            f"client '{job.client}': {job.steps} steps with snapshots {job.snapshots}; steps must "
            "be at least 1 and snapshots within 1..steps."
        )
    if not job.adapter.any():
        raise WireError("adapter_all_zero", "with A and B both zero no gradient ever arises")
