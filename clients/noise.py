"""Clipping and noise of a site's update, under frozen A only.

With A shared and never trained, a site's update of the adapted matrices is ``(B - B0) A``: linear
in the difference ``d = B - B0`` of the factors B, all modules in one vector.  The rows of A are
orthonormal times a = 1/sqrt(3) (``aggregation/adapters.py``), so the norm of the update is a |d|.
Two steps, both in units of that norm:

clip    d <- d * min(1, C / (a |d|))
noise   d <- d + e,  every entry of e drawn from a normal distribution with deviation z C / a

C is ``update.clip``, z is ``update.noise``.  They bound ``d`` itself, whatever A the server sent.

*What this is worth.*  After clipping, the vectors of any two data sets of the site are at most
2 C / a apart, so one release satisfies rho-zCDP with rho = (2 C / a)^2 / (2 (z C / a)^2) = 2 / z^2
for the whole data set of the site replaced by another, and rho = 1 / (2 z^2) for the site's update
against none (Bun and Steinke, arXiv 1605.02635).  R releases add up to R rho.  That is *not* a
stated guarantee of this project: nobody adds up rho over rounds and runs here, the scores, losses
and counts beside the update are outside of it (``scores.release = withheld`` removes the first
two), and the draws are floating-point numbers.

*Draws.*  The generator is seeded by HMAC-SHA256 under a key that only the site holds, over round
and clipped update.  To anyone without the key the noise is random; but the same update asked for
again gets the same noise, so repeating a round does not average it away, and a resumed run is
equal to an undisturbed one.  The run's seed, which the coordinator knows, plays no part.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import numpy as np

from clients.site_policy import UpdatePolicy
from fedalign.aggregation.adapters import ROW_NORM
from fedalign.errors import DataError
from fedalign.wire import F32

KEY_BYTES = 32


def load_key(path: Path) -> bytes:
    """Return the site's noise key, made from the system's randomness where there is none (0600).

    Raises ``DataError`` for a file that is no key.
    """
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as f:
            f.write(secrets.token_bytes(KEY_BYTES))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise DataError(f"{path}: {len(key)} bytes; a noise key has {KEY_BYTES}. Put a copy back.")
    return key


def clip(difference: F32, bound: float) -> F32:
    """Return ``d`` (P,) with ``a |d|`` at most ``bound``, in the same direction."""
    norm = ROW_NORM * float(np.linalg.norm(difference.astype(np.float64)))
    if norm <= bound:
        return difference
    return (difference.astype(np.float64) * (bound / norm)).astype(np.float32)


def protect(settings: UpdatePolicy, key: bytes, round_: int, received: F32, trained: F32) -> F32:
    """Return the factors B that may leave, (P,) float32.

    Args:
        settings: ``clip`` (above 0) and ``noise``.
        key: the site's noise key.
        round_: number of the round.
        received: (P,) the factors B that training started from.
        trained: (P,) the factors B it ended with, finite.
    """
    difference = clip(trained - received, settings.clip)
    if settings.noise:
        seed = hmac.new(key, f"{round_}|".encode() + difference.tobytes(), hashlib.sha256).digest()
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
        deviation = settings.noise * settings.clip / ROW_NORM
        difference = difference + (deviation * draw.standard_normal(len(difference))).astype(
            np.float32
        )
    return (received + difference).astype(np.float32)


def rho(noise: float) -> float:
    """Return rho of one noised release, for the site's data replaced: 2 / z^2; ``noise`` > 0."""
    return 2.0 / noise**2
