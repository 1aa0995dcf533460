"""PPO's pure functions: numbers worked by hand, an independent implementation, invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.training.ppo import gae, masked_mean, policy_loss, token_rewards, value_loss, whiten


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_token_rewards_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old = tensor([[-1.0, -2.0, 7.0], [-0.5, -0.5, -0.5]])
    ref = tensor([[-1.5, -1.0, 3.0], [-0.5, -1.5, -0.5]])
    got = token_rewards(tensor([0.9, 0.2]), old, ref, mask, 0.1)
    # Text 1: -0.1 * 0.5; -0.1 * -1 + 0.9.  Text 2: 0; -0.1 * 1; 0 + 0.2.
    np.testing.assert_allclose(got, [[-0.05, 1.0, 0.0], [0.0, -0.1, 0.2]], atol=1e-12)


def test_gae_by_hand() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(tensor([[0, 0, 1]]), tensor([[0.5, 0.4, 0.6]]), mask, 0.9, 0.5)
    # d = -0.5 + 0.9 * 0.4, -0.4 + 0.9 * 0.6, 1 - 0.6 = -0.14, 0.14, 0.4; gamma lam = 0.45:
    # A3 = 0.4, A2 = 0.14 + 0.45 * 0.4 = 0.32, A1 = -0.14 + 0.45 * 0.32 = 0.004.
    np.testing.assert_allclose(advantages, [[0.004, 0.32, 0.4]], atol=1e-12)
    np.testing.assert_allclose(returns, [[0.504, 0.72, 1.0]], atol=1e-12)


def test_policy_loss_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    ratios = tensor([[1.5, 0.5], [1.1, 1.5], [1.0, 9.0]])
    advantages = tensor([[2.0, -1.0], [1.0, -1.0], [0.5, 5.0]])
    loss, clipped = policy_loss(ratios.log(), torch.zeros(3, 2), advantages, mask, 0.2)
    # -2 * 1.2, 0.8, -1.1, 1.5, -0.5: sum -1.7 over five tokens; three ratios are off by over 0.2.
    assert float(loss) == pytest.approx(-1.7 / 5, abs=1e-12)
    assert float(clipped) == pytest.approx(3 / 5, abs=1e-12)


def test_value_loss_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    values = tensor([[1.0, 0.6, 0.5, 8.0]])
    old, returns = tensor([[0.5, 0.2, 0.5, 0.0]]), tensor([[0.6, 0.6, 0.9, 0.0]])
    # Free: 0.16, 0, 0.16.  Bounded values 0.7, 0.4, 0.5: 0.01, 0.04, 0.16.
    assert float(value_loss(values, old, returns, mask, 0.0)) == pytest.approx(0.32 / 6)
    assert float(value_loss(values, old, returns, mask, 0.2)) == pytest.approx(0.36 / 6)


def test_whiten_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    got = whiten(tensor([[1.0, 2.0], [3.0, 50.0]]), mask)
    np.testing.assert_allclose(got, [[-math.sqrt(1.5), 0.0], [math.sqrt(1.5), 0.0]], atol=1e-9)
    assert whiten(tensor([[0.3, 0.3], [0.3, 1.0]]), mask).abs().max() < 1e-6


def batch(seed: int, rollouts: int = 7, tokens: int = 6) -> dict[str, torch.Tensor]:
    """Return a random batch; text i has 1 + i % tokens tokens."""
    rng = np.random.default_rng(seed)
    lengths = 1 + np.arange(rollouts) % tokens
    made = {
        name: torch.from_numpy(rng.normal(size=(rollouts, tokens)))
        for name in ("old", "ref", "new", "values", "moved")
    }
    made["mask"] = torch.from_numpy(np.arange(tokens) < lengths[:, None])
    made["scores"] = torch.from_numpy(rng.random(rollouts))
    return made


def chain(b: dict[str, torch.Tensor], white: bool = True) -> list[torch.Tensor]:
    """Return everything from scores to losses."""
    rewards = token_rewards(b["scores"], b["old"], b["ref"], b["mask"], 0.3)
    advantages, returns = gae(rewards, b["values"], b["mask"], 0.97, 0.8)
    used = whiten(advantages, b["mask"]) if white else advantages
    loss, clipped = policy_loss(b["new"], b["old"], used, b["mask"], 0.2)
    error = value_loss(b["values"] + b["moved"], b["values"], returns, b["mask"], 0.5)
    return [rewards, advantages, returns, used, loss, clipped, error]


def test_equals_an_independent_implementation_over_lists() -> None:
    """Texts as lists of their own length, sums written out: no padding, no mask, no recursion."""
    b = batch(3)
    lists = {
        name: [row[m].tolist() for row, m in zip(b[name], b["mask"], strict=True)]
        for name in ("old", "ref", "new", "values", "moved")
    }
    advantages, returns = [], []
    for i, score in enumerate(b["scores"].tolist()):
        n = len(lists["old"][i])
        r = [-0.3 * (lists["old"][i][t] - lists["ref"][i][t]) for t in range(n)]
        r[-1] += score
        v = [*lists["values"][i], 0.0]
        deltas = [r[t] + 0.97 * v[t + 1] - v[t] for t in range(n)]
        a = [sum((0.97 * 0.8) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
        advantages.append(a)
        returns.append([a[t] + v[t] for t in range(n)])
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    policy, outside, value = [], [], []
    for i, row in enumerate(advantages):
        for t, a in enumerate(row):
            ratio = math.exp(lists["new"][i][t] - lists["old"][i][t])
            white = (a - mean) / spread
            policy.append(-min(ratio * white, min(max(ratio, 0.8), 1.2) * white))
            outside.append(abs(ratio - 1) > 0.2)
            old = lists["values"][i][t]
            moved = lists["moved"][i][t]
            errors = [old + m - returns[i][t] for m in (moved, min(max(moved, -0.5), 0.5))]
            value.append(max(e * e for e in errors) / 2)
    _, got_a, got_q, _, loss, clipped, error = chain(b)
    for i, m in enumerate(b["mask"]):
        np.testing.assert_allclose(got_a[i][m], advantages[i], atol=1e-12)
        np.testing.assert_allclose(got_q[i][m], returns[i], atol=1e-12)
    assert float(loss) == pytest.approx(sum(policy) / len(policy), abs=1e-9)
    assert float(clipped) == sum(outside) / len(outside)
    assert float(error) == pytest.approx(sum(value) / len(value), abs=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.0, 50.0, math.nan, math.inf]))
@settings(max_examples=40, deadline=None)
def test_padding_changes_nothing_and_reaches_no_gradient(seed, more, filling) -> None:
    plain = batch(seed)
    padded = {
        name: torch.where(table_mask, value, filling) if value.is_floating_point() else value
        for name, value in plain.items()
        if value.ndim == 2
        for table_mask in [plain["mask"]]
    }
    for name, value in padded.items():
        extra = torch.full((len(value), more), False if name == "mask" else filling)
        padded[name] = torch.cat([value, extra.to(value.dtype)], dim=1)
    padded["scores"] = plain["scores"]
    for b in (plain, padded):
        for name in ("new", "moved"):
            b[name].requires_grad_()
    width = plain["mask"].shape[1]
    a, b = chain(plain), chain(padded)
    for one, other in zip(a, b, strict=True):
        cut = other[:, :width] if other.ndim == 2 else other
        assert torch.allclose(one, cut, atol=1e-12)
        if other.ndim == 2:
            assert not other[:, width:].any()
    for outcome in (a, b):
        (outcome[4] + outcome[6]).backward()
    for name in ("new", "moved"):
        assert torch.allclose(plain[name].grad, padded[name].grad[:, :width], atol=1e-12)
        assert not padded[name].grad[~padded["mask"]].any()


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_whitened_values_have_mean_0_and_variance_1(seed) -> None:
    b = batch(seed)
    white = whiten(b["values"] * 3 + 2, b["mask"])[b["mask"]]
    assert abs(float(white.mean())) < 1e-9
    assert float(white.var(correction=0)) == pytest.approx(1.0, abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_without_discount_and_bootstrap_the_advantage_is_the_rest_minus_the_value(seed) -> None:
    b = batch(seed)
    rewards = token_rewards(b["scores"], b["old"], b["ref"], b["mask"], 0.3)
    advantages, returns = gae(rewards, b["values"], b["mask"], 1.0, 1.0)
    rest = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns[b["mask"]], rest[b["mask"]], atol=1e-12)
    assert torch.allclose(advantages[b["mask"]], (rest - b["values"])[b["mask"]], atol=1e-12)
    total = b["scores"] - 0.3 * ((b["old"] - b["ref"]) * b["mask"]).sum(1)
    assert torch.allclose(returns[:, 0], total, atol=1e-12)


@given(st.integers(0, 10_000), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_whitening_keeps_the_ratio_of_score_to_divergence(seed, factor) -> None:
    """Score and coefficient times the same factor: the same whitened advantages."""
    b = batch(seed)
    out = []
    for f in (1.0, factor):
        rewards = token_rewards(f * b["scores"], b["old"], b["ref"], b["mask"], f * 0.3)
        out.append(whiten(gae(rewards, f * b["values"], b["mask"], 1.0, 0.95)[0], b["mask"]))
    assert torch.allclose(out[0], out[1], atol=1e-5)


def test_at_ratio_one_the_gradient_is_that_of_plain_policy_gradient() -> None:
    b = batch(5)
    new = b["old"].clone().requires_grad_()
    loss, clipped = policy_loss(new, b["old"], b["values"], b["mask"], 0.2)
    loss.backward()
    expected = torch.where(b["mask"], -b["values"], 0.0) / b["mask"].sum()
    assert torch.allclose(new.grad, expected, atol=1e-12)
    assert float(clipped) == 0.0


def test_the_mean_over_no_token_is_not_a_number() -> None:
    assert math.isnan(float(masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))))
