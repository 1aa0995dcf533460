"""The reference of the preference losses: none, the base, or a named adapter; never a moving one.

A reference that follows the last round's adapter multiplies the preference in again each round and
drives probability off the answers.  So a client computes the reference log-probabilities of its
training set once, keeps them for the whole run, and every round trains against the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fedalign.config import LocalConfig
from fedalign.errors import ConfigError
from fedalign.models.base import Reference, ResidentModel
from fedalign.models.layout import Array, read_peft_folder
from fedalign.training.batch import Prompt
from fedalign.training.score import logps_of

ReferenceKind = Reference | Literal["none"]


def reference_kind(resident: ResidentModel, settings: LocalConfig) -> ReferenceKind:
    """Return ``none``, ``base``, or the adapter (P,) that ``local.reference`` names."""
    if settings.reference == "none":
        return "none"
    if settings.reference == "base":
        return "base"
    if not Path(settings.reference).is_absolute():
        raise ConfigError(
            f"local.reference = '{settings.reference}' is not 'base', 'none' or an absolute path."
        )
    return read_peft_folder(
        Path(settings.reference), resident.layout, resident.config.rank, resident.config.alpha
    )


def reference_logps(
    resident: ResidentModel, prompts: Sequence[Prompt], kind: ReferenceKind
) -> Array | None:
    """Return the reference's log-probability of every completion: (C,), or None without one.

    Call it once for each client; the adapter that is loaded does not change it.
    """
    if isinstance(kind, str):
        if kind == "none":
            return None
        with resident.reference("base"):
            return logps_of(resident, prompts).astype(np.float32)
    with resident.reference(kind):
        return logps_of(resident, prompts).astype(np.float32)
