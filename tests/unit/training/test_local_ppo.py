"""Local PPO: batches, rewards, reproducible jobs, snapshots, the optimum, recorded failures."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.store import population
from fedalign import wire
from fedalign.aggregation.adapters import initial_adapter
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
from fedalign.errors import ConfigError, DataError, WireError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import pack
from fedalign.rewards.optimum import closed_share, divergence, optimum, with_rest
from fedalign.rewards.text import reward_of_answer
from fedalign.training import tasks
from fedalign.training.local_ppo import (
    PolicyJob,
    check_policy_job,
    learnable,
    next_batch,
    question_stream,
    score_texts,
    train_ppo,
)
from fedalign.training.loop import TrainResult

GROUP = "isles"
CONFIG = Config(
    local=LocalConfig(objective="ppo"),
    ppo=PpoConfig(questions=2, samples=4, minibatches=2, epochs=2, kl=0.2, learning_rate=0.004),
)


def survey(count: int = 6, options: int = 4, seed: int = 0) -> tuple[SurveyItem, ...]:
    """Return questions of the pocket's kind with drawn shares."""
    rng = np.random.default_rng(seed)
    words = ("strongly agree", "agree", "disagree", "strongly disagree", "pass")[:options]
    return tuple(
        SurveyItem(
            f"q{k}",
            f"Should the town build bridge {k}?",
            words,
            {GROUP: tuple(rng.dirichlet(np.ones(options)).tolist())},
            ordinals=tuple(float(i) for i in range(options)) if k % 2 else None,
        )
        for k in range(count)
    )


def make_job(model: ResidentModel, tiny, client: str = "c", **changes) -> PolicyJob:
    job = PolicyJob(client, GROUP, tiny.start(model), survey(), 4, 0.004, (1, client))
    return replace(job, **changes)


@pytest.fixture(scope="module")
def pocket() -> ResidentModel:
    """The packaged model; a random one would never write a letter."""
    return ResidentModel(ModelConfig(device="cpu"))


def adapter_of(result: TrainResult) -> np.ndarray:
    assert result.failure == ""
    return result.adapter


@given(
    steps=st.integers(1, 200),
    minibatches=st.integers(1, 8),
    epochs=st.integers(1, 5),
)
def test_batches_add_up_to_the_steps(steps: int, minibatches: int, epochs: int) -> None:
    settings = PpoConfig(minibatches=minibatches, epochs=epochs)
    left, small = steps, 0
    while left:
        batch = next_batch(settings, left)
        updates = batch.minibatches * batch.epochs
        assert 1 <= updates <= left
        small += updates < minibatches * epochs
        left -= updates
    assert small <= 2  # once fewer passes, once fewer questions


def test_batches_by_hand() -> None:
    settings = PpoConfig(minibatches=4, epochs=2)
    sizes = []
    left = 23
    while left:
        batch = next_batch(settings, left)
        sizes.append((batch.minibatches, batch.epochs))
        left -= batch.minibatches * batch.epochs
    assert sizes == [(4, 2), (4, 2), (4, 1), (3, 1)]


def test_questions_come_in_keyed_permutations() -> None:
    drawn = list(islice(question_stream(5, 0, (1, "c")), 15))
    for epoch in range(3):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert drawn == list(islice(question_stream(5, 0, (1, "c")), 15))
    assert drawn != list(islice(question_stream(5, 0, (2, "c")), 15))


def test_texts_are_scored_by_the_groups_shares() -> None:
    items = (
        SurveyItem("a", "one?", ("x", "y"), {GROUP: (0.9, 0.1), "other": (0.0, 1.0)}),
        SurveyItem("b", "two?", ("x", "y"), {GROUP: (0.001, 0.999)}),
    )
    config = replace(CONFIG, rewards=RewardsConfig(floor=0.01, malformed=0.25))
    scored = score_texts(config, GROUP, items, [" A", " B", " C", " A", "B", "A B"])
    expected = [
        1 - math.log(0.9) / math.log(0.01),
        1 - math.log(0.1) / math.log(0.01),  # a half
        0.25,
        0.0,  # below the floor
        1 - math.log(0.999) / math.log(0.01),
        0.25,
    ]
    np.testing.assert_allclose(scored.rewards, expected, rtol=1e-6)
    assert scored.rewards.dtype == np.float32
    assert scored.well_formed.tolist() == [True, True, False, True, True, False]


