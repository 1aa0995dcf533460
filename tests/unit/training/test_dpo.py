"""Losses against numbers worked by hand, TRL's published forms, and their defining identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalign.config import LocalConfig
from fedalign.training.dpo import LOSSES, differences, metrics, pair_losses

SETTINGS = LocalConfig(beta=0.5, label_noise=0.2)


def of(name: str, **changes) -> LocalConfig:
    return replace(SETTINGS, loss=name, **changes)


def number(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sigmoid_by_hand() -> None:
    # lp = (-1, -3), ref = (-2, -2.5): Delta = 1 - (-0.5) = 1.5, beta 0.5: -ls(0.75)
    delta = differences(
        number([-1, -3]),
        number([-2, -2.5]),
        torch.tensor([1, 2]),
        torch.tensor([0]),
        torch.tensor([1]),
        of("sigmoid"),
    )
    assert delta.tolist() == [1.5]
    loss = pair_losses(delta, number([1.0]), of("sigmoid"))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)), abs=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "conservative", "robust"])
def test_no_difference_costs_ln_2(name: str) -> None:
    loss = pair_losses(number([0.0]), number([0.3]), of(name))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_ipo_both_forms_by_hand() -> None:
    # ratios 2 over 4 tokens and -1 over 2 tokens; 1 / (2 beta) = 1
    arguments = (
        number([2.0, -1.0]),
        None,
        torch.tensor([4, 2]),
        torch.tensor([0]),
        torch.tensor([1]),
    )
    normalised, summed = (of("ipo", length_normalised=flag) for flag in (True, False))
    one = number([1.0])
    assert differences(*arguments, normalised).item() == 1.0  # 2/4 + 1/2
    assert differences(*arguments, summed).item() == 3.0
    assert pair_losses(number([1.0]), one, normalised).item() == pytest.approx(0.0)
    assert pair_losses(number([3.0]), one, summed).item() == pytest.approx(4.0)


def test_length_normalisation_is_for_ipo_alone() -> None:
    arguments = (number([2.0, -1.0]), None, torch.tensor([4, 2]))
    pair = (torch.tensor([0]), torch.tensor([1]))
    assert differences(*arguments, *pair, of("sigmoid")).item() == 3.0


def test_conservative_is_least_at_logit_of_one_minus_noise() -> None:
    settings = of("conservative")
    best = math.log(0.8 / 0.2) / settings.beta  # beta Delta = 1.386
    delta = number([best]).requires_grad_()
    pair_losses(delta, number([1.0]), settings).sum().backward()
    assert delta.grad is not None
    assert delta.grad.item() == pytest.approx(0.0, abs=1e-12)
    for away in (-0.1, 0.1):
        worse = pair_losses(number([best + away]), number([1.0]), settings)
        assert worse.item() > pair_losses(delta, number([1.0]), settings).item()


@given(st.floats(-20, 20), st.floats(0, 0.45))
def test_robust_is_unbiased_for_flipped_labels(delta: float, noise: float) -> None:
    settings = of("robust", label_noise=noise)
    d = number([delta])
    expected = (1 - noise) * pair_losses(d, number([1.0]), settings) + noise * pair_losses(
        d, number([0.0]), settings
    )
    clean = pair_losses(d, number([1.0]), of("sigmoid"))
    assert expected.item() == pytest.approx(clean.item(), abs=1e-9)


def test_conservative_is_biased_for_flipped_labels() -> None:
    settings = of("conservative")
    d = number([2.0])
    expected = 0.8 * pair_losses(d, number([1.0]), settings) + 0.2 * pair_losses(
        d, number([0.0]), settings
    )
    clean = pair_losses(d, number([1.0]), of("sigmoid"))
    assert abs(expected.item() - clean.item()) > 0.05


@given(st.sampled_from(sorted(LOSSES)), st.floats(-50, 50), st.floats(0, 1))
def test_a_vote_share_is_the_expected_loss_over_votes(name: str, delta: float, q: float) -> None:
    d = number([delta]).requires_grad_()
    share = pair_losses(d, number([q]), of(name))
    votes = q * LOSSES[name](d, of(name)) + (1 - q) * LOSSES[name](-d, of(name))
    assert share.item() == pytest.approx(votes.item(), abs=1e-9)
    (gradient,) = torch.autograd.grad(share.sum(), d)
    assert math.isfinite(gradient.item())


@given(st.sampled_from(sorted(LOSSES)), st.floats(-5, 5), st.floats(0, 1))
def test_swapping_sides_and_share_changes_nothing(name: str, delta: float, q: float) -> None:
    a = pair_losses(number([delta]), number([q]), of(name))
    b = pair_losses(number([-delta]), number([1 - q]), of(name))
    assert a.item() == pytest.approx(b.item(), abs=1e-9)


def test_soft_labels_have_their_optimum_at_the_vote_share() -> None:
    q = 0.7
    delta = number([math.log(q / (1 - q)) / SETTINGS.beta]).requires_grad_()
    pair_losses(delta, number([q]), of("sigmoid")).sum().backward()
    assert delta.grad is not None
    assert delta.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_metrics_by_hand() -> None:
    # pairs: prefers i and right; prefers j and wrong; a tie; undecided
    delta, q = number([2.0, 1.0, 0.0, 5.0]), number([0.9, 0.1, 1.0, 0.5])
    logps = number([-1.0, -2.0])
    i, j = torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 1, 1])
    out = metrics(delta, q, logps, i, j, SETTINGS)
    assert out["accuracy"].item() == pytest.approx((1 + 0 + 0.5) / 3)
    assert out["margin"].item() == pytest.approx(0.5 * (2 - 1 + 0 + 0) / 4)
    assert out["chosen_logp"].item() == pytest.approx((-1 - 2 - 1 - 1) / 4)
    assert "accuracy" not in metrics(delta, number([0.5] * 4), logps, i, j, SETTINGS)
