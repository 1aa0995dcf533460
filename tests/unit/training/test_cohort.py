"""A cohort gives what separate runs give: every architecture, loss and raggedness; failures stay.

AdamW divides a gradient by its own size, so an entry whose gradient is nearly zero may move by a
rounding error's sign.  Equality is therefore asked of B A, what a layer adds to its weights, in
units of its largest entry: every entry within 2e-3, and 2e-5 on average.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fedalign.config import LocalConfig, ModelConfig
from fedalign.errors import ConfigError, WireError
from fedalign.models.base import ResidentModel
from fedalign.training import cohort_batch, cohort_llama
from fedalign.training.cohort import train_cohort
from fedalign.training.cohort_batch import Question, collate, in_passes
from fedalign.training.cohort_forward import StackedLayers, token_logps
from fedalign.training.cohort_plan import cohort_size, forward_of, in_cohorts, side_by_side
from fedalign.training.examples import TrainingSet
from fedalign.training.loop import TrainJob, TrainResult, train
from fedalign.training.rows import NO_PAIRS, lay_out
from fedalign.training.stack import AdapterStack, stacked_factors

SETTINGS = LocalConfig(batch_size=4)


@pytest.fixture(scope="module")
def plain_llama(tiny, tmp_path_factory: pytest.TempPathFactory) -> ResidentModel:
    """Return a Llama whose heads share nothing, the kind that is merged."""
    folder = tmp_path_factory.mktemp("plain-llama")
    tokenizer = tiny.tokenizer()
    base = tiny.config("llama", len(tokenizer)).to_dict() | {
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(LlamaConfig(**base))
        for name, parameter in network.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model(folder)


def model(folder: Path, frozen_a: bool = False, **more) -> ResidentModel:
    return ResidentModel(
        ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu", **more), frozen_a
    )


def jobs_of(resident: ResidentModel, tiny, count: int = 5, **changes) -> list[TrainJob]:
    """Return jobs of unequal size, each with its own adapter and rate."""
    return [
        replace(
            TrainJob(
                f"c{k}",
                tiny.start(resident, seed=k, b=0.05),
                tiny.survey_like(3 + 2 * k, seed=k),
                None,
                4,
                5e-3 / (k + 1),
                (1, f"c{k}"),
            ),
            **changes,
        )
        for k in range(count)
    ]


def products(resident: ResidentModel, adapter: np.ndarray) -> dict[str, np.ndarray]:
    factors = resident.unpack(adapter)
    return {
        name: factors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        for name, a in factors.items()
        if "lora_A" in name
    }


def assert_same(
    resident: ResidentModel,
    together: list[TrainResult],
    apart: list[TrainResult],
) -> None:
    for got, expected in zip(together, apart, strict=True):
        assert (got.client, got.failure, got.steps) == (
            expected.client,
            expected.failure,
            expected.steps,
        )
        if expected.adapter is None:
            assert got.adapter is None
            continue
        pairs = [(got.adapter, expected.adapter)]
        assert got.snapshots.keys() == expected.snapshots.keys()
        pairs += [(got.snapshots[s], expected.snapshots[s]) for s in expected.snapshots]
        for a, b in pairs:
            one, other = products(resident, a), products(resident, b)
            for name in one:
                error = np.abs(one[name] - other[name]) / np.abs(other[name]).max()
                assert error.max() <= 2e-3, name
                assert error.mean() <= 2e-5, name
        assert got.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            assert got.metrics[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("data", ["survey_like", "text_like"])
def test_equals_separate_runs_on_every_architecture(
    kind: str, data: str, tiny, tmp_path: Path
) -> None:
    resident = model(tiny.save(kind, tmp_path))
    jobs = [
        replace(j, data=getattr(tiny, data)(4 + k, seed=k))
        for k, j in enumerate(jobs_of(resident, tiny))
    ]
    together = train_cohort(resident, jobs, SETTINGS, 0)
    assert_same(resident, together, train(resident, jobs, SETTINGS, 0))


@pytest.mark.parametrize("data", ["survey_like", "text_like"])
@pytest.mark.parametrize("pass_tokens", [8192, 64])
def test_merged_llama_equals_separate_runs(
    data: str, pass_tokens: int, plain_llama, tiny, monkeypatch
) -> None:
    assert cohort_llama.supported(plain_llama)
    monkeypatch.setattr("fedalign.training.cohort_forward.PASS_TOKENS", pass_tokens)
    jobs = [
        replace(j, data=getattr(tiny, data)(4 + k, seed=k))
        for k, j in enumerate(jobs_of(plain_llama, tiny))
    ]
    together = train_cohort(plain_llama, jobs, SETTINGS, 0)
    assert_same(plain_llama, together, train(plain_llama, jobs, SETTINGS, 0))


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "down_proj", "all-linear"])
def test_merged_llama_with_some_layers_adapted(targets: str, plain_llama, tiny) -> None:
    resident = model(plain_llama.folder, targets=targets)
    jobs = jobs_of(resident, tiny, 3)
    assert_same(
        resident, train_cohort(resident, jobs, SETTINGS, 0), train(resident, jobs, SETTINGS, 0)
    )


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "conservative", "robust"])
def test_every_loss_with_a_reference(loss: str, resident, tiny) -> None:
    settings = replace(
        SETTINGS, loss=loss, reference="base", beta=0.5, label_noise=0.1 * (loss[0] in "cr")
    )
    rng = np.random.default_rng(0)
    jobs = []
    for k, job in enumerate(jobs_of(resident, tiny, 3)):
        data = tiny.text_like(4 + k, seed=k)
        logps = -rng.random(data.completions).astype(np.float32) * 5
        jobs.append(replace(job, data=data, reference_logps=logps))
    together = train_cohort(resident, jobs, settings, 0)
    assert_same(resident, together, train(resident, jobs, settings, 0))


def test_frozen_a_stays_bit_for_bit(plain_llama, tiny) -> None:
    for size in (0, 2):
        resident = model(plain_llama.folder, frozen_a=True)
        jobs, settings = jobs_of(resident, tiny), replace(SETTINGS, cohort_size=size)
        together = train_cohort(resident, jobs, settings, 0)
        frozen = resident.frozen_mask()
        for job, result in zip(jobs, together, strict=True):
            assert np.array_equal(result.adapter[frozen], job.adapter[frozen])
            assert not np.array_equal(result.adapter[~frozen], job.adapter[~frozen])
        assert_same(resident, together, train(resident, jobs, SETTINGS, 0))


def test_a_client_that_has_finished_stops_changing(resident, tiny) -> None:
    jobs = [
        replace(j, steps=steps, snapshots=snapshots)
        for j, steps, snapshots in zip(
            jobs_of(resident, tiny, 4), (2, 7, 5, 7), ((1, 2), (3, 7), (), (7,)), strict=True
        )
    ]
    together = train_cohort(resident, jobs, SETTINGS, 0)
    assert [r.steps for r in together] == [2, 7, 5, 7]
    assert_same(resident, together, train(resident, jobs, SETTINGS, 0))


@pytest.mark.parametrize("merged", [True, False])
def test_a_client_that_fails_leaves_the_others_as_they_were(
    merged: bool, plain_llama, resident, tiny
) -> None:
    used = plain_llama if merged else resident
    jobs = jobs_of(used, tiny, 4)
    huge = tiny.start(used, b=1.0) * np.float32(1e25)
    jobs[1] = replace(jobs[1], adapter=huge)
    together = train_cohort(used, jobs, SETTINGS, 0)
    assert together[1].failure == "loss_not_finite"
    assert together[1].adapter is None
    assert together[1].metrics == {}
    assert_same(used, together, train(used, jobs, SETTINGS, 0))


def test_all_fail(plain_llama, tiny) -> None:
    huge = tiny.start(plain_llama, b=1.0) * np.float32(1e25)
    jobs = [replace(j, adapter=huge) for j in jobs_of(plain_llama, tiny, 3)]
    found = train_cohort(plain_llama, jobs, SETTINGS, 0)
    assert [r.failure for r in found] == ["loss_not_finite"] * 3


def test_clipping_is_per_client(resident, tiny) -> None:
    settings = replace(SETTINGS, max_grad_norm=0.05)
    jobs = jobs_of(resident, tiny)
    together = train_cohort(resident, jobs, settings, 0)
    norms = [r.metrics["grad_norm"] for r in together]
    assert max(norms) > 0.05  # something is clipped
    assert_same(resident, together, train(resident, jobs, settings, 0))
    off = replace(SETTINGS, max_grad_norm=0.0)
    assert_same(resident, train_cohort(resident, jobs, off, 0), train(resident, jobs, off, 0))


def test_recomputed_activations(tiny, tmp_path: Path) -> None:
    resident = model(tiny.save("llama", tmp_path), gradient_checkpointing="on")
    jobs = jobs_of(resident, tiny, 3)
    together = train_cohort(resident, jobs, SETTINGS, 0)
    assert_same(resident, together, train(resident, jobs, SETTINGS, 0))


def test_bfloat16_base_learns_the_same_thing_roughly(tiny, tmp_path: Path) -> None:
    resident = model(tiny.save("llama", tmp_path), dtype="bfloat16")
    jobs = jobs_of(resident, tiny, 3)
    for got, expected in zip(
        train_cohort(resident, jobs, SETTINGS, 0), train(resident, jobs, SETTINGS, 0), strict=True
    ):
        assert got.failure == ""
        assert got.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=0.05)


def test_same_cohort_same_bytes_and_every_size_gives_the_same_in_order(resident, tiny) -> None:
    jobs = jobs_of(resident, tiny, 5)
    once, again = (train_cohort(resident, jobs, SETTINGS, 0) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert a.adapter.tobytes() == b.adapter.tobytes()
        assert a.metrics == b.metrics
    for size in (1, 2, 4):
        settings = replace(SETTINGS, cohort_size=size)
        found = train_cohort(resident, jobs, settings, 0)
        assert [r.client for r in found] == [j.client for j in jobs]
        assert_same(resident, found, once)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("count", [4, 11])
def test_no_bit_depends_on_the_threads_of_merged_cohorts(count: int, plain_llama, tiny) -> None:
    """Large enough that torch would cut it, in one cohort and in several."""
    settings = replace(SETTINGS, batch_size=32)
    jobs = [
        replace(j, data=tiny.text_like(40, seed=k))
        for k, j in enumerate(jobs_of(plain_llama, tiny, count, steps=3))
    ]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(train_cohort(plain_llama, jobs, settings, 0))
            assert threads_of_a_new_thread() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(plain_llama, found[0], train(plain_llama, jobs, settings, 0))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.adapter.tobytes() == b.adapter.tobytes()
            assert a.metrics == b.metrics


def test_an_error_on_a_thread_ends_the_work_and_leaves_threads_as_they_were(
    plain_llama, tiny, monkeypatch
) -> None:
    jobs = jobs_of(plain_llama, tiny, 11)
    monkeypatch.setattr("fedalign.training.cohort._step", lambda *_: 1 / 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            train_cohort(plain_llama, jobs, SETTINGS, 0)
        assert threads_of_a_new_thread() == 2
    finally:
        torch.set_num_threads(before)


def test_cohorts_side_by_side_are_at_least_two_of_at_least_four(plain_llama, monkeypatch) -> None:
    given = {1: 4, 8: 4, 9: 5, 16: 8, 32: 16, 64: 16, 1000: 16}
    assert {jobs: side_by_side(plain_llama, jobs) for jobs in given} == given
    monkeypatch.setattr("fedalign.training.cohort_plan.MEMORY", 10_000_000)
    assert 1 <= side_by_side(plain_llama, 1000) < 16
    running, most, lock = [0], [0], threading.Lock()

    def work(chosen: list[int]) -> list[int]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return chosen

    before = torch.get_num_threads()
    torch.set_num_threads(32)
    try:
        found = in_cohorts(plain_llama, SETTINGS, range(100), work)
    finally:
        torch.set_num_threads(before)
    assert found == {k: k for k in range(100)}
    assert 1 < most[0] <= 8


def test_activations_beyond_float32_are_a_recorded_failure(plain_llama, tiny) -> None:
    """Their norm is 0, and so would their gradient be: a client that looks as if it were done."""
    jobs = jobs_of(plain_llama, tiny, 3)
    far = tiny.start(plain_llama, seed=1, b=0.05) * np.float32(1e5)
    jobs[1] = replace(jobs[1], adapter=far)
    together = train_cohort(plain_llama, jobs, SETTINGS, 0)
    assert together[1].failure == "gradient_not_finite"
    others = [0, 2]
    apart = train(plain_llama, [jobs[k] for k in others], SETTINGS, 0)
    assert_same(plain_llama, [together[k] for k in others], apart)


def test_tokens_are_those_of_distinct_rows(plain_llama, tiny) -> None:
    one = tiny.survey_like(2, seed=0)
    twice = TrainingSet(one.prompts * 2, one.labels * 2)
    jobs = [replace(j, data=twice) for j in jobs_of(plain_llama, tiny, 2)]
    together = train_cohort(plain_llama, jobs, SETTINGS, 0)
    apart = train(plain_llama, jobs, SETTINGS, 0)
    assert [r.metrics["tokens"] for r in together] == [r.metrics["tokens"] for r in apart]


def test_one_position_a_row_stays_so_where_clients_have_fewer_rows(tiny) -> None:
    laid = [lay_out(tiny.survey_like(n, seed=n).prompts) for n in (4, 1, 3)]
    batch = collate(
        [[Question(c, rows, NO_PAIRS, None) for rows in own] for c, own in enumerate(laid)],
        torch.device("cpu"),
    )
    assert (batch.positions // batch.rows.shape[1]).tolist() == list(range(12))


def test_jobs_that_cannot_run_are_refused_before_anything_is_done(resident, tiny) -> None:
    jobs = jobs_of(resident, tiny, 2)
    with pytest.raises(WireError, match="adapter_all_zero"):
        train_cohort(
            resident,
            [jobs[0], replace(jobs[1], adapter=np.zeros_like(jobs[1].adapter))],
            SETTINGS,
            0,
        )
    for reason, adapter in (
        ("adapter_size", jobs[1].adapter[:-1]),
        ("adapter_dtype", jobs[1].adapter.astype(np.float64)),
        ("adapter_not_finite", np.full_like(jobs[1].adapter, np.nan)),
    ):
        with pytest.raises(WireError, match=reason):
            train_cohort(resident, [jobs[0], replace(jobs[1], adapter=adapter)], SETTINGS, 0)
    assert train_cohort(resident, [], SETTINGS, 0) == []


def test_the_model_is_left_as_it_was(resident, tiny) -> None:
    layers = [m for m in resident.peft.modules() if "forward" in m.__dict__]
    row = torch.tensor([[1, 9, 30, 31, 44]])
    resident.load(tiny.start(resident, b=0.1))
    before = resident.network(input_ids=row).logits.detach().clone()
    train_cohort(resident, jobs_of(resident, tiny), SETTINGS, 0)
    assert [m for m in resident.peft.modules() if "forward" in m.__dict__] == layers
    assert torch.equal(resident.network(input_ids=row).logits, before)


def test_tokens_that_are_regrouped_are_refused(resident, tiny) -> None:
    forward = StackedLayers(resident)
    jobs = jobs_of(resident, tiny, 2)
    forward.begin(stack_of(resident, jobs))
    with (
        forward.layers(),
        pytest.raises(ConfigError, match=r"cannot be cut by 2 clients.*cohort-size = 1"),
    ):
        resident.network(input_ids=torch.tensor([[1, 5, 9]]))


@pytest.mark.parametrize("data", ["survey_like", "text_like"])
def test_merged_logits_are_the_models_own(data: str, plain_llama, tiny) -> None:
    jobs = [
        replace(j, data=getattr(tiny, data)(3, seed=k))
        for k, j in enumerate(jobs_of(plain_llama, tiny, 3))
    ]
    stack = stack_of(plain_llama, jobs)
    step = [
        [Question(c, rows, job.data.pairs[k], None) for k, rows in enumerate(job.data.rows)]
        for c, job in enumerate(jobs)
    ]
    (part,) = in_passes(step, 10**6)
    batch = collate(part, plain_llama.device)
    merged, stacked = cohort_llama.MergedLlama(plain_llama), StackedLayers(plain_llama)
    with torch.no_grad():
        merged.begin(stack)
        stacked.begin(stack)
        a, b = merged.logits(batch), stacked.logits(batch)
    torch.testing.assert_close(a, b, atol=6e-5, rtol=1e-5)


@pytest.mark.parametrize("data", ["survey_like", "text_like"])
@pytest.mark.parametrize("targets", ["all-linear", "k_proj,o_proj,up_proj"])
@pytest.mark.parametrize("most", [10**6, 64])
def test_merged_gradients_are_the_models_own(
    most: int, targets: str, data: str, plain_llama, tiny
) -> None:
    """One step's gradient of every factor, which no optimiser has magnified yet."""
    resident = model(plain_llama.folder, targets=targets)
    jobs = [
        replace(j, data=getattr(tiny, data)(3, seed=k))
        for k, j in enumerate(jobs_of(resident, tiny, 3))
    ]
    step = [
        [Question(c, rows, job.data.pairs[k], None) for k, rows in enumerate(job.data.rows)]
        for c, job in enumerate(jobs)
    ]
    found = []
    for forward in (cohort_llama.MergedLlama(resident), StackedLayers(resident)):
        stack = stack_of(resident, jobs)
        for _ in range(2):  # what an earlier step left must not count
            stack.gradient.zero_()
            forward.begin(stack)
            for part in in_passes(step, most):
                batch = collate(part, resident.device)
                logps = token_logps(forward.logits(batch), batch.slot, batch.token)
                forward.backward((logps * torch.linspace(0.5, 2.0, len(logps))).sum())
            forward.finish()
        found.append(stacked_factors(stack.gradient, resident.layout))
    for name, expected in found[1].items():
        error = torch.linalg.vector_norm(found[0][name] - expected, dim=(1, 2))
        assert (error <= 2e-5 * torch.linalg.vector_norm(expected, dim=(1, 2))).all(), name
        assert (expected != 0).any(dim=(1, 2)).all()