def test_questions_without_a_reward_are_left_out() -> None:
    config = replace(CONFIG, rewards=RewardsConfig(task="shares", score="wasserstein"))
    foreign = SurveyItem("z", "other?", ("x", "y"), {"other": (0.5, 0.5)})
    job = PolicyJob("c", GROUP, np.ones(1, np.float32), (*survey(), foreign), 4, 0.01, (1,))
    assert [i.id for i in learnable(job, config)] == ["q1", "q3", "q5"]
    assert len(learnable(job, CONFIG)) == 6
    with pytest.raises(DataError, match="wasserstein"):
        learnable(replace(job, items=(foreign, survey()[0])), config)


def test_same_seed_same_bytes_and_jobs_are_independent(pocket, tiny) -> None:
    one = make_job(pocket, tiny, "a")
    two = make_job(pocket, tiny, "b", steps=6, adapter=tiny.start(pocket, 2, b=0.1))
    together = train_ppo(pocket, [one, two, one], CONFIG, 0)
    alone = train_ppo(pocket, [two], CONFIG, 0)[0]
    other = train_ppo(pocket, [one], CONFIG, 1)[0]
    assert [r.client for r in together] == ["a", "b", "a"]
    assert adapter_of(together[0]).tobytes() == adapter_of(together[2]).tobytes()
    assert adapter_of(together[1]).tobytes() == adapter_of(alone).tobytes()
    assert together[1].metrics == alone.metrics
    assert adapter_of(together[0]).tobytes() != adapter_of(other).tobytes()


@pytest.mark.parametrize(("steps", "items"), [(1, 6), (3, 6), (4, 6), (7, 6), (5, 1), (6, 3)])
def test_takes_exactly_the_steps_asked_for(pocket, tiny, steps: int, items: int) -> None:
    job = make_job(pocket, tiny, steps=steps, items=survey(items))
    result = train_ppo(pocket, [job], CONFIG, 0)[0]
    assert result.steps == steps
    assert not np.array_equal(adapter_of(result), job.adapter)


def test_a_snapshot_is_what_a_job_of_that_many_steps_returns(pocket, tiny) -> None:
    long = make_job(pocket, tiny, steps=9, snapshots=(3, 9))
    short = replace(long, steps=3, snapshots=())
    got, expected = (train_ppo(pocket, [j], CONFIG, 0)[0] for j in (long, short))
    assert got.snapshots[3].tobytes() == adapter_of(expected).tobytes()
    assert got.snapshots[9].tobytes() == adapter_of(got).tobytes()


def test_tokens_are_those_the_policy_computed(pocket, tiny) -> None:
    """Letters of one question share a row: prompts for texts, policy, base and each update."""
    items = survey(2)
    config = replace(CONFIG, ppo=replace(CONFIG.ppo, minibatches=1, epochs=1))
    job = make_job(pocket, tiny, steps=2, items=items)
    found = train_ppo(pocket, [job], config, 0)[0].metrics["tokens"]
    prompts = sum(len(tasks.task_prompt(pocket, "letter", i.question, i.options)) for i in items)
    longest = max(tasks.max_new_tokens(pocket, "letter", i.options) for i in items)
    assert longest == 1
    assert found == 2 * (1 + 2 + 1) * prompts


def test_frozen_a_stays_frozen(tiny) -> None:
    model = ResidentModel(ModelConfig(device="cpu"), frozen_a=True)
    job = make_job(model, tiny)
    adapter = adapter_of(train_ppo(model, [job], CONFIG, 0)[0])
    frozen = model.frozen_mask()
    assert np.array_equal(adapter[frozen], job.adapter[frozen])
    assert not np.array_equal(adapter[~frozen], job.adapter[~frozen])


@pytest.mark.parametrize("task", ["shares", "order"])
def test_texts_of_several_tokens(pocket, tiny, task: str) -> None:
    config = replace(CONFIG, rewards=RewardsConfig(task=task))
    result = train_ppo(pocket, [make_job(pocket, tiny)], config, 0)[0]
    assert result.steps == 4
    assert 0.0 <= result.metrics["format_rate"] <= 1.0
    assert 0.0 <= result.metrics["reward"] <= 1.0


