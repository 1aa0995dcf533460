"""Scores of what the policy *writes*, for tasks ``shares`` and ``order``: evaluation by sampling.

``score.samples`` texts are sampled for each distinct question, whoever asks it; each is scored
against each asking group's own answers by the run's metric.  A text that is no answer scores 0, and
the share of well-formed texts stands where a letter task has its option mass.

Draws are keyed by the seed and the question alone: all adapters of a run, and all arms of a
comparison, are scored with the same random numbers, and a question's texts do not depend on which
questions are scored with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from fedalign import wire
from fedalign.config import Config
from fedalign.data.records import SurveyItem
from fedalign.metrics import alignment, ranking
from fedalign.models.base import ResidentModel
from fedalign.rewards.text import reward
from fedalign.training.tasks import sample_texts

Task = TypeVar("Task", bound=Hashable)


def sampled_scores(
    resident: ResidentModel,
    config: Config,
    metric: str,
    tasks: Mapping[Task, tuple[str, Sequence[SurveyItem]]],
) -> dict[Task, tuple[wire.Score, list[float]] | None]:
    """Score the loaded adapter; ``tasks`` maps what is asked to (group, its questions).

    Returns for each the mean score with option mass (= format rate) and the score of a uniform
    answerer, and each question's score; None where there is no question.
    """
    distinct = list(
        dict.fromkeys((i.question, i.options) for _, own in tasks.values() for i in own)
    )
    texts = dict(
        zip(
            distinct,
            sample_texts(
                resident, config.rewards.task, distinct, config.score.samples, config.run.seed
            ),
            strict=True,
        )
    )
    found: dict[Task, tuple[wire.Score, list[float]] | None] = {}
    for task, (group, own) in tasks.items():
        if not own:
            found[task] = None
            continue
        values: list[float] = []
        formed: list[float] = []
        for item in own:
            given = [
                reward(config.rewards, metric, text, item.shares[group], item.ordinals)
                for text in texts[(item.question, item.options)]
            ]
            values.append(float(np.mean([0.0 if r is None else r for r in given])))
            formed.append(float(np.mean([r is not None for r in given])))
        score = wire.Score(
            score=float(np.mean(values)),
            n=len(values),
            option_mass=float(np.mean(formed)),
            uniform=float(np.mean([_uniform(config, metric, i, group) for i in own])),
        )
        found[task] = (score, values)
    return found


def _uniform(config: Config, metric: str, item: SurveyItem, group: str) -> float:
    """Return what an answerer without preference scores: any order, or equal shares."""
    shares = item.shares[group]
    if config.rewards.task == "order":
        return ranking.chance(metric, shares)
    even = np.full(len(shares), 1.0 / len(shares))
    return alignment.score(metric, even, shares, item.ordinals)
