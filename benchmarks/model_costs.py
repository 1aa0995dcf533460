"""What a round costs on published models: bytes, GPU memory, operations, seconds, by arithmetic.

    python benchmarks/model_costs.py

Each architecture is built from the published configuration (typed in below) with tensors that have
shapes but no storage (torch's meta device under FakeTensorMode), so nothing is downloaded and no
weight exists.  On it this project's own code runs as in training: adapter targets, wire layout,
scored positions, losses, recomputed activations.

- *Parameters, bytes*: counted.
- *Operations*: counted by torch's FlopCounterMode over forward, recomputation and backward of one
  step (one multiply-add is two operations).
- *Memory*: weights in bfloat16, the float32 adapter four times (value, gradient, two Adam moments),
  and the most bytes that tensors of a step, or of the largest scoring pass, take at one time
  (followed through every operation).  CUDA's own context, workspaces and fragmentation come on top:
  allow 2 GB more.
- *Seconds*: operations divided by an assumed sustained rate.  **Arithmetic, not a measurement.**
  The adapter's operations are float32 and are divided by a float32 rate.  Launching kernels takes
  time too, which small models and small batches feel: expect two to four times as long.

The table stands in docs/models.md.
"""

from __future__ import annotations

import argparse
import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedalign.config import LocalConfig
from fedalign.models.base import resolve_targets
from fedalign.training.batch import ROW_TOKENS, Prompt, collate, completion_logps
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
    training: int
    """Peak of activations, recomputation, logits and gradients in one step."""
    scoring: int
    """Peak of the largest forward pass of scoring."""
    operations: int
    """Of one step, the adapter's among them."""
    adapter_operations: int

    @property
    def memory(self) -> int:
        """Bytes on the GPU at the peak."""
        return self.weights + self.optimiser + max(self.training, self.scoring)

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
        base: Any = get_peft_model(model, lora, autocast_adapter_dtype=True).get_base_model()
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


class Live(TorchDispatchMode):
    """Follows the bytes of tensors made within the context; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # Views and results in place share the storage of what was given.
                if storage._cdata not in given:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


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
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as counter:
        step_loss(model, work).backward()
    with fake, Live() as training:
        step_loss(model, work).backward()
    largest = replace(work, batch=ROW_TOKENS // work.tokens)
    model.train(False)
    with fake, torch.no_grad(), Live() as scoring:
        step_loss(model, largest)
    return Cost(
        model=name,
        parameters=parameters,
        adapter=entries,
        down=entries * FLOAT32,
        up=sent[False] * FLOAT32,
        up_frozen_a=sent[True] * FLOAT32,
        weights=parameters * BFLOAT16,
        optimiser=entries * FLOAT32 * 4,
        training=training.peak,
        scoring=scoring.peak,
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
        (
            f"adapter, rank {work.rank} (million entries)",
            [f"{c.adapter / mega:.2f}" for c in costs],
        ),
        ("to a client, a round (MB)", [f"{c.down / mega:.1f}" for c in costs]),
        ("from a client, a round (MB)", [f"{c.up / mega:.1f}" for c in costs]),
        ("the same, `frozen-a` (MB)", [f"{c.up_frozen_a / mega:.1f}" for c in costs]),
        ("GPU memory: weights (GB)", [f"{c.weights / giga:.2f}" for c in costs]),
        ("adapter, gradient, Adam (GB)", [f"{c.optimiser / giga:.2f}" for c in costs]),
        ("a training step (GB)", [f"{c.training / giga:.2f}" for c in costs]),
        ("the largest scoring pass (GB)", [f"{c.scoring / giga:.2f}" for c in costs]),
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
