"""Losses on preference pairs, as pure functions of log-ratio differences.

With lp the log-probability of a completion and ref the reference's (0 when there is none),

    Delta = (lp_i - ref_i) - (lp_j - ref_j)        for a pair in which i was preferred

    sigmoid       -ls(beta Delta)                                   DPO, arXiv 2305.18290
    ipo           (Delta - 1/(2 beta))^2                            IPO, arXiv 2310.12036
    conservative  -(1-e) ls(beta Delta) - e ls(-beta Delta)         label smoothing of DPO
    robust        (-(1-e) ls(beta Delta) + e ls(-beta Delta)) / (1-2e)   arXiv 2403.00409

where ls is the log of the logistic function and e the assumed share of flipped labels.

How we deviate.  A pair may carry a *vote share* q, the share of voters who preferred i.  Its loss
is the expected loss over a drawn vote, ``q loss(Delta) + (1-q) loss(-Delta)``; q in {0, 1} is the
published loss.  With Bradley-Terry shares the optimum of ``sigmoid`` is ref * p^(1/beta): with no
reference and beta 1 it is the group's own distribution p.  IPO divides each log-ratio by its
completion's length where ``length_normalised`` is set, as TRL does; the paper's form does not.
``robust`` is unbounded below; it needs a reference or few steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fedalign.config import LocalConfig

Loss = Callable[[torch.Tensor, LocalConfig], torch.Tensor]


def sigmoid_loss(delta: torch.Tensor, settings: LocalConfig) -> torch.Tensor:
    """DPO: (n,) differences to (n,) losses; ln 2 at 0."""
    return -F.logsigmoid(settings.beta * delta)


def ipo_loss(delta: torch.Tensor, settings: LocalConfig) -> torch.Tensor:
    """IPO: squared distance of the difference from 1 / (2 beta)."""
    return (delta - 0.5 / settings.beta) ** 2


def conservative_loss(delta: torch.Tensor, settings: LocalConfig) -> torch.Tensor:
    """DPO with smoothed labels; least at beta Delta = logit(1 - label_noise)."""
    e, scaled = settings.label_noise, settings.beta * delta
    return -(1 - e) * F.logsigmoid(scaled) - e * F.logsigmoid(-scaled)


def robust_loss(delta: torch.Tensor, settings: LocalConfig) -> torch.Tensor:
    """Unbiased for DPO's loss on clean labels when a share ``label_noise`` is flipped."""
    e, scaled = settings.label_noise, settings.beta * delta
    return (-(1 - e) * F.logsigmoid(scaled) + e * F.logsigmoid(-scaled)) / (1 - 2 * e)


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "conservative": conservative_loss,
    "robust": robust_loss,
}


def pair_losses(delta: torch.Tensor, q: torch.Tensor, settings: LocalConfig) -> torch.Tensor:
    """Return the loss of each pair: (n,).

    ``delta`` (n,) from :func:`differences`; ``q`` (n,) in [0, 1], the share preferring i.
    """
    loss = LOSSES[settings.loss]
    return q * loss(delta, settings) + (1 - q) * loss(-delta, settings)


def differences(
    logps: torch.Tensor,
    reference: torch.Tensor | None,
    lengths: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    settings: LocalConfig,
) -> torch.Tensor:
    """Return Delta for each pair: (n,).

    ``logps``, ``reference``, ``lengths`` are (C,) over completions; ``i``, ``j`` (n,) index them.
    """
    ratios = logps if reference is None else logps - reference
    if settings.loss == "ipo" and settings.length_normalised:
        ratios = ratios / lengths
    # Not ratios[i]: its gradient is summed by threads in no order.
    return ratios.index_select(0, i) - ratios.index_select(0, j)


def pair_values(
    delta: torch.Tensor,
    q: torch.Tensor,
    logps: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    settings: LocalConfig,
) -> dict[str, torch.Tensor]:
    """Return what :func:`metrics` averages, for each pair: (n,) each, without gradients.

    ``margin`` and ``chosen_logp`` in nats; ``right``, 1 where the preferred side has the larger
    log-ratio, 1/2 for a tie; ``decided``, True where q is not 1/2 and ``right`` means something.
    """
    with torch.no_grad():
        towards = delta * torch.sign(q - 0.5)
        return {
            "margin": settings.beta * towards,
            "chosen_logp": torch.where(q >= 0.5, logps[i], logps[j]),
            "right": (torch.sign(towards) + 1) / 2,
            "decided": q != 0.5,
        }


def metrics(
    delta: torch.Tensor,
    q: torch.Tensor,
    logps: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    settings: LocalConfig,
) -> dict[str, torch.Tensor]:
    """Return named 0-d tensors, without gradients.

    ``margin``: mean of beta Delta, signed towards the preferred side, in nats.  ``accuracy``: share
    of pairs with q other than 1/2 whose preferred side has the larger log-ratio, a tie counting
    1/2; left out when there is no such pair.  ``chosen_logp``: mean log-probability of the
    preferred side, in nats; it falls when probability leaves the answers altogether.
    """
    values = pair_values(delta, q, logps, i, j, settings)
    out = {"margin": values["margin"].mean(), "chosen_logp": values["chosen_logp"].mean()}
    if bool(values["decided"].any()):
        out["accuracy"] = values["right"][values["decided"]].mean()
    return out
