"""The predictor's network: what it may depend on, its losses by hand, its parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.config import PredictorConfig
from fedalign.rewards.predictor import (
    LOG_STD,
    Prediction,
    cross_entropy_loss,
    gaussian_loss,
    predict,
    unpack,
)
from fedalign.rewards.predictor_parameters import initial_predictor, layout, predictor_size

SMALL = PredictorConfig(width=16, layers=2, heads=4)
D = 6
LAYOUT = layout(SMALL, D)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return unpack(torch.from_numpy(initial_predictor(SMALL, D, seed)), LAYOUT)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def example(seed: int, context: int = 9, questions: int = 5, options: int = 4):
    x, y = numbers(seed, context, D), torch.sigmoid(numbers(seed + 1, context))
    targets = numbers(seed + 2, questions, options, D)
    mask = torch.ones(questions, options, dtype=torch.bool)
    mask[::2, -1] = False
    return x, y, targets, mask


def ask(x, y, targets, mask, seed: int = 0) -> Prediction:
    return predict(weights(seed), SMALL, (x, y), targets, mask)


def close(a: Prediction, b: Prediction, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.shares, b.shares, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.log_std, b.log_std, atol=10 * tolerance, rtol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_order_of_the_context_does_not_matter(seed: int) -> None:
    x, y, targets, mask = example(seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    close(ask(x, y, targets, mask), ask(x[order], y[order], targets, mask))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_order_of_questions_and_options_does_not_matter(seed: int) -> None:
    x, y, targets, mask = example(seed)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(5), rng.permutation(4)
    whole = ask(x, y, targets, mask)
    moved = ask(x, y, targets[rows][:, columns], mask[rows][:, columns])
    expected = Prediction(whole.shares[rows][:, columns], whole.log_std[rows][:, columns])
    close(moved, expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_a_prediction_does_not_depend_on_other_targets(seed: int) -> None:
    x, y, targets, mask = example(seed)
    whole = ask(x, y, targets, mask)
    alone = ask(x, y, targets[1:2], mask[1:2])
    close(alone, Prediction(whole.shares[1:2], whole.log_std[1:2]))


def test_padding_does_not_matter_and_has_no_share() -> None:
    x, y, targets, mask = example(3)
    changed = targets.clone()
    changed[~mask] = 100.0
    whole, padded = ask(x, y, targets, mask), ask(x, y, changed, mask)
    torch.testing.assert_close(padded.shares, whole.shares, atol=1e-6, rtol=0)
    assert (whole.shares[~mask] == 0).all()
    torch.testing.assert_close(whole.shares.sum(-1), torch.ones(5))


def test_an_all_zero_embedding_is_an_option_like_any_other() -> None:
    """Padding is the mask, not "the embedding sums to zero"."""
    x, y, targets, mask = example(4)
    targets[1, 0] = 0.0
    prediction = ask(x, y, targets, mask)
    assert prediction.shares[1, 0] > 0
    y_true = torch.full((5, 4), 0.25)
    before = gaussian_loss(prediction, y_true, mask)
    y_true[1, 0] = 0.9
    assert gaussian_loss(prediction, y_true, mask) != before


def test_the_context_does_matter() -> None:
    x, y, targets, mask = example(5)
    a, b = ask(x, y, targets, mask), ask(x, 1 - y, targets, mask)
    assert (a.shares - b.shares).abs().max() > 1e-3


def test_gaussian_loss_by_hand() -> None:
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    log_std = torch.tensor([[0.0, math.log(0.5), 9.0], [0.0, 0.0, math.log(0.1)]])
    y = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    constant = 0.5 * math.log(2 * math.pi)
    tokens = [
        constant + 0.5 * 0.2**2,
        constant + math.log(0.5) + 0.5 * (0.2 / 0.5) ** 2,
        constant,
        constant,
        constant + math.log(0.1),
    ]
    loss = gaussian_loss(Prediction(shares, log_std), y, mask)
    assert float(loss) == pytest.approx(sum(tokens) / 5, rel=1e-6)


def test_cross_entropy_by_hand() -> None:
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    y = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = cross_entropy_loss(Prediction(shares, torch.zeros(2, 3)), y, mask)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)


def test_the_standard_deviation_is_bounded() -> None:
    w = weights()
    w["head.1.bias"] = torch.tensor([0.0, -1000.0])
    x, y, targets, mask = example(6)
    found = predict(w, SMALL, (x, y), targets, mask)
    assert (found.log_std == LOG_STD[0]).all()
    assert torch.isfinite(gaussian_loss(found, torch.zeros(5, 4), mask))


def test_parameters_are_keyed_by_seed_and_sorted() -> None:
    flat = initial_predictor(SMALL, D, 3)
    assert flat.dtype == np.float32
    assert flat.shape == (predictor_size(SMALL, D),)
    assert np.array_equal(flat, initial_predictor(SMALL, D, 3))
    assert not np.array_equal(flat, initial_predictor(SMALL, D, 4))
    names = [name for name, _ in LAYOUT]
    assert names == sorted(names)
    w = weights(3)
    assert torch.equal(w["layer.00.query.weight"], w["layer.00.key.weight"])
    assert not torch.equal(w["layer.00.query.weight"], w["layer.01.query.weight"])


def test_size_by_hand() -> None:
    def linear(into: int, out: int) -> int:
        return into * out + out

    per_layer = 6 * linear(16, 16) + 2 * 32
    whole = linear(D + 1, 16) + linear(16, 16) + 2 * per_layer + 32
    assert predictor_size(SMALL, D) == whole + linear(16, 16) + linear(16, 2)


def test_gradients_reach_the_flat_parameters() -> None:
    flat = torch.nn.Parameter(torch.from_numpy(initial_predictor(SMALL, D, 0)))
    x, y, targets, mask = example(7)
    prediction = predict(unpack(flat, LAYOUT), SMALL, (x, y), targets, mask)
    gaussian_loss(prediction, torch.full((5, 4), 0.25), mask).backward()
    gradients = unpack(flat.grad, LAYOUT)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if not name.endswith("key.bias"))
