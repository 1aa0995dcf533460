"""Local training of the predictor on made-up groups: learning, schedule, draws, failures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedalign.config import PredictorConfig
from fedalign.errors import DataError
from fedalign.rewards.predictor_parameters import initial_predictor, layout
from fedalign.training.predictor_fit import (
    Answered,
    draw,
    fit,
    fixed_context,
    js_error,
    learning_rate,
    predicted_shares,
)

D = 12
SMALL = PredictorConfig(
    width=32, layers=2, heads=4, context=10, targets=10, rounds=20, steps=10, learning_rate=0.004
)
LAYOUT = layout(SMALL, D)


def group(taste: float, questions: int = 40, seed: int = 0) -> list[Answered]:
    """Options lie on one direction of the embedding; ``taste`` says how a group likes it."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(questions):
        x = rng.normal(size=(3 + i % 2, D)).astype(np.float32)
        p = np.exp(taste * x[:, 0])
        found.append(Answered(f"{i:016x}", x, (p / p.sum()).astype(np.float32)))
    return found


def error(flat: np.ndarray, own: list[Answered], asked: list[Answered]) -> float:
    context = fixed_context(own, SMALL, 0, "c")
    found = predicted_shares(flat, LAYOUT, SMALL, context, [q.options for q in asked])
    return js_error(found, [q.shares for q in asked])


def start() -> np.ndarray:
    return initial_predictor(SMALL, D, 0)


def test_overfits_one_group() -> None:
    own = group(1.0, 12)
    flat = start()
    for round_ in range(1, SMALL.rounds + 1):
        done = fit(flat, LAYOUT, own, SMALL, 0, "c", round_)
        assert done.flat is not None
        flat = done.flat
    assert error(start(), own, own) > 0.15
    assert error(flat, own, own) < 0.02


def federated(groups: dict[str, list[Answered]], settings: PredictorConfig) -> np.ndarray:
    flat = start()
    for round_ in range(1, settings.rounds + 1):
        found = [fit(flat, LAYOUT, a, settings, 0, n, round_).flat for n, a in groups.items()]
        flat = np.mean(found, axis=0, dtype=np.float64).astype(np.float32)
    return flat


def centralised(groups: dict[str, list[Answered]], settings: PredictorConfig) -> np.ndarray:
    """As many steps in one place, each on every group: averaging after every single step."""
    each = replace(settings, rounds=settings.rounds * settings.steps, steps=1)
    weights = torch.from_numpy(start())
    optimiser = torch.optim.Adam([weights], lr=1.0)
    for step in range(1, each.rounds + 1):
        weights.grad = torch.stack(
            [gradient(weights.numpy(), a, each, n, step) for n, a in groups.items()]
        ).mean(0)
        optimiser.param_groups[0]["lr"] = learning_rate(each, step - 1)
        optimiser.step()
    return weights.numpy()


def gradient(
    flat: np.ndarray, own: list[Answered], settings: PredictorConfig, name: str, step: int
) -> torch.Tensor:
    from fedalign.rewards.predictor import LOSSES, predict, unpack
    from fedalign.training.predictor_fit import _targets, context_of

    weights = torch.from_numpy(flat.copy()).requires_grad_(True)
    context, targets = draw(own, settings, 0, (name, step, 0))
    x, y, mask = _targets(targets)
    LOSSES[SMALL.loss](
        predict(unpack(weights, LAYOUT), settings, context_of(context), x, mask), y, mask
    ).backward()
    found = weights.grad
    assert found is not None
    return found / max(1.0, float(found.norm()))


def test_federated_is_near_centralised_at_equal_steps() -> None:
    """Stated margin: .04 of Jensen-Shannon distance on held-out questions."""
    tastes = {"a": -1.0, "b": 0.5, "c": 1.0}
    groups = {n: group(t, 40, seed=1) for n, t in tastes.items()}
    held_out = {n: group(t, 30, seed=2) for n, t in tastes.items()}
    together, apart = centralised(groups, SMALL), federated(groups, SMALL)
    for n in tastes:
        before = error(start(), groups[n], held_out[n])
        one, other = (error(f, groups[n], held_out[n]) for f in (together, apart))
        assert one < 0.6 * before
        assert other < one + 0.04


def test_the_rate_falls_along_one_cosine() -> None:
    rates = [learning_rate(SMALL, step) for step in range(SMALL.rounds * SMALL.steps)]
    assert rates[0] == SMALL.learning_rate
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[100] == pytest.approx(SMALL.learning_rate / 2)
    assert 0 < rates[-1] < 1e-3 * SMALL.learning_rate


def test_a_round_depends_on_nothing_but_its_key() -> None:
    own = group(1.0)
    a = fit(start(), LAYOUT, own, SMALL, 0, "c", 3)
    torch.manual_seed(99)
    b = fit(start(), LAYOUT, own, SMALL, 0, "c", 3)
    assert a.flat is not None
    assert b.flat is not None
    assert np.array_equal(a.flat, b.flat)
    for other in (
        fit(start(), LAYOUT, own, SMALL, 1, "c", 3),
        fit(start(), LAYOUT, own, SMALL, 0, "d", 3),
        fit(start(), LAYOUT, own, SMALL, 0, "c", 4),
    ):
        assert not np.array_equal(a.flat, other.flat)


def test_tokens_are_real_options_only() -> None:
    own = [q for q in group(1.0) if len(q.shares) == 3]
    mixed = group(1.0, 20)
    assert fit(start(), LAYOUT, own, SMALL, 0, "c", 1).tokens == 10 * 10 * 3
    assert fit(start(), LAYOUT, mixed, SMALL, 0, "c", 1).tokens < 10 * 10 * 4


def test_context_and_targets_are_disjoint() -> None:
    own = group(1.0)
    for step in range(20):
        context, targets = draw(own, SMALL, 0, ("c", 1, step))
        assert len(context) == len(targets) == 10
        assert not {q.key for q in context} & {q.key for q in targets}


def test_few_questions_give_half_to_each() -> None:
    context, targets = draw(group(1.0, 5), SMALL, 0, ("c", 1, 0))
    assert (len(context), len(targets)) == (2, 3)


def test_the_fixed_context_leaves_out_the_question_asked() -> None:
    own = group(1.0)
    usual = [q.key for q in fixed_context(own, SMALL, 0, "c")]
    assert usual == [q.key for q in fixed_context(own, SMALL, 0, "c")]
    assert usual != [q.key for q in fixed_context(own, SMALL, 0, "d")]
    without = [q.key for q in fixed_context(own, SMALL, 0, "c", usual[0])]
    assert without[:-1] == usual[1:]
    assert len(without) == len(usual) == SMALL.context


def test_one_question_is_not_enough() -> None:
    with pytest.raises(DataError, match="at least 2"):
        fit(start(), LAYOUT, group(1.0, 1), SMALL, 0, "c", 1)
    lone = group(1.0, 1)
    with pytest.raises(DataError, match="no training question"):
        fixed_context(lone, SMALL, 0, "c", lone[0].key)


def test_parameters_that_blow_up_are_a_failure() -> None:
    flat = start()
    flat[:] = 1e30
    assert fit(flat, LAYOUT, group(1.0), SMALL, 0, "c", 1).flat is None


def test_js_error_by_hand() -> None:
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0], np.float32)
    assert js_error([a], [b]) == pytest.approx(np.sqrt(np.log(2)), abs=1e-6)
    assert js_error([a, a], [b, a.astype(np.float32)]) == pytest.approx(
        np.sqrt(np.log(2)) / 2, abs=1e-6
    )
