"""Every random draw of a run comes from a generator keyed by what it is for.

A draw is keyed by ``(seed, purpose, *keys)``, for instance ``(7, "batches", round, client)``.  The
key is hashed, so draws for different purposes are independent, and no draw depends on how many
draws were made before it: a round that is run again after a crash, on another node, or in another
order gives the same numbers.  Nothing here touches the global generators of numpy or torch.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

Key = str | int


def keyed_seed(seed: int, purpose: str, *keys: Key) -> int:
    """Return a 63-bit seed for ``(seed, purpose, *keys)``; stable over machines and versions."""
    text = json.dumps([int(seed), purpose, *keys], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *keys: Key) -> np.random.Generator:
    """Return a fresh numpy generator (PCG64) for ``(seed, purpose, *keys)``."""
    return np.random.Generator(np.random.PCG64(keyed_seed(seed, purpose, *keys)))


def unit_interval(seed: int, purpose: str, *keys: Key) -> float:
    """Return one number in [0, 1) for a key, without building a generator."""
    return keyed_seed(seed, purpose, *keys) / float(1 << 63)
