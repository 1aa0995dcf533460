"""A prompt's rows and scored tokens, worked out once and used in every step.

Completions whose rows (``batch.py``) are the same share one; all one-letter answers of a question
have a single row.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedalign.training.batch import Prompt
from fedalign.training.encode import Ids


@dataclass(frozen=True)
class PromptRows:
    """Distinct rows of a prompt, and its scored tokens in completion order."""

    rows: tuple[Ids, ...]
    where: tuple[tuple[int, int], ...]
    """(row, column) that predicts each scored token."""
    token: tuple[int, ...]
    """The scored tokens."""
    lengths: tuple[int, ...]
    """Tokens of each completion."""
    longest: int
    """Tokens of the longest row."""
    tokens: int
    """Tokens of all rows."""


def lay_out(prompt: Prompt) -> PromptRows:
    """Return what a prompt's completions need."""
    rows: dict[Ids, int] = {}
    where: list[tuple[int, int]] = []
    token: list[int] = []
    start = len(prompt.tokens) - 1
    for completion in prompt.completions:
        row = rows.setdefault(prompt.tokens + completion[:-1], len(rows))
        where += [(row, start + offset) for offset in range(len(completion))]
        token += completion
    return PromptRows(
        tuple(rows),
        tuple(where),
        tuple(token),
        tuple(map(len, prompt.completions)),
        max(map(len, rows)),
        sum(map(len, rows)),
    )
