"""An exported folder loads in plain PEFT and transformers and gives the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedalign.errors import FedalignError
from fedalign.export import adapter_config, export_adapter, public_base_name

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK, ALPHA = 4, 6.0


def base_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def adapter() -> dict[str, np.ndarray]:
    shapes = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 24)}
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(2):
        for module, (out, into) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(RANK, into)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(out, RANK)).astype(np.float32)
    return tensors


def export(folder: Path, tensors: dict[str, np.ndarray], **changes) -> None:
    given = {
        "base_name": "/home/someone/models/tiny-llama",
        "rank": RANK,
        "alpha": ALPHA,
        "targets": TARGETS,
        "card": "# a card\n",
    }
    export_adapter(folder, tensors, **{**given, **changes})


def expected_logits(ids):
    """The update added to the base weights by hand: W + alpha / rank * B A."""
    import torch

    model = base_model()
    tensors = adapter()
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")]
                update = torch.from_numpy(b @ a) * (ALPHA / RANK)
                model.get_submodule(module).weight.add_(update)
        return model(ids).logits


def test_peft_and_transformers_load_it_and_agree(tmp_path):
    import torch
    from peft import PeftModel

    export(tmp_path / "adapter", adapter())
    ids = torch.arange(1, 13).reshape(2, 6)
    expected = expected_logits(ids)
    with torch.no_grad():
        untouched = base_model()(ids).logits
        by_peft = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()(ids).logits
        model = base_model()
        model.load_adapter(str(tmp_path / "adapter"))
        by_transformers = model.eval()(ids).logits
    assert (expected - untouched).abs().max() > 1e-3
    torch.testing.assert_close(by_peft, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_transformers, by_peft, rtol=0, atol=0)


def test_equal_to_the_adapter_set_directly(tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    export(tmp_path / "adapter", adapter())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0)
    direct = get_peft_model(base_model(), config)
    set_peft_model_state_dict(direct, {n: torch.from_numpy(t) for n, t in adapter().items()})
    ids = torch.arange(1, 13).reshape(2, 6)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(direct.eval()(ids).logits, loaded.eval()(ids).logits)


def test_the_config_holds_only_keys_peft_knows_and_no_path(tmp_path):
    from peft import LoraConfig

    export(tmp_path / "adapter", adapter())
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert "someone" not in text
    config = json.loads(text)
    assert list(config) == sorted(config)
    loaded = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    for key, value in config.items():
        got = getattr(loaded, key)
        got = sorted(got) if key == "target_modules" else got
        assert got == value, key


def test_same_input_same_bytes_and_whole_folder_only(tmp_path):
    for name in ("a", "b"):
        export(tmp_path / name, dict(reversed(adapter().items())) if name == "b" else adapter())
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_earlier_export_is_replaced_but_nothing_else_is(tmp_path):
    export(tmp_path / "a", adapter())
    export(tmp_path / "a", adapter(), card="second")
    assert (tmp_path / "a" / "README.md").read_text() == "second"
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(FedalignError, match=r"thesis\.txt"):
        export(tmp_path / "a", adapter())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_failed_write_leaves_the_old_export(tmp_path, monkeypatch):
    export(tmp_path / "a", adapter(), card="first")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(FedalignError, match="No space left"):
        export(tmp_path / "a", adapter(), card="second")
    assert (tmp_path / "a" / "README.md").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def broken(change: str) -> dict[str, np.ndarray]:
    tensors = adapter()
    first = min(tensors)
    match change:
        case "nan":
            tensors[first] = np.full_like(tensors[first], np.nan)
        case "partner":
            del tensors[first]
        case "name":
            tensors["base_model.model.lm_head.weight"] = tensors[first]
        case "rank":
            tensors = {n: (t[:3] if "lora_A" in n else t[:, :3]) for n, t in tensors.items()}
        case "target":
            tensors["x.up_proj.lora_A.weight"] = np.zeros((RANK, 2), np.float32)
            tensors["x.up_proj.lora_B.weight"] = np.zeros((2, RANK), np.float32)
        case "unused":
            tensors = {n: t for n, t in tensors.items() if "down_proj" not in n}
        case "empty":
            tensors = {}
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "not finite"),
        ("partner", "no partner"),
        ("name", "no adapter tensor"),
        ("rank", "rank 4 needs"),
        ("target", "none of the target modules"),
        ("unused", "down_proj have no tensors"),
        ("empty", "without tensors"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, change, message):
    with pytest.raises(FedalignError, match=message):
        export(tmp_path / "a", broken(change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("pocket", "fedalign-pocket"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/tiny/", "tiny"),
        ("~/models/tiny", "tiny"),
        ("./tiny", "tiny"),
        ("C:\\Users\\someone\\tiny", "tiny"),
        ("/", "local-model"),
    ],
)
def test_public_base_name(given, shown):
    assert public_base_name(given) == shown


def test_alpha_keeps_its_value():
    assert adapter_config("pocket", 8, 16.0, ["q_proj"])["lora_alpha"] == 16
    assert adapter_config("pocket", 8, 1.5, ["q_proj"])["lora_alpha"] == 1.5


def test_no_heavy_import(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; import fedalign.export as e\n"
        "t = {'m.q.lora_A.weight': np.ones((2, 3)), 'm.q.lora_B.weight': np.ones((3, 2))}\n"
        "e.export_adapter(Path(sys.argv[1]), t, base_name='pocket', rank=2, alpha=4.0,"
        " targets=['q'], card='x')\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'ray', 'flwr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=ROOT, check=True)
    assert (tmp_path / "a" / "adapter_config.json").exists()
