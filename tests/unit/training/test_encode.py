"""Tokenisation: joint, prefix-checked, one BOS, EOS where asked."""

from __future__ import annotations

import pytest

from fedalign.data.records import Message
from fedalign.errors import DataError
from fedalign.training.encode import encode, encode_text, render

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first else '' }}[{{ m.role }}]{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASK = (Message("user", "Is it fair?"),)
SAY = (Message("assistant", "yes it is"),)


def test_joint_tokens_with_one_bos_and_one_eos(tiny) -> None:
    tokenizer = tiny.tokenizer()
    got = encode(tokenizer, "the river is", " wide", eos=True)
    whole = tokenizer("the river is wide")["input_ids"]
    assert [*got.prompt, *got.completion] == [*whole, tokenizer.eos_token_id]
    assert got.prompt.count(tokenizer.bos_token_id) == 1
    assert got.length == len(whole) + 1


def test_without_eos_the_answer_is_the_letter(tiny) -> None:
    tokenizer = tiny.tokenizer()
    got = encode(tokenizer, "people say", " A", eos=False)
    assert tokenizer.decode(list(got.completion)) == " A"


def test_eos_written_in_the_text_is_not_doubled(tiny) -> None:
    tokenizer = tiny.tokenizer()
    got = encode(tokenizer, "people say", " A</s>", eos=True)
    assert got.completion.count(tokenizer.eos_token_id) == 1


def test_border_inside_a_token_is_an_error_that_says_where(tiny) -> None:
    with pytest.raises(DataError, match=r"part at token \d+ of \d+"):
        encode(tiny.tokenizer(), "the bridge is ", "old", eos=True)


def test_double_bos_is_an_error(tiny) -> None:
    with pytest.raises(DataError, match="two BOS"):
        encode(tiny.tokenizer(), "<s>people say", " A", eos=True)


def test_rendered_text_gets_no_second_bos(tiny) -> None:
    tokenizer = tiny.tokenizer()
    got = encode_text(tokenizer, "<s>people say", " A", eos=False, special_tokens=False)
    assert got.prompt.count(tokenizer.bos_token_id) == 1


def test_empty_completion_is_an_error(tiny) -> None:
    with pytest.raises(DataError, match="completion has no tokens"):
        encode(tiny.tokenizer(), "people say", "", eos=False)


def test_conversation_goes_through_the_chat_template(tiny) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    got = encode(tokenizer, ASK, SAY, eos=True)
    assert tokenizer.decode(list(got.prompt)) == "<s>[user]Is it fair?\n[assistant]"
    assert tokenizer.decode(list(got.completion)) == "yes it is\n"
    assert got.prompt.count(tokenizer.bos_token_id) == 1


def test_a_template_that_thinks_is_asked_not_to(tiny) -> None:
    """As in Qwen3: an answer without thoughts has the empty block, and so must its prompt."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<t></t>{% endif %}"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% if enable_thinking is defined and enable_thinking is false %}<t></t>{% endif %}"
        "{% endif %}"
    )
    got = encode(tokenizer, ASK, SAY, eos=True)
    assert tokenizer.decode(list(got.prompt)) == "[user]Is it fair?\n[assistant]<t></t>"
    assert tokenizer.decode(list(got.completion)) == "yes it is\n"


def test_a_template_that_writes_the_date_gives_the_same_text_every_day(tiny) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert render(tokenizer, ASK, open_turn=True) == "26 Jul 2024 Is it fair?"


def test_conversation_without_a_template_is_an_error(tiny) -> None:
    with pytest.raises(DataError, match="chat template"):
        encode(tiny.tokenizer(), ASK, SAY, eos=True)


def test_mixed_forms_are_an_error(tiny) -> None:
    with pytest.raises(DataError, match="both"):
        encode(tiny.tokenizer(), "Is it fair?", SAY, eos=True)
