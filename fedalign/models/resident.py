"""The one base model of a process: coordinator and clients of a simulation share it.

Whoever uses it loads the adapter it needs first; nobody may count on what is loaded.
"""

from __future__ import annotations

from fedalign.config import ModelConfig
from fedalign.models.base import ResidentModel

_models: dict[tuple[ModelConfig, bool], ResidentModel] = {}


def resident_model(model: ModelConfig, frozen_a: bool) -> ResidentModel:
    """Return the resident base; runs of one process that share it do not load it again."""
    key = (model, frozen_a)
    if key not in _models:
        _models.clear()  # let go of the old base before the new one is loaded
        _models[key] = ResidentModel(model, frozen_a)
    return _models[key]


def forget_models() -> None:
    """Let go of the base; the next use loads it again."""
    _models.clear()
