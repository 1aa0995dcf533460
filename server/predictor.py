"""Federated averaging of the preference predictor (PluralLLM, arXiv 2503.09925), on the server.

Rounds 1 to ``predictor.rounds``: the parameters go to the sampled clients, each trains on its own
answers, and the new parameters are the weighted mean of what comes back.  Weights are fixed:
every group the same, and within a group by capped size (``weights.within-group``).  (The published
code weights by the size of one random batch, another in every round.)  The round after the last
asks all clients for the error of the final parameters and changes nothing.

A group none of whose replies is usable is left out of the mean of that round.  Below quorum the
attempt is void.  The ledger gets, under phase ``predictor``, a reply a client and the curves
``predictor-loss`` (last step) and ``predictor-error`` (of the parameters the client received, on
its validation questions: mean Jensen-Shannon distance, lower is better; absent where a site
withholds it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import Message, RecordDict

from fedalign import wire
from fedalign.aggregation.clients import client_weights
from fedalign.errors import RunFailed
from fedalign.ledger import CurveRow, ReplyRow
from fedalign.rewards.predictor_parameters import initial_predictor
from fedalign.wire.predictor import (
    PREDICTOR,
    PredictorReply,
    decode_predictor_replies,
    encode_predictor,
    predictor_record,
)
from server.asking import QuorumMissed
from server.strategy import GroupStrategy

PHASE = "predictor"


def first_predictor(strategy: GroupStrategy, dim: int) -> wire.F32:
    """Return the starting parameters (P,); ``dim`` is ``fedalign.rewards.embedding_dim``."""
    return initial_predictor(strategy.config.predictor, dim, strategy.config.run.seed)


def configure_predictor(strategy: GroupStrategy, round_: int, flat: wire.F32) -> Iterable[Message]:
    """Ask the sampled clients to train (P,) parameters; all clients in the round after the last."""
    record = predictor_record(flat)

    def build(request: wire.Request) -> RecordDict:
        return encode_predictor(wire.encode_request(request), record)

    return strategy.messages(PREDICTOR, PHASE, round_, strategy.asked(PHASE, round_), build)


def aggregate_predictor(
    strategy: GroupStrategy, round_: int, received: wire.F32, replies: Iterable[Message]
) -> wire.F32:
    """Check the replies, record them, and return the new parameters (P,).

    ``received`` are the parameters that were sent.  Raises :class:`QuorumMissed` below quorum and
    ``RunFailed`` when the mean is not finite.
    """
    usable: dict[str, PredictorReply] = {}
    trained: dict[str, wire.F32] = {}
    failed: dict[str, str] = {}

    def decode(message: Message, clients: Sequence[str]) -> None:
        rows, updates = decode_predictor_replies(message.content, clients, len(received))
        for row, update in zip(rows, updates, strict=True):
            if row.status == wire.OK:
                usable[row.client], trained[row.client] = row, update
            else:
                failed[row.client] = wire.STATUS[row.status]

    strategy.collect(replies, decode, failed)
    try:
        strategy.check_quorum(PHASE, round_, usable, failed)
    except QuorumMissed:
        rows = strategy.recorder.failures(failed)
        strategy.ledger.write(PHASE, round_, strategy.attempt, replies=rows)
        raise
    training = round_ <= strategy.config.predictor.rounds
    trained = {client: trained[client] for client in usable}
    weights = fixed_weights(strategy, tuple(usable)) if training else {}
    flat = average(trained, weights) if training else received
    if not np.isfinite(flat).all():
        raise RunFailed(f"predictor round {round_}: the mean of the parameters is not finite.")
    members = strategy.directory.members
    answered = [
        ReplyRow(
            client=c,
            group=members[c].group,
            weight=weights.get(c),
            examples=r.tokens,
            loss=r.loss_last if training else None,
            steps=strategy.config.predictor.steps if training else 0,
        )
        for c, r in sorted(usable.items())
    ]
    curves = [
        CurveRow(client=c, name=name, value=value)
        for c, r in sorted(usable.items())
        for name, value in (("predictor-loss", r.loss_last), ("predictor-error", r.error))
        if (training if name == "predictor-loss" else r.questions > 0)
    ]
    strategy.ledger.write(
        PHASE,
        round_,
        strategy.attempt,
        replies=answered + strategy.recorder.failures(failed),
        curves=curves,
    )
    return flat


def fixed_weights(strategy: GroupStrategy, clients: Sequence[str]) -> dict[str, float]:
    """Return the weight of each client: groups alike, within a group by capped size; sum 1."""
    members = strategy.directory.members
    groups = sorted({members[c].group for c in clients})
    return client_weights(
        dict.fromkeys(groups, 1.0 / len(groups)),
        [(c, members[c].group, members[c].size) for c in sorted(clients)],
        strategy.config.weights.within_group,
    )


def average(trained: dict[str, wire.F32], weights: dict[str, float]) -> wire.F32:
    """Return the weighted mean (P,) float32, summed in float64 in the order of client names."""
    total = np.zeros(len(next(iter(trained.values()))), dtype=np.float64)
    for client in sorted(weights):
        total += weights[client] * trained[client].astype(np.float64)
    return total.astype(np.float32)
