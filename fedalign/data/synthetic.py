"""A synthetic population: groups with latent values who answer survey questions.

The *world* is fixed: four value axes, 16 topics with a loading vector each, three statements a
topic, three question stems with three answer scales each (3 to 5 options), and the centre of each
group's profile.  The *seed* draws only where a group stands: u_g = centre_g + sd * N(0, I).

For a topic with unit loading vector w and an option at position x on the scale (1.5 for full
agreement down to -1.5, evenly spaced), a group with values u answers with shares

    p(x)  proportional to  exp( -(x - 1.2 u.w)^2 / (2 * 0.8^2) ),

the discretised normal response of item response theory, in the population-level form used to
simulate opinion surveys.  Shares are exact: nobody is sampled, so scores carry no survey noise.
All options run from agreement to disagreement, and the three statements of a topic share its
loading: the questions differ in wording and scale more than real ones do in substance.

Worlds:

``default``
    Four groups of very different size.  ``isles``, the smallest, is at odds with each of the
    others on some axis and is absent from the corpus that the pocket model is trained on.
``balanced``
    Four groups of equal size, placed symmetrically and close around the profile that fits that
    corpus best.  The base serves all four about equally badly, so a weight rule that follows
    shortfalls has nothing to gain here.
``many``: fifty groups, for runs of many clients (``world_many.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fedalign.data import world_many
from fedalign.data.records import Dataset, SurveyItem
from fedalign.errors import DataError
from fedalign.randomness import generator

Values = npt.NDArray[np.float64]

AXES = ("solidarity", "tradition", "openness", "growth")
SLOPE = 1.2
WIDTH = 0.8
REACH = 1.5
"""Options lie evenly on [-REACH, REACH]."""

# topic: (loading over AXES, statements); agreeing with a statement means standing high on the
# loading.  Loadings are normalised to unit length where they are used.
TOPICS: dict[str, tuple[tuple[float, float, float, float], tuple[str, str, str]]] = {
    "ferries": (
        (1.0, 0.0, 0.5, 0.0),
        (
            "the ferry should be free for everyone",
            "taxes should pay for a night ferry",
            "every village needs a landing, whatever it costs",
        ),
    ),
    "taxes": (
        (1.0, 0.0, 0.0, -0.3),
        (
            "large fortunes should be taxed more",
            "those who earn more should pay a larger part",
            "the island fund should help poor households first",
        ),
    ),
    "health": (
        (1.0, 0.3, 0.0, 0.0),
        (
            "visits to the doctor should cost nothing",
            "neighbours have a duty to care for the sick",
            "the clinic matters more than lower taxes",
        ),
    ),
    "housing": (
        (0.5, 0.0, 0.3, 0.8),
        (
            "the town should build many more flats",
            "fields near the town may become homes",
            "taller houses are welcome at the harbour",
        ),
    ),
    "schools": (
        (0.2, -0.9, 0.4, 0.0),
        (
            "pupils should learn programming before old crafts",
            "schools should drop the morning hymn",
            "teachers should be free to change the lessons",
        ),
    ),
    "festivals": (
        (0.2, 1.0, -0.3, 0.0),
        (
            "the harvest feast must stay as it was",
            "shops should close on holy days",
            "children should wear the old dress at feasts",
        ),
    ),
    "family": (
        (0.4, 1.0, 0.0, 0.0),
        (
            "grandparents should live with their children",
            "young people should ask their parents before moving away",
            "a family farm should never be sold",
        ),
    ),
    "dialect": (
        (0.0, 0.8, -0.6, 0.0),
        (
            "signs should be written in the local tongue",
            "the radio should broadcast in dialect",
            "officials must speak the old language",
        ),
    ),
    "newcomers": (
        (0.4, -0.3, 1.0, 0.0),
        (
            "newcomers make this a better place to live",
            "anyone who finds work here may stay",
            "foreign workers deserve the same rights",
        ),
    ),
    "trade": (
        (-0.3, 0.0, 0.9, 0.5),
        (
            "goods from abroad should come in without duties",
            "foreign firms should be allowed to buy land",
            "a trade treaty with the mainland is worth its price",
        ),
    ),
    "tourism": (
        (0.0, -0.2, 0.7, 0.7),
        (
            "large cruise ships should be allowed to dock",
            "more hotels should be opened on the beach",
            "visitors bring more good than harm",
        ),
    ),
    "forests": (
        (0.3, 0.2, 0.0, -1.0),
        (
            "the old forest must not be cut",
            "half of the land should be left to nature",
            "the quarry should be closed to save the stream",
        ),
    ),
    "fishing": (
        (-0.3, 0.3, -0.5, 0.8),
        (
            "the limits on fishing should be lifted",
            "local boats should catch as much as they can",
            "the sea reserve should be opened to nets",
        ),
    ),
    "energy": (
        (0.0, -0.5, 0.2, -0.8),
        (
            "wind turbines should replace the coal plant",
            "people should use less power in winter",
            "petrol engines should be banned from the bay",
        ),
    ),
    "roads": (
        (0.0, 0.0, 0.2, 1.0),
        (
            "a wide road should cross the mountains",
            "the airport needs a second runway",
            "new factories matter more than a quiet valley",
        ),
    ),
    "order": (
        (-0.5, 0.8, -0.3, 0.0),
        (
            "courts should punish theft more severely",
            "the elders should have the last word",
            "people should solve their troubles without the state",
        ),
    ),
}

# stem name: (text, answer scales from agreement to disagreement)
STEMS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "agree": (
        "Do you agree that {}?",
        (
            (
                "Strongly agree",
                "Agree",
                "Neither agree nor disagree",
                "Disagree",
                "Strongly disagree",
            ),
            ("Fully agree", "Mostly agree", "Mostly disagree", "Fully disagree"),
            ("Agree", "Undecided", "Disagree"),
        ),
    ),
    "feel": (
        "How do you feel about the view that {}?",
        (
            ("Very positive", "Fairly positive", "Neutral", "Fairly negative", "Very negative"),
            ("Strongly in favour", "Rather in favour", "Rather opposed", "Strongly opposed"),
            ("In favour", "In between", "Opposed"),
        ),
    ),
    "close": (
        "Some people say that {}. How close is this to what you think?",
        (
            ("Exactly what I think", "Close", "Halfway", "Far", "The opposite of what I think"),
            ("Very close", "Rather close", "Rather far", "Very far"),
            ("Close", "Halfway", "Far"),
        ),
    ),
}

CORPUS_PROFILE = (0.81, -0.72, 0.65, 0.49)
"""Values whose answers fit the base corpus best (least mean JSD over all questions)."""

OFFSET = 0.3
"""How far, per axis, the groups of the balanced world stand from CORPUS_PROFILE."""

CENTRES: dict[str, dict[str, tuple[float, ...]]] = {
    "default": {
        "coast": (0.9, -1.1, 0.9, 0.3),
        "valley": (0.8, -0.1, 0.4, 1.2),
        "hills": (0.5, 1.0, -0.6, 0.8),
        "isles": (-1.2, 0.8, 0.5, -1.0),
    },
    # The corners of a regular tetrahedron: offsets of equal length that sum to zero.
    "balanced": {
        name: tuple(c + OFFSET * s for c, s in zip(CORPUS_PROFILE, signs, strict=True))
        for name, signs in {
            "north": (1, 1, 1, 0),
            "east": (1, -1, -1, 0),
            "south": (-1, 1, -1, 0),
            "west": (-1, -1, 1, 0),
        }.items()
    },
    "many": world_many.CENTRES,
}
"""Centre of each group's values over AXES."""

