"""Scores against plain computations: answer distribution, option mass, margins."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedalign.config import LocalConfig
from fedalign.data.records import Pair
from fedalign.errors import WireError
from fedalign.training.batch import Prompt, in_passes
from fedalign.training.reference import reference_logps
from fedalign.training.score import logps_of, pair_prompts, score_pairs, score_survey

QUESTIONS = [
    ("Build it?", ("yes", "no")),
    ("Should the river be wide and old?", ("agree", "disagree", "pass", "other")),
    ("Build it?", ("yes", "no", "later")),
]
PAIRS = [
    Pair("a", "say", " yes it is", " no", "g"),
    Pair("b", "the bridge", " is old", " is wide and the river too", "g"),
]


def test_answers_equal_a_plain_forward(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    tokenizer = resident.tokenizer
    for answer, (question, options) in zip(
        score_survey(resident, QUESTIONS), QUESTIONS, strict=True
    ):
        names = "ABCD"[: len(options)]
        lines = "".join(f"{n}. {o}\n" for n, o in zip(names, options, strict=True))
        ids = tokenizer(f"Question: {question}\n{lines}Answer:")["input_ids"]
        with torch.no_grad():
            p = resident.network(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        letters = [tokenizer(f" {n}", add_special_tokens=False)["input_ids"] for n in names]
        assert all(len(x) == 1 for x in letters)
        expected = np.array([float(p[x[0]]) for x in letters])
        assert answer.option_mass == pytest.approx(expected.sum(), rel=1e-5)
        np.testing.assert_allclose(answer.probabilities, expected / expected.sum(), rtol=1e-5)


def test_letters_of_several_tokens_are_summed(resident, tiny) -> None:
    """A tokenizer without a token for " B" still gives a distribution."""
    resident.load(tiny.start(resident, b=0.1))
    question = ("Odd?", ("yes", "no"))
    resident.encoded[question] = Prompt((1, 20, 21), ((30, 40), (30, 41)))
    answer = score_survey(resident, [question])[0]
    logps = logps_of(resident, [resident.encoded[question]])
    assert answer.option_mass == pytest.approx(np.exp(logps).sum())
    assert answer.probabilities[0] == pytest.approx(1 / (1 + math.exp(logps[1] - logps[0])))


def test_order_and_company_do_not_matter(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    forth = score_survey(resident, QUESTIONS * 2)
    back = score_survey(resident, list(reversed(QUESTIONS)))
    for k, answer in enumerate(forth):
        twin = back[len(QUESTIONS) - 1 - k % len(QUESTIONS)]
        np.testing.assert_allclose(answer.probabilities, twin.probabilities, rtol=2e-5)


def test_the_base_is_scored_in_its_context(resident, tiny) -> None:
    resident.load(tiny.start(resident))
    untouched = score_survey(resident, QUESTIONS)
    resident.load(tiny.start(resident, b=0.3))
    with resident.reference("base"):
        base = score_survey(resident, QUESTIONS)
    assert all(
        np.array_equal(a.probabilities, b.probabilities)
        for a, b in zip(untouched, base, strict=True)
    )
    assert not np.allclose(
        score_survey(resident, QUESTIONS)[0].probabilities, base[0].probabilities
    )


def test_margins_are_beta_times_the_loss_difference(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    settings = LocalConfig(beta=0.5)
    prompts = pair_prompts(resident, PAIRS)
    logps = logps_of(resident, prompts)
    plain = score_pairs(resident, PAIRS, settings, None)
    np.testing.assert_allclose(plain, 0.5 * (logps[::2] - logps[1::2]))
    base = reference_logps(resident, prompts, "base")
    assert base is not None
    ratios = logps - base
    with_base = score_pairs(resident, PAIRS, replace(settings, reference="base"), base)
    np.testing.assert_allclose(with_base, 0.5 * (ratios[::2] - ratios[1::2]))
    lengths = np.array([len(c) for p in prompts for c in p.completions])
    per_token = ratios / lengths
    ipo = score_pairs(resident, PAIRS, replace(settings, loss="ipo", reference="base"), base)
    np.testing.assert_allclose(ipo, 0.5 * (per_token[::2] - per_token[1::2]))


def test_margins_against_the_base_are_zero_before_training(resident, tiny) -> None:
    resident.load(tiny.start(resident))
    base = reference_logps(resident, pair_prompts(resident, PAIRS), "base")
    margins = score_pairs(resident, PAIRS, LocalConfig(reference="base"), base)
    assert np.abs(margins).max() < 1e-5


def test_a_named_adapter_as_reference(resident, tiny) -> None:
    other = tiny.start(resident, seed=7, b=0.3)
    prompts = tiny.survey_like(4).prompts
    resident.load(other)
    expected = logps_of(resident, prompts).astype(np.float32)
    resident.load(tiny.start(resident))
    got = reference_logps(resident, prompts, other)
    assert got is not None
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert reference_logps(resident, prompts, "none") is None


def test_a_score_that_is_not_finite_is_an_error(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=1.0) * np.float32(1e25))
    with pytest.raises(WireError) as caught:
        score_survey(resident, QUESTIONS)
    assert caught.value.reason == "score_not_finite"


def test_passes_stay_within_bounds_and_lose_nothing(monkeypatch) -> None:
    from fedalign.training import batch

    monkeypatch.setattr(batch, "ROW_TOKENS", 60)
    prompts = [Prompt(tuple(range(1, 4 + k)), ((5,), (6,))) for k in range(20)]
    prompts.append(Prompt(tuple(range(100)), ((5,), (6,))))
    passes = in_passes(prompts, vocabulary=10)
    assert [k for p in passes for k in p] == list(range(21))
    assert passes[-1] == [20]  # larger than the bound, alone
    for indices in passes[:-1]:
        assert len(indices) * max(len(prompts[k].tokens) for k in indices) <= 60
