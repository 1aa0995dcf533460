"""Shared by the end-to-end tests: a clean copy of the source, and commands of this environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedalign.compat import QUIET_FLOWER

NOT_SOURCE = (".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "*.fab", "venv*")
PACKAGES = ("fedalign", "server", "clients", "simulations")


@pytest.fixture
def source_copy(root: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkout without what building and testing leave behind."""
    copy = tmp_path / "source"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a folder, with this environment's programs first on the path."""

    def run(
        *words: str | Path, cwd: Path, timeout: float = 300.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [str(w) for w in words],
            cwd=cwd,
            env={**os.environ, **QUIET_FLOWER, "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def loopback(root: Path) -> ModuleType:
    """Return ``benchmarks/loopback.py``: real processes of a coordinator and its sites."""
    return _module(root / "benchmarks" / "loopback.py")


@pytest.fixture(scope="session")
def deployed() -> ModuleType:
    """Return ``deployed.py``: what tests of a deployment compare and wait for."""
    return _module(Path(__file__).with_name("deployed.py"))


@pytest.fixture(scope="module")
def federation(loopback: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a coordinator and three sites for the tests of a file."""
    with loopback.Federation(tmp_path_factory.mktemp("federation")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(federation: Any, deployed: ModuleType) -> Path:
    """Return the folder of a run that nothing disturbed."""
    done = federation.run("plain", *deployed.SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(federation.result("plain"))
