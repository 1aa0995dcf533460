"""What both TRL engines do about TRL's habits while one of its trainers lives (TRL 1.16).

- Every construction sends telemetry unless that is switched off.
- Given a PEFT model a trainer copies the adapter of the moment as its reference, ``ref``.
- It patches the model's ``forward`` once more with every construction, and leaves the model in
  training mode.
- It uses the first visible GPU, wherever the model is.
"""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedalign.errors import ConfigError
from fedalign.models.base import ResidentModel
from fedalign.models.layout import Array

REFERENCE = "ref"
"""TRL's name for its copy of the received adapter."""


def check_device(resident: ResidentModel) -> None:
    """Raise ``ConfigError`` when the model is on a GPU that TRL would not use."""
    if resident.device.type == "cuda" and (resident.device.index or 0) != 0:
        raise ConfigError(
            f"engine 'trl' uses the first visible GPU, but the model is on {resident.device}. "
            "Set CUDA_VISIBLE_DEVICES and model.device = 'cuda'."
        )


def no_telemetry() -> None:
    """Switch the hub library's telemetry off; to be called before anything of TRL is imported."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub.constants

    # The variable is read when the hub library is first imported, which was earlier.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


@contextmanager
def trl_session(resident: ResidentModel) -> Iterator[str]:
    """Yield a folder for a trainer's output; afterwards the model is as it was before.

    The trainer must be made inside, and given to :func:`prepared` at once.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield folder
        finally:
            drop_reference(resident)
            vars(resident.network).pop("forward", None)
            resident.network.train(False)
            resident.set_trainable()


def prepared(trainer: Any, resident: ResidentModel) -> Any:
    """Return a trainer that was just made, without its reference and its printing."""
    from transformers.trainer_callback import PrinterCallback

    drop_reference(resident)
    resident.set_trainable()
    trainer.remove_callback(PrinterCallback)
    # Every train() collects garbage; what was imported need not be walked each time.
    gc.freeze()
    return trainer


def drop_reference(resident: ResidentModel) -> None:
    """Delete TRL's copy of the received adapter, where there is one."""
    if REFERENCE in resident.peft.peft_config:
        resident.peft.delete_adapter(REFERENCE)


def snapshots(resident: ResidentModel) -> Any:
    """Return a callback that keeps copies of the adapter after the steps in its ``wanted``."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        """Keeps copies of the adapter after the step counts a job asks for."""

        def __init__(self) -> None:
            self.wanted: tuple[int, ...] = ()
            self.kept: dict[int, Array] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in self.wanted:
                self.kept[state.global_step] = resident.read()

    return Keeper()
