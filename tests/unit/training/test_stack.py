"""The stacked AdamW is torch's, client by client."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.training.stack import AdapterStack

LAYOUT = (("x.lora_A.weight", (2, 3)), ("x.lora_B.weight", (4, 2)))
SIZE = 14


def stack(rows: np.ndarray, rates: list[float], frozen_a: bool = False) -> AdapterStack:
    return AdapterStack(list(rows), rates, LAYOUT, torch.device("cpu"), frozen_a)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clients=st.integers(1, 4),
    steps=st.integers(1, 6),
    most=st.sampled_from([0.0, 0.5, 10.0]),
    same=st.booleans(),
)
def test_updates_and_clipping_are_torchs(
    seed: int, clients: int, steps: int, most: float, same: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(clients, SIZE)).astype(np.float32)
    rates = [0.01 if same else 0.01 * (k + 1) for k in range(clients)]
    made = stack(rows, rates)
    plain = [torch.nn.Parameter(torch.from_numpy(r.copy())) for r in rows]
    optimisers = [
        torch.optim.AdamW([p], lr=rate, weight_decay=0.0)
        for p, rate in zip(plain, rates, strict=True)
    ]
    for _ in range(steps):
        gradient = rng.normal(size=(clients, SIZE)).astype(np.float32)
        made.gradient.zero_()
        made.add([torch.from_numpy(gradient[:, :6]).view(-1, 2, 3), torch.zeros(clients, 4, 2)])
        made.add([torch.zeros(clients, 2, 3), torch.from_numpy(gradient[:, 6:]).view(-1, 4, 2)])
        assert np.array_equal(made.gradient.numpy(), gradient)
        made.clip(made.norms(), most)
        made.update()
        for parameter, optimiser, own in zip(plain, optimisers, gradient, strict=True):
            parameter.grad = torch.from_numpy(own.copy())
            if most:
                torch.nn.utils.clip_grad_norm_([parameter], most)
            optimiser.step()
    for row, parameter in enumerate(plain):
        np.testing.assert_allclose(made.read(row), parameter.detach().numpy(), atol=2e-6)


def test_factors_are_views_and_moments_go_along() -> None:
    rows = np.arange(3 * SIZE, dtype=np.float32).reshape(3, SIZE)
    made = stack(rows, [0.1, 0.2, 0.3])
    assert made.factors["x.lora_A.weight"].shape == (3, 2, 3)
    made.gradient.fill_(1.0)
    made.update()
    assert torch.equal(made.factors["x.lora_B.weight"].reshape(3, -1), made.weights[:, 6:])
    less = made.take([2, 0])
    assert less.rates == [0.3, 0.1]
    for _ in range(2):
        made.gradient.fill_(0.5)
        less.gradient.fill_(0.5)
        made.update()
        less.update()
    assert np.array_equal(less.read(0), made.read(2))
    assert np.array_equal(less.read(1), made.read(0))


def test_frozen_a_has_no_gradient_and_does_not_move() -> None:
    rows = np.ones((2, SIZE), dtype=np.float32)
    made = stack(rows, [0.1, 0.1], frozen_a=True)
    assert [f.shape for f in made.trainable()] == [(2, 4, 2)]
    made.add([torch.ones(2, 4, 2)])
    made.update()
    assert np.array_equal(made.weights[:, :6].numpy(), rows[:, :6])
    assert (made.weights[:, 6:].numpy() < 1).all()
