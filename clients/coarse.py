r"""What a round sends and receives in few bytes, and error feedback.

**Receiving.**  In a coarse precision the broadcast holds what changes: under frozen A that is B,
and A is made from the run's seed as the server made it.  The client trains from what it got; the
server adds the client's change to its own exact factors, so the broadcast's rounding never adds up
over rounds.

**Sending.**  With r_t the factors a client received in round t and x_t those that may leave (after
the site's clipping and noise), the change d_t = x_t - r_t is rounded: q_t = Q(d_t).

**Error feedback** (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847)::

    q_t = Q(d_t + e_t),     e_{t+1} = d_t + e_t - q_t,     e_1 = 0

Under frozen A the server forms B_{t+1} = B_t + sum_c w_c q_{c,t} in one fixed basis, the rows of A.
Summed over rounds with constant weights, what was sent is what was trained, up to one residual::

    sum_t q_t = sum_t d_t - e_{T+1}

however many rounds there are; without feedback the errors of all rounds add up.  (Weights that move
leave sum_t (w_t - w_{t-1}) e_t beside it: as small as the weights move.)

**Why not under ``product``.**  There a client sends (A + a, B + b), and the server factorises the
weighted sum of products anew each round: A_{t+1} = V^T / sqrt(3), B_{t+1} = sqrt(3) U S, from a
truncated singular value decomposition.  A residual (e_A, e_B) is coordinates in the basis of round
t: what was lost is the matrix E = B e_A + e_B A - e_B e_A (A, B as trained).  In round t+1 the same
numbers stand for B_{t+1} e_A + e_B A_{t+1}, another matrix: the rows of A come in the order of the
new singular values, with new signs and directions, and adding the residual is noise of its size.
Carrying E itself needs its projection on the tangent space of the new factors, whose A part
B_{t+1}^+ E (I - V V^T) divides by singular values that are zero at the start and small later; and
of E, truncation has dropped a part for good.  So feedback exists under frozen A alone; settings
refuse it elsewhere.

**A site's policy** goes first: d_t is clipped and noised before it gets here.  The residual is made
from what was released, so it tells nothing more.  Where a site clips without noise, d_t + e_t is
clipped again and what is sent, decoded, stays within the bound; with noise the norm that leaves has
no bound to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from clients.residuals import Residuals
from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import Config
from fedalign.models.layout import pack
from fedalign.wire.coarse import Layout, decode, encode

SHRINK = 0.999
"""Beyond the bound, a change is scaled to just below it; a few times in bfloat16, once in int8."""


def receive(content: RecordDict, config: Config, manifest: wire.Manifest) -> wire.F32:
    """Return the whole adapter (size,) that a round of training starts from."""
    if config.wire.download == wire.FLOAT32:
        return wire.decode_adapter(content, manifest)
    sent = wire.decode_broadcast(content, manifest, config.wire.download)
    if not manifest.frozen_a:
        return sent
    whole = _first(manifest.layout, config.run.seed).copy()
    whole[manifest.upload_mask()] = sent
    return whole


def send(
    config: Config,
    manifest: wire.Manifest,
    round_: int,
    replies: Sequence[wire.TrainReply],
    received: wire.F32,
    updates: wire.F32,
    bound: float | None,
) -> wire.Coarse | wire.F32:
    """Return what leaves of a round in the run's precision; residuals are on disk before it does.

    Args:
        config: the run's settings, ``run.out`` where residuals are kept.
        manifest: of the run.
        round_: number of the round.
        replies: one for each client; only one with status ``ok`` has an update.
        received: (P,) the factors that training started from, as far as clients send them.
        updates: (k, P) the factors that may leave.
        bound: largest norm of a change, decoded; None sets none.
    """
    precision, layout = config.wire.upload, manifest.upload
    if precision == wire.FLOAT32:
        return updates
    rows = []
    for reply, update in zip(replies, updates, strict=True):
        if reply.status != wire.OK:
            rows.append(encode(np.zeros((1, len(received)), np.float32), layout, precision))
            continue
        change = update - received
        if not config.wire.feedback:
            rows.append(bounded(change, layout, precision, bound)[0])
            continue
        kept = Residuals(Path(config.run.out), reply.client)
        residual = kept.before(round_, len(received))
        row, lost = bounded(change + residual, layout, precision, bound)
        kept.keep(round_, lost)
        rows.append(row)
    return wire.Coarse(
        precision,
        np.concatenate([r.entries for r in rows]),
        np.concatenate([r.scales for r in rows]),
    )


def bounded(
    wanted: wire.F32, layout: Layout, precision: str, bound: float | None
) -> tuple[wire.Coarse, wire.F32]:
    """Return one row as it travels, and what rounding took of it, (P,).

    With a bound, ``wanted`` (P,) is first scaled to it, and what travels, decoded, stays within it.
    What scaling took is not counted as lost: else a site that clips would owe more each round.
    """
    if bound is not None:
        wanted = _scaled(wanted, min(1.0, bound / max(_norm(wanted), 1e-30)))
    aim = wanted
    while True:
        row = encode(aim[None], layout, precision)
        (sent,) = decode(row, layout)
        norm = _norm(sent)
        if bound is None or norm <= bound:
            return row, wanted - sent
        aim = _scaled(aim, SHRINK * bound / norm)


def _norm(x: wire.F32) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def _scaled(x: wire.F32, factor: float) -> wire.F32:
    return x if factor == 1.0 else (x.astype(np.float64) * factor).astype(np.float32)


@lru_cache(maxsize=1)
def _first(layout: Layout, seed: int) -> wire.F32:
    """Return the adapter before round 1, of which frozen A is kept for the whole run."""
    return pack(initial_adapter(dict(layout), seed), layout)
