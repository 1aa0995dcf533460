"""The policy that the server trains in mode ``rewards``: texts out, PPO updates in.

The torch side of :mod:`server.rlhf`.  One LoRA adapter over the frozen base (the reference is the
base itself, adapter off), a value head, their optimiser moments and the current KL coefficient make
up the state; all of it is in the checkpoint, so a resumed run takes the same updates bit for bit.
Texts, minibatches and questions are drawn from generators keyed by (seed, purpose, exchange).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedalign import wire
from fedalign.aggregation.group_rewards import kl_factor
from fedalign.config import Config
from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.models.resident import resident_model
from fedalign.randomness import keyed_seed
from fedalign.rewards.text import parse
from fedalign.training.generate import generate
from fedalign.training.policy import Episodes, Measured, PolicyState, improve, measure, start
from fedalign.training.policy_tokens import forward_tokens
from fedalign.training.tasks import decode, max_new_tokens, spelled, task_prompt
from server.questions import draw_questions, question_bank
from server.rlhf import F64, Sampled

PREFIX = "policy/"
WARM_UP = 4
"""Exchanges until the learning rate is reached."""


@dataclass(frozen=True)
class _Batch:
    episodes: Episodes
    measured: Measured


class PolicyTrainer:
    """Samples from and improves the policy of one run."""

    def __init__(
        self,
        config: Config,
        groups: int,
        manifest: wire.Manifest,
        adapter: wire.F32,
        arrays: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        """Go on from the checkpoint's ``adapter`` and ``arrays``, or start from ``adapter``.

        Raises ``RunFailed`` when this machine's base is not the one the clients hold, ``DataError``
        for a question bank the model cannot take.
        """
        torch.set_num_threads(1)
        self.config = config
        self.resident = resident_model(config.model, config.aggregation.method == "frozen-a")
        _check_same_base(self.resident, manifest)
        self.factor = kl_factor(config.rewards.rule, groups)
        self.bank = self._usable_bank()
        stored = {n.removeprefix(PREFIX): a for n, a in arrays.items() if n.startswith(PREFIX)}
        self.state = (
            PolicyState.from_arrays({"adapter": adapter, **stored})
            if stored
            else start(self.resident, adapter, config.ppo, config.ppo.kl)
        )
        self._next = self.state

    @property
    def bank_hash(self) -> str:
        """SHA-256 of the question bank; a resumed run must have the same."""
        return hashlib.sha256(repr(self.bank).encode()).hexdigest()

    @property
    def kl(self) -> float:
        """Current KL coefficient, without the rule's factor."""
        return self.state.kl

    def sample(self, exchange: int) -> Sampled:
        """Write ``minibatches * questions * samples`` texts, and measure them once."""
        config, ppo, task = self.config, self.config.ppo, self.config.rewards.task
        began = time.perf_counter()
        count = ppo.minibatches * ppo.questions
        chosen = [
            self.bank[i] for i in draw_questions(len(self.bank), count, config.run.seed, exchange)
        ]
        prompts = [task_prompt(self.resident, task, q.question, q.options) for q in chosen]
        self.resident.load(self.state.adapter)
        written = generate(
            self.resident,
            prompts,
            ppo.samples,
            [max_new_tokens(self.resident, task, q.options) for q in chosen],
            keyed_seed(config.run.seed, "rollouts", exchange),
            stop_at_eos=task != "letter",
        )
        texts = [decode(self.resident, task, tokens, ended) for tokens, ended in written]
        question_of = [i for i in range(count) for _ in range(ppo.samples)]
        answers = [
            parse(task, text, len(chosen[i].options))
            for text, i in zip(texts, question_of, strict=True)
        ]
        generated = time.perf_counter()
        episodes = Episodes(
            tuple(prompts[i] for i in question_of), tuple(tokens for tokens, _ in written)
        )
        measured = measure(self.resident, self.state, episodes)
        return Sampled(
            rollouts=wire.Rollouts(tuple(chosen), tuple(question_of), tuple(texts)),
            well_formed=np.array([a is not None for a in answers], dtype=bool),
            canonical=np.array(
                [
                    a is not None and text == spelled(self.resident, task, a)
                    for a, text in zip(answers, texts, strict=True)
                ],
                dtype=bool,
            ),
            reference_logps=measured.ref_text_logps,
            kl=float(measured.kl.mean()),
            generated_tokens=sum(len(tokens) for tokens, _ in written),
            seconds={"generate": generated - began, "measure": time.perf_counter() - generated},
            episodes=_Batch(episodes, measured),
        )

    def improve(
        self, exchange: int, sampled: Sampled, rewards: F64
    ) -> tuple[wire.F32, dict[str, np.ndarray[Any, Any]], dict[str, float]]:
        """Take the PPO updates of an exchange on the texts that have a reward."""
        config, batch = self.config, sampled.episodes
        assert isinstance(batch, _Batch)
        rate = config.ppo.learning_rate * rate_of(exchange, config.run.rounds)
        self._next, metrics = improve(
            self.resident,
            self.state,
            batch.episodes,
            batch.measured,
            rewards,
            config.ppo,
            config.run.seed,
            ("exchange", exchange),
            learning_rate=rate,
            kl_factor=self.factor,
        )
        metrics["policy-tokens"] = float(
            forward_tokens(
                self.resident, batch.episodes, config.ppo.questions, int(metrics["updates"])
            )
        )
        # The adapter itself stands in the checkpoint as such.
        arrays = {PREFIX + n: a for n, a in self._next.arrays().items() if n != "adapter"}
        return self._next.adapter, arrays, metrics

    def adopt(self) -> None:
        """Make the result of the last :meth:`improve` the policy."""
        self.state = self._next

    def _usable_bank(self) -> tuple[wire.Question, ...]:
        bank, bad = [], []
        for question in question_bank(self.config):
            try:
                task_prompt(
                    self.resident, self.config.rewards.task, question.question, question.options
                )
                bank.append(question)
            except DataError as error:
                bad.append(str(error))
        if bad and not self.config.data.skip_bad:
            raise DataError(f"{bad[0]} Use --set data.skip-bad=true to leave such questions out.")
        if not bank:
            raise DataError(f"this model can take none of {len(bad)} questions; first: {bad[0]}")
        return tuple(bank)


def rate_of(exchange: int, exchanges: int) -> float:
    """Return the learning rate of an exchange (1, 2, ...) as a share of ``ppo.learning-rate``.

    It rises over the first exchanges, because Adam's first steps are of full size whatever the
    gradient and the value head knows nothing yet: without that a run in a hundred collapsed.  Then
    it falls in a line to nothing: at a constant rate the policy jitters about its optimum.
    """
    return min(1.0, exchange / WARM_UP) * (1.0 - (exchange - 1) / exchanges)


def _check_same_base(resident: ResidentModel, manifest: wire.Manifest) -> None:
    mine = (resident.base_revision, resident.tokenizer_hash, resident.layout)
    if mine != (manifest.base_revision, manifest.tokenizer_hash, manifest.layout):
        raise RunFailed(
            "the coordinator's base model is not the one the clients hold (weights, tokenizer or "
            "adapter shape differ). In mode 'rewards' both sides must load the same model."
        )
