"""PPO of a cohort gives what separate runs give: texts, adapters, metrics, failures.

Every client's sampled texts must be the same in every batch.  That is no law: a draw on the border
between two tokens may fall the other way after other roundings, and all that follows differs then.
With the seeds used here none does.

AdamW divides a gradient by its own size, so an entry whose gradient is nearly zero may move by a
rounding error's sign, and one entry of B moves a row of B A.  Equality is therefore asked of B A in
units of its largest entry: 5e-5 on average, 1e-3 for 99 of 100 entries, 2e-2 for all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedalign import wire
from fedalign.config import (
    Config,
    DataConfig,
    LocalConfig,
    ModelConfig,
    PersonalConfig,
    PpoConfig,
    RewardsConfig,
    RunConfig,
)
from fedalign.data.records import SurveyItem
from fedalign.errors import DataError, WireError
from fedalign.models.base import ResidentModel
from fedalign.training import cohort_forward, cohort_llama, cohort_sample
from fedalign.training.cohort_ppo import train_ppo_cohort
from fedalign.training.cohort_texts import cut
from fedalign.training.local_ppo import Course, PolicyJob, train_ppo
from fedalign.training.loop import TrainResult

GROUPS = ("isles", "coast")
WORDS = ("strongly agree", "agree", "disagree", "strongly disagree", "pass")
CONFIG = Config(
    local=LocalConfig(objective="ppo"),
    ppo=PpoConfig(questions=2, samples=4, minibatches=2, epochs=2, kl=0.2, learning_rate=0.004),
)


def of_task(task: str, config: Config = CONFIG, **ppo) -> Config:
    return replace(config, rewards=RewardsConfig(task=task), ppo=replace(config.ppo, **ppo))


@pytest.fixture(scope="module")
def pocket() -> ResidentModel:
    return ResidentModel(ModelConfig(device="cpu"))


def model(folder: Path, frozen_a: bool = False, **more) -> ResidentModel:
    config = ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu", **more)
    return ResidentModel(config, frozen_a)


def survey(count: int) -> tuple[SurveyItem, ...]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        n = 3 + k % 3
        shares = {group: tuple(rng.dirichlet(np.ones(n)).tolist()) for group in GROUPS}
        question = f"Should the {'old ' * (k % 2)}town build bridge {k}?"
        made.append(SurveyItem(f"q{k}", question, WORDS[:n], shares))
    return tuple(made)


def jobs_of(resident: ResidentModel, tiny, count: int = 4, **changes) -> list[PolicyJob]:
    """Return jobs of unequal size, steps, rate and start; one asks fewer questions than a batch."""
    return [
        replace(
            PolicyJob(
                f"c{k}",
                GROUPS[k % 2],
                tiny.start(resident, k, b=0.02),
                survey(10)[k : 3 + 2 * k],
                4 + 2 * k,
                0.004 / (k + 1),
                (1, f"c{k}"),
                (3,),
            ),
            **changes,
        )
        for k in range(count)
    ]


class Watch:
    """Writes down every batch of sampled texts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: dict[str, list[list[object]]] = {}
        read = Course.read

        def watched(course: Course, batch, sampled):
            self.texts.setdefault(course.job.client, []).append(list(sampled))
            return read(course, batch, sampled)

        monkeypatch.setattr(Course, "read", watched)

    def take(self) -> dict[str, list[list[object]]]:
        taken, self.texts = self.texts, {}
        return taken


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def products(resident: ResidentModel, adapter: np.ndarray) -> dict[str, np.ndarray]:
    factors = resident.unpack(adapter)
    return {
        name: factors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        for name, a in factors.items()
        if "lora_A" in name
    }


def assert_same(
    resident: ResidentModel, together: list[TrainResult], apart: list[TrainResult]
) -> None:
    for got, expected in zip(together, apart, strict=True):
        assert (got.client, got.failure, got.steps) == (
            expected.client,
            expected.failure,
            expected.steps,
        )
        if expected.adapter is None:
            assert got.adapter is None
            assert got.metrics == {}
            continue
        assert got.adapter is not None
        assert got.snapshots.keys() == expected.snapshots.keys()
        pairs = [(got.adapter, expected.adapter)]
        pairs += [(got.snapshots[s], expected.snapshots[s]) for s in expected.snapshots]
        for a, b in pairs:
            one, other = products(resident, a), products(resident, b)
            for name in one:
                error = np.abs(one[name] - other[name]) / np.abs(other[name]).max()
                assert error.mean() <= 5e-5, name
                assert np.quantile(error, 0.99) <= 1e-3, name
                assert error.max() <= 2e-2, name
        assert got.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            assert got.metrics[name] == pytest.approx(value, rel=1e-3, abs=5e-5), name