def test_numbers_that_are_not_finite_are_a_recorded_failure(pocket, tiny) -> None:
    huge = (tiny.start(pocket, b=1.0) * 1e25).astype(np.float32)
    jobs = [make_job(pocket, tiny, "bad", adapter=huge), make_job(pocket, tiny, "fine")]
    bad, fine = train_ppo(pocket, jobs, CONFIG, 0)
    assert bad.failure == "loss_not_finite"
    assert bad.adapter is None
    assert fine.failure == ""


def test_a_divergence_above_the_limit_is_a_recorded_failure(pocket, tiny) -> None:
    config = replace(CONFIG, ppo=replace(CONFIG.ppo, max_kl=1e-3))
    far = make_job(pocket, tiny, adapter=tiny.start(pocket, b=0.5))
    result = train_ppo(pocket, [far], config, 0)[0]
    assert result.failure == "divergence_above_max_kl"
    assert result.adapter is None


def test_jobs_that_cannot_be_run_are_refused(pocket, tiny) -> None:
    job = make_job(pocket, tiny)
    with pytest.raises(ConfigError, match="snapshots"):
        check_policy_job(replace(job, snapshots=(5,)))
    with pytest.raises(ConfigError, match="at least 1"):
        check_policy_job(replace(job, steps=0))
    with pytest.raises(WireError, match="adapter_all_zero"):
        train_ppo(pocket, [replace(job, adapter=job.adapter * 0)], CONFIG, 0)


def test_reaches_the_closed_form_on_the_pocket(pocket, tiny) -> None:
    """Six questions, the reward of their own letters: pi_base exp(r / kl), malformed included."""
    data = DataConfig(partition="group", clients_per_group="1")
    (client,) = (c for c in population(Config(data=data)) if c.group == GROUP)
    items = tuple(i for i in client.train if isinstance(i, SurveyItem))[:6]
    config = replace(CONFIG, ppo=replace(CONFIG.ppo, samples=32, questions=3))
    job = make_job(pocket, tiny, steps=100, items=items, learning_rate=0.002)
    result = train_ppo(pocket, [job], config, 0)[0]
    before, after = [], []
    for item in items:
        values = [
            reward_of_answer(config.rewards, "log", a, item.shares[GROUP], None)
            for a in range(len(item.options))
        ]
        with pocket.reference("base"):
            ref = tasks.answer_logps(pocket, "letter", item.question, item.options)[1]
        pocket.load(adapter_of(result))
        now = tasks.answer_logps(pocket, "letter", item.question, item.options)[1]
        aim = optimum(ref, values, config.ppo.kl, malformed=0.0)
        before.append(divergence(with_rest(ref), aim))
        after.append(divergence(with_rest(now), aim))
    assert closed_share(float(np.mean(before)), float(np.mean(after))) > 0.95
    assert result.metrics["reward"] > 0.5


def test_a_client_trains_by_ppo_in_rounds_and_in_the_personal_phase(tmp_path) -> None:
    from clients.trainer import ResidentTrainer

    config = replace(
        CONFIG,
        run=RunConfig(out=str(tmp_path)),
        data=DataConfig(questions=30, partition="group", clients_per_group="1"),
        model=ModelConfig(device="cpu"),
        local=replace(CONFIG.local, steps=3),
        personal=PersonalConfig(steps=2),
    )
    trainer = ResidentTrainer(config)
    name = next(n for n, c in trainer.clients.items() if c.group == GROUP)
    received = pack(initial_adapter(dict(trainer.manifest.layout), 0), trainer.manifest.layout)
    (reply, unknown), updates = trainer.train([name, "nobody"], received, 1)
    assert (reply.status, unknown.status) == (wire.OK, wire.UNKNOWN_CLIENT)
    assert reply.steps == 3
    assert reply.pairs == len(trainer.clients[name].train)
    # The first step of Adam is the learning rate, for every number with a gradient.
    moved = np.abs(updates[0] - received).max()
    assert 0.5 * config.ppo.learning_rate < moved < 4 * config.ppo.learning_rate
    (personal,), stages = trainer.personal([name], received, rounds=2)
    assert personal.status == wire.OK
    assert tuple(personal.scores) == stages == ("personal", "local_only", "local_only_total")
