"""Both engines take the same steps on the same batches, and TRL's own losses equal ours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedalign.config import LocalConfig, ModelConfig
from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.training.batch import collate, completion_logps
from fedalign.training.dpo import differences, pair_losses
from fedalign.training.loop import TrainJob, train
from fedalign.training.reference import reference_logps
from fedalign.training.trl_engine import _trainer, rows_of, train_trl
from fedalign.training.trl_session import snapshots

SETTINGS = LocalConfig(reference="base", labels="hard", engine="trl", batch_size=4)


def make_job(model: ResidentModel, tiny, client: str = "c", **changes) -> TrainJob:
    data = tiny.text_like(12, seed=len(client))
    values = reference_logps(model, data.prompts, "base")
    start = tiny.start(model, b=0.02)
    return replace(TrainJob(client, start, data, values, 10, 5e-3, (1, client)), **changes)


def trl_loss(model: ResidentModel, job: TrainJob, settings: LocalConfig) -> tuple[float, dict]:
    """Return TRL's loss and logged log-probabilities on all rows of a job, without a step."""
    with _trainer(model, job, settings, 0, snapshots(model)) as trainer:
        model.load(job.adapter)
        inputs = trainer.data_collator(rows_of(job))
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model, inputs))
        split = "train" if trainer.model.training else "eval"
        return loss, {k: v[-1] for k, v in trainer._metrics[split].items()}


