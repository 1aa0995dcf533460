"""Who hosts what: clients, their groups and sizes, and the node that answers for each.

Built from the answers to ``hello``.  History, ledger, sampling and quorum speak of clients and
groups; only this table knows nodes.  In simulation a node's own word for a group counts; in a
deployment the enrolled one does (``roll_call.py``), and a client keeps its name and its place while
its node changes or is away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedalign import wire
from fedalign.aggregation.clients import capped_sizes
from fedalign.errors import RunFailed
from fedalign.randomness import generator
from server.enrolled import OnlineSite


@dataclass(frozen=True)
class Member:
    """One client of the federation."""

    client: str
    group: str
    node: int | None
    """Flower's number of the node that answers for it now; None: its site is offline."""
    train: int
    validation: int
    test: int
    size: int
    """Size claim, at least 1; capped where it is used."""
    key: bytes = b""
    """Public key of the node, as Flower shows it; empty in a simulation."""


@dataclass(frozen=True)
class Directory:
    """All clients, keyed and ordered by client name."""

    members: Mapping[str, Member]
    form: str
    manifest: wire.Manifest
    versions: Mapping[str, str]
    enrolled: bool = False
    """The clients are enrolled sites of a deployment."""

    @property
    def groups(self) -> tuple[str, ...]:
        """All groups, sorted."""
        return tuple(sorted({m.group for m in self.members.values()}))

    def group_sizes(self) -> dict[str, int]:
        """Return each group's size: the sum of its clients' claims, capped at 4 times the median.

        A group of one client has no median to be held against: its claim counts as it is.
        """
        claims: dict[str, list[int]] = {g: [] for g in self.groups}
        for m in self.members.values():
            claims[m.group].append(m.size)
        return {g: round(sum(capped_sizes(sizes))) for g, sizes in claims.items()}

    def sample(self, seed: int, round_: int, count: int) -> tuple[str, ...]:
        """Return ``count`` clients drawn uniformly for a round (0: all), sorted by name."""
        names = list(self.members)
        if count <= 0 or count >= len(names):
            return tuple(names)
        chosen = generator(seed, "sample", round_).choice(len(names), size=count, replace=False)
        return tuple(names[i] for i in sorted(int(i) for i in chosen))

    def jobs(self, clients: Sequence[str], at_most: int) -> list[tuple[int, tuple[str, ...]]]:
        """Return (node, clients) for each message: the clients of a node, ``at_most`` at a time.

        Clients whose site is offline are left out.
        """
        by_node: dict[int, list[str]] = {}
        for name in sorted(clients):
            node = self.members[name].node
            if node is not None:
                by_node.setdefault(node, []).append(name)
        return [
            (node, tuple(names[i : i + at_most]))
            for node, names in sorted(by_node.items(), key=lambda entry: entry[1][0])
            for i in range(0, len(names), at_most)
        ]

    def located(self, online: Mapping[str, OnlineSite]) -> Directory:
        """Return the directory with every site's node and key as they are now."""
        members = {
            name: replace(
                m,
                node=online[name].node if name in online else None,
                key=online[name].key if name in online else m.key,
            )
            for name, m in self.members.items()
        }
        return replace(self, members=members)

    def without(self, clients: Collection[str]) -> Directory:
        """Return the directory without these clients."""
        members = {name: m for name, m in self.members.items() if name not in clients}
        return replace(self, members=members)


def build(hellos: Iterable[tuple[int, wire.Hello]]) -> Directory:
    """Merge the answers of all nodes.

    Raises ``RunFailed`` when two nodes host the same client, or when model, tokenizer, data form
    or library versions that must agree do not; the message names what differs, never data.
    """
    members: dict[str, Member] = {}
    first: wire.Hello | None = None
    for node, hello in sorted(hellos, key=lambda entry: entry[1].clients[:1]):
        if not hello.clients:
            continue
        if first is None:
            first = hello
        if hello.manifest != first.manifest:
            differing = [
                name
                for name in ("base_revision", "tokenizer_hash", "rank", "alpha", "layout")
                if getattr(hello.manifest, name) != getattr(first.manifest, name)
            ]
            raise RunFailed(
                f"nodes hold different models: {', '.join(differing)} differ between the nodes of "
                f"'{first.clients[0]}' and '{hello.clients[0]}'. All must load the same base."
            )
        if hello.form != first.form:
            raise RunFailed("some clients hold survey data, others pairs; one run uses one form.")
        for i, client in enumerate(hello.clients):
            if client in members:
                raise RunFailed(f"client '{client}' is hosted by two nodes; names must be unique.")
            members[client] = Member(
                client,
                hello.groups[i],
                node,
                hello.train[i],
                hello.validation[i],
                hello.test[i],
                max(1, hello.size[i]),
            )
    if first is None:
        raise RunFailed("no node hosts a client: nothing to train. Check the data settings.")
    ordered = {name: members[name] for name in sorted(members)}
    return Directory(ordered, first.form, first.manifest, first.versions)
