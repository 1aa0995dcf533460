"""PEFT's own ways to add adapters, as an oracle: `cat` is the exact sum, `svd` its truncation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from fedalign.aggregation.adapters import A_SUFFIX, B_SUFFIX, Contribution, aggregate, modules

WEIGHTS = [0.5, 0.3, 0.2]
RANK = 4


class Net(torch.nn.Module):
    """Two linear layers of unequal sides, so that a transposition cannot hide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(10, 24, bias=False)
        self.second = torch.nn.Linear(24, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def numpy_of(model, name):
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {k: v.detach().clone().numpy() for k, v in state.items()}


@pytest.fixture(scope="module")
def peft_model():
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["first", "second"])
    model = get_peft_model(Net(), config, adapter_name="a0")
    for name in ("a1", "a2"):
        model.add_adapter(name, config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn_like(p))
    names = ["a0", "a1", "a2"]
    model.add_weighted_adapter(names, WEIGHTS, "cat", combination_type="cat")
    model.add_weighted_adapter(names, WEIGHTS, "svd", combination_type="svd", svd_rank=RANK)
    return model


def delta(model, name, layer):
    return getattr(model.base_model.model, layer).get_delta_weight(name).detach().double().numpy()


def ours(tensors, module):
    """Scale alpha / r = 2, as PEFT applies it."""
    return 2.0 * tensors[module + B_SUFFIX].astype(np.float64) @ tensors[module + A_SUFFIX]


def test_same_update_as_peft(peft_model):
    clients = [numpy_of(peft_model, f"a{i}") for i in range(3)]
    cs = [
        Contribution(f"c{i}", f"g{i}", w, t)
        for i, (w, t) in enumerate(zip(WEIGHTS, clients, strict=True))
    ]
    got = aggregate("product", cs, clients[0])
    for module in modules(clients[0]):
        layer = module.rsplit(".", 1)[1]
        exact, best = delta(peft_model, "cat", layer), delta(peft_model, "svd", layer)
        mine = ours(got.tensors, module)
        size = np.linalg.norm(exact)
        assert np.linalg.norm(mine - best) < 1e-5 * size
        assert np.linalg.norm(mine - exact) / size == pytest.approx(got.discarded[module], abs=1e-5)


def test_the_result_loads_into_peft(peft_model):
    from peft import set_peft_model_state_dict

    cs = [Contribution("c", "g", 1.0, numpy_of(peft_model, "a1"))]
    got = aggregate("product", cs, cs[0].tensors).tensors
    before = {layer: delta(peft_model, "a1", layer) for layer in ("first", "second")}
    tensors = {n: torch.from_numpy(x) for n, x in got.items()}
    result = set_peft_model_state_dict(peft_model, tensors, adapter_name="a0")
    assert not result.unexpected_keys
    for layer, was in before.items():
        assert np.allclose(delta(peft_model, "a0", layer), was, atol=1e-5)
