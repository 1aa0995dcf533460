"""One exchange, from the texts of the policy to its updates; what each step is, see ``rlhf.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Message

from fedalign.config import Config
from fedalign.errors import ResumeError
from fedalign.ledger import Ledger
from server.checkpoint import Checkpoint
from server.directory import Directory
from server.rlhf import Policy, RewardStrategy, check_alive
from server.strategy import RoundResult

MOSTLY_ANSWERED = 0.5
"""An exchange whose best-covered group answered a smaller share of the texts is warned of."""

Send = Callable[[Iterable[Message]], Iterator[Message]]


def run_exchange(
    strategy: RewardStrategy,
    policy: Policy,
    round_: int,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    send: Send,
    warn: Callable[[str], None],
) -> None:
    """Do one attempt at exchange ``round_``; the result is in ``strategy.result``.

    Args:
        arrays: of the checkpoint; the frozen predictor is read.
        send: pushes messages and yields their replies.
        warn: tells the person who runs this.

    Raises ``RunFailed`` when the policy has collapsed and ``QuorumMissed`` below quorum.
    """
    config = strategy.config
    sampled = policy.sample(round_)
    check_alive(config.rewards, config.ppo.max_kl, sampled, round_)
    asked = time.perf_counter()
    messages = strategy.configure_exchange(round_, sampled.rollouts, arrays.get("predictor"))
    given = strategy.aggregate_exchange(round_, send(messages), sampled)
    covered = max(given.coverage.values())
    if covered < MOSTLY_ANSWERED:
        warn(
            f"exchange {round_}: no group answered more than {covered:.0%} of the texts. Do sites "
            "hold these questions, and does their policy allow so many texts a question?"
        )
    judged = strategy.judge(round_, given, sampled, policy.kl)
    answered = time.perf_counter()
    adapter, kept, metrics = policy.improve(round_, sampled, judged.rewards)
    seconds = {
        **sampled.seconds,
        "exchange": answered - asked,
        "update": time.perf_counter() - answered,
    }
    strategy.record_exchange(round_, given, judged, metrics, seconds)
    strategy.state = judged.state
    strategy.result = RoundResult(adapter, judged.state, given.means, dict(judged.influence), kept)


def open_policy(
    config: Config, strategy: RewardStrategy, state: Checkpoint, ledger: Ledger
) -> Policy:
    """Return the policy of a run, new or as the checkpoint has it.

    Raises ``ResumeError`` when the questions it may ask are not those the run began with.
    """
    policy = make_policy(config, strategy.directory, state)
    if ledger.run().get("questions") not in (None, policy.bank_hash):
        raise ResumeError(
            f"the questions of {strategy.folder} have changed since the run began. Restore the "
            "data or rewards.prompts, or start a new run."
        )
    ledger.put_run(questions=policy.bank_hash)
    return policy


def make_policy(config: Config, directory: Directory, state: Checkpoint) -> Policy:
    """Load the model that the server trains in mode ``rewards``."""
    from server.policy_trainer import PolicyTrainer  # torch, which adapter mode does without

    return PolicyTrainer(
        config, len(directory.groups), directory.manifest, state.adapter, state.arrays
    )


def predictor_inputs(config: Config) -> int:
    """Return the width of the frozen base's embeddings, which the predictor reads."""
    from fedalign.models.resident import resident_model
    from fedalign.rewards.embedding import embedding_dim

    return embedding_dim(resident_model(config.model, config.aggregation.method == "frozen-a"))
