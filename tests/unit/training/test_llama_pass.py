"""Packed tokens and padded places: each leads to the other, and sums meet every place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.training import llama_pass
from fedalign.training.batch import Prompt
from fedalign.training.llama_pass import Heads, Pass
from fedalign.training.rows import lay_out

HEADS = Heads(2, 4, 10000.0 ** (-torch.arange(2) / 2))
WIDTH = HEADS.count * HEADS.size

rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5)
populations = st.lists(rows, min_size=1, max_size=4)


def layout(population: list[list[list[int]]]) -> tuple[Pass, list[list[tuple[int, ...]]]]:
    """Return the layout of clients' rows, filled up to equal numbers, and all their beginnings.

    A row that fills up is one token that no other row has.
    """
    most = max(map(len, population))
    width = max(len(row) for own in population for row in own)
    nodes = np.full((len(population) * most, width), -1)
    lengths = np.ones(len(nodes), dtype=np.int64)
    beginnings: list[list[tuple[int, ...]]] = []
    for c, own in enumerate(population):
        laid = lay_out([Prompt(tuple(row), ((9,),)) for row in own])
        for k in range(most):
            if k >= len(own):
                beginnings.append([(c, -1)])
                continue
            (ids,) = laid[k].nodes
            nodes[c * most + k, : len(ids)] = ids
            lengths[c * most + k] = len(ids)
            beginnings.append([(c, *own[k][: n + 1]) for n in range(len(ids))])
    return llama_pass.lay_out(nodes, lengths, len(population), HEADS, 1e-6), beginnings


def places(at: Pass, beginnings: list[list[tuple[int, ...]]]) -> list[tuple[int, ...] | None]:
    """Return what stands at every place of all buckets; None behind a row's end."""
    found: list[tuple[int, ...] | None] = []
    for bucket in at.buckets:
        assert bucket.start == len(found)
        for row in bucket.rows.tolist():
            own = beginnings[row]
            found += [*own, *[None] * (bucket.columns - len(own))]
    return found


@given(populations, st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_tokens_are_the_distinct_beginnings_client_by_client(population, least) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_pass, "BUCKET_ROWS", least)
        at, beginnings = layout(population)
    stands = places(at, beginnings)
    held = {b for own in beginnings for b in own}
    assert sum(at.sizes) == len(at.place) == len(held)
    named = [stands[p] for p in at.place.tolist()]  # of each token: what is at its own place
    assert set(named) == held
    clients = [b[0] for b in named if b is not None]
    assert clients == sorted(clients)
    assert at.sizes == [clients.count(c) for c in range(len(population))]
    assert at.column.tolist() == [len(b) - 2 for b in named if b is not None]
    tokens = torch.cat([b.tokens for b in at.buckets]).tolist()
    assert [named[t] for t, b in zip(tokens, stands, strict=True) if b is not None] == [
        b for b in stands if b is not None
    ]
    assert sorted({row for b in at.buckets for row in b.rows.tolist()}) == list(
        range(len(beginnings))
    )
    for row, own in enumerate(beginnings):
        assert [named[t] for t in at.token[row, : len(own)].tolist()] == own
    first = at.token.reshape(-1)[at.first]
    assert first.tolist() == list(range(len(named)))


@given(populations)
@settings(deadline=None, max_examples=60)
def test_sums_meet_every_real_place_once(population) -> None:
    at, beginnings = layout(population)
    stands = places(at, beginnings)
    values = torch.arange(1.0, len(stands) + 1).unsqueeze(1).repeat(1, 3)
    named = [stands[p] for p in at.place.tolist()]
    expected = [sum(k + 1.0 for k, b in enumerate(stands) if b == name) for name in named]
    assert at.summed(values)[:, 2].tolist() == expected
    assert at.own(values)[:, 0].tolist() == [p + 1.0 for p in at.place.tolist()]


@given(populations)
@settings(deadline=None, max_examples=60)
def test_split_and_join_undo_each_other_and_gradients_enter_once(population) -> None:
    at, _ = layout(population)
    packed = torch.randn(len(at.place), 3 * WIDTH)
    room = at.room(packed, 3 * WIDTH).zero_()
    for bucket in at.buckets:
        bucket.join(bucket.split(packed, 3), room)
    assert torch.equal(at.own(room), packed)
    g = torch.randn(len(at.place), WIDTH)
    entered = at.room(g, WIDTH)
    for bucket in at.buckets:
        bucket.join(bucket.split_gradient(g), entered)
    assert torch.equal(at.own(entered), g)
    assert torch.count_nonzero(entered) == torch.count_nonzero(g)


def test_prompts_laid_out_together_share_their_beginning() -> None:
    one, other = lay_out([Prompt((5, 6, 7), ((1, 2), (1, 3), (4,))), Prompt((5, 6, 8), ((1,),))])
    assert [r.tolist() for r in one.rows] == [[5, 6, 7, 1], [5, 6, 7]]
    assert [n.tolist() for n in one.nodes] == [[0, 1, 2, 3], [0, 1, 2]]
    assert [n.tolist() for n in other.nodes] == [[0, 1, 4]]
    # Tokens 1 and 1 are predicted by one position; so are 2 and 3, after the same row.
    assert (one.row.tolist(), one.column.tolist()) == ([0, 0, 1], [2, 3, 2])
    assert (one.slot.tolist(), one.token.tolist()) == ([0, 1, 0, 1, 2], [1, 2, 1, 3, 4])
