"""The answer formats as tokens: prompts, lengths, exact odds, sampled texts."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedalign.config import Config, RewardsConfig
from fedalign.errors import ConfigError, DataError
from fedalign.models.base import ResidentModel
from fedalign.models.formats import order_prompt, shares_prompt
from fedalign.rewards.text import parse
from fedalign.training.examples import survey_prompt
from fedalign.training.generate import generate
from fedalign.training.score import score_survey
from fedalign.training.tasks import (
    answer_logps,
    decode,
    max_new_tokens,
    sample_texts,
    task_prompt,
)

QUESTION = "Build it?"
OPTIONS = ("agree", "disagree", "pass")


@pytest.fixture(scope="module")
def pocket() -> ResidentModel:
    torch.set_num_threads(1)
    return ResidentModel(Config().model)


def pocket_question() -> tuple[str, tuple[str, ...]]:
    from fedalign.data.synthetic import generate

    item = generate("default", 0).items[0]
    return item.question, item.options


def test_prompts_are_the_texts_of_the_formats(resident) -> None:
    for task, text in (
        ("shares", shares_prompt(QUESTION, OPTIONS)),
        ("order", order_prompt(QUESTION, OPTIONS)),
    ):
        ids = task_prompt(resident, task, QUESTION, OPTIONS)
        assert list(ids) == resident.tokenizer(text)["input_ids"]
        assert task_prompt(resident, task, QUESTION, list(OPTIONS)) is ids  # cached
    letter = task_prompt(resident, "letter", QUESTION, OPTIONS)
    assert letter == survey_prompt(resident, QUESTION, OPTIONS).tokens


def test_lengths_have_room_for_every_answer(resident) -> None:
    """Every well-formed answer, with its end token, fits; the longest uses all of the room."""
    eos, tokenizer = resident.tokenizer.eos_token_id, resident.tokenizer
    texts = {
        "shares": [
            "".join(f" {t}" for t in tenths)
            for tenths in itertools.product(range(11), repeat=3)
            if sum(tenths) == 10
        ],
        "order": [" " + " ".join(p) for p in itertools.permutations("ABC")],
    }
    for task, answers in texts.items():
        prompt = task_prompt(resident, task, QUESTION, OPTIONS)
        text = {"shares": shares_prompt, "order": order_prompt}[task](QUESTION, OPTIONS)
        lengths = []
        for answer in answers:
            whole = tuple(tokenizer(text + answer)["input_ids"])
            assert whole[: len(prompt)] == prompt
            completion = (*whole[len(prompt) :], eos)
            lengths.append(len(completion))
            assert parse(task, decode(resident, task, completion, True), 3) is not None
        assert max(lengths) == max_new_tokens(resident, task, OPTIONS)
    assert max_new_tokens(resident, "letter", OPTIONS) == 1


def test_a_text_that_did_not_end_never_parses(resident) -> None:
    for task, text in (("shares", " 5 3 2"), ("order", " B A C")):
        ids = tuple(resident.tokenizer(text, add_special_tokens=False)["input_ids"])
        ended = (*ids, resident.tokenizer.eos_token_id)
        assert parse(task, decode(resident, task, ended, True), 3) is not None
        assert parse(task, decode(resident, task, ids, False), 3) is None
        assert parse(task, decode(resident, task, ended, False), 3) is None
    ids = tuple(resident.tokenizer(" B", add_special_tokens=False)["input_ids"])
    assert decode(resident, "letter", ids, False).strip() == "B"
    end = (resident.tokenizer.eos_token_id,)
    for text in (decode(resident, "letter", end, True), decode(resident, "letter", end, False)):
        assert parse("letter", text, 3) is None


def test_odds_of_letters_are_those_of_scoring(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    answers, logps = answer_logps(resident, "letter", QUESTION, OPTIONS)
    scored = score_survey(resident, [(QUESTION, OPTIONS)])[0]
    assert answers == [0, 1, 2]
    assert np.exp(logps).sum() == pytest.approx(scored.option_mass)
    np.testing.assert_allclose(np.exp(logps) / np.exp(logps).sum(), scored.probabilities)


def test_odds_of_orders_equal_a_plain_forward(resident, tiny) -> None:
    resident.load(tiny.start(resident, b=0.3))
    answers, logps = answer_logps(resident, "order", QUESTION, OPTIONS)
    assert answers == [list(p) for p in itertools.permutations(range(3))]
    prompt = list(task_prompt(resident, "order", QUESTION, OPTIONS))
    for answer, logp in zip(answers, logps, strict=True):
        text = order_prompt(QUESTION, OPTIONS) + "".join(f" {'ABC'[o]}" for o in answer)
        ids = [*resident.tokenizer(text)["input_ids"], resident.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = resident.network(input_ids=torch.tensor([ids])).logits[0].double()
        steps = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
        assert logp == pytest.approx(float(steps.sum()), abs=1e-4)


def test_what_cannot_be_asked_is_an_error(resident) -> None:
    with pytest.raises(ConfigError, match="letter or order"):
        answer_logps(resident, "shares", QUESTION, OPTIONS)
    with pytest.raises(DataError, match="the most is 6"):
        answer_logps(resident, "order", QUESTION, tuple("abcdefg"))
    with pytest.raises(ConfigError, match="letter, shares, order"):
        task_prompt(resident, "essay", QUESTION, OPTIONS)
    with pytest.raises(DataError, match="27 options"):
        task_prompt(resident, "order", QUESTION, tuple(map(str, range(27))))
    with pytest.raises(DataError, match=r"model\.max-length"):
        task_prompt(resident, "shares", "why " * 200, OPTIONS)


def test_chat_template_opens_a_turn(resident) -> None:
    """A chat answer has no space before it, so the prompt must end where the turn opens."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = SimpleNamespace(
        tokenizer=resident.tokenizer,
        config=replace(resident.config, chat_template=True),
        max_length=resident.max_length,
        encoded={},
    )
    old, resident.tokenizer.chat_template = resident.tokenizer.chat_template, template
    try:
        ids = task_prompt(chat, "order", QUESTION, OPTIONS)
        room = max_new_tokens(chat, "order", OPTIONS)
    finally:
        resident.tokenizer.chat_template = old
    text = resident.tokenizer.decode(ids)
    assert text.endswith("Order:\n<assistant>")
    assert text.count("<user>") == 1
    assert room >= 4


