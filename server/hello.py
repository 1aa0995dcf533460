"""The first message of a run: who is there, with how much data, with which model."""

from __future__ import annotations

import time

from flwr.app import Message
from flwr.serverapp import Grid

from fedalign import wire
from fedalign.config import Config, to_json
from fedalign.errors import RunFailed, WireError
from server.directory import Directory, build


def ask_hello(grid: Grid, config: Config, poll: float) -> Directory:
    """Ask every online node which clients it hosts.

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
    request = wire.Request("hello", 0, 1, (), to_json(config))
    messages = [
        Message(wire.encode_request(request), n, wire.HELLO, ttl=timeout, group_id="hello")
        for n in sorted(nodes)
    ]
    waiting = set(grid.push_messages(messages))
    node_of = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    hellos: list[tuple[int, wire.Hello]] = []
    reasons: set[str] = set()
    while waiting and time.monotonic() < end:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            asked = reply.metadata.reply_to_message_id
            waiting.discard(asked)
            if reply.has_error():
                reasons.add(f"flower-error-{reply.error.code}")
                continue
            try:
                hellos.append((node_of[asked], wire.decode_hello(reply.content)))
            except WireError as error:
                reasons.add(error.reason)
        if not replies:
            time.sleep(poll)
    if waiting:
        reasons.add("no-reply")
    if reasons:
        raise RunFailed(
            f"hello: {len(nodes) - len(hellos)} of {len(nodes)} nodes could not start "
            f"({', '.join(sorted(reasons))}). The cause is in the log of the node; nothing private "
            "is sent here."
        )
    return build(hellos)
