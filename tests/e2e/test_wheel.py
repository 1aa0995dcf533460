"""The wheel holds the four packages with their data, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from fedalign import __version__

PACKAGES = ("fedalign", "server", "clients", "simulations")
MAX_BYTES = 9_000_000


def setuptools_can_build() -> bool:
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture
def wheel(
    source_copy: Path, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Path:
    """Build the wheel from a copy that also holds things that must stay out."""
    if not setuptools_can_build():
        pytest.skip("building needs setuptools 77: pip install -e '.[test]'")
    (source_copy / "data").mkdir()
    (source_copy / "data" / "prefs.jsonl").write_text("{}\n")
    (source_copy / "server" / "secrets.yaml").write_text("key: value\n")
    build = command(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist",
        cwd=source_copy,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr[-3000:]
    (path,) = (tmp_path / "dist").iterdir()
    return path


def test_wheel_holds_the_four_packages_and_their_data(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        entry_points = opened.read(
            next(n for n in names if n.endswith("entry_points.txt"))
        ).decode()
    info = f"fedalign-{__version__}.dist-info"
    assert {n.split("/")[0] for n in names} == {*PACKAGES, info}
    expected = {
        str(path.relative_to(root))
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    expected |= {f"{package}/py.typed" for package in PACKAGES}
    expected |= {
        str(path.relative_to(root)) for path in (root / "fedalign/models/pocket").iterdir()
    }
    expected |= {
        str(path.relative_to(root)) for path in (root / "simulations/scenarios").glob("*.toml")
    }
    expected |= {str(path.relative_to(root)) for path in (root / "server/deploy").iterdir()}
    enrollment = root / "fedalign/enrollment"
    expected |= {
        str(path.relative_to(root))
        for end in ("proto", "pyi")
        for path in enrollment.glob(f"*.{end}")
    }
    assert {n for n in names if not n.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names
    for command, room in (
        ("fedalign", "simulations"),
        ("fedalign-server", "server"),
        ("fedalign-client", "clients"),
    ):
        assert f"{command} = {room}.cli:main" in entry_points
    assert wheel.stat().st_size < MAX_BYTES


def test_pocket_is_in_the_source_tree(root: Path) -> None:
    from fedalign.models.packaged import FILES

    assert {p.name for p in (root / "fedalign/models/pocket").iterdir()} >= set(FILES)
