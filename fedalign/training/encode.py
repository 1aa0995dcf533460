"""From text to token ids: prompt and completion tokenised together, and checked.

The two are tokenised as one string, because a completion tokenised alone may differ (merges over
the border, a second BOS).  The prompt's own tokens must be a prefix of the whole; if they are not,
the error says where they part.  Conversations go through the tokenizer's chat template, whose text
already holds the special tokens, so none are added to it.

Two habits of published templates would spoil a run and are switched off in :func:`render`.  Qwen3
opens a turn for a chain of thought, after which no letter follows; asked not to think, it writes
the empty thought that it also writes before a given answer, so prompt and whole agree.  Llama-3.2
and others write today's date, so the same question would change from day to day and from site to
site; they get one fixed date.

A *text* completion ends with EOS, since its end is part of what is preferred.  A *letter* answer
has no EOS: the answer is the letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedalign.data.records import Message, Text
from fedalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]

FIXED_DATE = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
"""Put before a chat template: what it is told when it asks for today's date (the date is the one
that Llama-3.2's template falls back to).  A macro shadows the library's function of that name."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt and one completion; the completion has at least one token."""

    prompt: Ids
    completion: Ids

    @property
    def length(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt) + len(self.completion)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, eos: bool
) -> Encoded:
    """Encode plain texts or conversations.

    ``eos`` ends a plain completion with EOS; a chat template closes its own turns.  Raises
    ``DataError`` when the prompt is not a token prefix, when BOS is doubled, or when a conversation
    meets a tokenizer without a chat template.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return encode_text(tokenizer, prompt, completion, eos=eos, special_tokens=True)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError("prompt and completion must both be plain text or both conversations.")
    return encode_text(
        tokenizer,
        render(tokenizer, prompt, open_turn=True),
        render(tokenizer, prompt + completion, open_turn=False),
        eos=False,
        special_tokens=False,
        joined=True,
    )


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completion: str,
    *,
    eos: bool,
    special_tokens: bool,
    joined: bool = False,
) -> Encoded:
    """Encode ``prompt + completion``; with ``joined`` the completion already holds the prompt.

    ``special_tokens`` False is for text that a chat template rendered.
    """
    text = completion if joined else prompt + completion
    head = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    whole = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and len(whole) > 1 and whole[0] == whole[1] == bos:
        raise DataError(
            "the row starts with two BOS tokens: the text holds one and the tokenizer adds one. "
            "Give a conversation, or plain text without special tokens."
        )
    shared = _shared(head, whole)
    if shared < len(head):
        raise DataError(
            f"the prompt is not a token prefix of prompt + completion: they part at token {shared} "
            f"of {len(head)} ({tokenizer.decode(head[shared : shared + 3])!r} against "
            f"{tokenizer.decode(whole[shared : shared + 3])!r}). End the prompt on a token "
            "boundary: no trailing space, the completion starting with one."
        )
    answer = list(whole[shared:])
    if eos:
        if end is None:
            raise ConfigError(
                "the tokenizer has no EOS token; a completion's end cannot be learnt."
            )
        if not answer or answer[-1] != end:
            answer.append(end)
    if not head or not answer:
        raise DataError(f"{'prompt' if not head else 'completion'} has no tokens.")
    return Encoded(tuple(head), tuple(answer))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], open_turn: bool
) -> str:
    """Return a conversation as the chat template's text; ``open_turn`` starts the next answer.

    The text depends on nothing but the conversation and the template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "a conversation needs a tokenizer with a chat template, and this model's has none. Use "
            "an instruction-tuned model or plain-text rows."
        )
    return str(
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=open_turn,
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            enable_thinking=False,
        )
    )


def _shared(a: list[int], b: list[int]) -> int:
    for k, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return k
    return min(len(a), len(b))
