"""Where the pocket is found: beside the code, in the cache, or trained there again."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from fedalign.errors import DataError
from fedalign.models import packaged


def fake_pocket(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    for name in packaged.FILES:
        (folder / name).write_bytes(weights)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without the shipped weights, and with an empty cache."""
    monkeypatch.setattr(packaged, "BESIDE_CODE", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return packaged.cache_folder()


def test_shipped_pocket_comes_first_and_loads_no_torch() -> None:
    code = (
        "import sys; from fedalign.models.packaged import pocket_folder; print(pocket_folder()); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == packaged.BESIDE_CODE


def test_recorded_hash_is_that_of_the_shipped_weights() -> None:
    record = json.loads((packaged.BESIDE_CODE / "training.json").read_text())
    assert record["sha256"]["model.safetensors"] == packaged.WEIGHTS_SHA256
    assert record["settings_digest"] == packaged.DEFAULT_SETTINGS.digest()


def test_damaged_shipped_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "BESIDE_CODE", fake_pocket(tmp_path / "pocket"))
    with pytest.raises(DataError, match="Install fedalign again"):
        packaged.pocket_folder()


def test_cache_is_used_when_the_bundle_has_no_weights(cache: Path) -> None:
    fake_pocket(cache)
    assert packaged.pocket_folder() == cache


def test_shipped_pocket_is_kept_in_the_cache_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packaged.keep_in_cache()
    kept = packaged.cache_folder()
    assert packaged.weights_sha256(kept) == packaged.WEIGHTS_SHA256
    before = (kept / "model.safetensors").stat().st_ino
    packaged.keep_in_cache()
    assert (kept / "model.safetensors").stat().st_ino == before
    assert [p.name for p in kept.parent.iterdir() if "copying" in p.name] == []


def test_cache_ignores_a_relative_xdg_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert packaged.cache_folder().parent == Path.home() / ".cache" / "fedalign"


def test_missing_pocket_is_trained_into_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pocket = pytest.importorskip("fedalign.models.pocket")
    monkeypatch.setattr(pocket, "train_default", fill)
    (cache / "left").mkdir(parents=True)  # an incomplete folder is no pocket
    assert packaged.pocket_folder() == cache
    assert packaged.is_complete(cache)
    assert not (cache / "left").exists()
    message = capsys.readouterr().err
    assert str(cache) in message
    assert "differ from the shipped ones" in message
    monkeypatch.setattr(pocket, "train_default", None)  # the second call trains nothing
    assert packaged.pocket_folder() == cache


def test_failed_training_leaves_nothing_that_looks_like_a_pocket(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pocket = pytest.importorskip("fedalign.models.pocket")

    def fail(out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise DataError("stopped half way")

    monkeypatch.setattr(pocket, "train_default", fail)
    with pytest.raises(DataError, match="half way"):
        packaged.pocket_folder()
    assert [p.suffix for p in cache.parent.iterdir()] == [".lock"]


def fill(out: Path) -> Path:
    for name in packaged.FILES:
        (out / name).write_bytes(b"trained")
    return out


def train_slowly(out: Path) -> Path:
    import time

    with (out.parent / "trainings").open("a") as log:
        log.write("x")
    time.sleep(0.3)
    return fill(out)


def ask(root: str) -> str:
    from fedalign.models import pocket

    packaged.BESIDE_CODE = Path(root) / "none"
    pocket.train_default = train_slowly
    return str(packaged.pocket_folder())


def test_two_processes_train_once(cache: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(ask, [str(tmp_path)] * 2, chunksize=1)
    assert found == [str(cache)] * 2
    assert (cache.parent / "trainings").read_text() == "x"
