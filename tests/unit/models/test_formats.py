"""Answer formats: exact texts, round trips, and strict parsers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.models import formats

weights = st.lists(st.integers(0, 1000), min_size=1, max_size=26).filter(lambda w: sum(w) > 0)
any_text = st.text(alphabet="ABCZ 0123456789-.,\n", max_size=30)


def test_prompts_read_as_documented() -> None:
    options = ("Yes", "No")
    body = "Question: Is it so?\nA. Yes\nB. No\n"
    assert formats.letter_prompt("Is it so?", options) == body + "Answer:"
    assert formats.shares_prompt("Is it so?", options) == body + "Shares in tenths:"
    assert formats.order_prompt("Is it so?", options) == body + "Order:"


def test_completions_read_as_documented() -> None:
    assert formats.letter_completion(1) == " B"
    assert formats.shares_completion([3, 4, 2, 1]) == " 3 4 2 1"
    assert formats.order_completion([1, 0, 3, 2]) == " B A D C"


@pytest.mark.parametrize("k", [0, 27, -1])
def test_letters_outside_a_to_z_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="1 to 26"):
        formats.letters(k)


def test_tenths_worked_by_hand() -> None:
    # 3.33 three times: whole parts 3 3 3, one tenth left, equal remainders, the first gets it.
    assert formats.to_tenths([1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    # 0.4 5.6 4.0: whole parts 0 5 4, one left, largest remainder .6.
    assert formats.to_tenths([0.04, 0.56, 0.40]) == [0, 6, 4]
    # 0.7 and 0.3 are not exact in binary; no tenth may be lost to that.
    assert formats.to_tenths([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert formats.to_tenths([0.1 + 0.2, 0.7]) == [3, 7]


@pytest.mark.parametrize("shares", [[], [0.5, 0.4], [1.5, -0.5], [float("nan"), 1.0]])
def test_tenths_of_what_is_no_distribution_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        formats.to_tenths(shares)


@given(weights)
def test_shares_round_trip_within_a_tenth(w: list[int]) -> None:
    shares = [x / sum(w) for x in w]
    tenths = formats.to_tenths(shares)
    assert sum(tenths) == 10
    assert all(abs(t - 10 * s) < 1 for t, s in zip(tenths, shares, strict=True))
    assert formats.parse_shares(formats.shares_completion(tenths), len(w)) == tenths


@given(st.integers(1, 26).flatmap(lambda k: st.permutations(range(k))))
def test_order_round_trip(order: list[int]) -> None:
    assert formats.parse_order(formats.order_completion(order), len(order)) == order


@given(st.integers(1, 26), st.data())
def test_letter_round_trip(k: int, data: st.DataObject) -> None:
    option = data.draw(st.integers(0, k - 1))
    assert formats.parse_letter(formats.letter_completion(option), k) == option


@given(any_text, st.integers(1, 6))
def test_parsers_return_a_valid_value_or_none(text: str, k: int) -> None:
    letter = formats.parse_letter(text, k)
    assert letter is None or 0 <= letter < k
    tenths = formats.parse_shares(text, k)
    assert tenths is None or (len(tenths) == k and sum(tenths) == 10 and min(tenths) >= 0)
    order = formats.parse_order(text, k)
    assert order is None or sorted(order) == list(range(k))


@pytest.mark.parametrize("text", ["", " E", "b", "A B", "A.", "Answer: A", "1"])
def test_malformed_letters(text: str) -> None:
    assert formats.parse_letter(text, 4) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "5 5", "3 4 2 2", "3 4 2 1 0", "3, 4, 2, 1", "3 4 2 -1", "3.0 4 2 1"),
        *("11 0 0 -1", "03 4 2 1", "٣ 4 2 1"),
    ],
)
def test_malformed_shares(text: str) -> None:
    assert formats.parse_shares(text, 4) is None


@pytest.mark.parametrize("text", ["", "A B C", "A B C C", "A B C E", "A B C D A", "ABCD", "A > B"])
def test_malformed_orders(text: str) -> None:
    assert formats.parse_order(text, 4) is None


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (formats.shares_completion, [3, 4]),
        (formats.shares_completion, [11, -1]),
        (formats.order_completion, [0, 0]),
        (formats.order_completion, [1, 2]),
    ],
)
def test_completions_refuse_what_no_parser_accepts(call, argument) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must be|not a permutation"):
        call(argument)
