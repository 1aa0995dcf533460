"""Shared by the end-to-end tests: a clean copy of the source, and commands of this environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
