"""Write an adapter as a folder that plain PEFT and transformers load, without loading torch.

The folder holds ``adapter_model.safetensors``, ``adapter_config.json`` and ``README.md`` (the model
card), in the layout of PEFT 0.21.  It is written under a temporary name and renamed, so a reader
sees a whole folder or none.  The update is ``alpha / rank * B A`` on every target module.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedalign.errors import FedalignError
from fedalign.storage import storing

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def export_adapter(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    base_name: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    card: str,
) -> None:
    """Write the adapter folder, replacing an earlier export of the same name.

    ``tensors`` maps PEFT names (``base_model.model.<module>.lora_A.weight``, without an adapter
    name) to arrays: A is (rank, in), B is (out, rank), finite; stored as float32.  ``targets`` are
    the module-name suffixes that were adapted, for instance ``("q_proj", "v_proj")``.  A local
    ``base_name`` is stored by its last path component only.

    Raises ``FedalignError`` for tensors that are no adapter of this rank and these targets, and for
    a folder that exists and holds anything else than an export; ``StorageError`` where the disk
    does not take it.
    """
    _check_tensors(tensors, rank, targets)
    from safetensors.numpy import save_file

    config = adapter_config(base_name, rank, alpha, targets)
    arrays = {n: np.ascontiguousarray(tensors[n], dtype=np.float32) for n in sorted(tensors)}
    _check_folder(folder)
    with storing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(arrays, made / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
            (made / CONFIG).write_text(text + "\n", encoding="utf-8")
            (made / CARD).write_text(card, encoding="utf-8")
            made.chmod(0o755)
            for file in made.iterdir():
                file.chmod(0o644)
                _sync(file)
            _swap(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def adapter_config(
    base_name: str, rank: int, alpha: float, targets: Sequence[str]
) -> dict[str, Any]:
    """Return what PEFT 0.21 needs to rebuild the adapter; all other settings are its defaults."""
    return {
        "base_model_name_or_path": public_base_name(base_name),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        # PEFT stores a whole number where alpha is one; both load to the same scale.
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": int(rank),
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def public_base_name(name: str) -> str:
    """Return a model name that says nothing about this machine.

    ``pocket`` becomes ``fedalign-pocket``, a local folder its last path component; a name on the
    hub (``owner/name``) stays.
    """
    if name == "pocket":
        return "fedalign-pocket"
    if name.startswith(("/", "~", ".")) or "\\" in name or name[1:3] in (":/", ":\\"):
        parts = [p for p in name.replace("\\", "/").split("/") if p not in ("", ".", "..", "~")]
        return parts[-1] if parts else "local-model"
    return name


def _check_tensors(tensors: Mapping[str, np.ndarray], rank: int, targets: Sequence[str]) -> None:
    if not tensors:
        raise FedalignError("an adapter without tensors cannot be exported.")
    if isinstance(targets, str) or not targets:
        raise FedalignError(f"targets = {targets!r}; give a list of module-name suffixes.")
    used: set[str] = set()
    for name, array in tensors.items():
        if not name.endswith((_A, _B)):
            raise FedalignError(
                f"'{name}' is no adapter tensor; names end in '{_A}' or '{_B}' (no adapter name)."
            )
        module, is_a = (name[: -len(_A)], True) if name.endswith(_A) else (name[: -len(_B)], False)
        if module + (_B if is_a else _A) not in tensors:
            raise FedalignError(f"'{name}' has no partner '{module + (_B if is_a else _A)}'.")
        if array.ndim != 2 or array.shape[0 if is_a else 1] != rank:
            want = f"({rank}, in)" if is_a else f"(out, {rank})"
            raise FedalignError(f"'{name}' has shape {array.shape}; rank {rank} needs {want}.")
        if not np.all(np.isfinite(array)):
            raise FedalignError(f"'{name}' holds values that are not finite; nothing was written.")
        matching = [t for t in targets if module == t or module.endswith("." + t)]
        if not matching:
            raise FedalignError(
                f"'{name}' is on none of the target modules {', '.join(sorted(targets))}; PEFT "
                "would drop it. Add its module-name suffix to the targets."
            )
        used.update(matching)
    if unused := sorted(set(targets) - used):
        raise FedalignError(
            f"targets {', '.join(unused)} have no tensors; PEFT would add untrained modules there. "
            "Leave them out."
        )


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FedalignError(f"{folder}: is not a folder. Give another name for the export.")
    if folder.is_dir():
        others = sorted({f.name for f in folder.iterdir()} - {WEIGHTS, CONFIG, CARD})
        if others:
            raise FedalignError(
                f"{folder}: holds {', '.join(others[:3])}, which no export wrote; nothing was "
                "replaced. Give another name, or empty the folder first."
            )


def _swap(made: Path, folder: Path) -> None:
    """Put the new folder in place; an old export is moved aside first, then removed."""
    if not folder.exists():
        made.rename(folder)
        return
    old = made.with_name(made.name + ".old")
    folder.rename(old)
    try:
        made.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
