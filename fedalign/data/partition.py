"""Deal the questions of each group to its clients, each split on its own.

- ``group``: one client holds the whole group.
- ``sizes``: even by count; questions are shuffled by seed and dealt in turn.
- ``dirichlet``: uneven; for each topic the clients' shares p ~ Dirichlet(alpha, ..., alpha) are
  drawn once (arXiv 1909.06335) and every question of the topic goes to a client drawn from p.
  Without topics p is drawn once for the group, so clients differ in size.  The same p serves train,
  validation and test, so a client is tested on what it trains on.
- ``column``: the named column of a row is its client, and the value alone is the client's name:
  the name under which a site of that population enrols.  No two groups may share a value.

A question is never split: all pairs of one prompt go to one client.  (Pairs that are split by
response are dealt one by one, because all share a prompt.)  After the draw a client left without
train or validation questions takes one from the client with most: a client that cannot train or be
scored is no client.  Test questions are handed over in the same way while there are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedalign.config import Config
from fedalign.data.columns import nearest
from fedalign.data.load import names
from fedalign.data.records import SPLITS, ClientData, Dataset, Item, Pair, SurveyItem
from fedalign.data.split import SPLIT_BY, assign_roles
from fedalign.errors import ConfigError, DataError
from fedalign.randomness import generator

Units = list[list[Item]]
"""Items that stay together, one list a question."""


def build_clients(dataset: Dataset, config: Config) -> tuple[ClientData, ...]:
    """Return the clients of every group, sorted by name.

    A client is named after its group where it is the only one, else "group#0", "group#1", ...; for
    ``column`` it is named by the column's value.  Survey items hold the shares of the client's own
    group only.
    ``size`` is the client's part of the group's people where the source knows them (synthetic),
    else its number of training questions.

    Raises ``DataError`` naming the client and what to change when a client has no train or no
    validation question, a group has no test question, or two groups share a client's name.
    """
    data = config.data
    counts = clients_per_group(data.clients_per_group, dataset.groups)
    if data.partition in ("group", "column") and set(counts.values()) != {1}:
        raise ConfigError(
            f"data.clients-per-group = '{data.clients_per_group}' has no effect with "
            f"data.partition = '{data.partition}'. Use 'sizes' or 'dirichlet', or set it to 1."
        )
    roles = assign_roles(dataset.items, config.run.seed, data.validation, data.test)
    people = _people(config)
    clients: list[ClientData] = []
    for group in dataset.groups:
        splits = _units(roles, group)
        if not splits["test"]:
            raise DataError(f"group '{group}' has no test question. {_advice(splits)}")
        if data.partition == "column":
            dealt = _by_column(splits, group, data.partition_column)
        else:
            dealt = _by_count(splits, group, counts[group], config)
        for label, held in dealt.items():
            name = group if len(dealt) == 1 else f"{group}#{label}"
            if data.partition == "column":
                name = label
            for split in ("train", "validation"):
                if not held[split]:
                    raise DataError(f"client '{name}' has no {split} question. {_advice(splits)}")
            clients.append(
                ClientData(
                    name=name,
                    group=group,
                    form=dataset.form,
                    train=_items(held["train"]),
                    validation=_items(held["validation"]),
                    test=_items(held["test"]),
                    size=_size(len(held["train"]), len(splits["train"]), people.get(group)),
                )
            )
    clients.sort(key=lambda c: c.name)
    for before, after in pairwise(clients):
        if before.name == after.name:
            column = f"column '{data.partition_column}' has this value in both; " * (
                data.partition == "column"
            )
            raise DataError(
                f"groups '{before.group}' and '{after.group}' would each have a client named "
                f"'{after.name}': {column}a client belongs to one group. Rename one of them."
            )
    return tuple(clients)


def clients_per_group(text: str, groups: tuple[str, ...]) -> dict[str, int]:
    """Parse "3" (all groups) or "a=3,b=1" (others 1; ``;`` where names hold commas)."""
    if "=" not in text:
        return dict.fromkeys(groups, _count(text, text))
    counts = dict.fromkeys(groups, 1)
    for part in names(text):
        group, _, number = (p.strip() for p in part.rpartition("="))
        if group not in counts:
            raise DataError(f"data.clients-per-group: no group '{group}'.{nearest(group, groups)}")
        counts[group] = _count(number, text)
    return counts


def _people(config: Config) -> dict[str, int]:
    """Return the people of each group where the source knows them: the synthetic worlds do."""
    if config.data.source != "synthetic":
        return {}
    from fedalign.data.synthetic import respondents

    return respondents(config.data.world)


def _size(questions: int, of_group: int, people: int | None) -> int:
    """Return a client's part of its group's people, by training questions; else its questions."""
    return questions if people is None else max(1, round(people * questions / of_group))


def _items(units: Units) -> tuple[Item, ...]:
    return tuple(item for unit in units for item in unit)


def _count(number: str, text: str) -> int:
    if not number.strip().isascii() or not number.strip().isdigit() or int(number) < 1:
        raise ConfigError(
            f"data.clients-per-group = '{text}': '{number}' is not a whole number of at least 1. "
            "Write 3, or name=3,other=1."
        )
    return int(number)


def _units(roles: list[tuple[Item, str]], group: str) -> dict[str, Units]:
    """Return the group's items by split and question, in the order of the data."""
    found: dict[str, dict[str, list[Item]]] = {split: {} for split in SPLITS}
    for item, split in roles:
        if isinstance(item, SurveyItem):
            if group in item.shares:
                found[split].setdefault(item.key, []).append(item.answered_by(group))
        elif item.group == group:
            alone = item.columns.get(SPLIT_BY) == "responses"
            found[split].setdefault(item.comparison if alone else item.key, []).append(item)
    return {split: list(units.values()) for split, units in found.items()}


