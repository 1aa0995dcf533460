"""Clients of a node are scored in one pass; which messages they come in changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import clients.scores
from clients.trainer import ResidentTrainer
from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import Config, from_flat
from fedalign.models.layout import pack


@pytest.fixture(scope="module")
def trainer() -> ResidentTrainer:
    return ResidentTrainer(
        from_flat(
            {
                "model.rank": 2,
                "model.device": "cpu",
                "data.source": "synthetic",
                "data.questions": 24,
                "data.partition": "sizes",
                "data.clients-per-group": "2",
                "run.clients-per-message": 3,
            },
            Config(),
        )
    )


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Return how many questions each call of the model scored."""
    seen: list[int] = []
    real = clients.scores.score_survey_loaded

    def counted(model, items, local):
        seen.append(len(items))
        return real(model, items, local)

    monkeypatch.setattr(clients.scores, "score_survey_loaded", counted)
    return seen


def adapter_of(trainer: ResidentTrainer, shift: float = 0.0) -> wire.F32:
    flat = pack(initial_adapter(dict(trainer.manifest.layout), 0), trainer.manifest.layout)
    return flat + np.float32(shift)


def values(replies: list[wire.ScoreReply]) -> list[dict[str, wire.Score]]:
    return [r.scores for r in replies]


def test_each_question_of_a_node_is_asked_once_whatever_the_messages(trainer, passes) -> None:
    names, splits = sorted(trainer.clients), ("validation", "test")
    whole = trainer.score(names, adapter_of(trainer), splits, names)
    parts = [
        reply
        for k in range(0, len(names), 3)
        for reply in trainer.score(names[k : k + 3], adapter_of(trainer), splits, names)
    ]
    assert len(passes) == 1
    assert values(parts) == values(whole)
    distinct = {
        (i.question, i.options) for n in names for s in splits for i in trainer.clients[n].split(s)
    }
    assert passes == [len(distinct)]


def test_another_adapter_or_split_is_scored_anew_with_the_same_bits(trainer, passes) -> None:
    names = sorted(trainer.clients)
    first = trainer.score(names[:3], adapter_of(trainer), ("test",), names)
    other = trainer.score(names[:3], adapter_of(trainer, 0.01), ("test",), names)
    trainer.score(names[3:], adapter_of(trainer), ("validation",), names)
    again = trainer.score(names[:3], adapter_of(trainer), ("test",), names)
    assert len(passes) == 4
    assert values(first) == values(again)
    assert values(first) != values(other)


def test_alone_is_the_same_up_to_rounding_and_one_a_message_asks_its_own(
    trainer, passes, monkeypatch
) -> None:
    names = sorted(trainer.clients)
    together = trainer.score(names[:1], adapter_of(trainer, 0.02), ("test",), names)
    alone = trainer.score(names[:1], adapter_of(trainer, 0.02), ("test",))
    assert passes[1] < passes[0]
    (a,), (b,) = values(together), values(alone)
    assert a["test"].score == pytest.approx(b["test"].score, abs=1e-6)
    run = replace(trainer.config.run, clients_per_message=1)
    monkeypatch.setattr(trainer, "config", replace(trainer.config, run=run))
    assert values(trainer.score(names[:1], adapter_of(trainer, 0.02), ("test",), names)) == [b]
