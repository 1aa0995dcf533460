"""From ``model.name`` to a local folder, and the hashes that say which model it is.

A name that begins with ``/``, ``.`` or ``~`` is a folder; a relative one is looked up from the
working directory of the process, so a run that goes on elsewhere needs the absolute path.  Any
other name is the hub's, even where a folder here is called the same.

Everything after this works on a folder in Hugging Face layout with safetensors weights.  Pickled
weights and code from a model repository are never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedalign.config import ModelConfig
from fedalign.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOCAL = ("/", ".", "~")
"""How the name of a folder begins."""
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def model_folder(config: ModelConfig) -> Path:
    """Return the folder of the base model; downloads from the hub only for a hub name.

    Raises ``ConfigError`` when there is no such folder or repository, or no safetensors weights.
    """
    if config.name == "pocket":
        from fedalign.models.packaged import pocket_folder

        folder = pocket_folder()
    elif config.name.startswith(LOCAL):
        folder = _local(config.name)
    else:
        folder = _from_hub(config)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.name = '{config.name}': no config.json in {folder}.")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model.name = '{config.name}': no *.safetensors in {folder}. Other weight formats are "
            "pickles and are refused; convert the model with save_pretrained."
        )
    return folder


def base_revision(folder: Path) -> str:
    """Return the SHA-256 (hex) over the configuration and all weight files of a model folder.

    A download of a model and a copy of its folder have the same revision.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    lines = [f"{file.name} {_file_hash(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 (hex) of what decides token ids: vocabulary, rules, specials, template."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are set by calls, not by the vocabulary.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    identity = {
        "rules": rules,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _local(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_absolute() and not folder.is_dir():
        raise ConfigError(
            f"model.name = '{name}': there is no such folder (looked for from {Path.cwd()}). Give "
            "the absolute path of a model folder; a relative one is found only from the working "
            "directory it was written for."
        )
    return folder.resolve()


def _from_hub(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                config.name,
                revision=config.revision or None,
                allow_patterns=HUB_FILES,
                ignore_patterns=["*/*"],
            )
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"model.name = '{config.name}' is gated: accept its licence on its page of the Hugging "
            "Face hub, then log in on this machine with `hf auth login`."
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        here = f" A folder of that name is here: write './{config.name}' for it."
        raise ConfigError(
            f"model.name = '{config.name}' could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}). Check the name and the network, or give the absolute path "
            f"of a model folder, or 'pocket'.{here if Path(config.name).is_dir() else ''}"
        ) from error


def _file_hash(file: Path) -> str:
    real = file.resolve()
    # The hub's cache names a large file by the SHA-256 of its content: reading 16 GB is saved.
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    stat = real.stat()
    return _content_hash(str(real), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _content_hash(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
