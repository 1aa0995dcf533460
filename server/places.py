"""Where a run's files are, in a form that tells sites nothing about the coordinator's machine.

A bundle goes to every site, with the run's configuration in it.  So places inside the state folder
are written relative to it there (:func:`shorten`), and the ServerApp, which runs on the coordinator
with ``FEDALIGN_STATE`` in its environment, makes them absolute again (:func:`located`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalign.errors import ConfigError

STATE = "FEDALIGN_STATE"
PLACES = ("run.out", "deployment.registry", "deployment.audit")


def shorten(flat: Mapping[str, Any], state: Path) -> dict[str, Any]:
    """Return flat settings with places inside ``state`` relative to it."""
    short = {
        key: str(Path(str(flat[key])).relative_to(state))
        for key in PLACES
        if flat.get(key) and Path(str(flat[key])).is_relative_to(state)
    }
    return {**flat, **short}


def located(flat: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Inverse of :func:`shorten`; a simulation has no relative places, and nothing changes.

    Raises ``ConfigError`` for a relative place outside a coordinator.
    """
    relative = [k for k in PLACES if flat.get(k) and not Path(str(flat[k])).is_absolute()]
    if relative and not environment.get(STATE):
        raise ConfigError(
            f"{relative[0]} = '{flat[relative[0]]}' is not an absolute path; a runner may work "
            "elsewhere."
        )
    return {**flat, **{k: str(Path(environment[STATE]) / str(flat[k])) for k in relative}}
