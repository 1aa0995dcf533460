"""How well the loaded adapter serves a client on one split: option probabilities, texts, or pairs.

Survey questions of task ``letter`` are scored by the model's distribution over the options, read
exactly; tasks ``shares`` and ``order`` by texts that it writes; pairs by the sign of a margin.
"""

from __future__ import annotations

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
from fedalign.training.reference import ReferenceKind, reference_logps
from fedalign.training.score import pair_prompts, score_pairs, score_survey


class Scorer:
    """Scores whatever adapter is loaded, for the clients of one process."""

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
        self._survey = next(iter(clients.values())).form == "survey"
        self._pair_references: dict[tuple[str, str], Array | None] = {}

    def scores(self, tasks: Sequence[tuple[str, str]]) -> dict[tuple[str, str], wire.Score | None]:
        """Score the loaded adapter; None where a client has no question of a split."""
        if self.config.rewards.task != "letter":
            return self._text_scores(tasks)
        if self._survey:
            return self._survey_scores(tasks)
        return {(c, split): self._pair_score(c, split) for c, split in tasks}

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
        self, tasks: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], wire.Score | None]:
        """Each distinct question goes through the model once, whoever asks it."""
        items = {t: [i for i in self._items(*t) if isinstance(i, SurveyItem)] for t in tasks}
        # By text, not by key: keys fold case and white space, which a model does not.
        distinct = list(
            dict.fromkeys((i.question, i.options) for own in items.values() for i in own)
        )
        answers = dict(zip(distinct, score_survey(self.model, distinct), strict=True))
        found: dict[tuple[str, str], wire.Score | None] = {}
        for task, own in items.items():
            group = self.clients[task[0]].group
            own = [i for i in own if is_defined(self.metric, i.ordinals)]
            if not own:
                found[task] = None
                continue
            truth = [i.shares[group] for i in own]
            ordinals = [i.ordinals for i in own]
            found_answers = [answers[(i.question, i.options)] for i in own]
            predicted = [a.probabilities for a in found_answers]
            even = [np.full(len(i.options), 1.0 / len(i.options)) for i in own]
            values = _defined(score_questions(self.metric, predicted, truth, ordinals))
            found[task] = wire.Score(
                score=float(np.mean(values)),
                n=len(values),
                option_mass=float(np.mean([a.option_mass for a in found_answers])),
                uniform=float(
                    np.mean(_defined(score_questions(self.metric, even, truth, ordinals)))
                ),
                items=self._reported(task[1], [i.key for i in own], values),
            )
        return found

    def _pair_score(self, client: str, split: str) -> wire.Score | None:
        pairs = [p for p in self._items(client, split) if isinstance(p, Pair)]
        if not pairs:
            return None
        key = (client, split)
        if key not in self._pair_references:
            loaded = self.model.read()
            prompts = pair_prompts(self.model, pairs)
            self._pair_references[key] = reference_logps(self.model, prompts, self._kind)
            self.model.load(loaded)
        margins = score_pairs(self.model, pairs, self.config.local, self._pair_references[key])
        values = [float(v) for v in pair_accuracy(margins, [p.vote_share for p in pairs])]
        return wire.Score(
            score=float(np.mean(values)),
            n=len(values),
            option_mass=1.0,
            uniform=0.5,
            items=self._reported(split, [p.comparison for p in pairs], values),
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
