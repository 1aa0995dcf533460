"""Where a run's files are, in a form that tells sites nothing about the coordinator's machine.

A bundle goes to every site, with the run's configuration in it.  So places inside the state folder
are written relative to it there (:func:`shorten`), and the ServerApp, which runs on the coordinator
with ``FEDALIGN_STATE`` in its environment, makes them absolute again (:func:`located`).  Files
elsewhere (:data:`FILES`) are not in the bundle at all: :func:`keep_files` writes their paths to a
file in the state folder, and :func:`located` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalign.config import Config, to_flat
from fedalign.errors import ConfigError
from server.coordinator import write_private

STATE = "FEDALIGN_STATE"
PLACES = ("run.out", "deployment.registry", "deployment.audit")
FILES = ("data.path", "rewards.prompts")
"""Files that the coordinator reads itself, wherever they are."""


def shorten(flat: Mapping[str, Any], state: Path) -> dict[str, Any]:
    """Return flat settings with places inside ``state`` relative to it, and without files."""
    short = {
        key: str(Path(str(flat[key])).relative_to(state))
        for key in PLACES
        if flat.get(key) and Path(str(flat[key])).is_relative_to(state)
    }
    defaults = to_flat(Config())
    return {**flat, **short, **{key: defaults[key] for key in FILES if key in flat}}


def keep_files(flat: Mapping[str, Any], state: Path, name: str) -> None:
    """Write down, for the ServerApp of run ``name`` alone, which files the run reads."""
    text = json.dumps({key: flat[key] for key in FILES if flat.get(key)}, sort_keys=True)
    write_private(_files(state, name), text.encode())


def _files(state: Path, name: str) -> Path:
    return state / "apps" / f"{name}.files.json"


def located(flat: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Inverse of :func:`shorten`; a simulation has no relative places, and nothing changes.

    Raises ``ConfigError`` for a relative place outside a coordinator, and where the paths of the
    run's files are lost.
    """
    relative = [k for k in PLACES if flat.get(k) and not Path(str(flat[k])).is_absolute()]
    if relative and not environment.get(STATE):
        raise ConfigError(
            f"{relative[0]} = '{flat[relative[0]]}' is not an absolute path; a runner may work "
            "elsewhere."
        )
    if not relative:
        return dict(flat)
    state = Path(environment[STATE])
    path = _files(state, str(flat["run.name"]))
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Submit the run again.") from None
    return {**flat, **{k: str(state / str(flat[k])) for k in relative}, **files}
