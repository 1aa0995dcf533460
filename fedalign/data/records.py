"""The two forms of private preference data, validated when they are made.

*Survey*: a question, its options, and for each group the share of its people choosing each option.
*Preference pairs*: a prompt, a chosen and a rejected response, the group, and optionally the share
of voters who preferred the chosen one.  Texts are plain strings, or conversations (tuples of
messages with ``role`` and ``content``), one form a file.

Both carry ``source`` ("file:line"), so every later error can name where a row came from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fedalign.errors import DataError


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Text = str | tuple[Message, ...]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SurveyItem:
    """One question with the answer shares of every group that answered it."""

    id: str
    question: str
    options: tuple[str, ...]
    shares: Mapping[str, tuple[float, ...]]
    """Group name to shares over options: (K,), non-negative, summing to 1."""
    ordinals: tuple[float, ...] | None = None
    """Ordinal value of each option, for ``wasserstein``; None for nominal questions."""
    split: str = ""
    """A split fixed by the source; empty lets the run decide."""
    topic: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Other columns of the row, for partition by column."""
    source: str = ""

    def __post_init__(self) -> None:
        where = self.source or self.id
        if not self.question.strip():
            raise DataError(f"{where}: empty question.")
        if len(self.options) < 2:
            raise DataError(f"{where}: {len(self.options)} options; a question needs at least 2.")
        if len(set(self.options)) != len(self.options):
            raise DataError(f"{where}: two options have the same text.")
        if self.ordinals is not None and len(self.ordinals) != len(self.options):
            raise DataError(
                f"{where}: {len(self.ordinals)} ordinals for {len(self.options)} options."
            )
        if self.split and self.split not in SPLITS:
            raise DataError(f"{where}: split '{self.split}' is not one of {', '.join(SPLITS)}.")
        for group, shares in self.shares.items():
            _check_shares(shares, len(self.options), f"{where}: group '{group}'")

    @property
    def key(self) -> str:
        """Identity of the question for scores: a hash of its text and options.

        Its role in the split follows from the text alone (``fedalign.data.split``).
        """
        return question_key(self.question, self.options)

    def answered_by(self, group: str) -> SurveyItem:
        """Return the item with the shares of one group only (what that group's site holds)."""
        return replace(self, shares={group: self.shares[group]})


@dataclass(frozen=True)
class Pair:
    """One preference between two responses to a prompt, by one group."""

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    group: str
    vote_share: float = 1.0
    """Share of voters who preferred ``chosen``, in [0, 1]; 1 when nobody counted."""
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        where = self.source or self.id
        if not self.group:
            raise DataError(f"{where}: empty group.")
        for name, text in (("prompt", self.prompt), ("chosen", self.chosen)):
            if not plain(text).strip():
                raise DataError(f"{where}: empty {name}.")
        if not plain(self.rejected).strip():
            raise DataError(f"{where}: empty rejected.")
        if self.chosen == self.rejected:
            raise DataError(f"{where}: chosen and rejected are the same text.")
        kinds = {isinstance(t, str) for t in (self.prompt, self.chosen, self.rejected)}
        if len(kinds) > 1:
            raise DataError(f"{where}: mixes plain text and conversation; use one form.")
        if not (math.isfinite(self.vote_share) and 0.0 <= self.vote_share <= 1.0):
            raise DataError(f"{where}: vote share {self.vote_share} is outside [0, 1].")
        if self.split and self.split not in SPLITS:
            raise DataError(f"{where}: split '{self.split}' is not one of {', '.join(SPLITS)}.")

    @property
    def key(self) -> str:
        """Identity of the question: a hash of the prompt."""
        return question_key(plain(self.prompt), ())

    @property
    def comparison(self) -> str:
        """Identity of the unordered comparison: the prompt and the two responses, sorted."""
        responses = tuple(sorted((plain(self.chosen), plain(self.rejected))))
        return question_key(plain(self.prompt), responses)


Item = SurveyItem | Pair


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    source: str
    """file:line"""
    reason: str


@dataclass(frozen=True)
class Dataset:
    """What a reader returns: items of one form, and every row it could not use."""

    form: str
    """``survey`` or ``pairs``."""
    items: tuple[Item, ...]
    bad_rows: tuple[BadRow, ...] = ()
    name: str = ""
    licence: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        """All groups, sorted."""
        names: set[str] = set()
        for item in self.items:
            names.update(item.shares if isinstance(item, SurveyItem) else (item.group,))
        return tuple(sorted(names))


@dataclass(frozen=True)
class ClientData:
    """The private data of one logical client: one group, three splits by question.

    A survey item here holds the shares of the client's own group only.
    """

    name: str
    group: str
    form: str
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    size: int = 0
    """What the ``size`` rule counts: people behind the data if known, else training questions."""

    def split(self, name: str) -> tuple[Item, ...]:
        """Return the items of ``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def plain(text: Text) -> str:
    """Return a text as one string; turns of a conversation are joined with their roles."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{m.role}: {m.content}" for m in text)


@lru_cache(maxsize=1 << 15)
def question_key(question: str, options: tuple[str, ...]) -> str:
    """Return 16 hex digits that identify a question; case and white space do not matter."""
    parts = [" ".join(t.split()).casefold() for t in (question, *options)]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def _check_shares(shares: tuple[float, ...], k: int, where: str) -> None:
    if len(shares) != k:
        raise DataError(f"{where}: {len(shares)} shares for {k} options.")
    if not all(math.isfinite(s) and s >= 0 for s in shares):
        raise DataError(f"{where}: shares must be finite and not negative, got {list(shares)}.")
    if abs(sum(shares) - 1.0) > 1e-6:
        raise DataError(
            f"{where}: shares sum to {sum(shares):.6g}; readers renormalise once, at reading."
        )