VALUE_SD: dict[str, float] = {"default": 0.25, "balanced": 0.05, "many": 0.25}
"""Standard deviation, per axis, of a group's values around its centre over seeds."""

CORPUS_WEIGHTS: dict[str, float] = {"coast": 0.7, "valley": 0.2, "hills": 0.1, "isles": 0.0}
"""Part of the base corpus written by each group of the default world, at its centre."""

POPULATION_SHARES: dict[str, dict[str, float]] = {
    "default": {"coast": 0.42, "valley": 0.30, "hills": 0.20, "isles": 0.08},
    "balanced": {"north": 0.25, "east": 0.25, "south": 0.25, "west": 0.25},
    "many": world_many.POPULATION_SHARES,
}

PEOPLE = 10_000
"""People of a world, over all groups."""


@dataclass(frozen=True)
class WorldQuestion:
    """One question of the world, the same in every world and for every seed."""

    id: str
    """``topic-statement-stem-K``, for instance ``ferries-1-agree-5``."""
    topic: str
    question: str
    options: tuple[str, ...]

    @property
    def positions(self) -> Values:
        """Where the options lie, from agreement to disagreement: (K,), in [-REACH, REACH]."""
        return np.linspace(REACH, -REACH, len(self.options))


@cache
def world_questions() -> tuple[WorldQuestion, ...]:
    """Return all 432 questions, in the order of the tables above."""
    return tuple(
        WorldQuestion(
            id=f"{topic}-{number}-{stem}-{len(options)}",
            topic=topic,
            question=text.format(statement),
            options=options,
        )
        for topic, (_, statements) in TOPICS.items()
        for number, statement in enumerate(statements, start=1)
        for stem, (text, scales) in STEMS.items()
        for options in scales
    )


