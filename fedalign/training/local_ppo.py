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

from collections.abc import Iterator, Sequence
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
from fedalign.training.generate import generate
from fedalign.training.loop import TrainResult
from fedalign.training.policy_tokens import forward_tokens


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
    check_policy_job(job)
    items = learnable(job, config)
    questions = question_stream(len(items), seed, job.key)
    state = policy.start(resident, job.adapter, config.ppo, config.ppo.kl)
    history: dict[str, list[float]] = {}
    snapshots: dict[int, Array] = {}
    done = batch = tokens = 0
    while done < job.steps:
        until = min(s for s in (*job.snapshots, job.steps) if s > done)
        settings = next_batch(config.ppo, until - done)
        size = min(settings.minibatches * settings.questions, len(items))
        asked = [items[next(questions)] for _ in range(size)]
        resident.load(state.adapter)
        try:
            episodes, texts = _sample(resident, asked, config, seed, (*job.key, batch))
            scored = score_texts(config, job.group, asked, texts)
            measured = policy.measure(resident, state, episodes)
            kl = float(np.mean(measured.kl))
            if kl > config.ppo.max_kl:
                return TrainResult(job.client, None, {}, done, "divergence_above_max_kl")
            state, values = policy.improve(
                resident,
                state,
                episodes,
                measured,
                scored.rewards,
                settings,
                seed,
                ("local-ppo", *job.key, batch),
                learning_rate=job.learning_rate,
            )
        except RunFailed:
            return TrainResult(job.client, None, {}, done, "loss_not_finite")
        updates = int(values["updates"])
        tokens += forward_tokens(resident, episodes, settings.questions, updates)
        done += updates
        batch += 1
        for name, value in {
            "loss": values["policy-loss"],
            "value_loss": values["value-loss"],
            "clip_fraction": values["clip-fraction"],
            "grad_norm": values["grad-norm"],
            "reward": float(scored.rewards.mean()),
            "format_rate": float(scored.well_formed.mean()),
            "kl": kl,
        }.items():
            history.setdefault(name, []).append(value)
        if done in job.snapshots:
            snapshots[done] = state.adapter.copy()
    if not np.isfinite(state.adapter).all():
        return TrainResult(job.client, None, {}, done, "adapter_not_finite")
    summary = {name: float(np.mean(series)) for name, series in history.items()}
    summary |= {"loss_first": history["loss"][0], "loss_last": history["loss"][-1]}
    summary["tokens"] = float(tokens)
    return TrainResult(job.client, state.adapter.copy(), summary, done, snapshots=snapshots)


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


def _sample(
    resident: ResidentModel,
    asked: Sequence[SurveyItem],
    config: Config,
    seed: int,
    key: tuple[Key, ...],
) -> tuple[policy.Episodes, list[str]]:
    """Sample ``ppo.samples`` texts for each question from the loaded adapter, question-major."""
    task, samples = config.rewards.task, config.ppo.samples
    prompts = [tasks.task_prompt(resident, task, i.question, i.options) for i in asked]
    longest = [tasks.max_new_tokens(resident, task, i.options) for i in asked]
    draws = keyed_seed(seed, "local-texts", *key)
    sampled = generate(resident, prompts, samples, longest, draws)
    texts = [tasks.decode(resident, task, tokens, ended) for tokens, ended in sampled]
    repeated = tuple(p for p in prompts for _ in range(samples))
    return policy.Episodes(repeated, tuple(tokens for tokens, _ in sampled)), texts
