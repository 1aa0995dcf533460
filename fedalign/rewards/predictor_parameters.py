"""The preference predictor's parameters as one flat float32 array.  Numpy only: the server too.

The array holds the tensors of :func:`layout` in sorted order of their names, each in row-major
order.  Both sides derive the layout from ``config.predictor`` and the width D of the base's
embeddings, so an array of another length is refused before it is read.
"""

from __future__ import annotations

import math

import numpy as np

from fedalign.config import PredictorConfig
from fedalign.models.layout import Array, Layout, pack, size
from fedalign.randomness import generator

MATCH = 3.0
"""Factor on the starting weights of query and key maps."""


def layout(settings: PredictorConfig, dim: int) -> Layout:
    """Return (name, shape) of every tensor, sorted by name; ``dim`` is D, the embedding's width."""
    w = settings.width
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    linear("embed.0", w, dim + 1)
    linear("embed.1", w, w)
    for k in range(settings.layers):
        layer = f"layer.{k:02d}"
        for name in ("query", "key", "value", "mix", "wide", "narrow"):
            linear(f"{layer}.{name}", w, w)
        for name in ("attention", "feed"):
            shapes[f"{layer}.{name}-norm.weight"] = (w,)
            shapes[f"{layer}.{name}-norm.bias"] = (w,)
    shapes["norm.weight"] = shapes["norm.bias"] = (w,)
    linear("head.0", w, w)
    linear("head.1", 2, w)
    return tuple(sorted(shapes.items()))


def predictor_size(settings: PredictorConfig, dim: int) -> int:
    """Return P, the number of parameters."""
    return size(layout(settings, dim))


def initial_predictor(settings: PredictorConfig, dim: int, seed: int) -> Array:
    """Return the starting parameters (P,), drawn by seed and tensor name.

    Weights and biases of linear maps are uniform in +-1/sqrt(inputs) (PyTorch's own start);
    normalisations start as the identity.  Key maps start equal to query maps, their weights times
    MATCH (ours): attention then starts as a kernel that looks for context alike to the token, in
    place of a mean over all context, from which training hardly ever leaves within a run.
    """
    shapes = dict(layout(settings, dim))
    tensors: dict[str, Array] = {}
    for name, shape in shapes.items():
        part, kind = name.rsplit(".", 1)
        if part.endswith("norm"):
            tensors[name] = np.full(shape, 1.0 if kind == "weight" else 0.0, dtype=np.float32)
            continue
        bound = 1.0 / math.sqrt(shapes[f"{part}.weight"][1])
        draw = generator(seed, "predictor-start", name).uniform(-bound, bound, size=shape)
        tensors[name] = draw.astype(np.float32)
    for k in range(settings.layers):
        query, key = f"layer.{k:02d}.query", f"layer.{k:02d}.key"
        tensors[f"{query}.weight"] *= np.float32(MATCH)
        for kind in ("weight", "bias"):
            tensors[f"{key}.{kind}"] = tensors[f"{query}.{kind}"]
    return pack(tensors, layout(settings, dim))
