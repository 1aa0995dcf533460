"""One handler for each message: decode, let the resident trainer work, encode the answer.

:func:`handle` is what the ClientApp calls in simulation and what the resident trainer of an
enrolled site calls for each frame.  What differs between the two is the :class:`SiteContext`: which
clients are hosted, from which data, what may be done and what may leave.

Whatever goes wrong becomes a status code for the clients concerned; the cause goes to this
process's own log (logger ``fedalign.client``) and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from clients.coarse import receive, send
from fedalign import wire
from fedalign.config import Config, from_json
from fedalign.errors import FedalignError, WireError
from fedalign.wire.predictor import (
    PREDICTOR,
    PredictorReply,
    decode_predictor,
    encode_predictor_replies,
)

if TYPE_CHECKING:
    from clients.trainer import ResidentTrainer

log = logging.getLogger("fedalign.client")


class Refused(FedalignError):
    """The site does not do what it was asked; ``status`` is all that the server is told."""

    def __init__(self, status: int) -> None:
        super().__init__(wire.STATUS[status])
        self.status = status


class SiteContext:
    """A node of a simulation: its share of the configured population, nothing withheld.

    The enrolled site (``clients.enrolled``) replaces every method.
    """

    def __init__(self, partition: int = 0, partitions: int = 1) -> None:
        self._share = (partition, partitions)

    def config(self, kind: str, request: wire.Request) -> Config:
        """Return the settings to work by; raises :class:`Refused` where the site declines."""
        return from_json(request.config_json)

    def answering(self, kind: str, clients: tuple[str, ...]) -> tuple[str, ...]:
        """Return the clients that a failure is reported for."""
        return clients

    def hosted(self, config: Config) -> tuple[str, ...]:
        """Return the clients of this node, sorted."""
        from clients.store import hosted, population

        return hosted([client.name for client in population(config)], *self._share)

    def trainer(self, config: Config) -> ResidentTrainer:
        """Return the trainer that serves them."""
        from clients.trainer import resident_trainer

        return resident_trainer(config)

    def release_scores(self, replies: Sequence[wire.ScoreReply]) -> list[wire.ScoreReply]:
        """Return what leaves of scores."""
        return list(replies)

    def release_training(
        self, round_: int, replies: Sequence[wire.TrainReply], received: wire.F32, updates: wire.F32
    ) -> tuple[list[wire.TrainReply], wire.F32]:
        """Return what leaves of a round.

        Args:
            round_: number of the round.
            replies: one for each client named.
            received: (P,) the factors that training started from, as far as clients send them.
            updates: (k, P) the factors it ended with.
        """
        return list(replies), updates

    def largest_change(self) -> float | None:
        """Return the norm that the change of the factors, as sent, may not exceed; None: any."""
        return None

    def release_predictor(self, replies: Sequence[PredictorReply]) -> list[PredictorReply]:
        """Return what leaves of a round of the predictor, beside its parameters."""
        return list(replies)


def handle(kind: str, content: RecordDict, site: SiteContext) -> RecordDict:
    """Return the answer to one message of kind ``kind`` (``fedalign.wire``); never raises.

    (But for what is no error: ``KeyboardInterrupt`` and the like pass.)
    """
    clients: tuple[str, ...] = ()
    try:
        request = wire.decode_request(content)
        clients = request.clients
        return HANDLERS[kind](content, request, site.config(kind, request), site)
    except Refused as refusal:
        log.warning("%s refused: %s", kind, refusal)
        status = refusal.status
    except WireError as error:
        log.error("request refused: %s", error)
        mismatch = error.reason == "manifest-mismatch"
        status = wire.MANIFEST_MISMATCH if mismatch else wire.BAD_REQUEST
    except FedalignError as error:
        log.error("%s", error)
        status = wire.INTERNAL_ERROR
    except Exception:
        log.exception("internal error")
        status = wire.INTERNAL_ERROR
    return wire.encode_failure(site.answering(kind, clients), status)


def _hello(_: RecordDict, __: wire.Request, config: Config, site: SiteContext) -> RecordDict:
    trainer = site.trainer(config)
    return wire.encode_hello(trainer.hello(site.hosted(config)))


def _score(
    content: RecordDict, request: wire.Request, config: Config, site: SiteContext
) -> RecordDict:
    trainer = site.trainer(config)
    adapter = _adapter(content, request, trainer.manifest)
    hosted = site.hosted(config)
    replies = trainer.score(request.clients, adapter, request.splits, hosted)
    return wire.encode_scores(site.release_scores(replies), request.splits)


def _train(
    content: RecordDict, request: wire.Request, config: Config, site: SiteContext
) -> RecordDict:
    trainer = site.trainer(config)
    manifest = trainer.manifest
    _check_manifest(request, manifest)
    adapter = receive(content, config, manifest)
    replies, updates = trainer.train(request.clients, adapter, request.round, site.hosted(config))
    received = adapter[trainer.upload_mask()]
    replies, updates = site.release_training(request.round, replies, received, updates)
    bound = site.largest_change()
    sent = send(config, manifest, request.round, replies, received, updates, bound)
    return wire.encode_train(replies, sent)


def _personal(
    content: RecordDict, request: wire.Request, config: Config, site: SiteContext
) -> RecordDict:
    trainer = site.trainer(config)
    adapter = _adapter(content, request, trainer.manifest)
    replies, stages = trainer.personal(request.clients, adapter, request.round)
    return wire.encode_scores(site.release_scores(replies), stages)


def _exchange(
    content: RecordDict, request: wire.Request, config: Config, site: SiteContext
) -> RecordDict:
    trainer = site.trainer(config)
    rollouts = wire.decode_rollouts(content)
    predictor = None
    if config.site.answers != "shares":
        predictor = decode_predictor(content, trainer.predictor.size)
    return wire.encode_rewards(trainer.exchange(request.clients, rollouts, predictor))


def _predictor(
    content: RecordDict, request: wire.Request, config: Config, site: SiteContext
) -> RecordDict:
    own = site.trainer(config).predictor
    flat = decode_predictor(content, own.size)
    replies, updates = own.train(request.clients, flat, request.round)
    return encode_predictor_replies(site.release_predictor(replies), updates)


def _adapter(content: RecordDict, request: wire.Request, manifest: wire.Manifest) -> wire.F32:
    _check_manifest(request, manifest)
    return wire.decode_adapter(content, manifest)


def _check_manifest(request: wire.Request, manifest: wire.Manifest) -> None:
    if request.manifest_hash != manifest.hash:
        raise WireError("manifest-mismatch")


HANDLERS: dict[str, Callable[[RecordDict, wire.Request, Config, SiteContext], RecordDict]] = {
    wire.HELLO: _hello,
    wire.SCORE: _score,
    wire.TRAIN: _train,
    wire.PERSONAL: _personal,
    wire.EXCHANGE: _exchange,
    PREDICTOR: _predictor,
}