def check(resident: ResidentModel, jobs, config: Config, watch: Watch) -> list[TrainResult]:
    """Train together and one after another; return the former's results once they agree."""
    together = train_ppo_cohort(resident, jobs, config, 0)
    texts = watch.take()
    apart = train_ppo(resident, jobs, config, 0)
    assert texts == watch.take()
    assert_same(resident, together, apart)
    return together


@pytest.mark.parametrize("task", ["letter", "shares", "order"])
def test_equals_separate_runs_on_the_pocket(task: str, pocket, tiny, watch: Watch) -> None:
    assert cohort_llama.supported(pocket)
    found = check(pocket, jobs_of(pocket, tiny), of_task(task), watch)
    assert [r.steps for r in found] == [4, 6, 8, 10]
    assert all(3 in r.snapshots for r in found)
    for job, result in zip(jobs_of(pocket, tiny), found, strict=True):
        assert not np.array_equal(result.adapter, job.adapter)
    # Texts are not all alike, and the clients learn different things.
    assert len({r.metrics["reward"] for r in found}) == len(found)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_equals_separate_runs_on_every_architecture(
    kind: str, tiny, tmp_path: Path, watch: Watch
) -> None:
    resident = model(tiny.save(kind, tmp_path))
    jobs = jobs_of(resident, tiny, 3, snapshots=())
    check(resident, jobs, of_task("letter"), watch)
    check(resident, [replace(j, steps=4) for j in jobs], of_task("order"), watch)


def test_recomputed_activations_have_no_shared_prompts(tiny, tmp_path: Path, watch: Watch) -> None:
    resident = model(tiny.save("llama", tmp_path), gradient_checkpointing="on")
    check(resident, jobs_of(resident, tiny, 2), of_task("order"), watch)


def test_frozen_a_stays_bit_for_bit(tiny, watch: Watch) -> None:
    resident = ResidentModel(ModelConfig(device="cpu"), frozen_a=True)
    jobs = jobs_of(resident, tiny, 2)
    frozen = resident.frozen_mask()
    for job, result in zip(jobs, check(resident, jobs, CONFIG, watch), strict=True):
        assert np.array_equal(result.adapter[frozen], job.adapter[frozen])
        assert not np.array_equal(result.adapter[~frozen], job.adapter[~frozen])


def test_early_stops_controlled_kl_and_clipping_are_per_client(pocket, tiny, watch: Watch) -> None:
    """Clients stop updating at different places, so their optimisers have unequal steps."""
    config = of_task(
        "letter", max_clip_fraction=0.1, kl_target=0.05, max_grad_norm=0.05, clip=0.1, epochs=3
    )
    jobs = [replace(j, steps=8, snapshots=()) for j in jobs_of(pocket, tiny)]
    jobs[3] = replace(jobs[3], adapter=tiny.start(pocket, 3, b=0.1))
    together = check(pocket, jobs, config, watch)
    divergences = [r.metrics["kl"] for r in together]
    assert min(divergences) < 0.04  # the controller lowers one coefficient and raises another
    assert max(divergences) > 0.06
    train_ppo_cohort(pocket, jobs, config, 0)
    batches = {name: len(found) for name, found in watch.take().items()}
    assert len(set(batches.values())) > 1  # some stopped early, more often than others
    assert max(r.metrics["grad_norm"] for r in together) > 0.05  # something is clipped


@pytest.mark.parametrize("task", ["letter", "order"])
def test_passes_and_cohorts_change_nothing(
    task: str, pocket, tiny, watch: Watch, monkeypatch
) -> None:
    monkeypatch.setattr(cohort_forward, "PASS_TOKENS", 300)
    monkeypatch.setattr(cohort_sample, "CACHE_TOKENS", 3000)
    jobs = jobs_of(pocket, tiny, 3)
    for size in (0, 2):
        config = of_task(task)
        check(pocket, jobs, replace(config, local=replace(config.local, cohort_size=size)), watch)


@pytest.mark.parametrize("task", ["letter", "order"])
def test_a_client_that_fails_leaves_the_others_as_they_were(
    task: str, pocket, tiny, watch: Watch
) -> None:
    jobs = jobs_of(pocket, tiny)
    huge = (tiny.start(pocket, b=1.0) * 1e25).astype(np.float32)
    jobs[1] = replace(jobs[1], adapter=huge)
    jobs[2] = replace(jobs[2], adapter=tiny.start(pocket, 2, b=0.5))
    found = check(pocket, jobs, of_task(task, max_kl=3.0), watch)
    assert found[1].failure == "loss_not_finite"
    assert found[2].failure == "divergence_above_max_kl"
    assert found[0].failure == found[3].failure == ""


