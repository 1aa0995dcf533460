"""Embeddings against plain computations on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedalign.errors import DataError
from fedalign.rewards.embedding import Embedder, embedding_dim

QUESTION = ("Should the river be wide?", ("agree", "disagree", "no idea at all"))
OTHER = ("Build it?", ("yes", "no"))


def test_an_embedding_is_two_means_of_the_base(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    found = Embedder(resident).embed([QUESTION])[0]
    assert found.dtype == np.float32
    assert found.shape == (3, embedding_dim(resident)) == (3, 64)
    prompt = (
        "Question: Should the river be wide?\nA. agree\nB. disagree\nC. no idea at all\nAnswer:"
    )
    cut = len(resident.tokenizer(prompt)["input_ids"])
    for name, option, vector in zip("ABC", QUESTION[1], found, strict=True):
        ids = resident.tokenizer(f"{prompt} {name}. {option}")["input_ids"]
        with resident.reference("base"):
            states = resident.network(torch.tensor([ids]), output_hidden_states=True).hidden_states[
                -1
            ][0]
        expected = torch.cat([states[:cut].mean(0), states[cut:].mean(0)])
        np.testing.assert_allclose(vector, expected.numpy(), atol=2e-5)


def test_the_adapter_does_not_matter_and_is_left_alone(resident, tiny) -> None:
    resident.load(tiny.start(resident))
    before = Embedder(resident).embed([QUESTION])[0]
    adapter = tiny.start(resident, b=0.3)
    resident.load(adapter)
    flags = [p.requires_grad for p in resident.network.parameters()]
    assert np.array_equal(Embedder(resident).embed([QUESTION])[0], before)
    assert np.array_equal(resident.read(), adapter)
    assert [p.requires_grad for p in resident.network.parameters()] == flags


def test_company_does_not_matter(resident) -> None:
    alone = Embedder(resident).embed([OTHER])[0]
    embedder = Embedder(resident)
    together = embedder.embed([QUESTION, OTHER, QUESTION])
    np.testing.assert_allclose(together[1], alone, atol=2e-5)
    assert together[0] is together[2]
    assert embedder.embed([OTHER])[0] is together[1]


def test_a_long_text_loses_the_beginning_of_its_prompt(resident) -> None:
    resident.max_length = 12
    short = Embedder(resident).embed([QUESTION])[0]
    assert np.isfinite(short).all()
    longer = replace_beginning(QUESTION)
    assert np.array_equal(short, Embedder(resident).embed([longer])[0])


def replace_beginning(question):
    text, options = question
    return text.replace("Should", "Perhaps should"), options


def test_too_many_options_are_named(resident) -> None:
    with pytest.raises(DataError, match="27 options"):
        Embedder(resident).embed([("Which?", tuple(f"option {i}" for i in range(27)))])
