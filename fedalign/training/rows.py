"""A prompt's rows and scored tokens, worked out once and used in every step.

Completions whose rows (``batch.py``) are the same share one; all one-letter answers of a question
have a single row.  Positions that predict several scored tokens are asked once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedalign.training.batch import Prompt
from fedalign.training.encode import Ids

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Distinct rows of a prompt, and its scored tokens in completion order."""

    rows: tuple[Ints, ...]
    nodes: tuple[Ints, ...]
    """Of each token of each row: a number that rows have in common as far as they begin alike,
    among all prompts that were laid out together."""
    row: Ints
    """(S,) of the row of each distinct position that is asked."""
    column: Ints
    """(S,) of its place in that row."""
    slot: Ints
    """(N,) into the positions: the one that predicts each scored token."""
    token: Ints
    """(N,) the scored tokens."""
    lengths: Ints
    """(completions,) tokens of each completion."""
    longest: int
    """Tokens of the longest row."""
    tokens: int
    """Tokens of all rows."""


@dataclass(frozen=True, eq=False)
class PairRows:
    """Labelled pairs of a prompt's completions."""

    i: Ints
    """(pairs,) into the completions, as ``j``."""
    j: Ints
    q: np.ndarray[Any, np.dtype[np.float32]]
    """(pairs,) share that preferred ``i``."""


_NONE: Ints = np.empty(0, dtype=np.int64)
NO_PAIRS = PairRows(_NONE, _NONE, np.empty(0, dtype=np.float32))


def lay_out(prompts: Sequence[Prompt]) -> tuple[PromptRows, ...]:
    """Return what the completions of each of one client's prompts need."""
    trie: dict[tuple[int, int], int] = {}
    return tuple(_lay_out(prompt, trie) for prompt in prompts)


def _lay_out(prompt: Prompt, trie: dict[tuple[int, int], int]) -> PromptRows:
    """``trie`` knows the number of a token after a number, and learns new ones."""
    rows: dict[Ids, int] = {}
    places: dict[tuple[int, int], int] = {}
    slot: list[int] = []
    token: list[int] = []
    start = len(prompt.tokens) - 1
    for completion in prompt.completions:
        row = rows.setdefault(prompt.tokens + completion[:-1], len(rows))
        for offset in range(len(completion)):
            slot.append(places.setdefault((row, start + offset), len(places)))
        token += completion
    nodes: list[Ints] = []
    for ids in rows:
        node, path = -1, []
        for t in ids:
            node = trie.setdefault((node, t), len(trie))
            path.append(node)
        nodes.append(_ints(path))
    return PromptRows(
        rows=tuple(map(_ints, rows)),
        nodes=tuple(nodes),
        row=_ints([row for row, _ in places]),
        column=_ints([column for _, column in places]),
        slot=_ints(slot),
        token=_ints(token),
        lengths=_ints([len(c) for c in prompt.completions]),
        longest=max(map(len, rows)),
        tokens=sum(map(len, rows)),
    )


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)
