"""Log-probabilities and training on four families, random weights, against a plain computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fedalign.config import LocalConfig, ModelConfig
from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.training.batch import Prompt, collate, completion_logps, logits_at
from fedalign.training.loop import TrainJob, train

KINDS = ["llama", "qwen3", "gemma2", "gpt2"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny, tmp_path_factory) -> ResidentModel:
    folder = tiny.save(request.param, tmp_path_factory.mktemp(request.param))
    return ResidentModel(ModelConfig(name=str(folder), rank=4, alpha=8.0, device="cpu"))


def plain_logps(model: ResidentModel, prompt: Prompt) -> list[float]:
    """Return summed log-probabilities, one unpadded row a completion, all logits, no sharing."""
    out = []
    for completion in prompt.completions:
        row = torch.tensor([prompt.tokens + completion])
        with torch.no_grad():
            logps = model.network(input_ids=row).logits[0].double().log_softmax(-1)
        first = len(prompt.tokens) - 1
        out.append(sum(float(logps[first + k, t]) for k, t in enumerate(completion)))
    return out


def mixed_prompts(tiny) -> list[Prompt]:
    letters = tiny.survey_like(5, seed=1).prompts
    texts = tiny.text_like(6, seed=2).prompts
    shared = Prompt((1, 9, 8, 7), ((30, 31, 2), (30, 31, 40), (30,), (41,)))
    return [*letters, *texts, shared]


def test_batched_log_probabilities_equal_single_rows(model, tiny) -> None:
    model.load(tiny.start(model, b=0.3))
    prompts = mixed_prompts(tiny)
    batch = collate(prompts)
    with torch.no_grad():
        got = completion_logps(model.network, batch)
    expected = [x for p in prompts for x in plain_logps(model, p)]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6, atol=2e-6)


def test_pad_id_does_not_matter(model, tiny) -> None:
    model.load(tiny.start(model, b=0.3))
    batch = collate(mixed_prompts(tiny))
    with torch.no_grad():
        before = completion_logps(model.network, batch)
        used = torch.zeros_like(batch.rows, dtype=torch.bool)
        for prompt in mixed_prompts(tiny):
            for completion in prompt.completions:
                ids = torch.tensor(prompt.tokens + completion[:-1])
                same = (batch.rows[:, : len(ids)] == ids).all(1)
                used[same, : len(ids)] = True
        batch.rows[~used] = 17
        after = completion_logps(model.network, batch)
    np.testing.assert_allclose(before.numpy(), after.numpy(), atol=1e-6)


def test_only_scored_positions_reach_the_head(model, tiny) -> None:
    prompts = tiny.survey_like(5).prompts
    batch = collate(prompts)
    assert batch.rows.shape[0] == 5  # four one-letter answers share the prompt's row
    with torch.no_grad():
        logits = logits_at(model.network, batch)
        direct = torch.stack(
            [model.network(input_ids=torch.tensor([p.tokens])).logits[0, -1] for p in prompts]
        )
    assert logits.shape == direct.shape
    np.testing.assert_allclose(logits.numpy(), direct.numpy(), rtol=2e-6, atol=2e-5)


def test_untrained_adapter_is_the_base(model, tiny) -> None:
    """At B = 0 policy and reference agree exactly, so the first DPO loss is ln 2."""
    model.load(tiny.start(model))
    batch = collate(tiny.text_like(6).prompts)
    with torch.no_grad():
        policy = completion_logps(model.network, batch)
    with model.reference("base"):
        reference = completion_logps(model.network, batch)
    assert torch.equal(policy, reference)


def test_training_moves_every_factor(model, tiny) -> None:
    adapter = tiny.start(model)
    job = TrainJob("c", adapter, tiny.text_like(8), None, 3, 1e-2, (1, "c"))
    result = train(model, [job], LocalConfig(batch_size=8), seed=0)[0]
    assert result.failure == ""
    assert result.adapter is not None
    assert result.metrics["grad_norm"] > 0
    before, after = model.unpack(adapter), model.unpack(result.adapter)
    assert all(not np.array_equal(before[k], after[k]) for k in before)


def test_plain_peft_loads_an_exported_adapter(model, tiny, tmp_path) -> None:
    import json

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = tiny.start(model, b=0.3)
    save_file(model.unpack(adapter), tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": list(model.targets),
        "fan_in_fan_out": "c_attn" in model.targets,
        "inference_mode": True,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(model.folder)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    model.load(adapter)
    row = torch.tensor([[1, 9, 30, 31, 44]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=row).logits, model.network(input_ids=row).logits)


def test_targets_are_explicit_sorted_and_never_the_head(model) -> None:
    assert list(model.targets) == sorted(model.targets)
    assert "lm_head" not in model.targets
    assert [name for name, _ in model.layout] == sorted(name for name, _ in model.layout)


def test_output_head_as_target_is_refused(model) -> None:
    with pytest.raises(ConfigError, match="output head"):
        ResidentModel(ModelConfig(name=str(model.folder), rank=4, targets="lm_head", device="cpu"))


def test_unknown_target_names_the_linear_layers(model) -> None:
    with pytest.raises(ConfigError, match=r"names no linear layer.*" + model.targets[0]):
        ResidentModel(ModelConfig(name=str(model.folder), rank=4, targets="nope", device="cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_what_the_processor_gives(model, tiny, dtype) -> None:
    config = ModelConfig(name=str(model.folder), rank=4, alpha=8.0, device="cuda", dtype=dtype)
    other = ResidentModel(config)
    adapter, data = tiny.start(model, b=0.05), tiny.text_like(8)
    job = TrainJob("c", adapter, data, None, 5, 2e-3, (1, "c"))
    here, there = (train(m, [job], LocalConfig(batch_size=8), 0)[0] for m in (model, other))
    assert here.adapter is not None
    assert there.adapter is not None
    if dtype == "float32":
        np.testing.assert_allclose(there.adapter, here.adapter, atol=1e-3)
    assert there.metrics["loss_first"] == pytest.approx(here.metrics["loss_first"], rel=0.1)
