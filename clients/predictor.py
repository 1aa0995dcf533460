"""The site's side of the preference predictor: local training, and predictions from a frozen one.

A client trains on its own training questions, and its context for predictions is drawn from them
too; validation questions are read only to measure the error, test questions never.  Clients of one
process share the base's embeddings (of public text) and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from fedalign import wire
from fedalign.config import Config
from fedalign.data.records import ClientData, SurveyItem, question_key
from fedalign.errors import DataError, FedalignError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.rewards.embedding import Embedder
from fedalign.rewards.predictor_parameters import layout, predictor_size
from fedalign.training.predictor_fit import (
    Answered,
    check_enough,
    fit,
    fixed_context,
    js_error,
    predicted_shares,
)
from fedalign.wire.predictor import PredictorReply

log = logging.getLogger("fedalign.client")


class PredictorSite:
    """Trains and keeps the predictor for the clients of one process."""

    def __init__(
        self, resident: ResidentModel, clients: Mapping[str, ClientData], config: Config
    ) -> None:
        self.clients = clients
        self.settings = config.predictor
        self.seed = config.run.seed
        self._embedder = Embedder(resident)
        self._layout = layout(self.settings, self._embedder.dim)
        self.size = predictor_size(self.settings, self._embedder.dim)
        """P, the number of parameters."""
        self._answered: dict[tuple[str, str], list[Answered]] = {}
        self._frozen: dict[str, Array] = {}
        self._predicted: dict[tuple[str, str, tuple[str, ...]], tuple[float, ...]] = {}

    def train(
        self, names: Sequence[str], flat: Array, round_: int
    ) -> tuple[list[PredictorReply], wire.F32]:
        """Measure the received parameters (P,) on validation, then train every client from them.

        Returns a reply for each name, in order, and parameters (k, P).  The round after the last
        trains nothing: it freezes the parameters and gives back what it got.
        """
        final = round_ > self.settings.rounds
        updates = np.zeros((len(names), self.size), dtype=np.float32)
        replies = []
        for i, name in enumerate(names):
            if name not in self.clients:
                replies.append(PredictorReply(name, wire.UNKNOWN_CLIENT))
                continue
            try:
                reply, updates[i] = self._train_one(name, flat, round_, final)
            except DataError as error:
                log.error("client %s: %s", name, error)
                reply = PredictorReply(name, wire.NO_DATA)
            replies.append(reply)
        if final:
            self.freeze(flat, names)
        return replies, updates

    def freeze(self, flat: Array, names: Sequence[str]) -> None:
        """Use these parameters for the predictions of the clients named, until further notice."""
        for name in names:
            known = self._frozen.get(name)
            if known is not None and np.array_equal(known, flat):
                continue
            self._frozen[name] = flat.copy()
            self._predicted = {k: v for k, v in self._predicted.items() if k[0] != name}

    def predict(self, name: str, question: wire.Question) -> tuple[float, ...]:
        """Return the predicted shares (K,) of a client's group; they sum to 1.

        The context never holds the question asked.  Raises ``FedalignError`` before
        :meth:`freeze`, and ``DataError`` for a question that cannot be embedded.
        """
        key = (name, question.question, question.options)
        if key not in self._predicted:
            if name not in self._frozen:
                raise FedalignError(
                    f"client '{name}' has no frozen predictor yet; the server sends it after the "
                    "last round of the predictor and with every exchange."
                )
            answered = self._split(name, "train")
            asked = question_key(question.question, question.options)
            context = fixed_context(answered, self.settings, self.seed, name, asked)
            embedded = self._embedder.embed([(question.question, question.options)])
            found = predicted_shares(
                self._frozen[name], self._layout, self.settings, context, embedded
            )
            self._predicted[key] = tuple(found[0].tolist())
        return self._predicted[key]

    def _train_one(
        self, name: str, flat: Array, round_: int, final: bool
    ) -> tuple[PredictorReply, Array]:
        train, held_out = self._split(name, "train"), self._split(name, "validation")
        check_enough(train, name)
        if not held_out:
            raise DataError(f"client '{name}' has no validation question to measure the error on.")
        context = fixed_context(train, self.settings, self.seed, name)
        predicted = predicted_shares(
            flat, self._layout, self.settings, context, [q.options for q in held_out]
        )
        error = js_error(predicted, [q.shares for q in held_out])
        if final:
            return PredictorReply(name, wire.OK, error=error, questions=len(held_out)), flat
        done = fit(flat, self._layout, train, self.settings, self.seed, name, round_)
        if done.flat is None:
            log.error("client %s: a loss or gradient of the predictor is not finite", name)
            return PredictorReply(name, wire.NON_FINITE), np.zeros_like(flat)
        reply = PredictorReply(
            name, wire.OK, done.loss_first, done.loss_last, done.tokens, error, len(held_out)
        )
        return reply, done.flat

    def _split(self, name: str, split: str) -> list[Answered]:
        """Return a client's own questions of ``train`` or ``validation``, embedded once."""
        key = (name, split)
        if key not in self._answered:
            client = self.clients[name]
            items = [i for i in client.split(split) if isinstance(i, SurveyItem)]
            vectors = self._embedder.embed([(i.question, i.options) for i in items])
            self._answered[key] = [
                Answered(i.key, x, np.asarray(i.shares[client.group], dtype=np.float32))
                for i, x in zip(items, vectors, strict=True)
            ]
        return self._answered[key]
