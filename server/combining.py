"""A round's updates as one adapter, a block of modules at a time.

The exact sum of products keeps the factors of all clients, in float64, until a group's stack is
wider than its matrix: for a model of a billion parameters and a thousand clients that is tens of
gigabytes.  Modules do not depend on each other, so they are combined in blocks, and each block
reads its own columns of every client's file.  A block holds at most ``BLOCK_BYTES`` of factors over
all clients, and one module at least.

The adapter and what truncation removed have the same bits whatever the blocks.  The norm of a
client's update is the root of the sum of squares over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby

import numpy as np

from fedalign import wire
from fedalign.aggregation import adapters
from fedalign.models.layout import Layout, pack, size, unpack
from server.recording import Combined
from server.spool import Spool

BLOCK_BYTES = 256 * 2**20
"""Most bytes of a block's factors, as float64, over all clients of the round."""


def combine(
    method: str,
    spool: Spool,
    manifest: wire.Manifest,
    received: wire.F32,
    shares: Mapping[str, float],
    groups: Mapping[str, str],
) -> Combined:
    """Return the weighted aggregate of the updates in ``spool``.

    Args:
        method: ``aggregation.method``.
        spool: one update for each client of ``shares``.
        manifest: layout of the adapter, and of what clients send of it.
        received: (P,) the global adapter the clients got.
        shares: client to weight; they sum to 1.
        groups: client to group.

    Raises ``ValueError`` as :func:`fedalign.aggregation.adapters.aggregate`.
    """
    scale = manifest.alpha / manifest.rank
    whole = unpack(received, manifest.layout)
    sent = dict(manifest.upload)
    norms: dict[str, list[float]] = {client: [] for client in shares}
    tensors: dict[str, np.ndarray] = {}
    discarded: list[tuple[str, str, float]] = []
    stop = 0
    for block in blocks(manifest.layout, len(shares)):
        upload = tuple((name, shape) for name, shape in block if name in sent)
        start, stop = stop, stop + size(upload)
        previous = {name: whole[name] for name, _ in block}

        def contributions(
            columns: tuple[int, int] = (start, stop),
            upload: Layout = upload,
            previous: dict[str, np.ndarray] = previous,
        ) -> Iterator[adapters.Contribution]:
            for client, update in spool.read(*columns):
                own = previous | unpack(update, upload)
                norms[client].append(scale * adapters.update_norm(own, previous))
                yield adapters.Contribution(client, groups[client], shares[client], own)

        made = adapters.aggregate(method, contributions(), previous)
        tensors |= made.tensors
        discarded += [
            (module, group, share)
            for module, by_group in made.discarded_by_group.items()
            for group, share in by_group.items()
        ]
        discarded += [(module, "", share) for module, share in made.discarded.items()]
    return Combined(
        pack(tensors, manifest.layout), discarded, {c: math.hypot(*n) for c, n in norms.items()}
    )


def blocks(layout: Layout, clients: int) -> list[Layout]:
    """Return the layout cut between modules into parts of bounded size, in order."""
    most = BLOCK_BYTES // (8 * max(1, clients))
    made: list[Layout] = []
    for _, entries in groupby(layout, key=lambda entry: entry[0].rsplit(".lora_", 1)[0]):
        module = tuple(entries)
        if made and size(made[-1]) + size(module) <= most:
            made[-1] += module
        else:
            made.append(module)
    return made
