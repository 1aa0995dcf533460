"""Three ways to ask a survey question and to answer it, as plain text.

===========  =======================  ===================================================
format       prompt ends with         completion, for four options
===========  =======================  ===================================================
letter       ``Answer:``              `` B``           one option
shares       ``Shares in tenths:``    `` 3 4 2 1``     one integer an option, summing to 10
order        ``Order:``               `` B A D C``     all options, most to least chosen
===========  =======================  ===================================================

Every prompt opens with ``Question: ...`` and one line ``A. option`` an option.  Prompts end without
a space and completions begin with one, so that byte-level tokenizers cut between them.

Parsers are strict: they return the value, or None for anything malformed (wrong count, wrong sum,
a letter out of range or twice, words around it).  None is a failure to be counted by the caller; it
is never repaired here.  White space around the completion does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TENTHS = 10

LETTER_CUE = "Answer:"
SHARES_CUE = "Shares in tenths:"
ORDER_CUE = "Order:"


def letters(k: int) -> tuple[str, ...]:
    """Return the letters of ``k`` options, 1 <= k <= 26; ``ValueError`` otherwise."""
    if not 1 <= k <= len(ALPHABET):
        raise ValueError(
            f"{k} options; options are named A to Z, so a question has 1 to {len(ALPHABET)}. "
            "Leave the question out or merge options."
        )
    return tuple(ALPHABET[:k])


def letter_prompt(question: str, options: Sequence[str]) -> str:
    """Return the prompt that asks for one letter."""
    return _prompt(question, options, LETTER_CUE)


def shares_prompt(question: str, options: Sequence[str]) -> str:
    """Return the prompt that asks for the share of each option, in tenths."""
    return _prompt(question, options, SHARES_CUE)


def order_prompt(question: str, options: Sequence[str]) -> str:
    """Return the prompt that asks for all options, most to least chosen."""
    return _prompt(question, options, ORDER_CUE)


def letter_completion(option: int) -> str:
    """Return `` B`` for option 1; ``option`` in [0, 26)."""
    return " " + letters(option + 1)[option]


def shares_completion(tenths: Sequence[int]) -> str:
    """Return `` 3 4 2 1``; the integers must be non-negative and sum to 10."""
    if any(t < 0 for t in tenths) or sum(tenths) != TENTHS:
        raise ValueError(f"tenths {list(tenths)} must be non-negative and sum to {TENTHS}")
    return "".join(f" {t}" for t in tenths)


def order_completion(order: Sequence[int]) -> str:
    """Return `` B A D C`` for ``[1, 0, 3, 2]``; ``order`` must be a permutation of its indexes."""
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"order {list(order)} is not a permutation of 0..{len(order) - 1}")
    names = letters(len(order))
    return "".join(f" {names[i]}" for i in order)


def to_tenths(shares: Sequence[float]) -> list[int]:
    """Round shares to integers that sum to 10 by largest remainder (Hamilton's method).

    ``shares`` (K,) are non-negative and sum to 1.  Equal remainders go to the earlier option.
    """
    # Written so that NaN fails it too.
    if not (shares and min(shares) >= 0 and abs(sum(shares) - 1.0) <= 1e-6):
        raise ValueError(f"shares {list(shares)} must be non-negative and sum to 1")
    # Rounding first keeps a share such as 0.3 (3 - 4e-16 tenths) from losing its whole tenth.
    exact = [round(TENTHS * s, 9) for s in shares]
    tenths = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (tenths[i] - exact[i], i))
    for i in by_remainder[: TENTHS - sum(tenths)]:
        tenths[i] += 1
    return tenths


def parse_letter(text: str, k: int) -> int | None:
    """Return the option (0-based) that a completion names, or None."""
    word = text.strip()
    return letters(k).index(word) if word in letters(k) else None


def parse_shares(text: str, k: int) -> list[int] | None:
    """Return ``k`` tenths that sum to 10, or None."""
    words = text.split()
    if len(words) != k or not all(re.fullmatch(r"[0-9]|10", w) for w in words):
        return None
    tenths = [int(w) for w in words]
    return tenths if sum(tenths) == TENTHS else None


def parse_order(text: str, k: int) -> list[int] | None:
    """Return the options (0-based), most to least chosen, or None."""
    words = text.split()
    names = letters(k)
    if sorted(words) != list(names):
        return None
    return [names.index(w) for w in words]


def _prompt(question: str, options: Sequence[str], cue: str) -> str:
    lines = [f"Question: {question}"]
    lines += [f"{name}. {o}" for name, o in zip(letters(len(options)), options, strict=True)]
    return "\n".join([*lines, cue])
