"""How well the loaded adapter serves a client on one split: option probabilities, texts, or pairs.

Survey questions of task ``letter`` are scored by the model's distribution over the options, read
exactly; tasks ``shares`` and ``order`` by texts that it writes; pairs by the sign of a margin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from clients.sampled_scores import sampled_scores
from fedalign import wire
from fedalign.config import Config
from fedalign.data.records import ClientData, Item, Pair, SurveyItem
from fedalign.errors import WireError
from fedalign.metrics.alignment import is_defined, pair_accuracy, score_questions
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array
from fedalign.training.cohort_score import (
    score_pairs_each,
    score_survey_each,
    score_survey_loaded,
)
from fedalign.training.reference import ReferenceKind, reference_logps
from fedalign.training.score import (
    Floats,
    SurveyAnswer,
    pair_prompts,
    score_pairs,
)

Answers = Mapping[tuple[str, tuple[str, ...]], SurveyAnswer]
"""(question, options) to how an adapter answers it."""


class Scorer:
    """Scores the adapter that is loaded, or adapters of the clients' own, in one process."""

    def __init__(
        self,
        model: ResidentModel,
        config: Config,
        clients: Mapping[str, ClientData],
        metric: str,
        kind: ReferenceKind,
    ) -> None:
        self.model = model
        self.config = config
        self.clients = clients
        self.metric = metric
        self._kind = kind
        self._is_survey = next(iter(clients.values())).form == "survey"
        self._pair_references: dict[tuple[str, str], Array | None] = {}
        self._answers: Answers = {}
        self._answered: tuple[bytes, tuple[tuple[str, str], ...]] = (b"", ())

    def scores(
        self, tasks: Sequence[tuple[str, str]], among: Sequence[str] = ()
    ) -> dict[tuple[str, str], wire.Score | None]:
        """Score the loaded adapter; None where a client has no question of a split.

        ``among`` names clients whose letter questions of the same splits are answered in the same
        passes and kept: all of a node, whose other messages then find them answered.
        """
        if self.config.rewards.task != "letter":
            return self._text_scores(tasks)
        if self._is_survey:
            return self._survey_scores(tasks, among)
        return {task: self._pair_scores(task) for task in tasks}

    def together(self, count: int) -> bool:
        """Return whether ``count`` adapters are scored as one batch: letters and pairs are."""
        letter = self.config.rewards.task == "letter"
        return letter and count > 1 and self.config.local.cohort_size != 1

    def own_scores(
        self, tasks: Sequence[tuple[str, str]], adapters: Sequence[Array]
    ) -> list[wire.Score | None]:
        """Score an adapter of its own for each (client, split); the result of each, in order.

        As :meth:`scores` with one adapter after another loaded, up to rounding.
        """
        local = self.config.local
        if not self.together(len(tasks)):
            found = []
            for task, adapter in zip(tasks, adapters, strict=True):
                self.model.load(adapter)
                found.append(self.scores([task])[task])
            return found
        if self._is_survey:
            items = [[i for i in self._items(*t) if isinstance(i, SurveyItem)] for t in tasks]
            asked = [[(i.question, i.options) for i in own] for own in items]
            answers = score_survey_each(self.model, adapters, asked, local)
            return self._letter_scores(
                [
                    (task, own, dict(zip(questions, given, strict=True)))
                    for task, own, questions, given in zip(
                        tasks, items, asked, answers, strict=True
                    )
                ]
            )
        pairs = [[p for p in self._items(*t) if isinstance(p, Pair)] for t in tasks]
        references = [
            self._pair_reference(t, own) if own else None
            for t, own in zip(tasks, pairs, strict=True)
        ]
        margins = score_pairs_each(self.model, adapters, pairs, local, references)
        return [
            self._pair_score(task, own, found)
            for task, own, found in zip(tasks, pairs, margins, strict=True)
        ]

    def _text_scores(
        self, tasks: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], wire.Score | None]:
        """Score texts that the loaded adapter writes."""
        asked = {}
        for task in tasks:
            own = [
                i
                for i in self._items(*task)
                if isinstance(i, SurveyItem) and is_defined(self.metric, i.ordinals)
            ]
            asked[task] = (self.clients[task[0]].group, own)
        found: dict[tuple[str, str], wire.Score | None] = {}
        for task, made in sampled_scores(self.model, self.config, self.metric, asked).items():
            if made is None:
                found[task] = None
                continue
            score, values = made
            items = self._reported(task[1], [i.key for i in asked[task][1]], values)
            found[task] = replace(score, items=items)
        return found

    def _survey_scores(
        self, tasks: Sequence[tuple[str, str]], among: Sequence[str]
    ) -> dict[tuple[str, str], wire.Score | None]:
        """Each distinct question goes through the model once, whoever asks it."""
        splits = dict.fromkeys(split for _, split in tasks)
        everybody = dict.fromkeys([*((c, split) for c in among for split in splits), *tasks])
        # Which clients share the passes never depends on the messages before, so neither do bits.
        asked = (hashlib.sha256(self.model.read().tobytes()).digest(), tuple(everybody))
        if asked != self._answered:
            # By text, not by key: keys fold case and white space, which a model does not.
            distinct = list(
                dict.fromkeys((i.question, i.options) for t in everybody for i in self._survey(t))
            )
            found = score_survey_loaded(self.model, distinct, self.config.local)
            self._answers = dict(zip(distinct, found, strict=True))
            self._answered = asked
        scores = self._letter_scores([(t, self._survey(t), self._answers) for t in tasks])
        return dict(zip(tasks, scores, strict=True))

    def _survey(self, task: tuple[str, str]) -> list[SurveyItem]:
        return [i for i in self._items(*task) if isinstance(i, SurveyItem)]

    def _letter_scores(
        self,
        asked: Sequence[tuple[tuple[str, str], Sequence[SurveyItem], Answers]],
    ) -> list[wire.Score | None]:
        """Return the score of each (task, its items, answers to them), all computed together."""
        own = [[i for i in items if is_defined(self.metric, i.ordinals)] for _, items, _ in asked]
        given = [
            [answers[(i.question, i.options)] for i in items]
            for items, (_, _, answers) in zip(own, asked, strict=True)
        ]
        truth = [
            i.shares[self.clients[task[0]].group]
            for items, (task, _, _) in zip(own, asked, strict=True)
            for i in items
        ]
        ordinals = [i.ordinals for items in own for i in items]
        predicted = [a.probabilities for answers in given for a in answers]
        even = [np.full(len(y), 1.0 / len(y)) for y in truth]
        values = _defined(score_questions(self.metric, predicted, truth, ordinals))
        uniform = _defined(score_questions(self.metric, even, truth, ordinals))
        out: list[wire.Score | None] = []
        stop = 0
        for items, answers, (task, _, _) in zip(own, given, asked, strict=True):
            start, stop = stop, stop + len(items)
            if not items:
                out.append(None)
                continue
            out.append(
                wire.Score(
                    score=float(np.mean(values[start:stop])),
                    n=len(items),
                    option_mass=float(np.mean([a.option_mass for a in answers])),
                    uniform=float(np.mean(uniform[start:stop])),
                    items=self._reported(task[1], [i.key for i in items], values[start:stop]),
                )
            )
        return out

    def _pair_scores(self, task: tuple[str, str]) -> wire.Score | None:
        pairs = [p for p in self._items(*task) if isinstance(p, Pair)]
        if not pairs:
            return None
        reference = self._pair_reference(task, pairs)
        margins = score_pairs(self.model, pairs, self.config.local, reference)
        return self._pair_score(task, pairs, margins)

    def _pair_reference(self, task: tuple[str, str], pairs: Sequence[Pair]) -> Array | None:
        if task not in self._pair_references:
            loaded = self.model.read()
            prompts = pair_prompts(self.model, pairs)
            self._pair_references[task] = reference_logps(self.model, prompts, self._kind)
            self.model.load(loaded)
        return self._pair_references[task]

    def _pair_score(
        self, task: tuple[str, str], pairs: Sequence[Pair], margins: Floats
    ) -> wire.Score | None:
        if not pairs:
            return None
        values = [float(v) for v in pair_accuracy(margins, [p.vote_share for p in pairs])]
        return wire.Score(
            score=float(np.mean(values)),
            n=len(values),
            option_mass=1.0,
            uniform=0.5,
            items=self._reported(task[1], [p.comparison for p in pairs], values),
        )

    def _reported(
        self, split: str, keys: Sequence[str], values: Sequence[float]
    ) -> tuple[tuple[str, float], ...]:
        """Per-question scores leave on test only, and only when the run asks for them."""
        if split != "test" or not self.config.score.items:
            return ()
        by_key: dict[str, list[float]] = {}
        for k, v in zip(keys, values, strict=True):
            by_key.setdefault(k, []).append(v)
        return tuple((k, float(np.mean(v))) for k, v in by_key.items())

    def _items(self, client: str, split: str) -> tuple[Item, ...]:
        return self.clients[client].split(split)


def _defined(values: Sequence[float | None]) -> list[float]:
    out = [v for v in values if v is not None]
    if len(out) != len(values):
        raise WireError("score_undefined")
    return out
