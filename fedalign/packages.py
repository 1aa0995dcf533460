"""Check that ``fedalign``, ``server``, ``clients`` and ``simulations`` belong together.

The names ``server`` and ``clients`` are common: a folder of that name in the working directory
would be imported instead of ours and fail in confusing ways.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from fedalign import __version__
from fedalign.errors import FedalignError

PACKAGES = ("fedalign", "server", "clients", "simulations")


def check_one_distribution() -> None:
    """Raise ``FedalignError`` when a package is missing or comes from somewhere else."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        # A folder without __init__.py is found as a namespace package, which has no origin.
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places:
            raise FedalignError(
                f"package '{name}' is missing beside fedalign in {home}. Install fedalign again."
            )
        found = Path(places[0]).resolve().parent
        if found != home:
            raise FedalignError(
                f"package '{name}' comes from {found}, but fedalign from {home}: something shadows "
                f"it. Run the command from another folder, or rename {found / name}."
            )
    check_installed_version()


def check_installed_version() -> None:
    """Raise ``FedalignError`` when an installed fedalign differs from the code that runs.

    Flower puts an app bundle first on the path, so it shadows an installed copy; scenarios and
    packaged data then belong to another version than the code.
    """
    try:
        installed = metadata.version("fedalign")
    except metadata.PackageNotFoundError:
        return
    if installed != __version__:
        raise FedalignError(
            f"this code is fedalign {__version__}, but {installed} is installed. Install the "
            "version that the bundle was built from."
        )
