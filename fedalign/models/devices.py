"""Where the base model runs and in which precision: ``auto`` resolved once, in one place."""

from __future__ import annotations

import torch

from fedalign.config import ModelConfig
from fedalign.errors import ConfigError

CHECKPOINTING_FROM = 500_000_000
"""Parameters from which ``gradient-checkpointing = auto`` switches it on."""


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device; ``auto`` takes CUDA where there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ConfigError(
            f"model.device = '{config.device}' is not a device. Use auto, cpu, cuda or cuda:N."
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device = '{config.device}': use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"model.device = '{config.device}', but this machine shows {count} CUDA devices. "
                "Use auto or cpu."
            )
    return device


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the precision of the frozen base; ``auto`` is bfloat16 on GPU, float32 on CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def resolve_checkpointing(config: ModelConfig, parameters: int) -> bool:
    """Return whether activations are recomputed in the backward pass."""
    if config.gradient_checkpointing == "auto":
        return parameters >= CHECKPOINTING_FROM
    return config.gradient_checkpointing == "on"
