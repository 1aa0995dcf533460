"""The three answer formats as a model sees them: prompts, lengths, sampled texts, exact odds.

``fedalign.models.formats`` holds the texts; here they become tokens of one model.  Where
``model.chat-template`` is on, the prompt is a user's turn and the answer opens the assistant's, so
it has no leading space.  A *letter* is complete without EOS (the answer is the letter); *shares*
and *order* end with EOS, because their end is part of the answer.

The exact odds (:func:`answer_logps`) are those of the one token sequence that training would use
for an answer.  A parser also accepts other spellings of it (a missing space); their probability is
small and counts as part of "everything else".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedalign.data.records import Message
from fedalign.errors import ConfigError, DataError
from fedalign.metrics.ranking import all_orders
from fedalign.models.base import ResidentModel
from fedalign.models.formats import (
    letter_completion,
    letters,
    order_completion,
    order_prompt,
    shares_completion,
    shares_prompt,
    to_tenths,
)
from fedalign.randomness import keyed_seed
from fedalign.rewards.text import Answer
from fedalign.training.batch import Prompt
from fedalign.training.encode import Ids, encode_text, render
from fedalign.training.examples import survey_prompt
from fedalign.training.generate import generate
from fedalign.training.score import logps_of

Floats = np.ndarray[Any, np.dtype[np.float64]]

NOT_ENDED = "…"
"""Put after a text that had to end and did not, so that no parser takes it."""
MOST_ORDERED = 6
"""Options up to which all orders are listed: 720 of them."""


def task_prompt(resident: ResidentModel, task: str, question: str, options: Sequence[str]) -> Ids:
    """Return the token ids that ask ``question`` in the format of ``task``.

    Raises ``DataError`` for more than 26 options, a prompt that is not a token prefix of its
    answers, or one that leaves no room for an answer within ``model.max-length``.
    """
    return _prompt(resident, task, question, options).tokens


def max_new_tokens(resident: ResidentModel, task: str, options: Sequence[str]) -> int:
    """Return how many tokens a well-formed answer needs: with EOS for ``shares`` and ``order``.

    A ``letter`` has no EOS; its number is that of the longest letter.
    """
    # What stands before an answer does not change its tokens: prompts are token prefixes.
    return max(map(len, _prompt(resident, task, "?", options).completions))


def decode(resident: ResidentModel, task: str, tokens: Ids, ended: bool) -> str:
    """Return a sampled answer as text, without its end token.

    Args:
        tokens: what was sampled.
        ended: whether the last token is an end token.  A ``shares`` or ``order`` text without one
            gets a mark that no parser accepts: it stopped because its room was used up.
    """
    body = list(tokens[:-1] if ended else tokens)
    text = str(resident.tokenizer.decode(body, clean_up_tokenization_spaces=False))
    return text if ended or task == "letter" else text + NOT_ENDED


def spelled(resident: ResidentModel, task: str, answer: Answer) -> str:
    """Return an answer as training spells it; a parser also accepts other white space."""
    if isinstance(answer, int):
        text = letter_completion(answer)
    elif task == "shares":
        text = shares_completion(answer)
    else:
        text = order_completion(answer)
    return text[1:] if resident.config.chat_template else text


def sample_texts(
    resident: ResidentModel,
    task: str,
    items: Sequence[tuple[str, Sequence[str]]],
    samples: int,
    seed: int,
) -> list[list[str]]:
    """Return ``samples`` texts for each (question, options), at temperature 1, in order.

    The loaded adapter is sampled; call within ``resident.reference("base")`` for the base.  Draws
    are keyed by (seed, task, question, options): a question's texts do not depend on the others
    (but for rounding of the logits), and two adapters are compared with the same random numbers.
    """
    distinct = list(dict.fromkeys((question, tuple(options)) for question, options in items))
    if not distinct:
        return []
    texts = generate(
        resident,
        [task_prompt(resident, task, question, options) for question, options in distinct],
        samples,
        [max_new_tokens(resident, task, options) for _, options in distinct],
        [keyed_seed(seed, "texts", task, question, *options) for question, options in distinct],
    )
    decoded = [decode(resident, task, tokens, ended) for tokens, ended in texts]
    drawn = {item: decoded[n * samples : (n + 1) * samples] for n, item in enumerate(distinct)}
    return [list(drawn[(question, tuple(options))]) for question, options in items]


def answer_logps(
    resident: ResidentModel, task: str, question: str, options: Sequence[str]
) -> tuple[list[Any], Floats]:
    """Return every well-formed answer and its log-probability under the loaded adapter.

    Returns:
        M answers as ``fedalign.rewards.text.parse`` gives them (``letter``: the K options;
        ``order``: the K! permutations, lexicographic), and (M,) nats; an order includes its EOS,
        a letter has none.

    Raises ``ConfigError`` for task ``shares`` and ``DataError`` for an order of more than
    ``MOST_ORDERED`` options: their answers are too many to list.
    """
    if task == "letter":
        prompt = survey_prompt(resident, question, options)
        return list(range(len(options))), logps_of(resident, [prompt])
    if task != "order":
        raise ConfigError(f"the answers of task '{task}' are not listed; use letter or order.")
    k = len(options)
    if k > MOST_ORDERED:
        raise DataError(f"{k} options have too many orders to list; the most is {MOST_ORDERED}.")
    orders = [[int(o) for o in row] for row in all_orders(k)]
    prompt = _encoded(resident, order_prompt(question, options), _order_texts(orders), question)
    return list(orders), logps_of(resident, [prompt])


def _order_texts(orders: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each order."""
    return [order_completion(order) for order in orders]


def _prompt(resident: ResidentModel, task: str, question: str, options: Sequence[str]) -> Prompt:
    """Return the prompt with answers among which a longest one is; cached on the resident."""
    if task == "letter":
        return survey_prompt(resident, question, options)
    k = len(options)
    try:
        letters(k)
    except ValueError as error:
        raise DataError(f"'{question[:60]}': {error}") from None
    if task == "shares":
        text = shares_prompt(question, options)
        # The number 10 may take more tokens than a digit.
        peaks = [[10 * int(i == j) for i in range(k)] for j in range(k)]
        answers = [shares_completion(t) for t in (to_tenths([1 / k] * k), *peaks)]
    elif task == "order":
        text = order_prompt(question, options)
        # Every letter in every place.
        answers = _order_texts([[(i + j) % k for i in range(k)] for j in range(k)])
    else:
        raise ConfigError(f"rewards.task = '{task}' is not one of letter, shares, order.")
    key = (text, tuple(answers))
    known = resident.encoded.get(key)
    if known is None:
        known = resident.encoded[key] = _encoded(resident, text, answers, question)
    return known


def _encoded(resident: ResidentModel, text: str, answers: Sequence[str], question: str) -> Prompt:
    """Return a prompt with the given answers, each with EOS."""
    chat = resident.config.chat_template
    if chat:
        text = render(resident.tokenizer, (Message("user", text),), open_turn=True)
    encoded = [
        encode_text(
            resident.tokenizer,
            text,
            answer[1:] if chat else answer,
            eos=True,
            special_tokens=not chat,
        )
        for answer in answers
    ]
    longest = max(e.length for e in encoded)
    if longest > resident.max_length:
        raise DataError(
            f"'{question[:60]}' has {longest} tokens with its answer; the most is "
            f"{resident.max_length}, from model.max-length and the model's positions."
        )
    if len({e.prompt for e in encoded}) > 1:
        raise DataError(f"'{question[:60]}': the prompt gives different tokens with each answer.")
    return Prompt(encoded[0].prompt, tuple(e.completion for e in encoded))