def _by_count(
    splits: Mapping[str, Units], group: str, n: int, config: Config
) -> dict[str, dict[str, Units]]:
    held: dict[str, dict[str, Units]] = {str(c): {s: [] for s in SPLITS} for c in range(n)}
    shares: dict[str, npt.NDArray[np.float64]] = {}  # topic: (clients,)
    for split, units in splits.items():
        rng = generator(config.run.seed, "partition", group, split)
        if config.data.partition == "dirichlet":
            owner = np.empty(len(units), dtype=np.int64)
            for u, unit in enumerate(units):
                topic = _topic(unit[0])
                if topic not in shares:
                    draw = generator(config.run.seed, "partition-shares", group, topic)
                    shares[topic] = draw.dirichlet(np.full(n, config.data.dirichlet_alpha))
                owner[u] = rng.choice(n, p=shares[topic])
            _fill(owner, n)
        else:
            owner = np.empty(len(units), dtype=np.int64)
            owner[rng.permutation(len(units))] = np.arange(len(units)) % n
        for c, unit in zip(owner, units, strict=True):
            held[str(c)][split].append(unit)
    return held


def _fill(owner: npt.NDArray[np.int64], n: int) -> None:
    """Hand the last question of the largest client to each empty one, while one can be spared."""
    for client in range(n):
        sizes = np.bincount(owner, minlength=n)
        if sizes[client] == 0 and sizes.max(initial=0) > 1:
            owner[np.flatnonzero(owner == sizes.argmax())[-1]] = client


def _by_column(splits: Mapping[str, Units], group: str, column: str) -> dict[str, dict[str, Units]]:
    held: dict[str, dict[str, Units]] = {}
    for split, units in splits.items():
        for unit in units:
            for item in unit:
                # The long survey layout keeps the columns of each group's row apart.
                value = item.columns.get(f"{column}@{group}", item.columns.get(column, ""))
                if not value:
                    raise DataError(
                        f"{item.source or item.id}: no column '{column}' to name the client."
                        f"{nearest(column, list(item.columns))} Check data.partition-column."
                    )
                mine = held.setdefault(value, {s: [] for s in SPLITS})
                mine[split].append([item])
    return dict(sorted(held.items()))


def _topic(item: Item) -> str:
    return item.columns.get("topic", "") if isinstance(item, Pair) else item.topic


def _advice(splits: Mapping[str, Units]) -> str:
    have = ", ".join(f"{len(splits[s])} {s}" for s in SPLITS)
    return (
        f"Its group has {have} questions. Give the group fewer clients (data.clients-per-group), "
        "larger shares (data.validation, data.test), more questions, or leave it out (data.groups)."
    )
