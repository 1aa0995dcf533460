"""A client's private data, and which clients a node hosts.

In simulation every node can build the whole population from the configuration (a seeded generator
or a file on this machine) and hosts its share of it: clients are dealt over the nodes in sorted
name order, so the result does not depend on how many nodes there are.  What a node holds never
leaves it except as listed in ``fedalign.wire``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedalign.config import Config, DataConfig, RunConfig, config_hash
from fedalign.data.load import load_dataset
from fedalign.data.partition import build_clients
from fedalign.data.records import SPLITS, ClientData, Dataset, SurveyItem, plain
from fedalign.runfolder import PERSONAL


def population(config: Config) -> tuple[ClientData, ...]:
    """Return all clients of the configured population, sorted by name.

    Cached by what it depends on (the data settings and the seed), so that the nodes of one process
    share one copy.
    """
    return _population(config.data, config.run.seed)


def dataset(config: Config) -> Dataset:
    """Return the configured dataset, with every row that was left out and why."""
    return _dataset(config.data, config.run.seed)


@lru_cache(maxsize=2)
def _dataset(data: DataConfig, seed: int) -> Dataset:
    return load_dataset(data, seed)


@lru_cache(maxsize=2)
def _population(data: DataConfig, seed: int) -> tuple[ClientData, ...]:
    config = Config(run=RunConfig(seed=seed), data=data)
    return build_clients(_dataset(data, seed), config)


def hosted(names: Sequence[str], partition: int, partitions: int) -> tuple[str, ...]:
    """Return the clients that node ``partition`` of ``partitions`` hosts, sorted."""
    if not 0 <= partition < partitions:
        raise ValueError(f"partition {partition} is outside 0..{partitions - 1}")
    return tuple(sorted(names)[partition::partitions])


def keep_personal_adapter(config: Config, place: int, client: str, adapter: np.ndarray) -> Path:
    """Write a personal adapter to the run folder; it never travels.

    The name holds a readable form of the client's name and its place in the sorted population, so
    that two names cannot share a file.
    """
    folder = Path(config.run.out) / PERSONAL
    folder.mkdir(parents=True, exist_ok=True)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", client).strip("-")[:60]
    path = folder / f"{place:05d}-{readable}.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file(
        {"adapter": np.ascontiguousarray(adapter)},
        temporary,
        metadata={"client": client, "config": config_hash(config)},
    )
    temporary.replace(path)
    return path


def fingerprint(clients: Iterable[ClientData]) -> str:
    """Return the SHA-256 of who holds what, so that a resume notices changed data."""
    digest = hashlib.sha256()
    for client in clients:
        for split in SPLITS:
            for item in client.split(split):
                answer = (
                    sorted(item.shares.items())
                    if isinstance(item, SurveyItem)
                    else (item.comparison, plain(item.chosen), item.vote_share)
                )
                digest.update(repr((client.name, client.group, split, item.key, answer)).encode())
    return digest.hexdigest()
