"""Losses and advantages of proximal policy optimisation, as pure functions over padded tables.

Sources: PPO (Schulman et al., arXiv 1707.06347), generalised advantage estimation (arXiv
1506.02438), its use on language models with a KL penalty a token (Ziegler et al., arXiv
1909.08593; Ouyang et al., arXiv 2203.02155).

Notation: R rollouts (sampled texts), T tokens of the longest.  Tables are (R, T), padded on the
right; ``mask`` (R, T) is True on the tokens of the text, the end-of-sequence token among them.
What stands in the padding is never read, be it NaN.

With log-probabilities in nats, score S_i in [0, 1], coefficient b in units of score a nat::

    r_it = -b (log pi_old - log pi_ref)_it  +  S_i [t is the last token]
    d_it = r_it + gamma V_i(t+1) - V_it                      V = 0 after the last token
    A_it = d_it + gamma lam A_i(t+1)                         Q_it = A_it + V_it (the return)
    w_it = exp(log pi - log pi_old)_it
    policy loss = mean_it max(-A w, -A clip(w, 1 - c, 1 + c))
    value loss  = mean_it max((V - Q)^2, (V_old + clip(V - V_old, -v, v) - Q)^2) / 2

Means are over tokens.  The expected total of r over a text is S minus b KL(pi_old || pi_ref), so
with gamma = 1 the optimum over texts is ``pi_ref exp(S / b)``, normalised.

The KL term stands inside the token reward (the estimator log pi_old - log pi_ref), not beside the
loss.  Whitening the advantages therefore rescales score and KL together: it changes the size of a
step and leaves the ratio of score to KL, and with it the optimum, as it is.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

WHITEN_EPSILON = 1e-12
"""Added to the variance, in squared units of reward; only so that equal values give zeros."""


def token_rewards(
    scores: Tensor, old_logps: Tensor, ref_logps: Tensor, mask: Tensor, kl: float | Tensor
) -> Tensor:
    """Return the reward of each token: (R, T), zero in the padding.

    ``scores`` (R,) go to the last token of each text, which has at least one token; ``kl`` is one
    coefficient, or (R, 1) of them.
    """
    rewards = torch.where(mask, -kl * (old_logps - ref_logps), 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1  # (R, 1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (R, T) each, zero in the padding.

    ``lam`` = 1 and ``gamma`` = 1 give advantage = sum of the rewards from here on, minus value.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    later_advantage = torch.zeros_like(values[:, 0])  # (R,)
    later_value = torch.zeros_like(later_advantage)
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        later_advantage = delta + gamma * lam * later_advantage
        later_value = values[:, t]
        columns.append(later_advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens of all texts: a scalar, NaN where the mask is empty."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` with mean 0 and (population) variance 1 over the mask; zero in the padding.

    Values that are all alike become zeros.
    """
    centred = torch.where(mask, x - masked_mean(x, mask), 0.0)
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + WHITEN_EPSILON)


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped loss and the share of tokens whose ratio left [1 - clip, 1 + clip].

    Both are scalars; gradients flow through ``logps`` alone.  The share counts every token that has
    moved so far, whether or not the loss was cut there, so that it measures drift from the rollout.
    """
    losses, outside = policy_terms(logps, old_logps, advantages, mask, clip)
    return masked_mean(losses, mask), masked_mean(outside, mask)


def policy_terms(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return what :func:`policy_loss` averages, of the tables' shape."""
    log_ratio = torch.where(mask, logps - old_logps, 0.0)
    ratio = torch.exp(log_ratio)
    advantages = torch.where(mask, advantages, 0.0)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    outside = ((ratio.detach() - 1).abs() > clip).to(ratio.dtype)
    return losses, outside


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return half the mean squared error of the values: a scalar.

    A value that has moved more than ``clip`` (units of reward) from ``old_values`` counts with the
    larger of its own error and that at the bound; ``clip`` 0 switches this off.
    """
    return 0.5 * masked_mean(value_terms(values, old_values, returns, mask, clip), mask)


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return what :func:`value_loss` is half the mean of, of the tables' shape."""
    # The padding is cut before anything is multiplied, so that nothing of it reaches a gradient.
    old_errors = torch.where(mask, old_values - returns, 0.0)
    moved = torch.where(mask, values - old_values, 0.0)
    errors = (old_errors + moved).square()
    if clip:
        errors = torch.maximum(errors, (old_errors + moved.clamp(-clip, clip)).square())
    return errors
