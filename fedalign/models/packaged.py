"""Where the pocket model is: beside the code, else in the user's cache, else trained there again.

A Flower app bundle carries code only, so the shipped weights may be absent where the code runs.
The pocket is then trained from its seed, which takes about a minute on one core.  With the same
library versions and processor features that gives the same bytes; otherwise rounding differs, and
over the steps the weights drift apart a little.  A message on standard error then says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedalign.errors import DataError
from fedalign.models.pocket_corpus import DEFAULT_SETTINGS

BESIDE_CODE = Path(__file__).parent / "pocket"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

WEIGHTS_SHA256 = "e6264a2a285d91aafd2e3068cd13bfb408a12cd3f5a51ee7aaccad35132c9f4a"
"""Hash of the shipped ``model.safetensors``."""


def pocket_folder() -> Path:
    """Return the folder of the pocket, in Hugging Face layout; train it first if there is none.

    Raises ``DataError`` when the pocket beside the code is damaged, and ``OSError`` when the cache
    cannot be written.
    """
    if is_complete(BESIDE_CODE):
        if weights_sha256(BESIDE_CODE) != WEIGHTS_SHA256:
            raise DataError(
                f"{BESIDE_CODE / 'model.safetensors'} is not the file that was shipped. "
                "Install fedalign again, or delete that folder to train the pocket from its seed."
            )
        return BESIDE_CODE
    cached = cache_folder()
    if is_complete(cached):
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with _lock(cached.with_suffix(".lock")):
        if not is_complete(cached):  # another process may have made it while we waited
            _train_into(cached)
    return cached


def keep_in_cache() -> None:
    """Put the shipped pocket in the user's cache, so that a bundle's process finds it there.

    Does nothing where the code has no weights beside it or the cache has them.
    """
    cached = cache_folder()
    if not is_complete(BESIDE_CODE) or is_complete(cached):
        return
    cached.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=cached.parent, prefix="pocket-copying-"))
    try:
        shutil.copytree(BESIDE_CODE, made, dirs_exist_ok=True)
        made.chmod(0o755)
        with _lock(cached.with_suffix(".lock")):
            if not is_complete(cached):
                if cached.exists():  # left over, incomplete
                    shutil.rmtree(cached)
                made.rename(cached)
    finally:
        if made.exists():
            shutil.rmtree(made)


def cache_folder() -> Path:
    """Return the pocket's place in the user's cache, one a version of its settings and weights."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    cache = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return cache / "fedalign" / f"pocket-{DEFAULT_SETTINGS.digest()}-{WEIGHTS_SHA256[:12]}"


def is_complete(folder: Path) -> bool:
    """Whether a folder holds every file that loading the pocket needs."""
    return all((folder / name).is_file() for name in FILES)


def weights_sha256(folder: Path) -> str:
    """Return the sha256 of a folder's weights, in hex."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _train_into(folder: Path) -> None:
    from fedalign.models.pocket import train_default

    print(
        f"fedalign: training the pocket model into {folder} (once, about a minute)",
        file=sys.stderr,
        flush=True,
    )
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix="pocket-making-"))
    try:
        train_default(made)
        made.chmod(0o755)
        if folder.exists():  # left over, incomplete
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        if made.exists():
            shutil.rmtree(made)
    if weights_sha256(folder) != WEIGHTS_SHA256:
        print(
            "fedalign: the weights differ from the shipped ones (other library version or "
            "processor): the same recipe with other rounding. Scores will differ a little. All "
            "nodes of a run must use the same pocket.",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
