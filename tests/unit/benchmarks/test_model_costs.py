"""Costs of published models: sizes as published, hand-worked counts, one layout with training."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def costs(root: Path) -> ModuleType:
    path = root / "benchmarks" / "model_costs.py"
    spec = importlib.util.spec_from_file_location("model_costs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_costs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "billions", "adapter"),
    [
        ("Qwen/Qwen3-0.6B", 0.596, 10_092_544),
        ("meta-llama/Llama-3.2-1B", 1.236, 11_272_192),
        ("google/gemma-2-2b", 2.614, 20_766_720),
    ],
)
def test_published_sizes(costs, name: str, billions: float, adapter: int) -> None:
    """Adapter by hand, rank 16: 16 * layers * the sum of (in + out) over the seven matrices."""
    config = costs.configurations()[name]
    model = costs.network(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions
    assert all(p.is_meta for p in model.parameters())
    h, i = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    by_hand = 16 * config.num_hidden_layers * (2 * (h + q) + 2 * (h + kv) + 3 * (h + i))
    entries = sum(math.prod(shape) for _, shape in costs.layout(model, 16))
    assert entries == by_hand == adapter


def test_layout_is_the_one_that_travels(costs, resident) -> None:
    from transformers import AutoConfig

    model = costs.network(AutoConfig.from_pretrained(resident.folder))
    assert costs.layout(model, 4) == resident.layout


def test_peak_follows_tensors_through_their_lives(costs) -> None:
    import torch

    x = torch.zeros(1000)
    with costs.Live() as live:
        y = x + 1  # 4000 bytes
        z = y * 2  # 8000
        assert live.now == 8000
        del y
        assert live.now == 4000
        z.mul_(3)
        view = z[:10]
        assert live.now == 4000
        z = z.double()  # 8000 more; the view holds the old one
        assert live.now == 12000
        del view
        assert live.now == 8000
    assert live.peak == 12000


def test_operations_and_memory_of_a_small_model(costs) -> None:
    """Three times the forward pass of the base, nearly all of it in its matrices."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    work = costs.Work(rank=2, batch=4, tokens=32, options=3)
    got = costs.cost("small", config, work)
    matrices = 3 * (4 * 256 * 256 + 3 * 256 * 512)
    base = got.operations - got.adapter_operations
    assert base == pytest.approx(3 * 2 * matrices * 4 * 32, rel=0.05)
    assert got.adapter == 2 * 3 * (4 * 512 + 3 * 768)
    assert got.down == got.up == 4 * got.adapter
    assert got.up_frozen_a == 4 * 2 * 3 * (4 * 256 + 2 * 512 + 256)
    assert got.training > 4 * 32 * 256 * 3 * 2  # at least the input of each layer
    assert got.memory == got.weights + got.optimiser + max(got.training, got.scoring)
    assert got.step_seconds > 0
