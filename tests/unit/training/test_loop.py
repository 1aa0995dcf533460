"""The loop: reproducible, independent jobs, frozen A, recorded failures, the optimum it finds."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from fedalign.config import LocalConfig, ModelConfig
from fedalign.errors import ConfigError, WireError
from fedalign.models.base import ResidentModel
from fedalign.training.batch import Prompt
from fedalign.training.examples import Label, TrainingSet
from fedalign.training.loop import TrainJob, batches, round_learning_rate, train
from fedalign.training.reference import reference_logps
from fedalign.training.score import logps_of

SETTINGS = LocalConfig(batch_size=4)


def job(adapter, data, client: str = "c", steps: int = 4, **changes) -> TrainJob:
    return replace(TrainJob(client, adapter, data, None, steps, 5e-3, (1, client)), **changes)


def adapter_of(result) -> np.ndarray:
    assert result.failure == ""
    return result.adapter


def test_same_seed_same_bytes_and_another_seed_differs(resident, tiny) -> None:
    one = job(tiny.start(resident), tiny.survey_like())
    a, b, c = (adapter_of(train(resident, [one], SETTINGS, s)[0]) for s in (0, 0, 1))
    assert a.tobytes() == b.tobytes()
    assert a.tobytes() != c.tobytes()


def test_a_list_of_jobs_is_one_job_after_another(resident, tiny) -> None:
    first = job(tiny.start(resident), tiny.survey_like(seed=1), "a")
    second = job(tiny.start(resident, seed=2, b=0.1), tiny.survey_like(seed=2), "b", steps=6)
    together = train(resident, [first, second], SETTINGS, 0)
    reverse = train(resident, [second, first], SETTINGS, 0)
    alone = [train(resident, [j], SETTINGS, 0)[0] for j in (first, second)]
    assert [r.client for r in together] == ["a", "b"]
    for got, swapped, expected in zip(together, reversed(reverse), alone, strict=True):
        assert adapter_of(got).tobytes() == adapter_of(expected).tobytes()
        assert adapter_of(swapped).tobytes() == adapter_of(expected).tobytes()
        assert got.metrics == expected.metrics


def test_equals_a_plain_loop_over_peft_parameters(resident, tiny) -> None:
    """The flat buffer is a matter of speed: AdamW on the separate factors gives the same."""
    import torch.nn.functional as F

    data, start = tiny.survey_like(6), tiny.start(resident)
    settings = replace(SETTINGS, batch_size=6, max_grad_norm=0.05)
    got = adapter_of(train(resident, [job(start, data, steps=5)], settings, 0)[0])

    resident.load(start)
    factors = [p for p in resident.peft.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(factors, lr=5e-3, weight_decay=0.0)
    for _ in range(5):
        losses = []
        for prompt, labels in zip(data.prompts, data.labels, strict=True):
            logits = resident.network(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
            lp = logits.log_softmax(-1)[[c[0] for c in prompt.completions]]
            for label in labels:
                h = lp[label.i] - lp[label.j]
                losses.append(-(label.q * F.logsigmoid(h) + (1 - label.q) * F.logsigmoid(-h)))
        for p in factors:
            p.grad = None
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(factors, 0.05)
        optimiser.step()
    np.testing.assert_allclose(resident.read(), got, atol=2e-5)  # of an update of 2.5e-2


def test_frozen_a_changes_b_alone(llama_folder, tiny) -> None:
    config = ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu")
    model = ResidentModel(config, frozen_a=True)
    start = tiny.start(model)
    reference_logps(model, tiny.survey_like().prompts, "base")  # must not unfreeze A
    after = model.unpack(adapter_of(train(model, [job(start, tiny.survey_like())], SETTINGS, 0)[0]))
    for name, before in model.unpack(start).items():
        assert np.array_equal(before, after[name]) == (".lora_A." in name)


def test_first_step_has_a_gradient_from_zero_b(resident, tiny) -> None:
    result = train(resident, [job(tiny.start(resident), tiny.survey_like(), steps=1)], SETTINGS, 0)
    assert result[0].metrics["grad_norm"] > 1e-3


def test_an_all_zero_adapter_is_refused(resident, tiny) -> None:
    zero = np.zeros_like(tiny.start(resident))
    with pytest.raises(WireError, match="adapter_all_zero"):
        train(resident, [job(zero, tiny.survey_like())], SETTINGS, 0)


def test_snapshots_are_the_shorter_run(resident, tiny) -> None:
    start, data = tiny.start(resident), tiny.survey_like()
    long = train(resident, [job(start, data, steps=7, snapshots=(3, 7))], SETTINGS, 0)[0]
    short = train(resident, [job(start, data, steps=3)], SETTINGS, 0)[0]
    assert sorted(long.snapshots) == [3, 7]
    assert np.array_equal(long.snapshots[3], adapter_of(short))
    assert np.array_equal(long.snapshots[7], adapter_of(long))


def test_a_loss_that_is_not_finite_is_a_recorded_failure_and_others_go_on(resident, tiny) -> None:
    good, huge = tiny.start(resident), tiny.start(resident, b=1.0)
    huge *= np.float32(1e25)
    jobs = [job(huge, tiny.survey_like(), "bad"), job(good, tiny.survey_like(), "good")]
    bad, fine = train(resident, jobs, SETTINGS, 0)
    assert bad.failure == "loss_not_finite"
    assert bad.adapter is None
    assert bad.metrics == {}
    assert bad.steps == 0
    assert np.array_equal(adapter_of(fine), adapter_of(train(resident, jobs[1:], SETTINGS, 0)[0]))


def test_reference_must_match_the_setting(resident, tiny) -> None:
    data = tiny.survey_like()
    values = reference_logps(resident, data.prompts, "base")
    with pytest.raises(ConfigError, match="some reference"):
        train(resident, [job(tiny.start(resident), data, reference_logps=values)], SETTINGS, 0)
    with_base = replace(SETTINGS, reference="base")
    with pytest.raises(ConfigError, match="no reference"):
        train(resident, [job(tiny.start(resident), data)], with_base, 0)
    short = job(tiny.start(resident), data, reference_logps=values[:-1])
    with pytest.raises(ConfigError, match="for 48 completions"):
        train(resident, [short], with_base, 0)


def test_first_dpo_loss_from_the_base_is_ln_2(resident, tiny) -> None:
    for data in (tiny.survey_like(), tiny.text_like()):
        values = reference_logps(resident, data.prompts, "base")
        one = job(tiny.start(resident), data, reference_logps=values, steps=1)
        settings = replace(SETTINGS, reference="base", batch_size=64)
        result = train(resident, [one], settings, 0)[0]
        assert result.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert result.metrics["margin"] == pytest.approx(0, abs=1e-5)


def test_the_anchor_does_not_move_over_rounds(resident, tiny) -> None:
    data, settings = tiny.survey_like(), replace(SETTINGS, reference="base")
    values = reference_logps(resident, data.prompts, "base")
    adapter = tiny.start(resident)
    for number in range(3):
        one = job(adapter, data, reference_logps=values, key=(number, "c"))
        adapter = adapter_of(train(resident, [one], settings, 0)[0])
        again = reference_logps(resident, data.prompts, "base")
        assert np.array_equal(again, values)
    resident.load(adapter)
    assert not np.allclose(logps_of(resident, data.prompts), values)


def test_without_reference_training_finds_the_shares(resident) -> None:
    """Bradley-Terry pairs of p, beta 1, no reference: the optimum is p itself."""
    p = np.array([0.6, 0.3, 0.1])
    labels = tuple(Label(i, j, p[i] / (p[i] + p[j])) for i in range(3) for j in range(i + 1, 3))
    data = TrainingSet((Prompt((1, 20, 30), ((260,), (261,), (262,))),), (labels,))
    rng = np.random.default_rng(0)
    start = rng.normal(0, 0.1, resident.parameters_flat.numel()).astype(np.float32)
    one = job(start, data, steps=150, learning_rate=1e-2)
    resident.load(adapter_of(train(resident, [one], SETTINGS, 0)[0]))
    got = np.exp(logps_of(resident, data.prompts))
    np.testing.assert_allclose(got / got.sum(), p, atol=0.01)


def test_several_passes_give_the_gradient_of_one(resident, tiny, monkeypatch) -> None:
    from fedalign.training import batch

    start, data = tiny.start(resident, b=0.1), tiny.text_like(12)
    settings = replace(SETTINGS, batch_size=12)
    whole = train(resident, [job(start, data)], settings, 0)[0]
    monkeypatch.setattr(batch, "ROW_TOKENS", 40)
    assert len(batch.in_passes(data.prompts, 320)) > 3
    cut = train(resident, [job(start, data)], settings, 0)[0]
    np.testing.assert_allclose(adapter_of(cut), adapter_of(whole), atol=2e-5)
    assert cut.metrics == pytest.approx(whole.metrics, rel=1e-3)


def test_batches_cover_every_prompt_once_an_epoch() -> None:
    drawn = list(islice(batches(10, 4, 0, (1, "c")), 5))
    assert [len(b) for b in drawn] == [4] * 5
    flat = [k for b in drawn for k in b]
    assert sorted(flat[:10]) == list(range(10))
    assert sorted(flat[10:]) == list(range(10))
    assert list(islice(batches(10, 4, 0, (2, "c")), 5)) != drawn
    assert [sorted(b) for b in islice(batches(3, 16, 0, (1,)), 4)] == [[0, 1, 2]] * 4


def test_learning_rate_over_rounds_by_hand() -> None:
    settings = LocalConfig(learning_rate=1.0)
    rates = [round_learning_rate(settings, t, 3) for t in (1, 2, 3)]
    assert rates == pytest.approx([1.0, 0.55, 0.1])
    assert round_learning_rate(settings, 1, 1) == 1.0
    assert round_learning_rate(replace(settings, schedule="constant"), 3, 3) == 1.0


def test_bad_jobs_are_refused(resident, tiny) -> None:
    start, data = tiny.start(resident), tiny.survey_like()
    for wrong in ({"steps": 0}, {"snapshots": (5,)}, {"snapshots": (0,)}):
        with pytest.raises(ConfigError, match="steps"):
            train(resident, [job(start, data, **wrong)], SETTINGS, 0)
