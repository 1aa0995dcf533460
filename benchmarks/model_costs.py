"""What a round costs on published models: bytes, GPU memory, operations, seconds, by arithmetic.

    python benchmarks/model_costs.py

Each architecture is built on torch's meta device from the published configuration (typed in below),
so nothing is downloaded and no weight exists.  On it this project's own code runs as in training:
adapter targets, wire layout, scored positions, losses, recomputed activations.

- *Parameters, bytes*: counted.
- *Operations*: counted by torch's FlopCounterMode over forward, recomputation and backward of one
  step (one multiply-add is two operations).
- *Memory*: weights in bfloat16, the float32 adapter four times (value, gradient, two Adam moments),
  the input of every layer, what autograd keeps of one layer while it is recomputed (counted), and
  the logits at scored positions four times in float32.  CUDA's own overhead is not in it.
- *Seconds*: operations divided by an assumed sustained rate.  **Arithmetic, not a measurement.**
  The adapter's operations are float32 and are divided by a float32 rate.  Launching kernels takes
  time too, which small models and small batches feel: expect two to four times as long.

The table stands in docs/models.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedalign.config import LocalConfig
from fedalign.models.base import resolve_targets
from fedalign.training.batch import Prompt, collate, completion_logps
from fedalign.training.dpo import differences, pair_losses
from fedalign.wire import Manifest

SUSTAINED = 0.3
"""Assumed share of the peak rate that is reached."""
A100_BF16, A100_FLOAT32 = 312e12, 19.5e12
"""Peak operations a second of one NVIDIA A100, from its data sheet."""
FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Work:
    """One step and one run, as the scenarios for GlobalOpinionQA have them."""

    rank: int = 16
    batch: int = 16
    """Prompts a step."""
    tokens: int = 100
    """Tokens a prompt, all alike."""
    options: int = 5
    pairs: int = 6
    steps: int = 10
    rounds: int = 10
    clients: int = 8
    personal: int = 20


@dataclass(frozen=True)
class Cost:
    """The costs of one model; bytes and operations unless said otherwise."""

    model: str
    parameters: int
    adapter: int
    """Entries of the adapter."""
    down: int
    """Bytes to a client in a round."""
    up: int
    """Bytes from a client in a round."""
    up_frozen_a: int
    weights: int
    optimiser: int
    """Adapter, gradient and Adam's moments."""
    inputs: int
    """Inputs of all layers."""
    layer: int
    """What autograd keeps of one layer."""
    logits: int
    operations: int
    """Of one step, the adapter's among them."""
    adapter_operations: int

    @property
    def memory(self) -> int:
        """Bytes on the GPU at the peak of a step."""
        return self.weights + self.optimiser + self.inputs + self.layer + self.logits

    @property
    def step_seconds(self) -> float:
        """Seconds a step at the assumed rates."""
        base = (self.operations - self.adapter_operations) / (SUSTAINED * A100_BF16)
        return base + self.adapter_operations / (SUSTAINED * A100_FLOAT32)


def configurations() -> dict[str, Any]:
    """Return the published configurations by model name, as transformers' own classes."""
    from transformers import Gemma2Config, LlamaConfig, Qwen3Config

    return {
        "Qwen/Qwen3-0.6B": Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        "meta-llama/Llama-3.2-1B": LlamaConfig(
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        "google/gemma-2-2b": Gemma2Config(
            vocab_size=256_000,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            tie_word_embeddings=True,
        ),
    }


def network(config: Any) -> Any:
    """Return the model on the meta device, in bfloat16, its parameters frozen."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def layout(model: Any, rank: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return names and shapes of the adapter on all linear layers, as it travels."""
    targets = resolve_targets(model, "all-linear", rank)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in targets:
            wide_out, wide_in = module.weight.shape
            shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, wide_in)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (wide_out, rank)
    return tuple(sorted(shapes.items()))


def adapted(model: Any, rank: int) -> Any:
    """Return the model with float32 LoRA layers in place and activations recomputed."""
    from peft import LoraConfig, get_peft_model

    targets = list(resolve_targets(model, "all-linear", rank))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        base = get_peft_model(model, lora, autocast_adapter_dtype=True).get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    return base.train()


def step_loss(model: Any, work: Work) -> torch.Tensor:
    """Return the loss of one step on survey prompts with one-letter answers."""
    settings = LocalConfig()
    prompts = [
        Prompt(tuple(range(k, k + work.tokens)), tuple((t,) for t in range(work.options)))
        for k in range(work.batch)
    ]
    batch = collate(prompts, "meta")
    logps = completion_logps(model, batch)
    index = torch.zeros(work.batch * work.pairs, dtype=torch.int64, device="meta")
    delta = differences(logps, None, batch.lengths, index, index, settings)
    share = torch.empty(len(index), device="meta")
    return pair_losses(delta, share, settings).mean()


