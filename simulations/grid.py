"""The in-process grid: Flower's Grid interface over one ClientApp in this process.

The same ServerApp and ClientApp as everywhere else, no Ray, no network, milliseconds a round.
Messages are handled when they are *pulled*, one at a time, so a round's replies never pile up: the
server's memory does not grow with the number of clients.  (Flower's own engines hold the replies
of a round until they are pulled.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedalign.compat import NodeInfo, become_flower_process, node_info

ERROR_CLIENT_APP = 2
"""Flower's code for a ClientApp that raised."""

Fault = Callable[[int, Message], str | None]
"""Test seam: ``drop`` loses the message, ``error`` answers with an error, None handles it."""


class InProcessGrid(Grid):
    """Hosts ``nodes`` virtual nodes; the population is dealt over them by the client app."""

    def __init__(self, client_app: ClientApp, nodes: int = 1, fault: Fault | None = None) -> None:
        become_flower_process()
        self._app = client_app
        self._fault = fault
        self._contexts: Mapping[int, Context] = {
            node + 1: Context(
                run_id=1,
                node_id=node + 1,
                node_config={"partition-id": node, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(nodes)
        }
        self._waiting: deque[Message] = deque()
        self._count = 0

    def set_run(self, run: object) -> None:
        """Do nothing: there is one run in a process."""

    @property
    def run(self) -> NoReturn:
        """Not available in process."""
        raise RuntimeError("the in-process grid has no Flower run record")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node (kept for Flower's interface)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all virtual nodes."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return all virtual nodes; names are empty, as in Flower's simulation engine."""
        return [node_info(node, "") for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; each gets an id."""
        ids = []
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = f"m{self._count}"
            self._waiting.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the next waiting message that is asked for and return its reply."""
        wanted = set(message_ids)
        for message in list(self._waiting):
            if message.metadata.message_id in wanted:
                self._waiting.remove(message)
                reply = self._handle(message)
                return [] if reply is None else [reply]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until all are answered or the time is over."""
        ids = set(self.push_messages(messages))
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while ids and self._waiting and time.monotonic() < end:
            for reply in self.pull_messages(ids):
                replies.append(reply)
                ids.discard(reply.metadata.reply_to_message_id)
        return replies

    def _handle(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        fault = self._fault(node, message) if self._fault else None
        if fault == "drop":
            return None
        if fault == "error":
            return Message(Error(ERROR_CLIENT_APP, "injected"), reply_to=message)
        try:
            return self._app(message, self._contexts[node])
        except Exception as error:
            # Flower's engines do the same: the run goes on without this reply.
            return Message(Error(ERROR_CLIENT_APP, type(error).__name__), reply_to=message)
