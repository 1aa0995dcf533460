"""The Flower ClientApp: one handler for each message type, and nothing private in any reply.

A handler decodes the request, lets the resident trainer work, encodes the answer.  Whatever goes
wrong becomes a status code for the clients concerned; the traceback goes to this process's own log
(logger ``fedalign.client``) and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.store import hosted, population
from fedalign import wire
from fedalign.config import Config, from_json
from fedalign.errors import FedalignError, WireError
from fedalign.wire.predictor import decode_predictor, encode_predictor_replies

log = logging.getLogger("fedalign.client")

app = ClientApp()

Handler = Callable[[Message, Context, wire.Request, Config], RecordDict]


def _answer(message: Message, context: Context, handler: Handler) -> Message:
    """Decode the request, call the handler, turn any failure into status codes."""
    clients: tuple[str, ...] = ()
    try:
        request = wire.decode_request(message.content)
        clients = request.clients
        content = handler(message, context, request, from_json(request.config_json))
    except WireError as error:
        log.error("request refused: %s", error)
        mismatch = error.reason == "manifest-mismatch"
        status = wire.MANIFEST_MISMATCH if mismatch else wire.BAD_REQUEST
        content = wire.encode_failure(clients, status)
    except FedalignError as error:
        log.error("%s", error)
        content = wire.encode_failure(clients, wire.INTERNAL_ERROR)
    except Exception:
        log.exception("internal error")
        content = wire.encode_failure(clients, wire.INTERNAL_ERROR)
    return Message(content, reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which clients this node hosts, and with which model."""

    def handle(_: Message, context: Context, request: wire.Request, config: Config) -> RecordDict:
        from clients.trainer import resident_trainer

        trainer = resident_trainer(config)
        return wire.encode_hello(trainer.hello(_hosted(context, config)))

    return _answer(message, context, handle)


@app.evaluate("score")
def score(message: Message, context: Context) -> Message:
    """Score the received adapter on the splits asked for."""

    def handle(message: Message, _: Context, request: wire.Request, config: Config) -> RecordDict:
        from clients.trainer import resident_trainer

        trainer = resident_trainer(config)
        adapter = _adapter(message, request, trainer.manifest)
        replies = trainer.score(request.clients, adapter, request.splits)
        return wire.encode_scores(replies, request.splits)

    return _answer(message, context, handle)


@app.train("round")
def train(message: Message, context: Context) -> Message:
    """Score the received adapter on validation, then train from it."""

    def handle(message: Message, _: Context, request: wire.Request, config: Config) -> RecordDict:
        from clients.trainer import resident_trainer

        trainer = resident_trainer(config)
        adapter = _adapter(message, request, trainer.manifest)
        return wire.encode_train(*trainer.train(request.clients, adapter, request.round))

    return _answer(message, context, handle)


@app.train("personal")
def personal(message: Message, context: Context) -> Message:
    """Train on from the final adapter, locally; answer with test scores only."""

    def handle(message: Message, _: Context, request: wire.Request, config: Config) -> RecordDict:
        from clients.trainer import resident_trainer

        trainer = resident_trainer(config)
        adapter = _adapter(message, request, trainer.manifest)
        replies, stages = trainer.personal(request.clients, adapter, request.round)
        return wire.encode_scores(replies, stages)

    return _answer(message, context, handle)


@app.query("exchange")
def exchange(message: Message, context: Context) -> Message:
    """Say what the server's sampled texts are worth here, as the site's policy allows."""

    def handle(message: Message, _: Context, request: wire.Request, config: Config) -> RecordDict:
        from clients.trainer import resident_trainer

        trainer = resident_trainer(config)
        rollouts = wire.decode_rollouts(message.content)
        predictor = None
        if config.site.answers != "shares":
            predictor = decode_predictor(message.content, trainer.predictor.size)
        return wire.encode_rewards(trainer.exchange(request.clients, rollouts, predictor))

    return _answer(message, context, handle)


@app.train("predictor")
def predictor(message: Message, context: Context) -> Message:
    """Train the preference predictor on this site's own answers."""

    def handle(message: Message, _: Context, request: wire.Request, config: Config) -> RecordDict:
        from clients.trainer import resident_trainer

        site = resident_trainer(config).predictor
        flat = decode_predictor(message.content, site.size)
        return encode_predictor_replies(*site.train(request.clients, flat, request.round))

    return _answer(message, context, handle)


def _adapter(message: Message, request: wire.Request, manifest: wire.Manifest) -> wire.F32:
    if request.manifest_hash != manifest.hash:
        raise WireError("manifest-mismatch")
    return wire.decode_adapter(message.content, manifest)


def _hosted(context: Context, config: Config) -> tuple[str, ...]:
    names = [client.name for client in population(config)]
    node = context.node_config
    return hosted(names, int(node.get("partition-id", 0)), int(node.get("num-partitions", 1)))
