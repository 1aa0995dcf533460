"""The synthetic population: hand-worked shares, fixed world, seeded groups, stated structure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.config import Config, DataConfig
from fedalign.data import synthetic, world_many
from fedalign.data.partition import build_clients
from fedalign.data.records import SurveyItem
from fedalign.errors import DataError

QUESTIONS = synthetic.world_questions()
numbers = st.floats(-4, 4, allow_nan=False)


def one_minus_jsd(p: np.ndarray, q: np.ndarray) -> float:
    m = (p + q) / 2
    return 1 - float(np.sum(p * np.log2(p / m)) + np.sum(q * np.log2(q / m))) / 2


def survey(world: str, seed: int) -> list[SurveyItem]:
    return [i for i in synthetic.generate(world, seed).items if isinstance(i, SurveyItem)]


def scores(items: list[SurveyItem], answers: list[np.ndarray]) -> dict[str, float]:
    return {
        g: float(
            np.mean(
                [
                    one_minus_jsd(a, np.asarray(i.shares[g]))
                    for i, a in zip(items, answers, strict=True)
                ]
            )
        )
        for g in items[0].shares
    }


def test_shares_worked_by_hand() -> None:
    question = next(q for q in QUESTIONS if q.topic == "roads" and len(q.options) == 3)
    # Values of zero stand in the middle: 1.5^2 / (2 * 0.8^2) = 1.7578, exp(-1.7578) = 0.17242.
    neutral = synthetic.answer_shares(question, np.zeros(4))
    np.testing.assert_allclose(neutral, [0.12821, 0.74358, 0.12821], atol=1e-5)
    # 1.25 along the unit loading: mean 1.2 * 1.25 = 1.5, on the first option;
    # 1, exp(-1.7578) = 0.17242, exp(-7.03125) = 0.00088.
    w = np.asarray(synthetic.TOPICS["roads"][0])
    agreeing = synthetic.answer_shares(question, 1.25 * w / np.linalg.norm(w))
    np.testing.assert_allclose(agreeing, [0.85229, 0.14696, 0.00075], atol=1e-5)


@given(st.tuples(numbers, numbers, numbers, numbers), st.sampled_from(QUESTIONS))
def test_opposite_values_answer_in_mirror(
    values: tuple[float, ...], question: synthetic.WorldQuestion
) -> None:
    shares = synthetic.answer_shares(question, np.asarray(values))
    assert shares.shape == (len(question.options),)
    assert shares.min() > 0
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    mirrored = synthetic.answer_shares(question, -np.asarray(values))
    np.testing.assert_allclose(mirrored, shares[::-1], rtol=1e-9)


def test_world_has_distinct_questions_of_three_to_five_options() -> None:
    items = survey("default", 0)
    assert len(items) == 432
    assert len({i.id for i in items}) == len({i.key for i in items}) == 432
    assert Counter(len(i.options) for i in items) == {3: 144, 4: 144, 5: 144}
    assert len({i.topic for i in items}) == 16
    assert all(i.ordinals == tuple(range(len(i.options), 0, -1)) for i in items)


def test_seed_moves_groups_and_nothing_else() -> None:
    first, again, other = survey("default", 3), survey("default", 3), survey("default", 4)
    assert first == again
    assert all(a.shares != b.shares for a, b in zip(first, other, strict=True))
    assert [replace(i, shares={}) for i in first] == [replace(i, shares={}) for i in other]


def test_values_have_the_stated_spread_over_seeds() -> None:
    for world in synthetic.CENTRES:
        for group, centre in synthetic.CENTRES[world].items():
            draws = np.array([synthetic.group_values(world, s)[group] for s in range(300)])
            np.testing.assert_allclose(
                draws.mean(0), centre, atol=5 * synthetic.VALUE_SD[world] / np.sqrt(300)
            )
            np.testing.assert_allclose(draws.std(0), synthetic.VALUE_SD[world], rtol=0.2)


def test_corpus_is_the_stated_mixture_without_isles() -> None:
    for question, item in zip(QUESTIONS, survey("balanced", 9), strict=True):
        by_group = {
            g: synthetic.answer_shares(question, np.asarray(c))
            for g, c in synthetic.CENTRES["default"].items()
        }
        expected = 0.7 * by_group["coast"] + 0.2 * by_group["valley"] + 0.1 * by_group["hills"]
        np.testing.assert_allclose(synthetic.corpus_shares(item), expected, atol=1e-12)


def test_corpus_refuses_foreign_questions() -> None:
    item = survey("default", 0)[0]
    for foreign in (replace(item, id="goqa0001"), replace(item, question="Why?")):
        with pytest.raises(DataError, match="not a question of the synthetic world"):
            synthetic.corpus_shares(foreign)
    with pytest.raises(DataError, match="not a question"):
        synthetic.in_corpus("goqa0001")


def test_one_wording_of_each_statement_is_left_out_of_the_corpus() -> None:
    left_out = [q for q in QUESTIONS if not synthetic.in_corpus(q.id)]
    statements = Counter(tuple(q.id.split("-")[:2]) for q in left_out)
    assert len(statements) == 48
    assert set(statements.values()) == {1}
    wordings = Counter(tuple(q.id.split("-")[2:]) for q in left_out)
    assert len(wordings) == 9
    assert set(wordings.values()) <= {5, 6}


def test_isles_are_small_and_at_odds_with_every_other_group() -> None:
    people = synthetic.respondents("default")
    assert people == {"coast": 4200, "valley": 3000, "hills": 2000, "isles": 800}
    isles = np.asarray(synthetic.CENTRES["default"]["isles"])
    for group in ("coast", "valley", "hills"):
        assert (isles * np.asarray(synthetic.CENTRES["default"][group]) < 0).any()


@pytest.mark.parametrize("seed", range(5))
def test_default_corpus_serves_isles_worst_and_a_fairer_answer_exists(seed: int) -> None:
    items = survey("default", seed)
    base = scores(items, [np.asarray(synthetic.corpus_shares(i)) for i in items])
    mean = scores(items, [np.mean(list(i.shares.values()), axis=0) for i in items])
    assert min(base, key=base.__getitem__) == "isles"
    assert base["isles"] < np.mean(list(base.values())) - 0.05
    assert min(mean.values()) > min(base.values()) + 0.05


@pytest.mark.parametrize("seed", range(5))
def test_balanced_groups_are_equal_in_size_and_in_shortfall(seed: int) -> None:
    assert set(synthetic.respondents("balanced").values()) == {2500}
    offsets = np.array(list(synthetic.CENTRES["balanced"].values())) - synthetic.CORPUS_PROFILE
    np.testing.assert_allclose(offsets.sum(0), 0, atol=1e-12)
    items = survey("balanced", seed)
    base = scores(items, [np.asarray(synthetic.corpus_shares(i)) for i in items])
    assert max(base.values()) - min(base.values()) < 0.03


def test_many_has_fifty_groups_spread_evenly_and_of_unequal_size() -> None:
    centres = np.array(list(synthetic.CENTRES["many"].values()))
    assert centres.shape == (50, 4)
    assert list(synthetic.CENTRES["many"])[::49] == ["parish-01", "parish-50"]
    for axis in centres.T:
        np.testing.assert_allclose(np.sort(axis), world_many.SPREAD * np.linspace(-0.98, 0.98, 50))
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(50, 1)]
    assert apart.min() > 0.9
    people = list(synthetic.respondents("many").values())
    assert people == sorted(people, reverse=True)
    assert people[0] > 5 * people[-1] > 500
    assert abs(sum(people) - synthetic.PEOPLE) <= 25
    assert survey("many", 3) == survey("many", 3) != survey("many", 4)


def test_the_scenario_many_has_a_thousand_clients_that_can_train_and_be_scored() -> None:
    config = Config(
        data=DataConfig(world="many", partition="sizes", clients_per_group="20"),
    )
    clients = build_clients(synthetic.generate("many", 0), config)
    assert len(clients) == 1000
    assert len({c.group for c in clients}) == 50
    assert min(min(len(c.train), len(c.validation), len(c.test)) for c in clients) > 0


def test_corpus_profile_fits_the_corpus_best() -> None:
    def fit(values: np.ndarray) -> float:
        return float(
            np.mean(
                [
                    one_minus_jsd(synthetic.corpus_mixture(q), synthetic.answer_shares(q, values))
                    for q in QUESTIONS
                ]
            )
        )

    centre = np.asarray(synthetic.CORPUS_PROFILE)
    best = fit(centre)
    for axis in range(4):
        for step in (-0.05, 0.05):
            assert fit(centre + step * np.eye(4)[axis]) < best


def test_unknown_world_is_refused() -> None:
    with pytest.raises(DataError, match="choose default, balanced"):
        synthetic.generate("skewed", 0)
