"""A client's answer to an exchange: one reward and one code for each sampled text.

A text is answered ``FROM_SHARES`` only where its question is one of the client's own *training*
questions, with the same options in the same order, character for character: letters and tenths
count options, so permuted options are another question.  Validation and test questions are never
answered, from shares or by the predictor, whatever their options: else a server could read by
asking what the run's scores are measured on.  The predictor may answer any other question, also
one that the group never answered.

=============  =======================================================================
code           when
=============  =======================================================================
``MALFORMED``  the text is no answer, whatever the question; it costs no budget
``UNANSWERED`` no source may or can answer: held out, unknown, permuted, no such score
``REFUSED``    the question's query budget is spent (``policy.py``)
=============  =======================================================================

What goes wrong for one client becomes its status; the others are answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clients.policy import Asked, decide, policy_file, release
from fedalign import wire
from fedalign.config import Config, resolve_reward
from fedalign.data.records import ClientData, Item, SurveyItem, question_key
from fedalign.errors import FedalignError
from fedalign.metrics.alignment import UndefinedScore
from fedalign.models.formats import ALPHABET
from fedalign.rewards.text import Answer, parse, reward_of_answer

log = logging.getLogger("fedalign.client")

Predict = Callable[[wire.Question], Sequence[float]]
"""A question to the predicted shares of one client's group, (K,)."""

# A population holds the same question once for each client; hashing it once is enough.
_key = lru_cache(maxsize=1 << 16)(question_key)


@dataclass(frozen=True)
class _Text:
    """One distinct sampled text."""

    question: int
    answer: Answer
    canonical: str


@dataclass(frozen=True)
class _Source:
    """What one client answers one question from."""

    key: str
    shares: Sequence[float]
    ordinals: Sequence[float] | None
    code: int


def answer(
    config: Config,
    clients: Mapping[str, ClientData],
    names: Sequence[str],
    rollouts: wire.Rollouts,
    predictors: Mapping[str, Predict] | None = None,
) -> list[wire.RewardReply]:
    """Return the rewards of every client named, in that order.

    Args:
        config: sections ``rewards``, ``site`` and ``run.out`` are read.
        clients: the whole population that this process knows, by name.
        names: clients asked for; one that is not in ``clients`` gets status ``UNKNOWN_CLIENT``.
        rollouts: N sampled texts to Q questions.
        predictors: frozen predictor of each client; needed unless ``site.answers`` is ``shares``.
            A client without one then gets status ``NO_DATA``.
    """
    parsed = _parse(config.rewards.task, rollouts)
    places = {name: i for i, name in enumerate(sorted(clients))}
    replies = []
    for name in names:
        predict = (predictors or {}).get(name)
        if name not in clients:
            replies.append(_nothing(name, wire.UNKNOWN_CLIENT, len(rollouts.texts)))
        elif config.site.answers != "shares" and predict is None:
            log.error("client %s: site.answers needs a predictor, and there is none", name)
            replies.append(_nothing(name, wire.NO_DATA, len(rollouts.texts)))
        else:
            try:
                replies.append(
                    _answer_one(config, clients[name], places[name], rollouts, parsed, predict)
                )
            except FedalignError as error:
                log.error("client %s: %s", name, error)
                replies.append(_nothing(name, wire.INTERNAL_ERROR, len(rollouts.texts)))
    return replies


def _parse(task: str, rollouts: wire.Rollouts) -> list[_Text | None]:
    """Return what each rollout says (N,), None where malformed; each distinct text is read once."""
    read: dict[tuple[int, str], _Text | None] = {}
    for key in dict.fromkeys(zip(rollouts.question_of, rollouts.texts, strict=True)):
        number, text = key
        k = len(rollouts.questions[number].options)
        # Options are named A to Z; nothing written about more of them can be an answer.
        found = parse(task, text, k) if k <= len(ALPHABET) else None
        read[key] = None if found is None else _Text(number, found, str(found))
    return [read[key] for key in zip(rollouts.question_of, rollouts.texts, strict=True)]


def _answer_one(
    config: Config,
    client: ClientData,
    place: int,
    rollouts: wire.Rollouts,
    parsed: Sequence[_Text | None],
    predict: Predict | None,
) -> wire.RewardReply:
    asked = {text.question for text in parsed if text is not None}
    sources = _sources(config.site.answers, client, rollouts.questions, asked, predict)
    worth: dict[tuple[int, str], Asked | None] = {}
    for text in parsed:
        if text is not None and (text.question, text.canonical) not in worth:
            source = sources.get(text.question)
            worth[(text.question, text.canonical)] = (
                None if source is None else _worth(config, text, source)
            )
    found = [None if t is None else worth[(t.question, t.canonical)] for t in parsed]
    queue = [one for one in found if one is not None]
    if config.site.query_budget:
        path = policy_file(config.run.out, place, client.name)
        leaving = iter(decide(config.site, path, client.name, queue))
    else:
        leaving = iter(release(config.site, {}, queue)[1])
    rewards = np.zeros(len(parsed), dtype=np.float32)
    codes = np.full(len(parsed), wire.UNANSWERED, dtype=np.int8)
    for i, (text, one) in enumerate(zip(parsed, found, strict=True)):
        if text is None:
            codes[i] = wire.MALFORMED
        elif one is not None:
            released = next(leaving)
            codes[i] = wire.REFUSED if released is None else released.code
            rewards[i] = 0.0 if released is None else released.reward
    return wire.RewardReply(client.name, wire.OK, rewards, codes)


def _sources(
    answers: str,
    client: ClientData,
    questions: Sequence[wire.Question],
    asked: set[int],
    predict: Predict | None,
) -> dict[int, _Source]:
    """Return what each asked question is answered from; questions without a source are absent."""
    own = _surveys(client.train)
    by_key = {_key(i.question, i.options): i for i in own}
    # Without options, as the split itself sees a question: another scale does not open it.
    held_out = {_key(i.question, ()) for i in _surveys((*client.validation, *client.test))}
    sources = {}
    for number in sorted(asked):
        question = questions[number]
        if _key(question.question, ()) in held_out:
            continue
        key = _key(question.question, question.options)
        item = by_key.get(key)
        if item is not None and item.options != question.options:
            item = None
        ordinals = None if item is None else item.ordinals
        if item is not None and answers != "predictor":
            sources[number] = _Source(key, item.shares[client.group], ordinals, wire.FROM_SHARES)
        elif predict is not None and answers != "shares":
            sources[number] = _Source(key, tuple(predict(question)), ordinals, wire.PREDICTED)
    return sources


def _worth(config: Config, text: _Text, source: _Source) -> Asked | None:
    """Return what a text is worth before the policy; None where the score has no value."""
    try:
        reward = reward_of_answer(
            config.rewards,
            resolve_reward(config),
            text.answer,
            source.shares,
            source.ordinals,
        )
    except UndefinedScore:
        return None
    return Asked(source.key, text.canonical, reward, source.code)


def _surveys(items: Sequence[Item]) -> list[SurveyItem]:
    return [item for item in items if isinstance(item, SurveyItem)]


def _nothing(name: str, status: int, n: int) -> wire.RewardReply:
    return wire.RewardReply(
        name, status, np.zeros(n, dtype=np.float32), np.full(n, wire.UNANSWERED, dtype=np.int8)
    )