def test_numbers_that_overflow_in_an_update_are_that_clients_failure(
    pocket, tiny, watch: Watch
) -> None:
    jobs = jobs_of(pocket, tiny, 3)
    jobs[0] = replace(jobs[0], learning_rate=1e30)
    found = check(pocket, jobs, CONFIG, watch)
    assert [r.failure for r in found] == ["loss_not_finite", "", ""]
    jobs = [replace(j, learning_rate=1e30) for j in jobs]
    assert {r.failure for r in train_ppo_cohort(pocket, jobs, CONFIG, 0)} == {"loss_not_finite"}


def test_same_cohort_same_bytes_in_order(pocket, tiny) -> None:
    jobs = jobs_of(pocket, tiny)
    once, again = (train_ppo_cohort(pocket, jobs, CONFIG, 0) for _ in range(2))
    assert [r.client for r in once] == [j.client for j in jobs]
    for a, b in zip(once, again, strict=True):
        assert a.adapter.tobytes() == b.adapter.tobytes()
        assert a.metrics == b.metrics


def test_jobs_that_cannot_run_are_refused_before_anything_is_done(pocket, tiny) -> None:
    jobs = jobs_of(pocket, tiny, 2)
    with pytest.raises(WireError, match="adapter_all_zero"):
        train_ppo_cohort(
            pocket, [jobs[0], replace(jobs[1], adapter=jobs[1].adapter * 0)], CONFIG, 0
        )
    with pytest.raises(DataError, match="c1"):
        train_ppo_cohort(pocket, [jobs[0], replace(jobs[1], items=())], CONFIG, 0)
    assert train_ppo_cohort(pocket, [], CONFIG, 0) == []


def test_the_model_is_left_as_it_was(resident, tiny) -> None:
    loaded = tiny.start(resident, b=0.1)
    resident.load(loaded)
    train_ppo_cohort(resident, jobs_of(resident, tiny, 2), of_task("order"), 0)
    assert np.array_equal(resident.read(), loaded)
    assert not any(
        "forward" in m.__dict__ for m in resident.peft.modules() if hasattr(m, "scaling")
    )


def test_passes_hold_every_place_once_and_stay_within_bounds() -> None:
    sizes = [[9, 7, 7, 1], [5], [8, 8, 2]]
    parts = cut(sizes, 60)
    assert [(p.start, p.stop) for p in parts] == [(0, 2), (2, 4)]
    assert [(p.start, p.stop) for p in cut(sizes, 1)] == [(k, k + 1) for k in range(4)]
    assert cut(sizes, 10**6) == [slice(0, 4)]


def test_a_trainer_takes_the_cohort_for_several_clients(tmp_path: Path, monkeypatch) -> None:
    from clients import trainer as module
    from fedalign.aggregation.adapters import initial_adapter
    from fedalign.models.layout import pack

    config = replace(
        CONFIG,
        run=RunConfig(out=str(tmp_path)),
        data=DataConfig(questions=30, partition="group", clients_per_group="1"),
        model=ModelConfig(device="cpu"),
        local=replace(CONFIG.local, steps=2),
        personal=PersonalConfig(steps=2),
    )
    counts: list[int] = []

    def counted(resident, jobs, *rest):
        counts.append(len(jobs))
        return train_ppo_cohort(resident, jobs, *rest)

    monkeypatch.setattr(module, "train_ppo_cohort", counted)
    together = module.ResidentTrainer(config)
    apart = module.ResidentTrainer(replace(config, local=replace(config.local, cohort_size=1)))
    names = list(together.clients)
    received = pack(initial_adapter(dict(together.manifest.layout), 0), together.manifest.layout)
    (a, moved), (b, other) = (t.train(names, received, 1) for t in (together, apart))
    assert counts == [len(names)]
    for one, two in zip(a, b, strict=True):
        assert (one.status, one.steps, one.pairs, one.tokens) == (
            two.status,
            two.steps,
            two.pairs,
            two.tokens,
        )
        assert one.loss == pytest.approx(two.loss, abs=1e-4)
    np.testing.assert_allclose(moved, other, atol=1e-3)
    replies, stages = together.personal(names, received, rounds=1)
    assert counts == [len(names), 2 * len(names)]
    assert all(r.status == wire.OK and tuple(r.scores) == stages for r in replies)
