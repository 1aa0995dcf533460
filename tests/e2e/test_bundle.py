"""The Flower app bundle carries code only, and runs unpacked from another working directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedalign import __version__
from fedalign.models.packaged import BESIDE_CODE, WEIGHTS_SHA256, weights_sha256

PACKAGES = ("fedalign", "server", "clients", "simulations")
ADDED_BY_FLOWER = {"pyproject.toml", ".info/CONTENT"}
MAX_BYTES = 10_000_000

Command = Callable[..., subprocess.CompletedProcess[str]]


def add_decoys(folder: Path) -> None:
    """Put things beside and among the code that must never be shipped to other sites."""
    for name in (
        "data/prefs.jsonl",
        "data/answers.csv",
        "secrets.yaml",
        "notes.md",
        ".env",
        "run.py",
        "server/secrets.yaml",
        "clients/prefs.json",
        "fedalign/data/private.jsonl",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private\n")


@pytest.fixture
def bundle(source_copy: Path, tmp_path: Path, command: Command) -> Path:
    add_decoys(source_copy)
    built = command("flwr", "build", cwd=source_copy, FLWR_HOME=str(tmp_path / "flwr"))
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = source_copy.glob("*.fab")
    return path


@pytest.fixture
def unpacked(bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(bundle) as opened:
        opened.extractall(folder)
    return folder


@pytest.fixture
def python(unpacked: Path, tmp_path: Path, command: Command) -> Callable[..., str]:
    """Run Python elsewhere, with the bundle first on the path and an empty home."""
    for name in ("elsewhere", "home", "cache"):
        (tmp_path / name).mkdir()

    def run(*words: str, expect: int = 0, path: str = "", timeout: float = 300.0) -> str:
        done = command(
            sys.executable,
            *words,
            cwd=tmp_path / "elsewhere",
            timeout=timeout,
            PYTHONPATH=f"{path}{unpacked}",
            HOME=str(tmp_path / "home"),
            XDG_CACHE_HOME=str(tmp_path / "cache"),
            XDG_DATA_HOME=str(tmp_path / "home" / "data"),
        )
        assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + (done.stderr if expect else "")

    return run


@pytest.fixture
def cached_pocket(python: Callable[..., str]) -> Path:
    """Put the shipped pocket where the bundle's code looks in the cache."""
    code = "from fedalign.models.packaged import cache_folder; print(cache_folder())"
    folder = Path(python("-c", code).strip())
    shutil.copytree(BESIDE_CODE, folder)
    return folder


WHERE = "from fedalign.models.packaged import pocket_folder; print(pocket_folder())"


def test_bundle_holds_code_and_nothing_else(bundle: Path, root: Path) -> None:
    with zipfile.ZipFile(bundle) as opened:
        names = set(opened.namelist())
    code = {str(p.relative_to(root)) for name in PACKAGES for p in (root / name).rglob("*.py")}
    assert names - ADDED_BY_FLOWER == code
    assert names >= ADDED_BY_FLOWER
    assert bundle.stat().st_size < MAX_BYTES


def test_unpacked_bundle_is_what_gets_imported(
    python: Callable[..., str], unpacked: Path, cached_pocket: Path
) -> None:
    for module in ("server.app", "clients.app"):
        place = python(
            "-c", f"import {module} as m, fedalign; print(m.__file__, fedalign.__file__)"
        )
        assert all(Path(found).is_relative_to(unpacked) for found in place.split())
    assert python("-c", WHERE).strip() == str(cached_pocket)
    shutil.copytree(BESIDE_CODE, unpacked / "fedalign" / "models" / "pocket")
    assert python("-c", WHERE).strip() == str(unpacked / "fedalign" / "models" / "pocket")


@pytest.mark.usefixtures("cached_pocket")
def test_unpacked_bundle_runs(python: Callable[..., str], tmp_path: Path) -> None:
    settings = ("run.rounds=1", "local.steps=1", "data.questions=24", "personal.steps=0")
    options = [word for s in settings for word in ("--set", s)]
    python("-m", "simulations.cli", "simulate", *options, "--out", str(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "start",
    [
        "from server.app import app; app(None, Context(1, 0, {}, RecordDict(), {}))",
        "from fedalign.packages import check_one_distribution; check_one_distribution()",
    ],
)
def test_other_installed_version_stops_the_run(
    python: Callable[..., str], tmp_path: Path, start: str
) -> None:
    info = tmp_path / "installed" / "fedalign-9.9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedalign\nVersion: 9.9.9\n")
    code = f"from flwr.app import Context, RecordDict; {start}"
    text = python("-c", code, path=f"{tmp_path / 'installed'}:", expect=1)
    assert f"this code is fedalign {__version__}, but 9.9.9 is installed" in text


@pytest.mark.slow
def test_bundle_trains_the_pocket_when_it_is_nowhere(
    python: Callable[..., str], tmp_path: Path
) -> None:
    *said, place = python("-c", f"import sys; sys.stderr = sys.stdout; {WHERE}").splitlines()
    folder = Path(place)
    assert folder.is_relative_to(tmp_path / "cache")
    assert "training the pocket model" in said[0]
    # Another processor or library version may give other last bits; then it must say so.
    same = weights_sha256(folder) == WEIGHTS_SHA256
    assert same or any("differ from the shipped ones" in line for line in said)
