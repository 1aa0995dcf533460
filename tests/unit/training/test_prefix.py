"""Texts on the cache of a prompt computed once: the same numbers and gradients as whole rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedalign.config import ModelConfig, PpoConfig
from fedalign.models.base import ResidentModel
from fedalign.training import batch as plain
from fedalign.training import ppo, prefix
from fedalign.training.batch import Prompt
from fedalign.training.policy import Episodes, improve, measure, start

PROMPTS = [
    Prompt((1, 5, 9, 20), ((30, 31, 2), (30, 31, 40), (41,), (30, 31, 2), (7, 8, 9, 10, 11, 2))),
    Prompt((1, 7), ((12,), (13,))),  # no row beyond the prompt
    Prompt((1, *range(30, 46)), ((9, 2), (8, 9, 2))),
    Prompt((1,), ((50, 51), (52, 53, 54))),
]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gpt2"])
def model(request, tiny, tmp_path_factory) -> ResidentModel:
    folder = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    return ResidentModel(ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu"))


def scored(module, model: ResidentModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (N,) and hidden states (N, H) of all scored tokens, in order."""
    batch = module.collate(PROMPTS, "cpu")
    hidden, logits = module.hidden_and_logits(model.network, batch)
    return logits.log_softmax(-1)[batch.slot, batch.token], hidden[batch.slot]


def gradient(module, model: ResidentModel) -> torch.Tensor:
    """Return the gradient of an odd sum of the log-probabilities, (P,)."""
    model.set_trainable()
    model.attach_gradients()
    logps, _ = scored(module, model)
    weights = torch.linspace(-1.0, 1.0, len(logps)) ** 3
    torch.autograd.backward((weights * logps).sum())
    return model.gradient_flat.clone()


def test_numbers_and_gradients_are_those_of_whole_rows(model, tiny) -> None:
    """Gemma's window of 6 tokens ends inside prompts, and inside texts."""
    model.load(tiny.start(model, b=0.3))
    with torch.inference_mode():
        for ours, rows in zip(scored(prefix, model), scored(plain, model), strict=True):
            np.testing.assert_allclose(ours, rows, atol=1e-5, rtol=1e-5)
    ours, rows = gradient(prefix, model), gradient(plain, model)
    assert float(rows.norm()) > 1.0
    assert float((ours - rows).abs().max()) < 1e-5 * float(rows.abs().max())


def test_each_prompt_and_each_different_text_goes_through_once(model, tiny) -> None:
    model.load(tiny.start(model, b=0.3))
    shapes: list[tuple[int, ...]] = []
    hook = model.network.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            scored(prefix, model)
    finally:
        hook.remove()
    # (30, 31) serves three texts; five texts of other prompts and one more of the first.
    assert shapes == [(4, 17), (6, 5)]


def test_letters_alone_need_no_second_pass(model, tiny) -> None:
    model.load(tiny.start(model, b=0.3))
    letters = [Prompt((1, 5, 9), ((30,), (31,))), Prompt((1, 7), ((30,),))]
    batch = prefix.collate(letters, "cpu")
    with torch.inference_mode():
        ours = prefix.hidden_and_logits(model.network, batch)[1]
        rows = plain.hidden_and_logits(model.network, plain.collate(letters))[1]
    assert ours.shape == (2, 320)
    np.testing.assert_allclose(ours, rows, atol=1e-5)


def test_sharing_is_worth_it_for_different_longer_texts() -> None:
    assert prefix.worth_sharing(PROMPTS)
    assert not prefix.worth_sharing([PROMPTS[1]])
    assert not prefix.worth_sharing([Prompt((1, 2), ((3, 4, 5), (3, 4, 6), (7,)))])  # one row


def episodes() -> Episodes:
    rng = np.random.default_rng(3)
    prompts = [(1, *rng.integers(3, 250, size=n).tolist()) for n in (4, 12, 7, 9)]
    return Episodes(
        tuple(p for p in prompts for _ in range(3)),
        tuple(tuple(rng.integers(3, 250, size=rng.integers(2, 6)).tolist()) for _ in range(12)),
    )


def exchange(model: ResidentModel, adapter: np.ndarray, settings: PpoConfig):
    state = start(model, adapter, settings, settings.kl)
    texts = episodes()
    found = measure(model, state, texts)
    scores = np.array([(sum(r) % 97) / 97 for r in texts.responses])
    return found, improve(model, state, texts, found, scores, settings, 0, (1,))


def test_an_exchange_is_the_same_in_either_layout(model, tiny, monkeypatch) -> None:
    settings = PpoConfig(questions=2, samples=3, minibatches=2, learning_rate=5e-4)
    adapter = tiny.start(model, b=0.3)
    found, (state, metrics) = exchange(model, adapter, settings)
    monkeypatch.setattr(prefix, "worth_sharing", lambda prompts: False)
    rows, (expected, same) = exchange(model, adapter, settings)
    for name in ("old_logps", "ref_logps", "values", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(rows, name), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(state.adapter, expected.adapter, atol=5e-5)  # of 4 steps of 5e-4
    assert np.abs(state.adapter - adapter).max() > 5e-4
    for name, value in same.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_first_ratio_is_exactly_one(model, tiny, monkeypatch) -> None:
    drift: list[float] = []
    loss = ppo.policy_loss

    def watched(logps, old_logps, advantages, mask, clip):
        drift.append(float(torch.where(mask, logps - old_logps, 0.0).detach().abs().max()))
        return loss(logps, old_logps, advantages, mask, clip)

    monkeypatch.setattr(ppo, "policy_loss", watched)
    settings = PpoConfig(questions=4, samples=3, minibatches=1, epochs=2, learning_rate=5e-3)
    exchange(model, tiny.start(model, b=0.3), settings)
    assert drift[0] == 0.0
    assert drift[1] > 1e-4


def test_where_activations_are_recomputed_texts_keep_rows_of_their_own(tiny, tmp_path) -> None:
    folder = tiny.save("llama", tmp_path / "llama")
    config = ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu")
    settings = PpoConfig(questions=4, samples=3, minibatches=1, learning_rate=5e-4)
    shapes: list[tuple[int, ...]] = []
    states = []
    for checkpointing in ("on", "off"):
        model = ResidentModel(replace(config, gradient_checkpointing=checkpointing))
        model.network.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        states.append(exchange(model, tiny.start(model, b=0.3), settings)[1][0])
    assert {s[0] for s in shapes[:4]} == {12}  # policy, reference, two epochs
    assert {s[0] for s in shapes[4:]} == {4, 12}  # prompts, then texts
    assert len(shapes) == 4 + 8
    np.testing.assert_allclose(states[0].adapter, states[1].adapter, atol=5e-5)