@contextmanager
def kept_by_autograd(model: Any) -> Iterator[dict[str, int]]:
    """Count ``bytes`` that autograd keeps within the context, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}
    count = {"bytes": 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = tensor  # held, so that no other storage takes its place
            count["bytes"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def layer_bytes(config: Any, work: Work) -> int:
    """Return what autograd keeps of one layer: two layers less one, without recomputation."""
    kept = []
    for layers in (1, 2):
        small = type(config).from_dict(
            {**config.to_dict(), "num_hidden_layers": layers, "layer_types": None}
        )
        model = adapted(network(small), work.rank)
        model.gradient_checkpointing_disable()
        with kept_by_autograd(model) as count:
            step_loss(model, work)
        kept.append(count["bytes"])
    return kept[1] - kept[0]


def cost(name: str, config: Any, work: Work) -> Cost:
    """Return the cost of one model."""
    model = network(config)
    parameters = sum(p.numel() for p in model.parameters())
    parts = layout(model, work.rank)
    sent = {
        frozen: Manifest(parts, work.rank, 2.0 * work.rank, (), "", "", frozen).upload_size
        for frozen in (False, True)
    }
    entries = sum(math.prod(shape) for _, shape in parts)
    tokens = work.batch * work.tokens
    model = adapted(model, work.rank)
    with FlopCounterMode(display=False) as counter:
        step_loss(model, work).backward()
    return Cost(
        model=name,
        parameters=parameters,
        adapter=entries,
        down=entries * FLOAT32,
        up=sent[False] * FLOAT32,
        up_frozen_a=sent[True] * FLOAT32,
        weights=parameters * BFLOAT16,
        optimiser=entries * FLOAT32 * 4,
        inputs=tokens * config.hidden_size * config.num_hidden_layers * BFLOAT16,
        layer=layer_bytes(config, work),
        logits=work.batch * config.vocab_size * FLOAT32 * 4,
        operations=counter.get_total_flops(),
        # Forward, recomputed forward, and twice that for the gradients of input and factor.
        adapter_operations=8 * tokens * entries,
    )


def table(costs: list[Cost], work: Work) -> str:
    """Return the Markdown table."""
    mega, giga, tera = 1e6, 1e9, 1e12
    train = work.clients * work.steps
    personal = work.clients * (2 * work.personal + work.rounds * work.steps)
    rows: list[tuple[str, list[str]]] = [
        ("parameters (billion)", [f"{c.parameters / giga:.3f}" for c in costs]),
        (f"adapter entries, rank {work.rank} (million)", [f"{c.adapter / mega:.2f}" for c in costs]),
        ("to a client, a round (MB)", [f"{c.down / mega:.1f}" for c in costs]),
        ("from a client, a round (MB)", [f"{c.up / mega:.1f}" for c in costs]),
        ("the same, `frozen-a` (MB)", [f"{c.up_frozen_a / mega:.1f}" for c in costs]),
        ("GPU memory: weights (GB)", [f"{c.weights / giga:.2f}" for c in costs]),
        ("adapter, gradient, Adam (GB)", [f"{c.optimiser / giga:.2f}" for c in costs]),
        ("inputs of all layers (GB)", [f"{c.inputs / giga:.2f}" for c in costs]),
        ("one layer recomputed (GB)", [f"{c.layer / giga:.2f}" for c in costs]),
        ("logits at scored positions (GB)", [f"{c.logits / giga:.2f}" for c in costs]),
        ("GPU memory in all (GB)", [f"{c.memory / giga:.1f}" for c in costs]),
        ("operations a step (10^12)", [f"{c.operations / tera:.1f}" for c in costs]),
        ("a step (s)", [f"{c.step_seconds:.2f}" for c in costs]),
        (
            f"a round: {work.clients} clients, {work.steps} steps each (s)",
            [f"{c.step_seconds * train:.0f}" for c in costs],
        ),
        (
            f"{work.rounds} rounds and the personal phase (min)",
            [f"{c.step_seconds * (work.rounds * train + personal) / 60:.0f}" for c in costs],
        ),
    ]
    lines = ["| | " + " | ".join(c.model for c in costs) + " |", "|---" * (len(costs) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Costs of published models, by arithmetic.")
    parser.add_argument("--tokens", type=int, default=Work.tokens, help="tokens a prompt")
    parser.add_argument("--batch", type=int, default=Work.batch, help="prompts a step")
    parser.add_argument("--rank", type=int, default=Work.rank, help="LoRA rank")
    given = parser.parse_args()
    work = Work(rank=given.rank, batch=given.batch, tokens=given.tokens)
    print(table([cost(n, c, work) for n, c in configurations().items()], work))


if __name__ == "__main__":
    main()
