"""Scenarios: named TOML files of settings, packaged beside the code or given by path.

Order of precedence, last wins: defaults, scenario file, ``--set`` overrides, command options.
A scenario's ``data.partition`` and ``data.clients-per-group`` are dropped when an override names
another population (source, world, groups or path): they name groups it does not have.

``run.mode = "rewards"`` given on the command line, or ``--mode rewards``, brings the settings of
scenario ``rewards`` (exchanges, temperature, decay, no personal phase) into any other scenario.

Relative paths given on the command line are made absolute from the working directory, because a
runner may work elsewhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedalign.config import Config, Scalar, flatten, from_flat, parse_override
from fedalign.errors import ConfigError

FOLDER = Path(__file__).parent / "scenarios"
PATH_KEYS = ("data.path", "run.out")
POPULATION = ("data.source", "data.world", "data.groups", "data.path")
DEALING = ("data.partition", "data.clients-per-group")


def packaged() -> dict[str, Path]:
    """Return the packaged scenarios by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def reward_settings() -> dict[str, Scalar]:
    """Return what mode ``rewards`` sets in a scenario made for adapters: all but name and data."""
    with packaged()["rewards"].open("rb") as f:
        flat = flatten(tomllib.load(f))
    return {k: v for k, v in flat.items() if k != "run.name" and not k.startswith("data.")}


def load(
    scenario: str, overrides: Sequence[str] = (), options: Mapping[str, Scalar] | None = None
) -> Config:
    """Return the configuration of a scenario (a packaged name or the path of a TOML file)."""
    flat: dict[str, Scalar] = {}
    path = packaged().get(scenario) or Path(scenario)
    if scenario == "default" and not path.exists():
        path = Path()  # a bundle carries code only; the defaults are the default scenario
    elif not path.is_file():
        raise ConfigError(
            f"no scenario '{scenario}'. Packaged: {', '.join(packaged())}; or give the path of a "
            "TOML file."
        )
    if path != Path():
        try:
            flat.update(flatten(tomllib.loads(path.read_text(encoding="utf-8"))))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
    given = dict(parse_override(text) for text in overrides) | dict(options or {})
    if given.get("run.mode") == "rewards" != flat.get("run.mode"):
        flat.update(reward_settings())
    if any(key in given and given[key] != flat.get(key) for key in POPULATION):
        # How a scenario deals clients belongs to its own population.
        flat = {k: v for k, v in flat.items() if k not in DEALING}
    flat.update(given)
    for key in PATH_KEYS:
        value = str(flat.get(key, ""))
        is_hub_name = key == "data.path" and flat.get("data.source") == "hf"
        if value and not is_hub_name:
            flat[key] = str(Path(value).expanduser().resolve())
    model = str(flat.get("model.name", ""))
    if model.startswith((".", "~")):  # a folder: a stored run must find it from anywhere
        flat["model.name"] = str(Path(model).expanduser().resolve())
    return from_flat(flat)
