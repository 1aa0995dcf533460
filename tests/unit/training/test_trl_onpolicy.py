"""RLOO and GRPO through TRL: the base as reference, clean jobs, recorded failures, the optimum."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.store import population
from fedalign.config import Config, DataConfig, LocalConfig, ModelConfig, PpoConfig
from fedalign.data.records import SurveyItem
from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.rewards.optimum import closed_share, divergence, optimum, with_rest
from fedalign.rewards.text import reward_of_answer
from fedalign.training import tasks, trl_onpolicy
from fedalign.training.local_ppo import PolicyJob
from fedalign.training.loop import TrainResult
from fedalign.training.trl_onpolicy import arguments, train_onpolicy

GROUP = "isles"
CONFIG = Config(
    local=LocalConfig(objective="rloo", engine="trl"),
    ppo=PpoConfig(questions=2, samples=4, minibatches=2, epochs=2, kl=0.2),
)
GRPO = replace(CONFIG, local=replace(CONFIG.local, objective="grpo"))
BOTH = pytest.mark.parametrize("config", [CONFIG, GRPO], ids=["rloo", "grpo"])


@pytest.fixture(scope="module")
def pocket() -> ResidentModel:
    """The packaged model; a random one would never write a letter."""
    return ResidentModel(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def items() -> tuple[SurveyItem, ...]:
    data = DataConfig(partition="group", clients_per_group="1")
    (client,) = (c for c in population(Config(data=data)) if c.group == GROUP)
    return tuple(i for i in client.train if isinstance(i, SurveyItem))[:6]


@pytest.fixture
def make_job(pocket, tiny, items):
    def make(client: str = "c", **changes) -> PolicyJob:
        job = PolicyJob(client, GROUP, tiny.start(pocket), items, 3, 0.004, (1, client))
        return replace(job, **changes)

    return make


def adapter_of(result: TrainResult) -> np.ndarray:
    assert result.failure == ""
    return result.adapter


@BOTH
def test_jobs_do_not_leak_into_each_other_or_into_the_model(
    pocket, tiny, make_job, config: Config
) -> None:
    """Adam moments, left-over texts, patch, copied reference, pad ids and flags are all gone."""
    one = make_job("a")  # three of four updates: texts are left over
    two = make_job("b", steps=5, adapter=tiny.start(pocket, 2, b=0.1), snapshots=(2,))
    place = pocket.parameters_flat.data_ptr()
    pads = (pocket.tokenizer.pad_token, pocket.network.generation_config.pad_token_id)
    together = train_onpolicy(pocket, [one, two, one], config, 0)
    alone = train_onpolicy(pocket, [two], config, 0)[0]
    assert adapter_of(together[0]).tobytes() == adapter_of(together[2]).tobytes()
    assert adapter_of(together[1]).tobytes() == adapter_of(alone).tobytes()
    assert together[1].metrics == alone.metrics
    assert [r.steps for r in together] == [3, 5, 3]
    assert not np.array_equal(alone.snapshots[2], alone.adapter)
    assert not np.array_equal(alone.snapshots[2], two.adapter)
    assert list(pocket.peft.peft_config) == ["default"]
    assert "forward" not in vars(pocket.network)
    assert not pocket.network.training
    assert pocket.parameters_flat.data_ptr() == place
    assert (pocket.tokenizer.pad_token, pocket.network.generation_config.pad_token_id) == pads
    other = train_onpolicy(pocket, [one], config, 1)[0]
    assert adapter_of(other).tobytes() != adapter_of(together[0]).tobytes()


def test_draws_do_not_depend_on_the_global_generators(pocket, make_job) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        results.append(adapter_of(train_onpolicy(pocket, [make_job()], CONFIG, 0)[0]))
    assert results[0].tobytes() == results[1].tobytes()


def test_the_reference_is_the_base_and_not_the_received_adapter(pocket, tiny, make_job) -> None:
    """One update: its texts were sampled from the received adapter, whose divergence is known."""
    far = tiny.start(pocket, 1, b=0.3)
    config = replace(CONFIG, ppo=replace(CONFIG.ppo, questions=96, minibatches=1))
    job = make_job(adapter=far, steps=1)
    found = train_onpolicy(pocket, [job], config, 0)[0].metrics["kl"]
    exact = []
    for item in job.items:
        prompt = tasks.task_prompt(pocket, "letter", item.question, item.options)
        pocket.load(far)
        now = next_token(pocket, prompt)
        with pocket.reference("base"):
            ref = next_token(pocket, prompt)
        exact.append(float((now.exp() * (now - ref)).sum()))
    assert np.mean(exact) > 0.1
    assert found == pytest.approx(np.mean(exact), rel=0.25)  # 384 texts


def next_token(model: ResidentModel, prompt: tuple[int, ...]) -> torch.Tensor:
    """Return the log-probabilities (vocabulary,) of the only token of a letter."""
    with torch.no_grad():
        return model.network(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


def test_frozen_a_stays_frozen_and_out_of_the_gradient(tiny, items) -> None:
    """TRL switches the adapter off for the reference, after which every factor would train."""
    model = ResidentModel(ModelConfig(device="cpu"), frozen_a=True)
    job = PolicyJob("c", GROUP, tiny.start(model, b=0.1), items, 4, 0.004, (1, "c"))
    frozen = model.frozen_mask()
    for config in (CONFIG, GRPO):
        result = train_onpolicy(model, [job], config, 0)[0]
        adapter = adapter_of(result)
        assert np.array_equal(adapter[frozen], job.adapter[frozen])
        assert not np.array_equal(adapter[~frozen], job.adapter[~frozen])
        flags = {n: p.requires_grad for n, p in model.peft.named_parameters() if "lora" in n}
        assert not any(flag for name, flag in flags.items() if "lora_A" in name)
        assert all(p.grad is None for n, p in model.peft.named_parameters() if "lora_A" in n)


def test_the_models_own_generation_settings_do_not_count(
    pocket, make_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    score_texts = trl_onpolicy.score_texts

    def record(config, group, asked, texts):
        seen.extend(texts)
        return score_texts(config, group, asked, texts)

    monkeypatch.setattr(trl_onpolicy, "score_texts", record)
    for name, value in {"do_sample": False, "top_k": 1, "temperature": 0.1, "top_p": 0.1}.items():
        monkeypatch.setattr(pocket.network.generation_config, name, value)
    config = replace(CONFIG, ppo=replace(CONFIG.ppo, samples=32, minibatches=1))
    train_onpolicy(pocket, [make_job(steps=1)], config, 0)
    assert len(seen) == 64
    assert len(set(seen[:32])) > 1


def test_a_policy_that_is_not_finite_is_a_recorded_failure(pocket, tiny, make_job) -> None:
    huge = (tiny.start(pocket, b=1.0) * 1e25).astype(np.float32)
    bad, fine = train_onpolicy(pocket, [make_job("bad", adapter=huge), make_job("fine")], CONFIG, 0)
    assert bad.failure in ("logits_not_finite", "loss_not_finite")
    assert bad.adapter is None
    alone = train_onpolicy(pocket, [make_job("fine")], CONFIG, 0)[0]
    assert adapter_of(fine).tobytes() == adapter_of(alone).tobytes()


def test_metrics(pocket, make_job) -> None:
    job = make_job(steps=6)
    for config in (CONFIG, GRPO):
        metrics = train_onpolicy(pocket, [job], config, 0)[0].metrics
        assert 0.0 < metrics["reward"] < 1.0
        assert 0.9 < metrics["format_rate"] <= 1.0
        assert metrics["kl"] > 0.0
        # Letters: two batches of sixteen rows, (3 passes + 2 epochs) and (3 passes + 1 epoch).
        lengths = [
            len(tasks.task_prompt(pocket, "letter", i.question, i.options)) for i in job.items
        ]
        low, high = (16 * 9 * (f(lengths) + 1) for f in (min, max))
        assert low <= metrics["tokens"] <= high


@BOTH
def test_texts_of_several_tokens(pocket, make_job, config: Config) -> None:
    config = replace(config, rewards=replace(config.rewards, task="order"))
    result = train_onpolicy(pocket, [make_job()], config, 0)[0]
    assert result.failure == ""
    assert result.metrics["format_rate"] > 0.5


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"samples": 1}, "at least 2"), ({"kl_target": 0.5}, "kl-target")],
)
def test_what_trl_cannot_do_is_refused(pocket, make_job, changes, named) -> None:
    config = replace(CONFIG, ppo=replace(CONFIG.ppo, **changes))
    with pytest.raises(ConfigError, match=named):
        train_onpolicy(pocket, [make_job()], config, 0)
    with pytest.raises(ConfigError, match="rloo, grpo"):
        train_onpolicy(pocket, [make_job()], replace(CONFIG, local=LocalConfig()), 0)


def test_the_divergence_has_the_weight_that_the_settings_ask_for(pocket) -> None:
    """GRPO's baseline shrinks the reward by (n - 1) / n, so its divergence shrinks as well."""
    assert arguments(CONFIG, pocket, "")["beta"] == 0.2
    grpo = arguments(GRPO, pocket, "")
    assert grpo["beta"] == pytest.approx(0.15)
    assert grpo["scale_rewards"] == "none"


def closed_after(pocket, make_job, config: Config) -> float:
    job = make_job(steps=48, learning_rate=0.003)
    result = train_onpolicy(pocket, [job], config, 0)[0]
    before, after = [], []
    for item in job.items:
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
    share = closed_share(float(np.mean(before)), float(np.mean(after)))
    assert share is not None
    return share


@BOTH
def test_moves_to_the_closed_form(pocket, make_job, config: Config) -> None:
    config = replace(config, ppo=replace(config.ppo, questions=6))  # each question twice
    assert closed_after(pocket, make_job, config) > 0.8


def test_trl_is_imported_by_this_engine_alone(root) -> None:
    import subprocess
    import sys

    code = (
        "import sys, fedalign.training.local_ppo, fedalign.training.trl_onpolicy;"
        "assert not {'trl', 'datasets'} & set(sys.modules), 'trl or datasets was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
