"""The bundle: the installed code and a configuration, and nothing else gets past the check."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.compat import QUIET_FLOWER
from fedalign.config import Config, flatten, from_flat, to_flat
from fedalign.errors import ConfigError
from server.bundle import (
    LISTING,
    PROJECT,
    BundleRefused,
    check_bundle,
    installed_code,
    make_app_folder,
    project_text,
    toml_value,
)


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


@pytest.fixture
def code(tmp_path: Path) -> dict[str, Path]:
    """A tiny installed distribution."""
    found = {}
    for name in ("server/app.py", "clients/app.py"):
        path = tmp_path / "installed" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"# {name}\n")
        found[name] = path
    return found


@pytest.fixture
def good(code: dict[str, Path]) -> dict[str, bytes]:
    project = project_text("a", to_flat(Config())).encode()
    return {name: path.read_bytes() for name, path in code.items()} | {
        PROJECT: project,
        LISTING: b"",
    }


def test_code_is_that_of_the_four_packages() -> None:
    code = installed_code()
    assert {name.split("/")[0] for name in code} == {"fedalign", "server", "clients", "simulations"}
    assert {"server/app.py", "clients/app.py", "fedalign/wire/__init__.py"} <= set(code)
    assert all(name.endswith(".py") and "__pycache__" not in name for name in code)


def test_flower_builds_what_the_check_accepts(tmp_path: Path) -> None:
    config = from_flat({"run.name": 'späte "Runde" \\ \t', "run.rounds": 3})
    app = make_app_folder(tmp_path / "run-1", to_flat(config))
    found = tomllib.loads((app / PROJECT).read_text(encoding="utf-8"))
    assert from_flat(flatten(found["tool"]["flwr"]["app"]["config"])) == config
    assert found["project"]["name"] == "run-1"
    (app / "data.jsonl").write_text("private\n")
    (app / "server" / "secrets.yaml").write_text("private\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "flwr", "build", "--app", app],
        cwd=tmp_path,
        env={**os.environ, **QUIET_FLOWER, "FLWR_HOME": str(tmp_path / "flwr")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (built,) = tmp_path.glob("*.fab")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(check_bundle(built)) == {*installed_code(), PROJECT, LISTING}


def test_a_folder_made_again_holds_nothing_old(tmp_path: Path) -> None:
    app = make_app_folder(tmp_path / "a", to_flat(Config()))
    (app / "old.py").write_text("")
    make_app_folder(app, to_flat(Config()))
    assert not (app / "old.py").exists()


@pytest.mark.parametrize("name", ["", "1a", "a b", "a_b", "x" * 33, "é"])
def test_flower_s_names_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run"):
        make_app_folder(tmp_path / "apps" / (name or " "), to_flat(Config()))


def test_good_bundle_passes(tmp_path: Path, code: dict[str, Path], good: dict[str, bytes]) -> None:
    names = check_bundle(pack(tmp_path / "a.fab", good), code)
    assert names == sorted(good)


@pytest.mark.parametrize(
    "name",
    [
        "data/prefs.jsonl",
        "server/secrets.yaml",
        "notes.md",
        ".env",
        "run.py",
        "server/extra.py",
        "../out.py",
        "/etc/x.py",
        "server/../x.py",
        "server\\x.py",
        "c:/x.py",
        "server//x.py",
        "server/x.py\n",
        "config.toml",
        "fedalign/pyproject.toml",
        "server/app.pyc",
    ],
)
def test_anything_else_is_refused_by_name(
    tmp_path: Path, code: dict[str, Path], good: dict[str, bytes], name: str
) -> None:
    with pytest.raises(BundleRefused, match="in the bundle"):
        check_bundle(pack(tmp_path / "a.fab", {**good, name: b"x = 1\n"}), code)


def test_changed_missing_twice_and_linked_code_is_refused(
    tmp_path: Path, code: dict[str, Path], good: dict[str, bytes]
) -> None:
    with pytest.raises(BundleRefused, match=r"server/app\.py.*differs"):
        check_bundle(pack(tmp_path / "a.fab", {**good, "server/app.py": b"DATA = 1\n"}), code)
    without = {name: content for name, content in good.items() if name != "clients/app.py"}
    with pytest.raises(BundleRefused, match=r"lacks clients/app\.py"):
        check_bundle(pack(tmp_path / "b.fab", without), code)
    path = pack(tmp_path / "c.fab", good)
    with zipfile.ZipFile(path, "a") as bundle, pytest.warns(UserWarning, match="Duplicate"):
        bundle.writestr("server/app.py", good["server/app.py"])
    with pytest.raises(BundleRefused, match="twice"):
        check_bundle(path, code)
    link = zipfile.ZipInfo("clients/app.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = pack(tmp_path / "d.fab", without)
    with zipfile.ZipFile(path, "a") as bundle:
        bundle.writestr(link, "/etc/passwd")
    with pytest.raises(BundleRefused, match="link or folder"):
        check_bundle(path, code)


def test_data_in_the_project_file_is_refused(
    tmp_path: Path, code: dict[str, Path], good: dict[str, bytes]
) -> None:
    for extra in (b"[tool.private]\nx = 1\n", b"[private]\nx = 1\n"):
        path = pack(tmp_path / "a.fab", {**good, PROJECT: good[PROJECT] + extra})
        with pytest.raises(BundleRefused, match="private"):
            check_bundle(path, code)


def test_too_large_and_no_zip_is_refused(
    tmp_path: Path, code: dict[str, Path], good: dict[str, bytes]
) -> None:
    (tmp_path / "a.fab").write_bytes(b"x")
    with pytest.raises(BundleRefused, match="no bundle"):
        check_bundle(tmp_path / "a.fab", code)
    with zipfile.ZipFile(tmp_path / "b.fab", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("server/app.py", b"\0" * 11_000_000)
    with pytest.raises(BundleRefused, match="unpacks to more"):
        check_bundle(tmp_path / "b.fab", code)


@given(st.one_of(st.text(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats()))
def test_toml_gives_back_what_was_written(value: str | int | float | bool) -> None:
    try:
        text = toml_value(value)
    except ConfigError:
        assert value in (float("inf"), float("-inf")) or value != value or isinstance(value, str)
        return
    back = tomllib.loads(f"v = {text}")["v"]
    assert type(back) is type(value)
    assert back == value


def test_all_settings_survive() -> None:
    found = tomllib.loads(project_text("a", to_flat(Config())))["tool"]["flwr"]["app"]["config"]
    assert flatten(found) == to_flat(Config())