@pytest.mark.parametrize(("loss", "noise"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.1)])
def test_same_loss_and_log_probabilities_on_one_batch(resident, tiny, loss, noise) -> None:
    settings = replace(SETTINGS, loss=loss, label_noise=noise, beta=0.3)
    job = make_job(resident, tiny)
    theirs, logged = trl_loss(resident, job, settings)

    resident.load(job.adapter)
    batch = collate(job.data.prompts)
    with torch.no_grad():
        logps = completion_logps(resident.network, batch)
    first = torch.arange(0, len(logps), 2)
    q = torch.tensor([labels[0].q for labels in job.data.labels])
    reference = torch.from_numpy(job.reference_logps)
    delta = differences(logps, reference, batch.lengths, first, first + 1, settings)
    ours = pair_losses(delta, q, settings).mean()
    assert theirs == pytest.approx(float(ours), abs=1e-5)
    chosen = torch.where(q == 1, logps[first], logps[first + 1])
    assert logged["logps/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-5)


def test_same_log_probability_of_every_sequence(resident, tiny) -> None:
    job = make_job(resident, tiny)
    resident.load(job.adapter)
    with torch.no_grad():
        ours = completion_logps(resident.network, collate(job.data.prompts))
    with _trainer(resident, job, SETTINGS, 0, snapshots(resident)) as trainer:
        resident.load(job.adapter)
        inputs = trainer.data_collator(rows_of(job))
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad():
            out = trainer.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        won, lost = out.log_probs.sum(1).chunk(2)
    for k, labels_k in enumerate(job.data.labels):
        pair = (won[k], lost[k]) if labels_k[0].q == 1 else (lost[k], won[k])
        np.testing.assert_allclose(ours[2 * k : 2 * k + 2], torch.stack(pair), atol=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_same_adapter_after_ten_steps(resident, tiny, loss) -> None:
    settings = replace(SETTINGS, loss=loss)
    job = make_job(resident, tiny, snapshots=(3, 10))
    ours = train(resident, [job], settings, 0)[0]
    theirs = train_trl(resident, [job], settings, 0)[0]
    assert ours.adapter is not None
    assert theirs.adapter is not None
    moved = np.abs(ours.adapter - job.adapter).max()
    assert moved > 0.02
    np.testing.assert_allclose(theirs.adapter, ours.adapter, atol=1e-4)
    np.testing.assert_allclose(theirs.snapshots[3], ours.snapshots[3], atol=1e-4)
    assert np.array_equal(theirs.snapshots[10], theirs.adapter)
    assert theirs.steps == ours.steps == 10
    names = ["loss", "loss_first", "loss_last", "chosen_logp", "grad_norm"]
    if loss == "sigmoid":  # for ipo TRL logs margins without length normalisation
        names.append("margin")
    for name in names:
        assert theirs.metrics[name] == pytest.approx(ours.metrics[name], rel=1e-3), name


def test_jobs_do_not_leak_into_each_other_or_into_the_model(resident, tiny) -> None:
    """Adam moments, the forward patch and the copied reference must all be gone."""
    one, two = make_job(resident, tiny, "a"), make_job(resident, tiny, "bb", steps=4)
    place = resident.parameters_flat.data_ptr()
    before = train(resident, [one], SETTINGS, 0)[0]
    together = train_trl(resident, [one, two, one], SETTINGS, 0)
    alone = train_trl(resident, [two], SETTINGS, 0)[0]
    assert np.array_equal(together[0].adapter, together[2].adapter)
    assert np.array_equal(together[1].adapter, alone.adapter)
    assert [r.steps for r in together] == [10, 4, 10]
    assert list(resident.peft.peft_config) == ["default"]
    assert "forward" not in vars(resident.network)
    assert not resident.network.training
    assert resident.parameters_flat.data_ptr() == place
    after = train(resident, [one], SETTINGS, 0)[0]
    assert np.array_equal(before.adapter, after.adapter)


def test_frozen_a_stays_frozen(llama_folder, tiny) -> None:
    config = ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu")
    model = ResidentModel(config, frozen_a=True)
    job = make_job(model, tiny)
    result = train_trl(model, [job], SETTINGS, 0)[0]
    frozen = model.frozen_mask()
    assert np.array_equal(result.adapter[frozen], job.adapter[frozen])
    assert not np.array_equal(result.adapter[~frozen], job.adapter[~frozen])
    ours = train(model, [job], SETTINGS, 0)[0]
    np.testing.assert_allclose(result.adapter, ours.adapter, atol=1e-4)


def test_a_loss_that_is_not_finite_is_a_recorded_failure(resident, tiny) -> None:
    huge = (tiny.start(resident, b=1.0) * 1e25).astype(np.float32)
    jobs = [make_job(resident, tiny, "bad", adapter=huge), make_job(resident, tiny, "fine")]
    bad, fine = train_trl(resident, jobs, SETTINGS, 0)
    assert bad.failure == "loss_not_finite"
    assert bad.adapter is None
    assert fine.failure == ""


def test_telemetry_is_off(resident, tiny, monkeypatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    train_trl(resident, [make_job(resident, tiny, steps=1)], SETTINGS, 0)
    assert constants.HF_HUB_DISABLE_TELEMETRY


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": "conservative", "label_noise": 0.1}, "conservative"),
        ({"loss": "ipo", "length_normalised": False}, "length-normalised"),
        ({"reference": "none"}, "reference"),
    ],
)
def test_what_trl_cannot_do_is_refused(resident, tiny, changes, named) -> None:
    with pytest.raises(ConfigError, match=named):
        train_trl(resident, [make_job(resident, tiny)], replace(SETTINGS, **changes), 0)


def test_vote_shares_are_refused(resident, tiny) -> None:
    data = tiny.survey_like(4)
    values = reference_logps(resident, data.prompts, "base")
    job = make_job(resident, tiny, data=data, reference_logps=values)
    with pytest.raises(ConfigError, match="vote share"):
        train_trl(resident, [job], SETTINGS, 0)


def test_survey_pairs_share_their_prompt(resident, tiny) -> None:
    data = tiny.survey_like(4, hard=True)
    values = reference_logps(resident, data.prompts, "base")
    job = make_job(resident, tiny, data=data, reference_logps=values)
    rows = rows_of(job)
    assert len(rows) == 12
    label = data.labels[2][1]
    won, lost = (label.i, label.j) if label.q == 1 else (label.j, label.i)
    assert rows[7]["chosen_ids"] == list(data.prompts[2].completions[won])
    assert rows[7]["ref_rejected_logps"] == float(values[8 + lost])
    result = train_trl(resident, [job], SETTINGS, 0)[0]
    assert result.failure == ""


def test_trl_is_imported_by_this_engine_alone(root) -> None:
    import subprocess
    import sys

    code = (
        "import sys, fedalign.training.loop, fedalign.training.score, fedalign.training.trl_engine;"
        "assert not {'trl', 'datasets'} & set(sys.modules), 'trl or datasets was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
