"""One frozen causal language model and one LoRA adapter, kept in memory for the life of a process.

Any Hugging Face causal LM works (Hu et al., arXiv 2106.09685, through PEFT).  The adapter is plain
LoRA: one rank, no bias, no dropout, no trained head, so that it is exactly its factors A and B and
can be averaged.  It is float32 whatever the precision of the base.

All factors live in one flat buffer ``parameters_flat`` (P,), and each PEFT parameter is a view of
it, its gradient a view of ``gradient_flat``.  Loading, reading, clipping and the optimiser then
work on one tensor instead of dozens of small ones.  Order and names: ``layout``.

Facts about PEFT 0.21 that this file guards against: ``disable_adapter`` makes every LoRA parameter
trainable again, ``get_peft_model_state_dict`` returns live views, and its setter accepts wrong
names and NaN without an error.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from fedalign.config import ModelConfig
from fedalign.errors import ConfigError
from fedalign.models import layout as flat_layout
from fedalign.models.devices import resolve_checkpointing, resolve_device, resolve_dtype
from fedalign.models.layout import Array, Layout
from fedalign.models.memory import keep_freed_memory
from fedalign.models.source import base_revision, model_folder, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedalign.training.batch import Prompt

Reference = Literal["base"] | Array
"""What an adapter is compared with: the untouched base, or another adapter (P,)."""


@dataclass(frozen=True)
class _Loaded:
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class ResidentModel:
    """A frozen base with one adapter named ``default``.

    Attributes:
        network: the base with LoRA layers in place; call it for logits.
        peft: the PEFT model around ``network``.
        tokenizer: the base's tokenizer.
        layout: names and shapes of the adapter, sorted by PEFT key.
        base_revision, tokenizer_hash: SHA-256 (hex) of weights and of tokenisation.
        parameters: parameters of the base.
        targets: adapted module-name suffixes, sorted.
        max_length: longest row in tokens, from ``model.max-length`` and the model's positions.
        parameters_flat, gradient_flat: (P,) float32 on ``device``.
        encoded: survey prompts already tokenised, by (question, options).

    The adapter is all zeros until :meth:`load`: starting factors come from the server, never from a
    local draw.  Raises ``ConfigError`` for a model, device, target or rank that cannot work.
    """

    def __init__(self, model: ModelConfig, frozen_a: bool = False) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        keep_freed_memory()
        self.config = model
        self.frozen_a = frozen_a
        self.device = resolve_device(model)
        self.folder: Path = model_folder(model)
        self.base_revision = base_revision(self.folder)
        loaded = _load(self.folder, resolve_dtype(model, self.device))
        self.tokenizer = loaded.tokenizer
        self.tokenizer_hash = tokenizer_hash(loaded.tokenizer)
        self.parameters = sum(p.numel() for p in loaded.network.parameters())
        self.checkpointing = resolve_checkpointing(model, self.parameters)
        self.max_length = _max_length(model, loaded.network)
        self.targets = resolve_targets(loaded.network, model.targets, model.rank)
        self.peft = _wrap(loaded.network, self.targets, model)
        self.network: PreTrainedModel = self.peft.get_base_model()
        self.network.to(self.device)
        if self.checkpointing:
            self.network.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            self.network.enable_input_require_grads()
        self.network.train(False)
        self._factors = _factors(self.peft)
        self.encoded: dict[tuple[str, tuple[str, ...]], Prompt] = {}
        self.layout: Layout = tuple((k, tuple(p.shape)) for k, p in self._factors.items())
        self._flatten()
        self.set_trainable()

    def load(self, flat: np.ndarray[Any, Any]) -> None:
        """Put an adapter (P,) float32 in place.  Raises ``WireError`` for anything else."""
        flat_layout.check_flat(flat, self.layout)
        with torch.no_grad():
            self.parameters_flat.copy_(torch.from_numpy(np.ascontiguousarray(flat)))

    def read(self) -> Array:
        """Return the adapter (P,) as a fresh copy that later training does not change."""
        return self.parameters_flat.detach().cpu().numpy().copy()

    def unpack(self, flat: np.ndarray[Any, Any]) -> dict[str, Array]:
        """Return ``{PEFT key: tensor}`` of a flat adapter."""
        return flat_layout.unpack(flat, self.layout)

    @contextlib.contextmanager
    def reference(self, kind: Reference) -> Iterator[None]:
        """Within the context the model is the reference, without gradients.

        ``base`` disables the adapter; an array (P,) is loaded for the time being.  Afterwards the
        adapter, its trainable flags and the mode are exactly as before.
        """
        trainable = [(p, p.requires_grad) for p in self._factors.values()]
        was_training = self.network.training
        before = None if isinstance(kind, str) else self.read()
        self.network.train(False)
        try:
            with torch.no_grad():
                if isinstance(kind, str):
                    if kind != "base":
                        raise ConfigError(f"reference '{kind}' is neither 'base' nor an adapter.")
                    with self.peft.disable_adapter():
                        yield
                else:
                    self.load(kind)
                    yield
        finally:
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            if before is not None:
                self.load(before)
            self.network.train(was_training)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Within the context activations may be recomputed; dropout is off in either mode."""
        # transformers recomputes activations only in training mode.
        self.network.train(self.checkpointing)
        try:
            yield
        finally:
            self.network.train(False)

    def set_trainable(self) -> None:
        """Set which factors train: A and B, or B alone under frozen A."""
        for name, parameter in self._factors.items():
            parameter.requires_grad_(not (self.frozen_a and ".lora_A." in name))

    def frozen_mask(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return (P,) booleans: True where a value must not change in training."""
        mask = np.zeros(flat_layout.size(self.layout), dtype=bool)
        for name, (start, stop) in flat_layout.offsets(self.layout).items():
            mask[start:stop] = self.frozen_a and ".lora_A." in name
        return mask

    def attach_gradients(self) -> None:
        """Let every factor accumulate its gradient in ``gradient_flat``, set to zero."""
        self.gradient_flat.zero_()
        for name, (start, stop) in flat_layout.offsets(self.layout).items():
            parameter = self._factors[name]
            if parameter.requires_grad:
                parameter.grad = self.gradient_flat[start:stop].view(parameter.shape)

    def _flatten(self) -> None:
        total = flat_layout.size(self.layout)
        self.parameters_flat = torch.zeros(total, dtype=torch.float32, device=self.device)
        self.gradient_flat = torch.zeros_like(self.parameters_flat)
        for name, (start, stop) in flat_layout.offsets(self.layout).items():
            parameter = self._factors[name]
            parameter.data = self.parameters_flat[start:stop].view(parameter.shape)


def resolve_targets(network: PreTrainedModel, targets: str, rank: int) -> tuple[str, ...]:
    """Return the module-name suffixes to adapt, sorted.

    ``all-linear`` becomes an explicit list, since PEFT keeps targets as a set whose order changes
    from process to process.  Raises ``ConfigError`` for a suffix that names no linear layer or the
    output head, and for a rank above the smallest adapted dimension.
    """
    from transformers.pytorch_utils import Conv1D

    head: Any = cast(Any, network).get_output_embeddings()
    linear = {
        name: (min(m.weight.shape), m is head)
        for name, m in network.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D)
    }
    suffixes = {name.rsplit(".", 1)[-1] for name, (_, is_head) in linear.items() if not is_head}
    chosen = suffixes if targets == "all-linear" else {t.strip() for t in targets.split(",")}
    for suffix in sorted(chosen):
        hit = {n: v for n, v in linear.items() if n == suffix or n.endswith("." + suffix)}
        if not hit:
            raise ConfigError(
                f"model.targets: '{suffix}' names no linear layer of {type(network).__name__}. "
                f"Linear layers: {', '.join(sorted(suffixes))}."
            )
        if any(is_head for _, is_head in hit.values()):
            raise ConfigError(
                f"model.targets: '{suffix}' is the output head, which cannot be adapted. "
                f"Allowed: {', '.join(sorted(suffixes))}."
            )
        smallest = min(width for width, _ in hit.values())
        if rank > smallest:
            raise ConfigError(
                f"model.rank = {rank} is larger than '{suffix}', whose smaller side is {smallest}."
            )
    return tuple(sorted(chosen))


def _load(folder: Path, dtype: torch.dtype) -> _Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the only progress on the terminal
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for part in (config, config.get_text_config()):
        _no_dropout(part)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except ValueError as error:
        raise ConfigError(
            f"{folder} cannot be loaded as a causal language model: {error}"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return _Loaded(network, tokenizer)


def _no_dropout(config: PretrainedConfig) -> None:
    # With dropout an untrained adapter in training mode would differ from its reference.
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)


def _max_length(config: ModelConfig, network: PreTrainedModel) -> int:
    positions = network.config.get_text_config().to_dict().get("max_position_embeddings")
    return min(config.max_length, int(positions)) if positions else config.max_length


def _wrap(network: PreTrainedModel, targets: tuple[str, ...], config: ModelConfig) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it as a float
        lora_dropout=0.0,
        bias="none",
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in network.modules()),
    )
    # PEFT draws A from torch's global generator; the draw is overwritten, its side effect undone.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(network, lora, autocast_adapter_dtype=True)


def _factors(peft: Any) -> dict[str, torch.nn.Parameter]:
    """Return ``{PEFT key: parameter}`` sorted by key; the keys are those PEFT saves."""
    from peft import get_peft_model_state_dict

    factors = {
        name.replace(".default.", "."): p
        for name, p in peft.named_parameters()
        if ".lora_A.default." in name or ".lora_B.default." in name
    }
    saved = get_peft_model_state_dict(peft, adapter_name="default")
    if set(saved) != set(factors):
        odd = sorted(set(saved) ^ set(factors))
        raise ConfigError(f"this adapter is more than plain LoRA factors: {odd[:3]}.")
    for name, parameter in factors.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"{name} is {parameter.dtype}; adapter factors must be float32.")
    return dict(sorted(factors.items()))