def stack_of(resident: ResidentModel, jobs: list[TrainJob]) -> AdapterStack:
    return AdapterStack(
        [j.adapter for j in jobs],
        [j.learning_rate for j in jobs],
        resident.layout,
        resident.device,
        resident.frozen_a,
    )


def test_merging_stands_for_plain_small_llamas_alone(
    plain_llama, resident, tiny, tmp_path: Path, monkeypatch
) -> None:
    assert isinstance(forward_of(plain_llama), cohort_llama.MergedLlama)
    assert not cohort_llama.supported(resident)  # its heads share keys
    assert not cohort_llama.supported(model(tiny.save("qwen3", tmp_path / "q")))
    assert not cohort_llama.supported(model(plain_llama.folder, dtype="bfloat16"))
    assert not cohort_llama.supported(model(plain_llama.folder, gradient_checkpointing="on"))
    monkeypatch.setattr(cohort_llama, "MOST_WEIGHTS", 100)
    assert isinstance(forward_of(plain_llama), StackedLayers)


def test_size_is_what_was_asked_or_what_fits(plain_llama, monkeypatch) -> None:
    assert cohort_size(plain_llama, replace(SETTINGS, cohort_size=7)) == 7
    assert cohort_size(plain_llama, SETTINGS) == 64
    monkeypatch.setattr("fedalign.training.cohort_plan.MEMORY", 10_000_000)
    assert 1 < cohort_size(plain_llama, SETTINGS) < 64
    monkeypatch.setattr("fedalign.training.cohort_plan.MEMORY", 1)
    assert cohort_size(plain_llama, SETTINGS) == 1


def test_passes_hold_every_prompt_once_longest_first(tiny) -> None:
    data = tiny.survey_like(9, seed=3)
    step = [
        [Question(c, p, data.pairs[k], None) for k, p in enumerate(lay_out(data.prompts[c:]))]
        for c in range(3)
    ]
    passes = in_passes(step, 3 * 2 * 12)
    assert len(passes) > 2
    for c in range(3):
        seen = [x for part in passes for x in part[c]]
        assert sorted(map(id, seen)) == sorted(map(id, step[c]))
        lengths = [x.rows.longest for x in seen]
        assert lengths == sorted(lengths, reverse=True)
    for part in passes:
        batch = collate(part, torch.device("cpu"))
        assert batch.rows.shape[0] == 3 * max(map(len, part))
        padded = batch.rows.numel()
        assert padded <= 3 * 2 * 12 or max(map(len, part)) == 1
    assert cohort_batch.PASS_TOKENS >= 1024
