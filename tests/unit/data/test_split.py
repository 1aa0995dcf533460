"""One question, one role, computed by anyone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.data.records import Item, Pair, SurveyItem
from fedalign.data.split import SPLIT_BY, assign_roles, role, split_keys
from fedalign.errors import DataError


def survey(name: str, split: str = "", text: str = "") -> SurveyItem:
    return SurveyItem(
        id=name, question=text or name, options=("a", "b"), shares={"g": (0.5, 0.5)}, split=split
    )


def pair(name: str, chosen: str, rejected: str, split: str = "", by: str = "") -> Pair:
    columns = {SPLIT_BY: by} if by else {}
    return Pair(
        id=name,
        prompt="p",
        chosen=chosen,
        rejected=rejected,
        group="g",
        split=split,
        columns=columns,
        source=f"f:{name}",
    )


def test_known_values() -> None:
    """Frozen on purpose: a change here changes every split ever made."""
    roles = [role(0, f"q{i}", 0.2, 0.2) for i in range(12)]
    assert [i for i, r in enumerate(roles) if r == "validation"] == [1, 5, 6]
    assert [i for i, r in enumerate(roles) if r == "test"] == [2]


@given(st.integers(0, 2**31 - 1), st.text(max_size=30))
def test_larger_shares_only_move_questions_out_of_train(seed: int, key: str) -> None:
    small, large = role(seed, key, 0.1, 0.1), role(seed, key, 0.1, 0.3)
    if small == "test":
        assert large == "test"
    if large == "train":
        assert small == "train"


def test_shares_hold_on_average_and_seeds_differ() -> None:
    n = 20_000
    roles = [role(3, f"q{i}", 0.2, 0.1) for i in range(n)]
    assert roles.count("validation") / n == pytest.approx(0.2, abs=0.012)
    assert roles.count("test") / n == pytest.approx(0.1, abs=0.009)
    assert roles != [role(4, f"q{i}", 0.2, 0.1) for i in range(n)]


def test_same_text_under_two_ids_has_one_role() -> None:
    items = [survey(f"id{k}{i}", text=f"Question {i}") for i in range(50) for k in "ab"]
    roles = [r for _, r in assign_roles(items, 0, 0.3, 0.3)]
    assert roles[::2] == roles[1::2]
    assert set(roles) == {"train", "validation", "test"}


def test_the_split_of_the_source_wins_for_every_row_of_the_question() -> None:
    items = [survey(f"q{i}", split="test") for i in range(20)]
    items += [survey(f"other{i}", text=f"q{i}") for i in range(20)]
    assert {r for _, r in assign_roles(items, 0, 0.2, 0.2)} == {"test"}


def test_two_declared_roles_are_an_error() -> None:
    with pytest.raises(DataError, match="one role"):
        assign_roles([survey("a", "train", "Tea?"), survey("b", "test", "tea? ")], 0, 0.2, 0.2)


def test_one_id_in_two_roles_is_an_error() -> None:
    items: list[Item] = [survey("a", "train", "Tea?"), survey("a", "test", "Milk?")]
    with pytest.raises(DataError, match="question or id"):
        assign_roles(items, 0, 0.2, 0.2)


def test_pairs_by_response_share_a_prompt_but_not_a_role() -> None:
    a = pair("1", "x", "y", "train", "responses")
    b = pair("2", "v", "w", "test", "responses")
    assert [r for _, r in assign_roles([a, b], 0, 0.2, 0.2)] == ["train", "test"]
    assert len(split_keys(a)) == 2
    with pytest.raises(DataError, match="one role"):
        assign_roles([a, pair("3", "x", "w", "test", "responses")], 0, 0.2, 0.2)
    with pytest.raises(DataError, match="one role"):
        assign_roles([pair("1", "x", "y", "train"), pair("2", "v", "w", "test")], 0, 0.2, 0.2)


def test_pair_whose_responses_hash_to_different_roles_is_an_error() -> None:
    pairs = [pair(str(i), f"x{i}", f"y{i}", by="responses") for i in range(30)]
    with pytest.raises(DataError, match="its two responses have different roles"):
        assign_roles(pairs, 0, 0.3, 0.3)


def test_the_same_words_with_other_options_have_one_role() -> None:
    for n in range(50):
        items = [
            SurveyItem(f"{n}-{k}", f"Question {n}?", options, {"g": (1.0, *([0.0] * (k + 1)))})
            for k, options in enumerate((("yes", "no"), ("yes", "maybe", "no")))
        ]
        assert len({r for _, r in assign_roles(items, 0, 0.3, 0.3)}) == 1
        assert items[0].key != items[1].key
