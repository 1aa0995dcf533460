"""Who hosts what: sampling, messages, sizes that a single claim cannot blow up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedalign import wire
from fedalign.errors import RunFailed
from server.directory import Directory, Member, build
from server.enrolled import OnlineSite

LAYOUT = (("m.lora_A.weight", (2, 3)), ("m.lora_B.weight", (4, 2)))
MANIFEST = wire.Manifest(LAYOUT, 2, 4.0, ("m",), "base", "tok", False)


def hello(*clients: str, size: int = 10, **changes: Any) -> wire.Hello:
    n = len(clients)
    made = wire.Hello(
        clients,
        tuple(c.split("#")[0] for c in clients),
        "survey",
        (4,) * n,
        (2,) * n,
        (2,) * n,
        (size,) * n,
        MANIFEST,
        {},
    )
    return replace(made, **changes)


def directory(sizes: dict[str, int]) -> Directory:
    members = {c: Member(c, c.split("#")[0], 1, 4, 2, 2, n) for c, n in sorted(sizes.items())}
    return Directory(members, "survey", MANIFEST, {})


def test_an_enormous_claim_counts_four_times_the_median_at_most() -> None:
    sizes = directory({"a#0": 10, "a#1": 10, "a#2": 10**9, "b#0": 20}).group_sizes()
    assert sizes == {"a": 10 + 10 + 40, "b": 20}


def test_jobs_name_every_client_once() -> None:
    d = build([(7, hello("a#0", "a#1", "b#0")), (3, hello("a#2", "c#0"))])
    jobs = d.jobs(list(d.members), 2)
    assert sorted(c for _, names in jobs for c in names) == sorted(d.members)
    assert all(len(names) <= 2 for _, names in jobs)
    assert all(d.members[c].node == node for node, names in jobs for c in names)


def test_a_client_on_two_nodes_is_refused() -> None:
    with pytest.raises(RunFailed, match="hosted by two nodes"):
        build([(1, hello("a#0")), (2, hello("a#0"))])


def test_nodes_with_other_models_are_refused_by_name() -> None:
    other = replace(MANIFEST, tokenizer_hash="else")
    with pytest.raises(RunFailed, match="tokenizer_hash"):
        build([(1, hello("a#0")), (2, hello("b#0", manifest=other))])


def test_nodes_with_other_forms_are_refused() -> None:
    with pytest.raises(RunFailed, match="one form"):
        build([(1, hello("a#0")), (2, hello("b#0", form="pairs"))])


def test_no_client_is_refused() -> None:
    with pytest.raises(RunFailed, match="no node hosts a client"):
        build([(1, hello())])


def test_sites_move_leave_and_come_back_under_their_name() -> None:
    d = directory({"a": 10, "b": 10, "c": 10})
    moved = d.located({"a": OnlineSite("a", "a", 9, b"new"), "c": OnlineSite("c", "c", 1, b"k")})
    assert [m.node for m in moved.members.values()] == [9, None, 1]
    assert moved.members["a"].key == b"new"
    assert moved.jobs(["a", "b", "c"], 5) == [(9, ("a",)), (1, ("c",))]
    # Who is away changes neither the sample nor the groups.
    assert moved.sample(0, 3, 2) == d.sample(0, 3, 2)
    assert moved.groups == d.groups
    assert moved.located({"b": OnlineSite("b", "b", 4, b"k")}).members["b"].node == 4
    assert list(moved.without(["b"]).members) == ["a", "c"]
