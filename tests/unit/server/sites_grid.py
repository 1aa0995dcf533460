"""The in-process grid made to look like a deployment: sites with keys, a registry, an audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedalign.compat import NodeInfo
from server.enrolled import Enrolled
from simulations.grid import InProcessGrid

SITES = {"east-a": "east", "east-b": "east", "north-a": "north"}


@dataclass(frozen=True)
class Row:
    """One key of the fake registry."""

    site: str
    group: str
    public_key: bytes
    status: str = "active"


class FakeRegistry:
    """Rows that a test changes while the run goes on, and what the run noted."""

    def __init__(self, sites: dict[str, str]) -> None:
        self.rows = [Row(site, group, key_of(site)) for site, group in sites.items()]
        self.notes: list[tuple[str, dict[str, str | int | float]]] = []
        self.enrolled = Enrolled(lambda: self.rows, self)

    def append(self, event: str, **facts: str | int | float) -> None:
        """Take an audit event."""
        self.notes.append((event, facts))

    def set_status(self, site: str, status: str) -> None:
        """Change every key of a site."""
        self.rows = [replace(r, status=status) if r.site == site else r for r in self.rows]

    def renew(self, site: str) -> bytes:
        """Replace a site's key by a new active one; return it."""
        group = next(r.group for r in self.rows if r.site == site)
        self.set_status(site, "replaced")
        self.rows.append(Row(site, group, key_of(site) + b"-new"))
        return self.rows[-1].public_key


def key_of(site: str) -> bytes:
    """Return the first key of a site."""
    return f"key of {site}".encode()


class SiteGrid(InProcessGrid):
    """Nodes come and go, as Flower's do; each hosts one site and shows a public key."""

    def __init__(self, app: ClientApp, sites: Iterable[str], first_node: int = 1) -> None:
        super().__init__(app, 0)
        self.nodes: dict[int, tuple[str, bytes]] = {}
        self.online: set[int] = set()
        self.handled: list[tuple[int, Message]] = []
        self.before_handling: Callable[[int, Message], None] = lambda node, message: None
        self.after_handling: Callable[[int, Message], None] = lambda node, message: None
        self.on_poll: Callable[[], None] = lambda: None
        self.unregistered: set[int] = set()
        """Nodes still listed whose registration is gone: a push to them gets no id."""
        for number, site in enumerate(sites, first_node):
            self.join(number, site, key_of(site))

    def join(self, node: int, site: str, key: bytes, **claims: str | int) -> None:
        """Bring a node online; ``claims`` are what it says of itself in its hello."""
        said = {k.replace("_", "-"): v for k, v in claims.items()}
        self.nodes[node] = (site, key)
        self.online.add(node)
        self._contexts = {
            **self._contexts,
            node: Context(1, node, {"site": site, **said}, RecordDict(), {}),
        }

    def get_node_ids(self) -> Iterable[int]:
        """Return the online nodes."""
        return sorted(self.online)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the online nodes, under a name that says nothing true."""
        self.on_poll()
        return [
            NodeInfo(node_id=n, name="boss@all", status="online", public_key=self.nodes[n][1])
            for n in sorted(self.online)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages, but for nodes that are not registered any more."""
        given = list(messages)
        stored = [m for m in given if m.metadata.dst_node_id not in self.unregistered]
        ids = iter(super().push_messages(stored))
        for m in given:
            if m not in stored:
                m.metadata.__dict__["_message_id"] = f"lost-{id(m)}"
        return [next(ids) if m in stored else "" for m in given]

    def _handle(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        self.before_handling(node, message)
        if node not in self.online:
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        self.handled.append((node, message))
        reply = super()._handle(message)
        self.after_handling(node, message)
        return reply
