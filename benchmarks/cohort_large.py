"""Cohorts of a large model on a GPU, for ``cohort.py``: tokens a second, share of the chip's rate.

A Llama of a published shape with random weights (``ppo_speed.py``); every client has pairs of its
own random texts.  Tokens are those that are not padding.  Operations are those the mathematics
needs, whatever is recomputed: for a token 4 N with N the weights of the decoder layers (forward and
the gradient of the input; the base is frozen and has no weight gradient), 6 for each LoRA weight,
and 4 for each weight of the output head at scored positions.  Attention's own products are left
out.  The chip's rate is that of a large square product of the same dtype, measured in this process.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ppo_speed import matmul_rate, random_llama, synchronise

from fedalign.aggregation.adapters import initial_adapter
from fedalign.config import LocalConfig, ModelConfig
from fedalign.models.base import ResidentModel
from fedalign.models.layout import pack
from fedalign.models.layout import size as layout_size
from fedalign.training.batch import Prompt, output_head
from fedalign.training.cohort import train_cohort
from fedalign.training.cohort_plan import cohort_size
from fedalign.training.examples import Label, TrainingSet
from fedalign.training.loop import TrainJob, train

PROMPTS, STEPS = 32, 2


def text_pairs(vocabulary: int, seed: int) -> TrainingSet:
    """Return one client's pairs: prompts of 80 to 160 tokens, completions of 20 to 60."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocabulary, size=rng.integers(low, high)).tolist())

    prompts = tuple(Prompt(ids(80, 161), (ids(20, 61), ids(20, 61))) for _ in range(PROMPTS))
    made = TrainingSet(prompts, tuple((Label(0, 1, 1.0),) for _ in prompts))
    assert made.rows
    return made


def operations(model: ResidentModel, tokens: float, scored: float) -> float:
    """Return the operations of a step's forward and backward."""
    network: Any = model.network
    adapter = layout_size(model.layout)
    inside = sum(p.numel() for p in network.model.layers.parameters())
    with_lora = sum(p.numel() for n, p in network.model.layers.named_parameters() if "lora_" in n)
    head = output_head(network).weight.numel()
    return tokens * (4.0 * (inside - with_lora) + 6.0 * adapter) + 4.0 * head * scored


def large(size: str, device: torch.device, dtype: str, counts: list[int], repeats: int) -> dict:
    """Measure every number of clients; return figures and raw seconds."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        random_llama(size, kind, Path(folder))
        model = ResidentModel(
            ModelConfig(name=folder, dtype=dtype, device=device.type, gradient_checkpointing="on")
        )
        local = LocalConfig(steps=STEPS, learning_rate=1e-4, beta=0.1)
        start = pack(initial_adapter(dict(model.layout), 0), model.layout)
        vocabulary = model.network.config.vocab_size
        rate = matmul_rate(device, kind)
        work = [
            TrainJob(f"c{k}", start, text_pairs(vocabulary, k), None, STEPS, 1e-4, (1, f"c{k}"))
            for k in range(max(counts))
        ]
        rows = []
        for count in counts:
            # Completions but their last token are rows; every completion token is scored.
            scored = sum(
                len(work[k].data.rows[i].slot) for k in range(count) for i in range(PROMPTS)
            ) / (count * PROMPTS)
            arms = {"cohort": train_cohort} | ({"one after another": train} if count <= 8 else {})
            for name, arm in arms.items():
                seconds, tokens = [], 0.0
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                for turn in range(repeats + 1):
                    synchronise(device)
                    began = time.perf_counter()
                    results = arm(model, work[:count], local, 0)
                    synchronise(device)
                    if turn:
                        seconds.append(time.perf_counter() - began)
                    if any(r.failure for r in results):
                        raise RuntimeError(f"{name}: {results[0].failure}")
                    tokens = sum(r.metrics["tokens"] for r in results)
                middle = float(np.median(seconds))
                asked = scored * local.batch_size * STEPS * count
                rows.append(
                    {
                        "clients": count,
                        "arm": name,
                        "cohort_size": cohort_size(model, local),
                        "seconds": seconds,
                        "tokens_a_second": tokens / middle,
                        "share_of_matmul_rate": operations(model, tokens, asked) / middle / rate,
                        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
                        if device.type == "cuda"
                        else None,
                    }
                )
    return {
        "llama": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "matmul_tflops": rate / 1e12,
        "steps": STEPS,
        "batch_size": local.batch_size,
        "rows": rows,
    }
