"""The site's predictor: what it reads, what it keeps apart, and what it answers when it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clients.predictor import PredictorSite
from fedalign import wire
from fedalign.config import Config, PredictorConfig, RunConfig
from fedalign.data.records import ClientData, SurveyItem
from fedalign.errors import FedalignError
from fedalign.rewards.predictor_parameters import initial_predictor

SETTINGS = PredictorConfig(
    rounds=3, steps=2, width=16, layers=1, heads=2, context=4, targets=4, learning_rate=0.01
)
CONFIG = Config(run=RunConfig(seed=5), predictor=SETTINGS)
THINGS = ("bridge", "river", "town", "tax", "boat", "road", "tree", "mill", "dock", "farm", "inn")


class Guarded(ClientData):
    """A client whose test questions nobody may read."""

    @property
    def test(self):  # type: ignore[override]
        raise AssertionError("test questions were read")

    def split(self, name: str):
        assert name in ("train", "validation")
        return getattr(self, name)


def client(name: str, group: str, lean: float) -> ClientData:
    items = [
        SurveyItem(
            f"{thing}",
            f"Is the {thing} old?",
            ("yes", "no"),
            {group: (lean, 1 - lean)},
        )
        for thing in THINGS
    ]
    data = object.__new__(Guarded)
    for key, value in {
        "name": name,
        "group": group,
        "form": "survey",
        "train": tuple(items[:8]),
        "validation": tuple(items[8:]),
        "size": 8,
    }.items():
        object.__setattr__(data, key, value)
    return data


@pytest.fixture
def site(resident, tiny) -> PredictorSite:
    resident.load(tiny.start(resident))
    population = {"a": client("a", "east", 0.9), "b": client("b", "west", 0.2)}
    return PredictorSite(resident, population, CONFIG)


def parameters(site: PredictorSite) -> np.ndarray:
    flat = initial_predictor(SETTINGS, site._embedder.dim, 0)
    assert flat.shape == (site.size,)
    return flat


NEW = wire.Question("Is the lake old?", ("yes", "no"))


def test_every_client_trains_from_what_it_received(site: PredictorSite) -> None:
    flat = parameters(site)
    replies, updates = site.train(("a", "b"), flat, 1)
    assert [r.status for r in replies] == [wire.OK, wire.OK]
    assert [r.questions for r in replies] == [3, 3]
    assert [r.tokens for r in replies] == [2 * 4 * 2] * 2
    assert not np.array_equal(updates[0], updates[1])
    alone, update = site.train(("b",), flat, 1)
    assert alone[0] == replies[1]
    assert np.array_equal(update[0], updates[1])


def test_the_error_is_that_of_the_received_parameters(site: PredictorSite) -> None:
    flat = parameters(site)
    first, updates = site.train(("a",), flat, 1)
    final, same = site.train(("a",), flat, SETTINGS.rounds + 1)
    assert first[0].error == final[0].error
    assert np.array_equal(same[0], flat)
    assert (final[0].tokens, final[0].loss_last) == (0, 0.0)
    later, _ = site.train(("a",), updates[0], 2)
    assert later[0].error != first[0].error


def test_the_last_message_freezes(site: PredictorSite) -> None:
    with pytest.raises(FedalignError, match="no frozen predictor"):
        site.predict("a", NEW)
    site.train(("a",), parameters(site), SETTINGS.rounds + 1)
    shares = site.predict("a", NEW)
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1.0)
    assert site.predict("a", NEW) is shares
    with pytest.raises(FedalignError, match="'b' has no frozen predictor"):
        site.predict("b", NEW)


def test_clients_of_one_process_have_contexts_of_their_own(site: PredictorSite) -> None:
    site.freeze(parameters(site), ("a", "b"))
    a, b = site.predict("a", NEW), site.predict("b", NEW)
    assert not np.allclose(a, b)
    only_b = PredictorSite(site._embedder.resident, {"b": site.clients["b"]}, CONFIG)
    only_b.freeze(parameters(site), ("b",))
    np.testing.assert_allclose(only_b.predict("b", NEW), b, atol=1e-6)


def test_other_parameters_clear_what_was_predicted(site: PredictorSite) -> None:
    flat = parameters(site)
    site.freeze(flat, ("a",))
    before = site.predict("a", NEW)
    site.freeze(flat.copy(), ("a",))
    assert site.predict("a", NEW) is before
    site.freeze(site.train(("a",), flat, 1)[1][0], ("a",))
    assert site.predict("a", NEW) != before


def test_a_question_is_not_predicted_from_its_own_answer(site: PredictorSite) -> None:
    """Changing the answer to the question asked must not change the prediction."""
    flat = parameters(site)
    asked = site.clients["a"].train[2]
    assert isinstance(asked, SurveyItem)
    question = wire.Question(asked.question, asked.options)
    wanted = []
    for shares in ((0.9, 0.1), (0.0, 1.0)):
        other = client("a", "east", 0.9)
        items = list(other.train)
        items[2] = replace(asked, shares={"east": shares})
        object.__setattr__(other, "train", tuple(items))
        small = replace(CONFIG, predictor=replace(SETTINGS, context=8))
        fresh = PredictorSite(site._embedder.resident, {"a": other}, small)
        fresh.freeze(flat, ("a",))
        wanted.append(fresh.predict("a", question))
    assert wanted[0] == wanted[1]


def test_clients_that_cannot_say_so_alone(site: PredictorSite) -> None:
    poor = client("c", "north", 0.5)
    object.__setattr__(poor, "train", poor.train[:1])
    many = PredictorSite(site._embedder.resident, {**site.clients, "c": poor}, CONFIG)
    replies, updates = many.train(("a", "c", "nobody"), parameters(site), 1)
    assert [r.status for r in replies] == [wire.OK, wire.NO_DATA, wire.UNKNOWN_CLIENT]
    assert not updates[1:].any()
