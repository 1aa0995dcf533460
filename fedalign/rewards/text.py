"""What one sampled text is worth to one group: a number in [0, 1], or "no answer".

With y the group's shares over the K options of a question, L = -ln(floor):

==========  ===========  ======================================================================
task        reward       value
==========  ===========  ======================================================================
``letter``  ``log``      1 + ln(max(y_a, floor)) / L for the option a that is named
``letter``  ``share``    y_a
``shares``  a distance   ``metrics.alignment``: score of the printed tenths / 10 against y
``order``   a ranking    ``metrics.ranking``: score of the printed order against y
==========  ===========  ======================================================================

``log`` is a scaled log-likelihood: a policy that maximises its mean minus kl times the divergence
from the base ends at pi_ref(a) y_a^(1 / (kl L)), so at kl = 1 / L it multiplies the base by the
group's shares.  It is 1 at y_a = 1 and 0 for every share up to the floor.

Texts are read by the strict parsers of ``fedalign.models.formats``.  A text that they refuse has no
reward here (None): what malformed text is worth is the server's setting ``rewards.malformed``, and
it is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedalign.config import RewardsConfig
from fedalign.config_rules import ORDER_METRICS, SURVEY_METRICS, TASK_SCORES, TASKS
from fedalign.errors import ConfigError, DataError
from fedalign.metrics import alignment, ranking
from fedalign.models.formats import TENTHS, parse_letter, parse_order, parse_shares

Answer = int | list[int]
"""``letter``: an option; ``shares``: K tenths; ``order``: a permutation of the K options."""


def parse(task: str, text: str, k: int) -> Answer | None:
    """Return the answer that a text gives to a question with ``k`` options, or None.

    Raises ``ConfigError`` for an unknown task and ``ValueError`` for k outside 1..26.
    """
    if task == "letter":
        return parse_letter(text, k)
    if task == "shares":
        return parse_shares(text, k)
    if task == "order":
        return parse_order(text, k)
    raise ConfigError(f"rewards.task = '{task}' is not one of {', '.join(TASKS)}.")


def reward(
    settings: RewardsConfig,
    kind: str,
    text: str,
    shares: Sequence[float],
    ordinals: Sequence[float] | None,
) -> float | None:
    """Return the reward of a text in [0, 1]; None for a malformed text.

    Args:
        settings: ``task`` and ``floor`` are read.
        kind: the score, as ``config.resolve_reward`` gives it; for evaluation the run's metric.
        text: what the policy wrote after the prompt, without its end token.
        shares: (K,) the group's shares.
        ordinals: (K,) ordinal values of the options, or None.

    Raises:
        UndefinedScore: ``wasserstein`` on a question without ordinals that differ.
        DataError: the shares are no distribution.
        ConfigError: the task is unknown, or ``kind`` is no score of the task.
    """
    answer = parse(settings.task, text, len(shares))
    if answer is None:
        return None
    return reward_of_answer(settings, kind, answer, shares, ordinals)


def reward_of_answer(
    settings: RewardsConfig,
    kind: str,
    answer: Answer,
    shares: Sequence[float],
    ordinals: Sequence[float] | None,
) -> float:
    """Return the reward of a parsed answer in [0, 1].  Arguments and errors as :func:`reward`."""
    task = settings.task
    if isinstance(answer, int):
        if task == "letter" and kind in TASK_SCORES["letter"]:
            return _letter_reward(kind, answer, shares, settings.floor)
    elif task == "shares" and kind in SURVEY_METRICS:
        return alignment.score(kind, np.asarray(answer) / TENTHS, shares, ordinals)
    elif task == "order" and kind in ORDER_METRICS:
        return ranking.score(kind, answer, shares)
    allowed = ", ".join(TASK_SCORES.get(task, ())) or f"one of the tasks {', '.join(TASKS)}"
    raise ConfigError(
        f"'{kind}' does not score the answer {answer} to task '{task}'; use {allowed}."
    )


def _letter_reward(kind: str, option: int, shares: Sequence[float], floor: float) -> float:
    y = alignment.distribution(shares, "shares")
    if not 0 <= option < len(y):
        raise DataError(f"option {option} of a question with {len(y)}; options are 0..{len(y) - 1}")
    share = float(y[option])
    if kind == "share":
        return share
    return 1.0 - math.log(max(share, floor)) / math.log(floor)
