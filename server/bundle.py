"""The app folder of a run, and the check of what Flower makes of it before anything is sent.

Flower sends a bundle (a zip with suffix ``.fab``) to every site and runs it there.  Ours is the
code of the four packages exactly as installed here, and a ``pyproject.toml`` that names the apps
and holds the run's configuration.  Flower would also ship ``*.json``, ``*.jsonl``, ``*.yaml``,
``*.md`` and ``*.toml`` that it finds, so the folder holds nothing else, the include list says
``*.py``, and :func:`check_bundle` opens the built file and compares every byte with the installed
code.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import stat
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fedalign import __version__
from fedalign.config import Scalar
from fedalign.errors import ConfigError, FedalignError
from fedalign.packages import PACKAGES

PROJECT = "pyproject.toml"
LISTING = ".info/CONTENT"
MAX_BYTES = 10_000_000
"""Flower refuses a bundle above 10,485,760 bytes; unpacked, ours must stay below this too."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What Flower takes as the name of an app; the name of a run is one, too."""


class BundleRefused(FedalignError):
    """The bundle holds something that must not be sent; names the file."""


def installed_code() -> dict[str, Path]:
    """Return every ``*.py`` of the four packages by its path in a bundle."""
    code: dict[str, Path] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"package '{package}' is missing. Install fedalign again.")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            if not path.is_symlink() and "__pycache__" not in path.parts:
                code[str(PurePosixPath(package, *path.relative_to(root).parts))] = path
    return code


def make_app_folder(folder: Path, flat: Mapping[str, Scalar]) -> Path:
    """Write the app folder of a run (its name is the run's); replaces what was there.

    ``flat`` are the run's settings as sites may see them (``places.py``).

    Raises ``ConfigError`` for a name that Flower does not take.
    """
    if not NAME.fullmatch(folder.name):
        raise ConfigError(
            f"'{folder.name}' cannot name a run: at most 32 letters, digits and hyphens, and a "
            "letter first."
        )
    if folder.exists():
        shutil.rmtree(folder)
    for name, source in installed_code().items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (folder / PROJECT).write_text(project_text(folder.name, flat), encoding="utf-8")
    return folder


def project_text(name: str, flat: Mapping[str, Scalar]) -> str:
    """Return the ``pyproject.toml`` of a run's app."""
    lines = [
        "[project]",
        f"name = {toml_value(name)}",
        f"version = {toml_value(__version__)}",
        'description = "One fedalign run"',
        'license = "Apache-2.0"',
        'dependencies = ["flwr>=1.40,<1.43"]',
        "[tool.flwr.app]",
        'publisher = "fedalign"',
        "fab-include = [" + ", ".join(f'"{package}/**/*.py"' for package in PACKAGES) + "]",
        "[tool.flwr.app.components]",
        'serverapp = "server.app:app"',
        'clientapp = "clients.app:app"',
    ]
    section = ""
    for key, value in flat.items():
        found, option = key.split(".", 1)
        if found != section:
            section = found
            lines.append(f"[tool.flwr.app.config.{section}]")
        lines.append(f"{option} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Scalar) -> str:
    """Return a scalar as TOML; ``ConfigError`` for a number that is not finite."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{value} cannot be a setting: give a finite number.")
        return repr(value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{value!r} is not valid text.") from None
    # JSON's escapes are TOML's, but TOML also wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_bundle(path: Path, code: Mapping[str, Path] | None = None) -> list[str]:
    """Return the names in a built bundle, all of them harmless.

    Raises ``BundleRefused``, naming the file, for anything but the installed ``*.py`` byte for
    byte, ``pyproject.toml`` and Flower's own listing, in plain files below the size limit.
    """
    allowed = installed_code() if code is None else code
    if path.stat().st_size > MAX_BYTES:
        raise BundleRefused(f"{path} has {path.stat().st_size} bytes; {MAX_BYTES} are allowed.")
    try:
        with zipfile.ZipFile(path) as bundle:
            members = bundle.infolist()
            names = [member.filename for member in members]
            for member in members:
                _check_member(member, names)
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise BundleRefused(f"{path} unpacks to more than {MAX_BYTES} bytes.")
            for member in members:
                _check_content(member.filename, bundle.read(member), allowed)
    except zipfile.BadZipFile as error:
        raise BundleRefused(f"{path} is no bundle: {error}.") from None
    missing = sorted({*allowed, PROJECT} - set(names))
    if missing:
        raise BundleRefused(f"{path} lacks {missing[0]}: Flower left it out.")
    return sorted(names)


def _check_member(member: zipfile.ZipInfo, names: list[str]) -> None:
    name = member.filename
    parts = name.split("/")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG) or member.is_dir():
        raise BundleRefused(f"'{name}' in the bundle is a link or folder, not a plain file.")
    odd = any(part in ("", ".", "..") for part in parts)
    if odd or "\\" in name or ":" in name or not name.isprintable():
        raise BundleRefused(f"'{name}' in the bundle is a path that leads elsewhere.")
    if names.count(name) > 1:
        raise BundleRefused(f"'{name}' is in the bundle twice.")
    if name in (PROJECT, LISTING):
        return
    if not name.endswith(".py"):
        raise BundleRefused(
            f"'{name}' in the bundle is not code. Only *.py may be sent to sites; keep data out of "
            "the package folders."
        )


def _check_content(name: str, content: bytes, allowed: Mapping[str, Path]) -> None:
    if name == LISTING:
        return
    if name == PROJECT:
        _check_project(content)
        return
    if name not in allowed:
        raise BundleRefused(f"'{name}' in the bundle is not part of the installed fedalign.")
    if content != allowed[name].read_bytes():
        raise BundleRefused(f"'{name}' in the bundle differs from the installed file.")


def _check_project(content: bytes) -> None:
    try:
        found = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise BundleRefused(f"'{PROJECT}' in the bundle is not TOML.") from None
    tables = {*found, *(f"tool.{name}" for name in found.get("tool", {}))}
    extra = sorted(tables - {"project", "tool", "tool.flwr"})
    if extra:
        raise BundleRefused(f"'{PROJECT}' in the bundle holds [{extra[0]}], which is not needed.")
