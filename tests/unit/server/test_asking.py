"""Asking: how many clients a message is for, and rejections in one transaction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import RecordDict

from fedalign import wire
from fedalign.compat import become_flower_process
from fedalign.config import Config
from fedalign.ledger import Ledger
from server import asking
from server.asking import UPLOAD_BYTES, Asking, QuorumMissed
from server.directory import Directory, Member

CLIENTS = tuple(f"c#{i:03d}" for i in range(200))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def ask(ledger: Ledger, width: int, at_most: int = 64, frozen_a: bool = False) -> Asking:
    """Return what asks 200 clients of one node, with an adapter of 8 * (width + 16) entries."""
    become_flower_process()
    layout = (("m.lora_A.weight", (8, width)), ("m.lora_B.weight", (16, 8)))
    manifest = wire.Manifest(layout, 8, 16.0, ("m",), "base", "tok", frozen_a)
    members = {c: Member(c, "c", 1, 4, 2, 2, 4) for c in CLIENTS}
    config = Config()
    config = replace(config, run=replace(config.run, clients_per_message=at_most))
    return Asking(config, Directory(members, "survey", manifest, {}), ledger)


def largest(made: Asking, kind: str) -> int:
    """Return the clients of the largest message; every client must be in one message."""
    made.messages(kind, "train", 1, CLIENTS, lambda request: RecordDict())
    assert sorted(c for _, names in made._sent for c in names) == list(CLIENTS)
    return max(len(names) for _, names in made._sent)


def test_small_updates_fill_a_message(ledger: Ledger) -> None:
    assert largest(ask(ledger, 64), wire.TRAIN) == 64


def test_updates_of_a_message_stay_below_the_bound(ledger: Ledger) -> None:
    made = ask(ledger, 1_000_000)
    count = largest(made, wire.TRAIN)
    update = 4 * made.directory.manifest.upload_size
    assert count == 7
    assert count * update <= UPLOAD_BYTES < (count + 1) * update


def test_only_what_clients_send_counts(ledger: Ledger) -> None:
    assert largest(ask(ledger, 1_000_000, frozen_a=True), wire.TRAIN) == 64


def test_an_update_above_the_bound_travels_alone(ledger: Ledger) -> None:
    assert largest(ask(ledger, 10_000_000), wire.TRAIN) == 1


def test_scores_are_small_whatever_the_model(ledger: Ledger) -> None:
    assert largest(ask(ledger, 1_000_000, at_most=100), wire.SCORE) == 100


def test_rejections_are_one_transaction(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ask(ledger, 64)
    calls: list[int] = []
    write = ledger.put_events
    monkeypatch.setattr(ledger, "put_events", lambda rows: (calls.append(len(rows)), write(rows)))
    with pytest.raises(QuorumMissed):
        made.check_quorum("train", 1, {}, dict.fromkeys(CLIENTS, asking.NO_REPLY))
    assert calls == [200]
    events = ledger.events("reply-rejected")
    assert [(e.client, e.detail, e.phase, e.round) for e in events] == [
        (c, "no-reply", "train", 1) for c in CLIENTS
    ]