def test_samples_follow_the_exact_odds(pocket) -> None:
    """Frequencies of 2000 sampled answers against the listed probabilities (chi-square)."""
    from scipy.stats import chisquare

    question, options = pocket_question()
    pocket.load(np.zeros(pocket.parameters_flat.numel(), dtype=np.float32))
    for task in ("letter", "order"):
        answers, logps = answer_logps(pocket, task, question, options)
        texts = sample_texts(pocket, task, [(question, options)], 2000, seed=3)[0]
        seen = Counter(str(parse(task, t, len(options))) for t in texts)
        observed = np.array([*(seen[str(a)] for a in answers), seen["None"]], dtype=float)
        expected = 2000 * np.append(np.exp(logps), max(0.0, 1 - np.exp(logps).sum()))
        rare = expected < 5  # too few for the test: pooled
        if rare.any():
            observed = np.append(observed[~rare], observed[rare].sum())
            expected = np.append(expected[~rare], expected[rare].sum())
        assert observed.sum() == 2000
        # A pool that is itself rare joins the largest cell.
        if expected[-1] < 5:
            top = int(expected[:-1].argmax())
            observed[top] += observed[-1]
            expected[top] += expected[-1]
            observed, expected = observed[:-1], expected[:-1]
        assert chisquare(observed, expected * 2000 / expected.sum()).pvalue > 1e-3


def test_the_pocket_writes_well_formed_answers(pocket) -> None:
    question, options = pocket_question()
    for task in ("letter", "shares", "order"):
        settings = RewardsConfig(task=task)
        texts = sample_texts(pocket, task, [(question, options)], 100, seed=0)[0]
        formed = [parse(settings.task, t, len(options)) is not None for t in texts]
        assert np.mean(formed) > 0.9


def test_texts_of_a_question_do_not_depend_on_the_others(pocket, monkeypatch) -> None:
    from fedalign.data.synthetic import generate as synthetic
    from fedalign.training import tasks

    calls: list[int] = []

    def counted(resident, prompts, *more):
        calls.append(len(prompts))
        return generate(resident, prompts, *more)

    monkeypatch.setattr(tasks, "generate", counted)
    items = [(i.question, i.options) for i in synthetic("default", 0).items[:12]]
    for task in ("letter", "shares", "order"):
        together = sample_texts(pocket, task, [*items, items[0]], 8, seed=1)
        assert calls == [12]  # all questions in one call, each once
        assert together[12] == together[0]
        assert together[:12] == [sample_texts(pocket, task, [i], 8, seed=1)[0] for i in items]
        assert together[:12] != sample_texts(pocket, task, items, 8, seed=2)
        calls.clear()
    assert sample_texts(pocket, "order", [], 5, seed=1) == []
