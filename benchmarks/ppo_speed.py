"""Speed of one PPO exchange: sampling, measuring, updating, on the pocket or a random Llama.

    python benchmarks/ppo_speed.py                                   # the pocket, one thread
    python benchmarks/ppo_speed.py --samples 8 --minibatches 8
    python benchmarks/ppo_speed.py --llama 1b --device cuda --dtype bfloat16

Prints one JSON line and a table.  The three phases are timed in turns in one process, each the
median over ``--rounds`` after one warm-up: ``generate`` samples texts with a cache, ``measure``
runs policy and reference once over them, ``improve`` takes the updates.

- *text tokens/s*: sampled tokens, once each (for ``improve`` once for each pass over them).
- *share of matmul rate*: operations of the phase, counted by torch's FlopCounterMode (recomputed
  activations among them), a second, divided by the rate that a plain square matrix product of the
  same dtype reaches on this device in this process.  A share compares machines; seconds do not.
- *peak memory*: of tensors on CUDA, of the process on a CPU.

``--llama`` makes a model of a published shape with random weights and the pocket's tokenizer in a
temporary folder (its size on disk: two bytes a parameter in bfloat16); what it says is noise, what
it costs is real.  Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import ModelConfig, PpoConfig
from fedalign.models.base import ResidentModel
from fedalign.models.layout import pack
from fedalign.models.packaged import pocket_folder
from fedalign.training.generate import generate
from fedalign.training.policy import Episodes, Measured, improve, measure, start

# hidden, intermediate, layers, heads, key-value heads, vocabulary
LLAMAS = {
    "10m": (256, 1024, 8, 4, 4, 4096),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def random_llama(size: str, dtype: torch.dtype, folder: Path) -> Path:
    """Save a Llama of a published shape with random weights; return its folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, groups, vocabulary = LLAMAS[size]
    tokenizer = AutoTokenizer.from_pretrained(pocket_folder())
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read after it is meant."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a square matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    best = 0.0
    for _ in range(10):
        synchronise(device)
        begin = time.perf_counter()
        a @ a
        synchronise(device)
        best = max(best, 2.0 * n**3 / (time.perf_counter() - begin))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed of one PPO exchange.")
    parser.add_argument("--model", default="pocket", help="pocket, a model name, or a folder")
    parser.add_argument("--llama", choices=sorted(LLAMAS), help="a random Llama instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--checkpointing", default="auto", help="auto, on or off")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="texts a prompt")
    parser.add_argument("--minibatches", type=int, default=4, help="of 16 prompts")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        name = given.model
        if given.llama:
            dtype = torch.bfloat16 if given.dtype == "bfloat16" else torch.float32
            name = str(random_llama(given.llama, dtype, Path(scratch)))
        config = ModelConfig(
            name=name,
            device=given.device,
            dtype=given.dtype,
            rank=given.rank,
            alpha=2.0 * given.rank,
            gradient_checkpointing=given.checkpointing,
        )
        resident = ResidentModel(config)
    print_result(given, resident, phases(given, resident))


def phases(given: argparse.Namespace, resident: ResidentModel) -> dict[str, dict[str, float]]:
    """Return seconds, text tokens and operations of each phase."""
    settings = PpoConfig(
        samples=given.samples, minibatches=given.minibatches, max_clip_fraction=1.0
    )
    adapter = pack(initial_adapter(dict(resident.layout), 0), resident.layout)
    state = start(resident, adapter, settings, settings.kl)
    rng = np.random.default_rng(0)
    count = settings.minibatches * settings.questions
    vocabulary = resident.network.config.vocab_size
    prompts = [
        tuple(rng.integers(3, vocabulary, size=given.prompt_tokens).tolist()) for _ in range(count)
    ]
    owners = tuple(p for p in prompts for _ in range(settings.samples))
    scores = rng.random(len(owners))
    held: dict[str, Any] = {}

    def sample() -> None:
        made = generate(resident, prompts, settings.samples, given.new_tokens, 0, stop_at_eos=False)
        held["episodes"] = Episodes(owners, tuple(t for t, _ in made))

    def look() -> None:
        held["measured"] = measure(resident, state, held["episodes"])

    def update() -> None:
        found: Measured = held["measured"]
        improve(resident, state, held["episodes"], found, scores, settings, 0, (0,))

    tokens = len(owners) * given.new_tokens
    work: dict[str, tuple[Callable[[], None], int]] = {
        "generate": (sample, tokens),
        "measure": (look, tokens),
        "improve": (update, tokens * settings.epochs),
    }
    out: dict[str, dict[str, float]] = {}
    for name, (call, count) in work.items():
        with FlopCounterMode(display=False) as counter:
            call()
        out[name] = {"tokens": count, "operations": counter.get_total_flops()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(given.rounds):
        for name, (call, _) in work.items():
            synchronise(resident.device)
            begin = time.perf_counter()
            call()
            synchronise(resident.device)
            times[name].append(time.perf_counter() - begin)
    for name, series in times.items():
        out[name]["seconds"] = statistics.median(series)
    return out


def print_result(
    given: argparse.Namespace, resident: ResidentModel, found: dict[str, dict[str, float]]
) -> None:
    """Print the JSON line and the table."""
    dtype = next(resident.network.parameters()).dtype
    rate = matmul_rate(resident.device, dtype)
    if resident.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(resident.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for values in found.values():
        values["tokens_a_second"] = values["tokens"] / values["seconds"]
        values["share_of_matmul_rate"] = values["operations"] / values["seconds"] / rate
    total = sum(v["seconds"] for v in found.values())
    summary = {
        "model": f"llama-{given.llama}" if given.llama else given.model,
        "parameters": resident.parameters,
        "device": str(resident.device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": given.threads,
        "checkpointing": resident.checkpointing,
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.new_tokens,
        "samples": given.samples,
        "minibatches": given.minibatches,
        "exchange_seconds": round(total, 4),
        "peak_memory_bytes": peak,
        "matmul_rate": rate,
        **{name: {k: float(f"{v:.5g}") for k, v in x.items()} for name, x in found.items()},
    }
    print(json.dumps(summary))
    print("| phase | seconds | share of time | text tokens/s | share of matmul rate |")
    print("|---|---|---|---|---|")
    for name, x in found.items():
        print(
            f"| {name} | {x['seconds']:.3f} | {x['seconds'] / total:.0%} | "
            f"{x['tokens_a_second']:.0f} | {x['share_of_matmul_rate']:.1%} |"
        )
    print(
        f"\n{summary['model']}, {resident.parameters / 1e6:.1f} million parameters, "
        f"{summary['dtype']} on {resident.device}: {total:.3f} s an exchange, peak memory "
        f"{peak / 1e9:.2f} GB, matmul rate {rate / 1e12:.3f} Tflop/s."
    )


if __name__ == "__main__":
    main()
