"""Sampling: the cache changes nothing, draws follow the model, ends and limits hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedalign.config import ModelConfig
from fedalign.errors import DataError, RunFailed
from fedalign.models.base import ResidentModel
from fedalign.training import generate as module
from fedalign.training.generate import end_tokens, generate

PROMPTS = [(1, 5, 9, 20), (1, 7), (1, 30, 31, 32, 33, 34, 35, 36, 37), (1, 100, 101)]


def forced(resident: ResidentModel, prompt, text) -> np.ndarray:
    """Return next-token probabilities along prompt + text, one pass, no cache: (len(text), V)."""
    row = torch.tensor([[*prompt, *text[:-1]]])
    with torch.inference_mode():
        logits = resident.network(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.softmax(logits.double(), dim=-1).numpy()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_with_cache_and_padding_every_distribution_is_the_models_own(
    kind, tiny, tmp_path, monkeypatch
) -> None:
    folder = tiny.save(kind, tmp_path / kind)
    resident = ResidentModel(ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu"))
    resident.load(tiny.start(resident, b=0.3))
    seen: list[np.ndarray] = []
    draw = module.draw

    def watched(logits, draws):
        seen.append(torch.softmax(logits.double(), dim=-1).numpy())
        return draw(logits, draws)

    monkeypatch.setattr(module, "draw", watched)
    # Gemma's window of 6 tokens is passed by the third prompt alone and by all texts.
    texts = generate(resident, PROMPTS, 2, 8, 5, stop_at_eos=False)
    order = sorted(range(len(PROMPTS)), key=lambda k: len(PROMPTS[k]))
    for row, k in enumerate(np.repeat(order, 2)):
        text = texts[2 * k + row % 2][0]
        assert len(text) == 8
        got = np.stack([step[row] for step in seen])
        np.testing.assert_allclose(got, forced(resident, PROMPTS[k], text), atol=2e-5)


def test_draws_follow_the_models_probabilities(resident, tiny) -> None:
    """Chi-square over the first token, and over the second after the commonest first."""
    from scipy.stats import chisquare

    resident.load(tiny.start(resident, b=0.3))
    count = 20_000
    texts = [t for t, _ in generate(resident, [PROMPTS[0]], count, 2, 1, stop_at_eos=False)]
    first = np.bincount([t[0] for t in texts], minlength=resident.network.config.vocab_size)
    top = int(first.argmax())
    second = [t[1] for t in texts if t[0] == top]
    expected = forced(resident, PROMPTS[0], (top, 0))
    assert len(second) > 500
    for found, p in (
        (first, expected[0]),
        (np.bincount(second, minlength=len(first)), expected[1]),
    ):
        n = found.sum()
        common = p * n >= 5
        seen = np.append(found[common], found[~common].sum())
        hoped = np.append(p[common], p[~common].sum()) * n
        assert common.sum() > 5
        assert chisquare(seen, hoped).pvalue > 1e-3


def test_a_number_picks_the_token_by_the_distribution_function() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.25, 0.5, 0.0]])).expand(6, 5)
    numbers = [0.0, 0.2499, 0.25, 0.4999, 0.5, float(np.nextafter(1.0, 0.0))]
    picked = module.draw(logits, torch.tensor(numbers, dtype=torch.float64))
    assert picked.tolist() == [1, 1, 2, 2, 3, 3]  # never one of probability zero


def test_the_last_number_below_one_picks_a_token_of_the_vocabulary() -> None:
    draws = torch.randn(200, 997, generator=torch.Generator().manual_seed(0))
    last = torch.full((200,), float(np.nextafter(1.0, 0.0)), dtype=torch.float64)
    assert module.draw(draws, last).max() == 996
    assert module.draw(draws, torch.zeros(200, dtype=torch.float64)).tolist() == [0] * 200


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_texts_of_a_prompt_depend_on_its_own_seed_alone(kind, tiny, tmp_path, monkeypatch) -> None:
    folder = tiny.save(kind, tmp_path / kind)
    resident = ResidentModel(ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu"))
    resident.load(tiny.start(resident, b=0.3))
    seeds, limits = [11, 12, 13, 14], [6, 3, 6, 5]
    together = generate(resident, PROMPTS, 5, limits, seeds, stop_at_eos=False)
    for k in range(4):
        alone = generate(resident, [PROMPTS[k]], 5, limits[k], [seeds[k]], stop_at_eos=False)
        assert together[5 * k : 5 * k + 5] == alone
        fewer = generate(resident, [PROMPTS[k]], 2, limits[k], [seeds[k]], stop_at_eos=False)
        assert fewer == alone[:2]
    backwards = generate(resident, PROMPTS[::-1], 5, limits[::-1], seeds[::-1], stop_at_eos=False)
    assert backwards == [t for k in (3, 2, 1, 0) for t in together[5 * k : 5 * k + 5]]
    monkeypatch.setattr(module, "CACHE_TOKENS", 30)
    assert generate(resident, PROMPTS, 5, limits, seeds, stop_at_eos=False) == together


def test_a_prompt_given_again_has_the_texts_of_its_seed(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    prompt = PROMPTS[0]
    texts = generate(resident, [prompt] * 4, 3, 6, [1, 2, 1, 3], stop_at_eos=False)
    one, two, again, three = (texts[3 * k : 3 * k + 3] for k in range(4))
    assert one == again == generate(resident, [prompt], 3, 6, [1], stop_at_eos=False)
    assert one != two != three != one
    by_place = generate(resident, [prompt] * 2, 3, 6, 1, stop_at_eos=False)
    assert by_place[:3] != by_place[3:]


def test_greedy_is_the_argmax_of_every_step(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    texts = generate(resident, PROMPTS, 1, 6, 0, stop_at_eos=False, greedy=True)
    for prompt, (text, ended) in zip(PROMPTS, texts, strict=True):
        assert not ended
        assert forced(resident, prompt, text).argmax(axis=1).tolist() == list(text)


def test_same_seed_same_texts_and_nothing_global_is_touched(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    before = torch.get_rng_state()
    a, b, c = (generate(resident, PROMPTS, 3, 5, seed) for seed in (0, 0, 1))
    assert a == b
    assert a != c
    assert torch.equal(before, torch.get_rng_state())
    assert len(a) == 3 * len(PROMPTS)
    assert len({text for text, _ in a}) > len(PROMPTS)  # samples of a prompt differ


def test_texts_end_with_their_first_end_token_or_at_their_limit(
    resident, tiny, monkeypatch
) -> None:
    resident.load(tiny.start(resident, b=0.3))
    ends = list(range(0, 320, 3))  # a third of the vocabulary ends a text
    monkeypatch.setattr(resident.network.generation_config, "eos_token_id", ends)
    assert end_tokens(resident) == {*ends, 2}
    limits = [1, 4, 9, 2]
    texts = generate(resident, PROMPTS, 40, limits, 0)
    outcomes = set()
    for k, (text, ended) in enumerate(texts):
        stops = [t in end_tokens(resident) for t in text]
        assert not any(stops[:-1])
        assert ended == stops[-1]
        assert ended or len(text) == limits[k // 40]
        assert 1 <= len(text) <= limits[k // 40]
        outcomes.add((ended, len(text) == limits[k // 40]))
    assert outcomes == {(True, True), (True, False), (False, True)}
    free = generate(resident, PROMPTS, 5, limits, 0, stop_at_eos=False)
    assert [len(t) for t, _ in free] == np.repeat(limits, 5).tolist()
    assert not any(ended for _, ended in free)


def test_each_distinct_prompt_is_read_once(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    shapes: list[tuple[int, ...]] = []
    hook = resident.network.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        texts = generate(resident, [*PROMPTS, PROMPTS[0]], 6, 3, 0, stop_at_eos=False)
    finally:
        hook.remove()
    assert shapes == [(4, 9), (30, 1), (30, 1)]
    assert len(texts) == 30
    assert [t for t, _ in texts[:6]] != [t for t, _ in texts[24:]]


def test_passes_do_not_change_greedy_texts(resident, tiny, monkeypatch) -> None:
    resident.load(tiny.start(resident, b=0.3))
    whole = generate(resident, PROMPTS, 2, 5, 0, greedy=True)
    monkeypatch.setattr(module, "CACHE_TOKENS", 30)
    assert generate(resident, PROMPTS, 2, 5, 0, greedy=True) == whole


def test_within_the_reference_the_base_writes(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.5))
    own = generate(resident, PROMPTS, 1, 6, 0, greedy=True)
    with resident.reference("base"):
        base = generate(resident, PROMPTS, 1, 6, 0, greedy=True)
    resident.load(tiny.start(resident, b=0.0))
    assert generate(resident, PROMPTS, 1, 6, 0, greedy=True) == base != own


def test_what_cannot_be_written_is_refused(resident, tiny) -> None:
    resident.load(tiny.start(resident))
    for prompts, samples, limit in (
        ([], 1, 1),
        (PROMPTS, 0, 1),
        (PROMPTS, 1, 0),
        (PROMPTS, 1, [1]),
    ):
        with pytest.raises(DataError, match="at least 1"):
            generate(resident, prompts, samples, limit, 0)
    with pytest.raises(DataError, match="4 prompts, 2 seeds"):
        generate(resident, PROMPTS, 1, 1, [0, 1])
    with pytest.raises(DataError, match="no tokens"):
        generate(resident, [()], 1, 1, 0)
    with pytest.raises(DataError, match=r"longer than 128, from model\.max-length"):
        generate(resident, PROMPTS, 1, 120, 0)
    resident.load(tiny.start(resident, b=1.0) * np.float32(1e25))
    with pytest.raises(RunFailed, match="not finite"):
        generate(resident, PROMPTS, 1, 2, 0)
