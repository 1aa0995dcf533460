"""Clients' own adapters scored as one batch: the scores that one after another gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clients.scores import Scorer
from clients.trainer import ResidentTrainer
from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import (
    Config,
    DataConfig,
    LocalConfig,
    ModelConfig,
    PersonalConfig,
    RunConfig,
    ScoreConfig,
)
from fedalign.data.records import ClientData, Pair
from fedalign.models.base import ResidentModel
from fedalign.models.layout import pack


def assert_same(together: list[wire.Score | None], apart: list[wire.Score | None]) -> None:
    for a, b in zip(together, apart, strict=True):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert a.n == b.n
        for name in ("score", "option_mass", "uniform"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-5), name
        assert [k for k, _ in a.items] == [k for k, _ in b.items]
        np.testing.assert_allclose([v for _, v in a.items], [v for _, v in b.items], atol=1e-5)


def after_another(
    scorer: Scorer, tasks: list[tuple[str, str]], adapters: list[np.ndarray]
) -> list[wire.Score | None]:
    found = []
    for task, adapter in zip(tasks, adapters, strict=True):
        scorer.model.load(adapter)
        found.append(scorer.scores([task])[task])
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        run=RunConfig(out=str(tmp_path_factory.mktemp("run"))),
        data=DataConfig(questions=40, partition="group", clients_per_group="1"),
        model=ModelConfig(device="cpu"),
        local=LocalConfig(steps=2),
        personal=PersonalConfig(steps=2),
        score=ScoreConfig(items=True),
    )


@pytest.fixture(scope="module")
def trainer(config: Config) -> ResidentTrainer:
    return ResidentTrainer(config)


def test_letters(trainer: ResidentTrainer, tiny) -> None:
    scorer = trainer.scorer
    tasks = [(name, split) for name in trainer.clients for split in ("test", "validation")]
    adapters = [tiny.start(trainer.model, seed=k, b=0.05) for k in range(len(tasks))]
    assert scorer.together(len(tasks))
    apart = after_another(scorer, tasks, adapters)
    assert len({s.score for s in apart if s is not None}) == len(tasks)
    assert_same(scorer.own_scores(tasks, adapters), apart)


def test_pairs(tmp_path: Path, tiny, config: Config) -> None:
    model = ResidentModel(replace(config.model, name=str(tiny.save("llama", tmp_path)), rank=4))
    clients = {}
    for k, name in enumerate(("a", "b", "c")):
        pairs = tuple(
            Pair(f"{name}{n}", f"matter {n}?", " yes it is", " no", "g", 0.6 + n / 50)
            for n in range(4 + k)
        )
        clients[name] = ClientData(name, "g", "pairs", pairs, pairs, pairs if k else ())
    with_base = replace(config, local=replace(config.local, reference="base"))
    for settings, kind in ((config, "none"), (with_base, "base")):
        scorer = Scorer(model, settings, clients, "accuracy", kind)
        tasks = [(name, "test") for name in clients]
        adapters = [tiny.start(model, seed=k, b=0.05) for k in range(3)]
        apart = after_another(scorer, tasks, adapters)
        assert apart[0] is None  # has no test pair
        fresh = Scorer(model, settings, clients, "accuracy", kind)
        assert_same(fresh.own_scores(tasks, adapters), apart)


def test_one_adapter_or_no_cohorts_is_the_plain_path(trainer: ResidentTrainer, tiny) -> None:
    scorer = trainer.scorer
    plain = Scorer(
        trainer.model,
        replace(trainer.config, local=replace(trainer.config.local, cohort_size=1)),
        trainer.clients,
        trainer.metric,
        "none",
    )
    assert not plain.together(5)
    assert not scorer.together(1)
    tasks = [(name, "test") for name in trainer.clients]
    adapters = [tiny.start(trainer.model, seed=k, b=0.05) for k in range(len(tasks))]
    assert plain.own_scores(tasks, adapters) == after_another(scorer, tasks, adapters)


def test_the_personal_phase_scores_every_stage_of_every_client(
    trainer: ResidentTrainer, config: Config
) -> None:
    alone = ResidentTrainer(replace(config, local=replace(config.local, cohort_size=1)))
    names = [*trainer.clients, "nobody"]
    received = pack(initial_adapter(dict(trainer.manifest.layout), 0), trainer.manifest.layout)
    (together, stages), (apart, _) = (t.personal(names, received, 2) for t in (trainer, alone))
    assert [r.status for r in together] == [wire.OK] * len(trainer.clients) + [wire.UNKNOWN_CLIENT]
    for a, b in zip(together, apart, strict=True):
        assert (a.client, a.status, tuple(a.scores)) == (b.client, b.status, tuple(b.scores))
        assert tuple(a.scores) == (stages if a.client != "nobody" else ())
        # Trained apart as well: adapters agree to rounding alone.
        for stage in a.scores:
            assert a.scores[stage].score == pytest.approx(b.scores[stage].score, abs=1e-3)
