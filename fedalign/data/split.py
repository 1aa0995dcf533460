"""Train, validation and test by question, as a pure hash.

The role of a question follows from (seed, key) alone, so every site can compute it without asking,
and one question has one role in the whole federation.  With u = hash(seed, key) in [0, 1):
test if u < test; validation if u < test + validation; else train.  The shares are therefore met on
average, not exactly.  A split given by the source wins.

The key is made from text, not from an id: the same question under two ids has one role.  The key
of a survey item is its question, whatever its options: the same words with another answer scale are
the same question.  That of a pair is its prompt.  Where many comparisons share
one prompt (statements of one conversation), a reader marks its pairs with
``columns["split_by"] = "responses"``; then both responses are keys, and no response is seen in two
roles.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedalign.data.records import Item, Pair, SurveyItem, plain, question_key
from fedalign.errors import DataError
from fedalign.randomness import unit_interval

SPLIT_BY = "split_by"


def role(seed: int, key: str, validation: float, test: float) -> str:
    """Return ``train``, ``validation`` or ``test`` for a question key.

    ``validation`` and ``test`` are shares in (0, 1) with a sum below 1.
    """
    u = unit_interval(seed, "split", key)
    if u < test:
        return "test"
    return "validation" if u < test + validation else "train"


def split_keys(item: Item) -> tuple[str, ...]:
    """Return the keys that must not appear in two roles: one, or two for pairs by response."""
    if isinstance(item, Pair) and item.columns.get(SPLIT_BY) == "responses":
        return (response_key(plain(item.chosen)), response_key(plain(item.rejected)))
    if isinstance(item, SurveyItem):
        return (question_key(item.question, ()),)
    return (item.key,)


def response_key(text: str) -> str:
    """Return the key of a response that is split on its own."""
    return question_key(text, ())


def assign_roles(
    items: Iterable[Item], seed: int, validation: float, test: float
) -> list[tuple[Item, str]]:
    """Return every item with its role, in the given order.

    A split declared for a key holds for all items with that key.  Raises ``DataError`` when a key
    or an id would have two roles.
    """
    items = list(items)
    declared: dict[str, Item] = {}
    for item in items:
        for key in split_keys(item) if item.split else ():
            first = declared.setdefault(key, item)
            if first.split != item.split:
                raise _two_roles(first, first.split, item, item.split)
    out: list[tuple[Item, str]] = []
    by_id: dict[str, tuple[Item, str]] = {}
    for item in items:
        roles = {
            declared[key].split if key in declared else role(seed, key, validation, test)
            for key in split_keys(item)
        }
        if len(roles) > 1:
            raise DataError(
                f"{item.source or item.id}: its two responses have different roles "
                f"({', '.join(sorted(roles))}); such pairs cannot be used."
            )
        chosen = roles.pop()
        first, before = by_id.setdefault(item.id, (item, chosen))
        if before != chosen:
            raise _two_roles(first, before, item, chosen)
        out.append((item, chosen))
    return out


def _two_roles(a: Item, role_a: str, b: Item, role_b: str) -> DataError:
    return DataError(
        f"{b.source or b.id}: in {role_b} here, but {a.source or a.id} puts the same question or "
        f"id in {role_a}. A question has one role: correct the column 'split' or the id."
    )
