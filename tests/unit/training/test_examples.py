"""From private data to prompts, completions and labelled pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedalign.config import LocalConfig
from fedalign.data.records import ClientData, Message, Pair, SurveyItem
from fedalign.errors import DataError
from fedalign.training.batch import Prompt
from fedalign.training.examples import (
    Label,
    TrainingSet,
    drop_unusable,
    pair_prompt,
    survey_prompt,
    training_set,
)

SETTINGS = LocalConfig(pairs_per_question=0)


def item(name: str, shares: tuple[float, ...], question: str = "Build it?") -> SurveyItem:
    options = tuple(f"{name}{k}" for k in range(len(shares)))
    return SurveyItem(name, question, options, {"north": shares}, source=f"file:{name}")


def pair(name: str, vote_share: float = 1.0, prompt: str = "say") -> Pair:
    return Pair(name, prompt, " yes it is", " no", "north", vote_share, source=f"file:{name}")


def client(form: str, *train) -> ClientData:
    return ClientData("north/0", "north", form, train, train[:1], train[:1])


def test_survey_prompt_has_one_letter_completion_an_option(resident) -> None:
    prompt = survey_prompt(resident, "Build it?", ("yes", "no", "later"))
    decode = resident.tokenizer.decode
    assert (
        decode(list(prompt.tokens[1:])) == "Question: Build it?\nA. yes\nB. no\nC. later\nAnswer:"
    )
    assert [decode(list(c)) for c in prompt.completions] == [" A", " B", " C"]
    assert survey_prompt(resident, "Build it?", ("yes", "no", "later")) is prompt


def test_survey_prompt_in_a_chat_template(resident) -> None:
    resident.config = replace(resident.config, chat_template=True)
    resident.tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    prompt = survey_prompt(resident, "Build it?", ("yes", "no"))
    decode = resident.tokenizer.decode
    assert decode(list(prompt.tokens)).startswith("<s>[user]Question: Build it?")
    assert decode(list(prompt.tokens)).endswith("[assistant]\n")
    assert [decode(list(c)) for c in prompt.completions] == ["A", "B"]
    assert prompt.tokens.count(1) == 1


def test_survey_labels_are_bradley_terry_shares(resident) -> None:
    got = training_set(resident, client("survey", item("q", (0.6, 0.3, 0.1))), SETTINGS, 0)
    assert got.examples == 3
    assert [(x.i, x.j) for x in got.labels[0]] == [(0, 1), (0, 2), (1, 2)]
    assert [x.q for x in got.labels[0]] == pytest.approx([2 / 3, 6 / 7, 3 / 4])


def test_unused_options_are_not_scored(resident) -> None:
    data = client("survey", item("q", (0.0, 0.5, 0.0, 0.5)))
    got = training_set(resident, data, replace(SETTINGS, pairs_per_question=1), 0)
    decode = resident.tokenizer.decode
    letters = [decode(list(c)) for c in got.prompts[0].completions]
    assert len(letters) == 2
    assert (got.labels[0][0].i, got.labels[0][0].j) == (0, 1)


def test_pairs_end_with_eos_and_carry_the_vote_share(resident) -> None:
    got = training_set(resident, client("pairs", pair("a", 0.8), pair("b", 0.3)), SETTINGS, 0)
    assert [labels[0].q for labels in got.labels] == [0.8, 0.3]
    assert all(c[-1] == resident.tokenizer.eos_token_id for c in got.prompts[0].completions)


def test_hard_labels_are_one_keyed_vote_a_pair(resident) -> None:
    pairs = [pair(f"p{k}", 0.7, prompt=f"say {k}") for k in range(300)]
    hard = replace(SETTINGS, labels="hard")
    first, again, other = (
        [x[0].q for x in training_set(resident, client("pairs", *pairs), hard, s).labels]
        for s in (0, 0, 1)
    )
    assert set(first) == {0.0, 1.0}
    assert first == again
    assert first != other
    assert sum(first) / 300 == pytest.approx(0.7, abs=0.08)  # 3 standard deviations
    shuffled = training_set(resident, client("pairs", *reversed(pairs)), hard, 0).labels
    assert [x[0].q for x in shuffled] == list(reversed(first))


def test_conversational_pairs_need_a_template(resident) -> None:
    turns = Pair(
        "c",
        (Message("user", "q"),),
        (Message("assistant", "a"),),
        (Message("assistant", "b"),),
        "north",
        source="file:9",
    )
    with pytest.raises(DataError, match=r"file:9.*chat template"):
        pair_prompt(resident, turns)


def test_a_long_row_is_an_error_that_names_it(resident) -> None:
    with pytest.raises(DataError, match=r"tokens; the most is 128"):
        survey_prompt(resident, "long " * 200, ("yes", "no"))


def test_unusable_rows_are_left_out_and_listed(resident) -> None:
    long = item("long", (0.5, 0.5), question="long " * 200)
    many = item("many", tuple([1 / 32] * 32))
    data = client("survey", item("q", (0.5, 0.5)), long, many)
    kept, bad = drop_unusable(resident, data)
    assert [i.id for i in kept.train] == ["q"]
    assert [b.source for b in bad] == ["file:long", "file:many"]
    assert "tokens" in bad[0].reason
    assert "A to Z" in bad[1].reason
    with pytest.raises(DataError, match="none of the 3 rows"):
        drop_unusable(resident, client("survey", long))


def test_no_pairs_at_all_is_an_error(resident) -> None:
    with pytest.raises(DataError, match="none gives a pair"):
        training_set(resident, ClientData("c", "north", "survey", (), (), ()), SETTINGS, 0)


def test_a_training_set_checks_itself() -> None:
    prompt = Prompt((1, 2), ((3,), (4,)))
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        TrainingSet((prompt,), ((Label(0, 2, 1.0),),))
    with pytest.raises(DataError, match="no pairs"):
        TrainingSet((prompt,), ((),))
    with pytest.raises(DataError, match="lists of pairs"):
        TrainingSet((prompt,), ())
