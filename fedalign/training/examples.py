"""From a client's private data to what the loop trains on: prompts, completions, labelled pairs.

*Survey*: each question becomes the letter prompt and pairs of its options; the pairs and their
labels follow from the group's shares (``fedalign.data.preferences``).  *Pairs*: each pair is one
prompt with two completions, ended by EOS.  Labels are vote shares, or one vote drawn per pair for
``labels = "hard"``.

Draws are keyed by (seed, "pairs", client, question), so they do not depend on the order of the data
or on the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedalign.config import LocalConfig
from fedalign.data.records import (
    BadRow,
    ClientData,
    Item,
    Message,
    Pair,
    SurveyItem,
)
from fedalign.errors import ConfigError, DataError
from fedalign.models.base import ResidentModel
from fedalign.randomness import generator, unit_interval
from fedalign.training.batch import Prompt
from fedalign.training.encode import Encoded, encode, encode_text, render
from fedalign.training.rows import PairRows, PromptRows, lay_out


@dataclass(frozen=True)
class Label:
    """Completion ``i`` of a prompt against its completion ``j``."""

    i: int
    j: int
    q: float
    """Share that preferred ``i``, in [0, 1]."""


@dataclass(frozen=True)
class TrainingSet:
    """Encoded prompts, each with its labelled pairs; at least one pair a prompt."""

    prompts: tuple[Prompt, ...]
    labels: tuple[tuple[Label, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.labels):
            raise DataError(
                f"{len(self.prompts)} prompts with {len(self.labels)} lists of pairs; a training "
                "set needs at least one prompt, and one list each."
            )
        for prompt, labels in zip(self.prompts, self.labels, strict=True):
            if not labels:
                raise DataError("a training prompt has no pairs; leave it out.")
            k = len(prompt.completions)
            if any(not (0 <= x.i < k and 0 <= x.j < k and x.i != x.j) for x in labels):
                raise DataError(f"a pair names a completion outside 0..{k - 1}, or one twice.")

    @property
    def examples(self) -> int:
        """Number of pairs."""
        return sum(map(len, self.labels))

    @property
    def completions(self) -> int:
        """Number of completions over all prompts, the length of cached log-probabilities."""
        return sum(len(p.completions) for p in self.prompts)

    @cached_property
    def rows(self) -> tuple[PromptRows, ...]:
        """Each prompt laid out; made once, since a client trains on it in every round."""
        return lay_out(self.prompts)

    @cached_property
    def pairs(self) -> tuple[PairRows, ...]:
        """The labels of each prompt as arrays."""
        return tuple(
            PairRows(
                np.array([x.i for x in own], dtype=np.int64),
                np.array([x.j for x in own], dtype=np.int64),
                np.array([x.q for x in own], dtype=np.float32),
            )
            for own in self.labels
        )


def training_set(
    resident: ResidentModel, data: ClientData, settings: LocalConfig, seed: int
) -> TrainingSet:
    """Return what a client trains on, from its train split.

    Raises ``DataError`` for a row that does not fit the model; call :func:`drop_unusable` first to
    leave such rows out, counted.
    """
    prompts: list[Prompt] = []
    labels: list[tuple[Label, ...]] = []
    for item in data.train:
        if isinstance(item, SurveyItem):
            prompt, pairs = _survey_example(resident, item, data, settings, seed)
        else:
            prompt, pairs = pair_prompt(resident, item), (_pair_label(item, data, settings, seed),)
        if pairs:
            prompts.append(prompt)
            labels.append(pairs)
    if not prompts:
        raise DataError(
            f"client '{data.name}' has {len(data.train)} training items and none gives a pair."
        )
    return TrainingSet(tuple(prompts), tuple(labels))


def survey_prompt(resident: ResidentModel, question: str, options: Sequence[str]) -> Prompt:
    """Return a question as the letter prompt, with one completion an option, in order.

    The completion is the letter without EOS: the answer is the letter.  With
    ``model.chat-template`` the prompt is a user's turn and the letter opens the assistant's.
    """
    from fedalign.models.formats import letter_prompt, letters

    key = (question, tuple(options))
    known = resident.encoded.get(key)
    if known is not None:
        return known
    try:
        names = letters(len(options))
    except ValueError as error:
        raise DataError(f"'{question[:60]}': {error}") from None
    text = letter_prompt(question, tuple(options))
    chat = resident.config.chat_template
    if chat:
        text = render(resident.tokenizer, (Message("user", text),), open_turn=True)
    encoded = [
        encode_text(
            resident.tokenizer,
            text,
            name if chat else f" {name}",
            eos=False,
            special_tokens=not chat,
        )
        for name in names
    ]
    resident.encoded[key] = prompt = _prompt(resident, encoded, question)
    return prompt


def pair_prompt(resident: ResidentModel, pair: Pair) -> Prompt:
    """Return a pair as a prompt with two completions: chosen, rejected."""
    try:
        encoded = [
            encode(resident.tokenizer, pair.prompt, text, eos=True)
            for text in (pair.chosen, pair.rejected)
        ]
    except DataError as error:
        raise DataError(f"{pair.source or pair.id}: {error}") from None
    return _prompt(resident, encoded, pair.source or pair.id)


def drop_unusable(
    resident: ResidentModel, data: ClientData
) -> tuple[ClientData, tuple[BadRow, ...]]:
    """Leave out the items of all three splits that this model cannot take, and list them.

    Such are rows longer than ``model.max-length``, questions with more than 26 options, and texts
    whose prompt is not a token prefix.  A model or tokenizer that can take none raises
    ``DataError`` with the first reason.
    """
    bad: list[BadRow] = []
    kept: dict[str, tuple[Item, ...]] = {}
    for split in ("train", "validation", "test"):
        good: list[Item] = []
        for item in data.split(split):
            try:
                if isinstance(item, SurveyItem):
                    survey_prompt(resident, item.question, item.options)
                else:
                    pair_prompt(resident, item)
                good.append(item)
            except DataError as error:
                bad.append(BadRow(item.source or item.id, str(error)))
        kept[split] = tuple(good)
    if bad and not any(kept.values()):
        raise DataError(f"this model can take none of the {len(bad)} rows; first: {bad[0].reason}")
    usable = replace(data, train=kept["train"], validation=kept["validation"], test=kept["test"])
    return usable, tuple(bad)


def _prompt(resident: ResidentModel, encoded: Sequence[Encoded], where: str) -> Prompt:
    longest = max(e.length for e in encoded)
    if longest > resident.max_length:
        raise DataError(
            f"'{where[:60]}' has {longest} tokens; the most is {resident.max_length}, from "
            "model.max-length and the model's positions."
        )
    heads = {e.prompt for e in encoded}
    if len(heads) > 1:
        raise DataError(f"'{where[:60]}': the prompt gives different tokens with each completion.")
    return Prompt(encoded[0].prompt, tuple(e.completion for e in encoded))


def _survey_example(
    resident: ResidentModel,
    item: SurveyItem,
    data: ClientData,
    settings: LocalConfig,
    seed: int,
) -> tuple[Prompt, tuple[Label, ...]]:
    from fedalign.data.preferences import option_pairs

    if data.group not in item.shares:
        raise DataError(f"{item.source or item.id}: no shares for group '{data.group}'.")
    pairs = option_pairs(
        np.asarray(item.shares[data.group], dtype=np.float64),
        settings.pairs_per_question,
        settings.labels,
        generator(seed, "pairs", data.name, item.key),
    )
    prompt = survey_prompt(resident, item.question, item.options)
    used = sorted({x for pair in pairs for x in (pair.i, pair.j)})
    place = {option: k for k, option in enumerate(used)}
    return (
        Prompt(prompt.tokens, tuple(prompt.completions[option] for option in used)),
        tuple(Label(place[pair.i], place[pair.j], float(pair.q)) for pair in pairs),
    )


def _pair_label(pair: Pair, data: ClientData, settings: LocalConfig, seed: int) -> Label:
    if settings.labels == "shares":
        return Label(0, 1, pair.vote_share)
    if settings.labels == "hard":
        drawn = unit_interval(seed, "pairs", data.name, pair.comparison, pair.id)
        return Label(0, 1, float(drawn < pair.vote_share))
    raise ConfigError(f"local.labels = '{settings.labels}' is not one of shares, hard.")
