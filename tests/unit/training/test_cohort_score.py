"""Adapters scored together give what each gives alone: every architecture and raggedness.

Log-probabilities agree to 1e-5 nats; those of texts of dozens of nats, where a float32 ends, to a
part in a million.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedalign.config import LocalConfig, ModelConfig
from fedalign.data.records import Pair
from fedalign.errors import WireError
from fedalign.models.base import ResidentModel
from fedalign.training import cohort_forward, cohort_llama
from fedalign.training.cohort_score import (
    logps_of_each,
    score_pairs_each,
    score_survey_each,
    score_survey_loaded,
)
from fedalign.training.score import logps_of, score_pairs, score_survey

SETTINGS = LocalConfig()


def model(folder: Path | None = None, **more) -> ResidentModel:
    named = {} if folder is None else {"name": str(folder)}
    return ResidentModel(ModelConfig(**named, rank=4, alpha=8.0, device="cpu", **more))


@pytest.fixture(scope="module")
def pocket() -> ResidentModel:
    return model()


def adapters_of(resident: ResidentModel, tiny, count: int) -> list[np.ndarray]:
    return [tiny.start(resident, seed=k, b=0.05) for k in range(count)]


def alone(resident: ResidentModel, adapters, prompts) -> list[np.ndarray]:
    found = []
    for adapter, own in zip(adapters, prompts, strict=True):
        resident.load(adapter)
        found.append(logps_of(resident, own) if own else np.empty(0))
    return found


def assert_close(together, apart) -> None:
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("data", ["survey_like", "text_like"])
def test_equals_one_after_another_on_every_architecture(
    kind: str, data: str, tiny, tmp_path: Path
) -> None:
    resident = model(tiny.save(kind, tmp_path))
    adapters = adapters_of(resident, tiny, 4)
    prompts = [getattr(tiny, data)(2 + 3 * k, seed=k).prompts for k in range(4)]
    apart = alone(resident, adapters, prompts)
    assert_close(logps_of_each(resident, adapters, prompts, SETTINGS), apart)
    # The adapters matter: another one gives other numbers.
    swapped = logps_of_each(resident, adapters[::-1], prompts, SETTINGS)
    assert np.abs(swapped[0] - apart[0]).max() > 1e-3


@pytest.mark.parametrize("data", ["survey_like", "text_like"])
@pytest.mark.parametrize("pass_tokens", [8192, 64])
def test_merged_weights_passes_and_cohorts(
    data: str, pass_tokens: int, pocket, tiny, monkeypatch
) -> None:
    """Ragged lists, one of them empty, in any size of cohort and pass."""
    assert cohort_llama.supported(pocket)
    monkeypatch.setattr(cohort_forward, "PASS_TOKENS", pass_tokens)
    adapters = adapters_of(pocket, tiny, 5)
    prompts = [getattr(tiny, data)(1 + 4 * k, seed=k).prompts for k in range(5)]
    prompts[2] = ()
    apart = alone(pocket, adapters, prompts)
    for size in (0, 2):
        settings = replace(SETTINGS, cohort_size=size)
        assert_close(logps_of_each(pocket, adapters, prompts, settings), apart)
    assert logps_of_each(pocket, [], [], SETTINGS) == []


@pytest.mark.parametrize("data", ["survey_like", "text_like"])
def test_no_bit_depends_on_the_threads_of_merged_cohorts(data: str, pocket, tiny) -> None:
    adapters = adapters_of(pocket, tiny, 9)
    prompts = [getattr(tiny, data)(1 + k, seed=k).prompts for k in range(9)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(logps_of_each(pocket, adapters, prompts, SETTINGS))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a, b)


def test_answers_and_margins(resident, tiny) -> None:
    adapters = adapters_of(resident, tiny, 3)
    items = [
        [(f"Should the town build bridge {k}?", ("yes", "no", "pass")[: 2 + k % 2])] * (k + 1)
        for k in range(3)
    ]
    answers = score_survey_each(resident, adapters, items, SETTINGS)
    pairs = [
        [Pair(f"{n}", "say" * (n + 1), " yes it is", " no", "g") for n in range(k)]
        for k in (3, 0, 2)
    ]
    settings = replace(SETTINGS, loss="ipo", length_normalised=True, beta=0.3, reference="base")
    references = [np.arange(2 * len(own), dtype=np.float32) for own in pairs]
    margins = score_pairs_each(resident, adapters, pairs, settings, references)
    plain = score_pairs_each(resident, adapters, pairs, SETTINGS, [None] * 3)
    for k, adapter in enumerate(adapters):
        resident.load(adapter)
        for a, b in zip(answers[k], score_survey(resident, items[k]), strict=True):
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
            assert a.option_mass == pytest.approx(b.option_mass, abs=1e-5)
        if not pairs[k]:
            assert len(margins[k]) == len(plain[k]) == 0
            continue
        assert_close([margins[k]], [score_pairs(resident, pairs[k], settings, references[k])])
        assert_close([plain[k]], [score_pairs(resident, pairs[k], SETTINGS, None)])


def test_the_loaded_adapter_through_merged_weights(pocket, resident, tiny) -> None:
    items = [(f"Should the town build bridge {k}?", ("yes", "no", "pass")) for k in range(5)]
    items.append(items[1])
    for model, exact in ((pocket, False), (resident, True)):
        assert cohort_llama.supported(model) is not exact
        model.load(tiny.start(model, seed=3, b=0.1))
        expected = score_survey(model, items)
        for found, other in zip(score_survey_loaded(model, items, SETTINGS), expected, strict=True):
            np.testing.assert_allclose(
                found.probabilities, other.probabilities, atol=0.0 if exact else 1e-5, rtol=0
            )
            assert found.option_mass == pytest.approx(other.option_mass, abs=1e-5)


def test_numbers_that_are_not_finite_are_an_error_as_with_one(pocket, tiny) -> None:
    adapters = adapters_of(pocket, tiny, 3)
    adapters[1] = (adapters[1] * 1e25).astype(np.float32)
    prompts = [tiny.survey_like(3, seed=k).prompts for k in range(3)]
    with pytest.raises(WireError, match="score_not_finite"):
        alone(pocket, adapters, prompts)
    with pytest.raises(WireError, match="score_not_finite"):
        logps_of_each(pocket, adapters, prompts, SETTINGS)


def test_the_model_is_left_as_it_was(resident, tiny) -> None:
    loaded = tiny.start(resident, seed=9, b=0.1)
    resident.load(loaded)
    prompts = [tiny.survey_like(3, seed=k).prompts for k in range(2)]
    before = logps_of(resident, prompts[0])
    logps_of_each(resident, adapters_of(resident, tiny, 2), prompts, SETTINGS)
    assert np.array_equal(resident.read(), loaded)
    assert np.array_equal(logps_of(resident, prompts[0]), before)
    assert not any(p.grad is not None and p.grad.any() for p in resident.peft.parameters())