def generate(world: str, seed: int) -> Dataset:
    """Return the survey of a world: every group answers every question.

    ``world`` is one of the above; ``seed`` (>= 0) draws the groups' values.  Items carry ordinals
    K..1 (agreement to disagreement) and the topic.  Raises ``DataError`` for an unknown world.
    """
    values = group_values(world, seed)
    items = tuple(
        SurveyItem(
            id=q.id,
            question=q.question,
            options=q.options,
            shares={group: _as_tuple(answer_shares(q, u)) for group, u in values.items()},
            ordinals=tuple(float(k) for k in range(len(q.options), 0, -1)),
            topic=q.topic,
            source=f"synthetic:{world}:{q.id}",
        )
        for q in world_questions()
    )
    return Dataset(form="survey", items=items, name=f"synthetic {world}", licence="Apache-2.0")


def group_values(world: str, seed: int) -> dict[str, Values]:
    """Return each group's values over AXES, (4,): its centre plus a draw keyed by seed and name."""
    _check_world(world)
    return {
        group: np.asarray(centre)
        + VALUE_SD[world] * generator(seed, "synthetic-values", world, group).standard_normal(4)
        for group, centre in CENTRES[world].items()
    }


def respondents(world: str) -> dict[str, int]:
    """Return the people of each group: what a synthetic client claims as its size."""
    _check_world(world)
    return {group: round(PEOPLE * s) for group, s in POPULATION_SHARES[world].items()}


def answer_shares(question: WorldQuestion, values: Values) -> Values:
    """Return the answer shares of people with ``values`` (4,): (K,), positive, summing to 1."""
    mean = SLOPE * float(values @ _loading(question.topic))
    p = np.exp(-((question.positions - mean) ** 2) / (2 * WIDTH**2))
    return np.asarray(p / p.sum())


def corpus_shares(item: SurveyItem) -> tuple[float, ...]:
    """Return the shares (K,) with which the base corpus answers a question of the world.

    The mixture of CORPUS_WEIGHTS over the fixed centres of the default world: no seed enters, so
    the pocket model knows the questions but not where the groups of a run stand.  Raises
    ``DataError`` for an item that is not a question of this world.
    """
    place = _order().get(item.id)
    question = None if place is None else world_questions()[place]
    if question is None or (question.question, question.options) != (item.question, item.options):
        raise DataError(
            f"{item.source or item.id}: '{item.id}' is not a question of the synthetic world; "
            "only questions from fedalign.data.synthetic have corpus shares."
        )
    return _as_tuple(corpus_mixture(question))


def in_corpus(question_id: str) -> bool:
    """Whether a question of the world is in the base corpus: eight wordings in nine, fixed.

    Statement, stem and scale of a question left out all occur in the corpus; only this combination
    does not.  Raises ``DataError`` for an unknown id.
    """
    order = _order()
    if question_id not in order:
        raise DataError(f"'{question_id}' is not a question of the synthetic world.")
    wordings = sum(len(scales) for _, scales in STEMS.values())
    statement, wording = divmod(order[question_id], wordings)
    return wording != statement % wordings


def corpus_mixture(question: WorldQuestion) -> Values:
    """Return the corpus answer to a question of the world: (K,), summing to 1."""
    centres = CENTRES["default"]
    return np.sum(
        [
            weight * answer_shares(question, np.asarray(centres[group]))
            for group, weight in CORPUS_WEIGHTS.items()
        ],
        axis=0,
    )


@cache
def _order() -> Mapping[str, int]:
    return {q.id: n for n, q in enumerate(world_questions())}


def _loading(topic: str) -> Values:
    w = np.asarray(TOPICS[topic][0])
    return np.asarray(w / np.linalg.norm(w))


def _as_tuple(shares: Values) -> tuple[float, ...]:
    return tuple(float(s) for s in shares)


def _check_world(world: str) -> None:
    if world not in CENTRES:
        raise DataError(
            f"unknown synthetic world '{world}'; choose {', '.join(CENTRES)} with data.world."
        )
