"""One adapter as one flat float32 array, and back.  Numpy only: the server uses this too.

A *layout* lists the adapter's tensors as ``(PEFT key, shape)``, sorted by key.  The flat array
holds the tensors in that order, each in row-major order; its length is P.  A layout is what two
sides must agree on; the array alone says nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedalign.errors import ConfigError, WireError

Layout = tuple[tuple[str, tuple[int, ...]], ...]
Array = np.ndarray[Any, np.dtype[np.float32]]


def layout_of(tensors: Mapping[str, np.ndarray[Any, Any]]) -> Layout:
    """Return the layout of named tensors."""
    return tuple((name, tuple(int(n) for n in tensors[name].shape)) for name in sorted(tensors))


def size(layout: Layout) -> int:
    """Return P, the number of values in a flat array of this layout."""
    return sum(math.prod(shape) for _, shape in layout)


def offsets(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return ``{name: (start, stop)}`` in the flat array."""
    out: dict[str, tuple[int, int]] = {}
    start = 0
    for name, shape in layout:
        stop = start + math.prod(shape)
        out[name] = (start, stop)
        start = stop
    return out


def check_flat(flat: np.ndarray[Any, Any], layout: Layout) -> None:
    """Raise ``WireError`` unless ``flat`` is a finite float32 array of shape (P,)."""
    expected = size(layout)
    if flat.dtype != np.float32:
        raise WireError("adapter_dtype", f"adapter is {flat.dtype}; it must be float32")
    if flat.shape != (expected,):
        raise WireError(
            "adapter_size",
            f"adapter has shape {flat.shape}; this model's adapter has shape ({expected},). "
            "Check that both sides use the same base model, rank and targets",
        )
    if not np.isfinite(flat).all():
        count = int((~np.isfinite(flat)).sum())
        raise WireError("adapter_not_finite", f"{count} of {expected} values are NaN or infinite")


def pack(tensors: Mapping[str, np.ndarray[Any, Any]], layout: Layout) -> Array:
    """Return named tensors as one flat array (P,), a fresh copy.

    Raises ``WireError`` when a name is missing or unknown, a shape differs, or a value is not
    finite.
    """
    known = {name for name, _ in layout}
    missing, unknown = sorted(known - set(tensors)), sorted(set(tensors) - known)
    if missing or unknown:
        raise WireError(
            "adapter_names",
            f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}",
        )
    flat = np.empty(size(layout), dtype=np.float32)
    spans = offsets(layout)
    for name, shape in layout:
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise WireError("adapter_shape", f"{name} has shape {tensor.shape}, expected {shape}")
        start, stop = spans[name]
        flat[start:stop] = np.asarray(tensor, dtype=np.float32).reshape(-1)
    check_flat(flat, layout)
    return flat


def unpack(flat: np.ndarray[Any, Any], layout: Layout) -> dict[str, Array]:
    """Return ``{name: tensor}`` as copies, so that later changes to ``flat`` do not show."""
    check_flat(flat, layout)
    return {
        name: flat[start:stop].reshape(shape).copy()
        for (name, shape), (start, stop) in zip(layout, offsets(layout).values(), strict=True)
    }


def read_peft_folder(folder: Path, layout: Layout, rank: int, alpha: float) -> Array:
    """Return the adapter of a PEFT folder as a flat array (P,).

    The folder holds ``adapter_config.json`` and ``adapter_model.safetensors``.  Only a plain LoRA
    adapter of the same rank, alpha and tensors is accepted; ``ConfigError`` says what differs.
    """
    from safetensors.numpy import load_file

    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ConfigError(f"{file}: no such file. Give a PEFT adapter folder with safetensors.")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    wanted = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
    }
    plain = {"use_dora": False, "use_rslora": False, "bias": "none"}
    for key, value in wanted.items():
        given = config.get(key, plain.get(key))
        if given != value:
            raise ConfigError(f"{config_file}: {key} is {given!r}; this run needs {value!r}.")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ConfigError(f"{config_file}: {key} is set; only one rank and alpha is supported.")
    try:
        return pack(load_file(weights_file), layout)
    except WireError as error:
        raise ConfigError(f"{weights_file} does not fit this model's adapter: {error}") from None
