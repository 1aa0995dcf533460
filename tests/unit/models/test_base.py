"""The resident model: strict loading, fresh copies, a reference that restores everything."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from fedalign.config import LocalConfig, ModelConfig
from fedalign.errors import ConfigError, WireError
from fedalign.models.base import ResidentModel
from fedalign.models.source import base_revision
from fedalign.training.loop import TrainJob, train
from fedalign.training.score import score_survey


def logits(model: ResidentModel) -> torch.Tensor:
    with torch.no_grad():
        return model.network(input_ids=torch.tensor([[1, 9, 30, 31, 44]])).logits


def flags(model: ResidentModel) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.peft.named_parameters() if "lora_" in n}


@pytest.fixture
def frozen(llama_folder) -> ResidentModel:
    config = ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu")
    return ResidentModel(config, frozen_a=True)


def test_keys_are_those_peft_saves(resident) -> None:
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(resident.peft)
    assert [name for name, _ in resident.layout] == sorted(saved)
    assert all(tuple(saved[n].shape) == shape for n, shape in resident.layout)


def test_load_and_read_round_trip_reaches_the_layers(resident, tiny) -> None:
    from peft import get_peft_model_state_dict

    flat = tiny.start(resident, b=0.3)
    resident.load(flat)
    assert np.array_equal(resident.read(), flat)
    saved = get_peft_model_state_dict(resident.peft)
    for name, tensor in resident.unpack(flat).items():
        assert np.array_equal(saved[name].detach().numpy(), tensor)


def test_loading_changes_the_output_and_zero_b_does_not(resident, tiny) -> None:
    base = logits(resident)
    resident.load(tiny.start(resident))
    assert torch.equal(logits(resident), base)
    resident.load(tiny.start(resident, b=0.3))
    assert not torch.allclose(logits(resident), base)


def test_what_was_read_does_not_change_with_training(resident, tiny) -> None:
    resident.load(tiny.start(resident))
    kept = resident.read()
    before = kept.copy()
    train(
        resident,
        [TrainJob("c", kept, tiny.survey_like(), None, 2, 1e-2, (1, "c"))],
        LocalConfig(),
        seed=0,
    )
    assert np.array_equal(kept, before)
    assert not np.array_equal(resident.read(), before)


@pytest.mark.parametrize("bad", ["short", "nan", "double"])
def test_strict_load_leaves_the_adapter_as_it_was(resident, tiny, bad) -> None:
    good = tiny.start(resident, b=0.1)
    resident.load(good)
    wrong = {
        "short": good[:-1],
        "nan": np.where(np.arange(len(good)) == 3, np.nan, good).astype(np.float32),
        "double": good.astype(np.float64),
    }[bad]
    with pytest.raises(WireError):
        resident.load(wrong)
    assert np.array_equal(resident.read(), good)


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_reference_restores_flags_adapter_and_mode_under_frozen_a(frozen, tiny, kind) -> None:
    mine, other = tiny.start(frozen, b=0.3), tiny.start(frozen, seed=5, b=0.3)
    frozen.load(mine)
    before, own = flags(frozen), logits(frozen)
    assert not any(on for name, on in before.items() if ".lora_A." in name)
    assert all(on for name, on in before.items() if ".lora_B." in name)
    with frozen.reference("base" if kind == "base" else other):
        inside = logits(frozen)
        assert not torch.is_grad_enabled()
    assert not torch.allclose(inside, own)
    assert flags(frozen) == before
    assert np.array_equal(frozen.read(), mine)
    assert torch.equal(logits(frozen), own)
    assert torch.is_grad_enabled()


def test_reference_restores_after_an_error(frozen, tiny) -> None:
    frozen.load(tiny.start(frozen, b=0.3))
    before, adapter = flags(frozen), frozen.read()
    with pytest.raises(RuntimeError, match="inside"), frozen.reference(tiny.start(frozen)):
        raise RuntimeError("inside")
    assert flags(frozen) == before
    assert np.array_equal(frozen.read(), adapter)


def test_disable_adapter_alone_would_unfreeze(frozen) -> None:
    """The reason for the guard; if PEFT mends this, the guard may go."""
    with frozen.peft.disable_adapter():
        pass
    assert any(on for name, on in flags(frozen).items() if ".lora_A." in name)


def test_base_reference_is_the_base(resident, tiny) -> None:
    base = logits(resident)
    resident.load(tiny.start(resident, b=0.3))
    with resident.reference("base"):
        assert torch.equal(logits(resident), base)


def test_an_unknown_reference_is_refused(resident) -> None:
    with pytest.raises(ConfigError, match="round_start"), resident.reference("round_start"):
        pass


def test_revision_follows_the_weights(llama_folder, tmp_path) -> None:
    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    assert base_revision(copy) == base_revision(llama_folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert base_revision(copy) != base_revision(llama_folder)


def test_tokenizer_hash_follows_tokenisation_not_padding(llama_folder, tiny) -> None:
    from fedalign.models.source import tokenizer_hash

    tokenizer = tiny.tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a b c"], padding=True)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(tiny.tokenizer(bos=False)) != before


def test_construction_leaves_the_global_generator_alone(llama_folder) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    ResidentModel(ModelConfig(name=str(llama_folder), rank=4, device="cpu"))
    assert torch.equal(torch.rand(1), expected)


def test_dropout_in_the_model_folder_is_switched_off(tiny, tmp_path) -> None:
    folder = tiny.save("gpt2", tmp_path)  # GPT-2 has dropout 0.1 by default
    model = ResidentModel(ModelConfig(name=str(folder), rank=4, device="cpu"))
    model.network.train()
    assert torch.equal(logits(model), logits(model))


def test_longest_row_is_bounded_by_the_model(resident) -> None:
    assert resident.max_length == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "/nowhere/at/all"}, "config.json"),
        ({"rank": 33}, "rank"),
        ({"device": "tpu"}, "model.device"),
        ({"device": "cuda:99"}, "CUDA"),
    ],
)
def test_settings_that_cannot_work_are_refused(llama_folder, changes, named) -> None:
    with pytest.raises(ConfigError, match=named):
        ResidentModel(ModelConfig(**{"name": str(llama_folder), "rank": 4, **changes}))


def test_pickled_weights_are_refused(llama_folder, tmp_path) -> None:
    shutil.copytree(llama_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        ResidentModel(ModelConfig(name=str(tmp_path / "m"), device="cpu"))


def test_checkpointing_gives_the_same_adapter(llama_folder, resident, tiny) -> None:
    config = ModelConfig(
        name=str(llama_folder), rank=4, alpha=8.0, device="cpu", gradient_checkpointing="on"
    )
    other = ResidentModel(config)
    assert other.checkpointing
    assert not resident.checkpointing
    job = TrainJob("c", tiny.start(resident), tiny.survey_like(), None, 3, 1e-2, (1, "c"))
    a, b = (train(m, [job], LocalConfig(), 0)[0].adapter for m in (resident, other))
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_base_keeps_float32_factors(llama_folder, tiny) -> None:
    config = ModelConfig(name=str(llama_folder), rank=4, alpha=8.0, device="cpu", dtype="bfloat16")
    model = ResidentModel(config)
    assert model.network.get_output_embeddings().weight.dtype == torch.bfloat16
    job = TrainJob("c", tiny.start(model), tiny.survey_like(), None, 2, 1e-2, (1, "c"))
    result = train(model, [job], LocalConfig(), 0)[0]
    assert result.failure == ""
    assert result.adapter is not None
    assert result.adapter.dtype == np.float32


@pytest.mark.real_data
def test_a_published_model_loads_scores_and_trains(real_data, tiny) -> None:
    folder = real_data / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model = ResidentModel(ModelConfig(name=str(folder), device="cpu"))
    assert model.parameters == 260_032
    model.load(tiny.start(model))
    answer = score_survey(model, [("Is the sky blue?", ("yes", "no", "perhaps"))])[0]
    assert answer.probabilities.sum() == pytest.approx(1.0)
    job = TrainJob("c", model.read(), tiny.survey_like(), None, 8, 5e-3, (1, "c"))
    result = train(model, [job], LocalConfig(), 0)[0]
    assert result.failure == ""
    assert result.metrics["loss_last"] < result.metrics["loss_first"]
