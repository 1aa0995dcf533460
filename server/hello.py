"""The first message of a run: who is there, with how much data, with which model."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedalign import wire
from fedalign.config import Config, to_json
from fedalign.errors import RunFailed, WireError
from server import link
from server.asking import NO_REPLY, failure_reason
from server.directory import Directory, build


def ask_hello(grid: Grid, config: Config, poll: float) -> Directory:
    """Ask every online node of a simulation which clients it hosts.

    Raises ``RunFailed`` when no node comes online in time, or one cannot start.
    """
    nodes = list(grid.get_node_ids())
    timeout = config.run.round_timeout
    end = time.monotonic() + timeout
    while not nodes and time.monotonic() < end:
        time.sleep(max(poll, 0.1))  # Flower registers virtual nodes in the background
        nodes = list(grid.get_node_ids())
    if not nodes:
        raise RunFailed(
            f"no node came online within run.round-timeout = {timeout:g} s. Start the nodes, or "
            "wait longer."
        )
    hellos, reasons = exchange_hello(grid, nodes, to_json(config), timeout, poll)
    if reasons:
        raise RunFailed(
            f"hello: {len(nodes) - len(hellos)} of {len(nodes)} nodes could not start "
            f"({', '.join(sorted(set(reasons.values())))}). The cause is in the log of the node; "
            "nothing private is sent here."
        )
    return build(hellos.items())


def exchange_hello(
    grid: Grid, nodes: Iterable[int], config_json: str, timeout: float, poll: float
) -> tuple[dict[int, wire.Hello], dict[int, str]]:
    """Ask nodes; return each one's answer, or the short code of why there is none.

    Takes ``timeout`` seconds at most.
    """
    request = wire.Request("hello", 0, 1, (), config_json)
    messages = [
        Message(wire.encode_request(request), n, wire.HELLO, ttl=timeout, group_id="hello")
        for n in sorted(nodes)
    ]
    waiting = link.push(grid, messages)
    node_of = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    hellos: dict[int, wire.Hello] = {}
    reasons: dict[int, str] = {}
    end = time.monotonic() + timeout
    while waiting and time.monotonic() < end:
        replies = link.pull(grid, waiting)
        for reply in replies:
            asked = reply.metadata.reply_to_message_id
            waiting.discard(asked)
            if reply.has_error():
                reasons[node_of[asked]] = failure_reason(reply.error.code)
                continue
            try:
                hellos[node_of[asked]] = wire.decode_hello(reply.content)
            except WireError as error:
                reasons[node_of[asked]] = error.reason
        if not replies:
            time.sleep(poll)
    silent = set(node_of.values()) - hellos.keys() - reasons.keys()
    return hellos, reasons | dict.fromkeys(sorted(silent), NO_REPLY)
