"""The Flower ClientApp: hands each message on, and nothing private is in any reply.

On an enrolled site (``--node-config 'socket="..."'``) this code came from the coordinator and runs
beside the node's key, away from the data.  It sends kind and content of the message to the site's
resident trainer over a unix socket (``frames.py``) and returns what comes back; it loads neither
torch nor a model.  In simulation there is no socket and the handlers run in this process.

Whatever goes wrong becomes a status code for the clients that the message names; the cause goes to
this process's own log (logger ``fedalign.client``) and nowhere else.
"""

from __future__ import annotations

import json
import logging
import socket
import time

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedalign import wire
from fedalign.errors import WireError
from fedalign.wire.predictor import PREDICTOR

log = logging.getLogger("fedalign.client")

CONNECT = 30.0
"""Seconds to reach the trainer."""
LONGEST = 3600.0
"""Seconds to wait for its answer where the message does not say (``run.round-timeout``)."""

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which clients this node hosts, and with which model."""
    return _answer(wire.HELLO, message, context)


@app.evaluate("score")
def score(message: Message, context: Context) -> Message:
    """Score the received adapter on the splits asked for."""
    return _answer(wire.SCORE, message, context)


@app.train("round")
def train(message: Message, context: Context) -> Message:
    """Score the received adapter on validation, then train from it."""
    return _answer(wire.TRAIN, message, context)


@app.train("personal")
def personal(message: Message, context: Context) -> Message:
    """Train on from the final adapter, locally; answer with test scores only."""
    return _answer(wire.PERSONAL, message, context)


@app.query("exchange")
def exchange(message: Message, context: Context) -> Message:
    """Say what the server's sampled texts are worth here, as the site's policy allows."""
    return _answer(wire.EXCHANGE, message, context)


@app.train("predictor")
def predictor(message: Message, context: Context) -> Message:
    """Train the preference predictor on this site's own answers."""
    return _answer(PREDICTOR, message, context)


def _answer(kind: str, message: Message, context: Context) -> Message:
    node = context.node_config
    if "socket" in node:
        content = forward(kind, message.content, str(node["socket"]), str(node.get("site", "")))
    else:
        from clients.handlers import SiteContext, handle

        share = SiteContext(int(node.get("partition-id", 0)), int(node.get("num-partitions", 1)))
        content = handle(kind, message.content, share)
    return Message(content, reply_to=message)


def forward(kind: str, content: RecordDict, path: str, site: str) -> RecordDict:
    """Return the trainer's answer; status ``internal-error`` where there is none in time."""
    from clients.frames import REPLY, read_frame, write_frame
    from clients.lines import Line

    clients: tuple[str, ...] = (site,)
    seconds = LONGEST
    try:
        request = wire.decode_request(content)
        clients = request.clients or clients
        seconds = float(json.loads(request.config_json)["run.round-timeout"])
    except (WireError, ValueError, KeyError, TypeError):
        log.warning("%s: the message cannot be read here; the trainer will say so", kind)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            _connect(connection, path)
            line = Line(connection, seconds)
            write_frame(line.write, kind, content)
            line.finish()
            return read_frame(line.read, (REPLY,))[1]
    except (OSError, WireError) as error:
        log.error("%s: no answer from the resident trainer at %s: %s", kind, path, error)
    return wire.encode_failure(clients, wire.INTERNAL_ERROR)


def _connect(connection: socket.socket, path: str) -> None:
    """Reach the trainer; where its queue is full, Linux says so at once instead of waiting."""
    connection.settimeout(CONNECT)
    end = time.monotonic() + CONNECT
    while True:
        try:
            return connection.connect(path)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.1)
