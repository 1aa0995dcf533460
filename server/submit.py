"""Submitting a run to the coordinator's SuperLink: its settings, its bundle, its number.

Settings come from a scenario (a packaged name, or a TOML file) and ``--set``.  Packaged scenarios
lie with the package ``simulations``; they are found as files, nothing of it is imported.  On a
deployment a scenario's section ``data`` describes nobody: every site has its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedalign.config import Config, Scalar, from_flat, load_toml, parse_override, to_flat
from fedalign.errors import ConfigError, ResumeError
from fedalign.ledger import Ledger, is_blank
from fedalign.models.packaged import keep_in_cache
from fedalign.runfolder import LEDGER
from server.bundle import check_bundle, make_app_folder
from server.coordinator import Coordinator, write_private
from server.places import keep_files, shorten
from server.questions import read_prompts
from server.superlink_admin import (
    CONNECTION,
    AdminRefused,
    RunAdmin,
    flower_environment,
    flwr,
    write_connection,
)


@dataclass(frozen=True)
class Submission:
    """One submission of a run, kept in ``apps/NAME.json``."""

    name: str
    run_id: int
    bundle: str
    """SHA-256 (hex) of the bundle."""
    submitted: float
    """Seconds since 1970."""


def settings(scenario: str, overrides: Sequence[str]) -> dict[str, Scalar]:
    """Return the flat settings of a packaged scenario or TOML file, with ``--set`` overrides.

    Raises ``ConfigError`` for a scenario that is wrong by itself; together they are checked with
    the places of a run (:func:`new_run`).
    """
    packaged = packaged_scenarios()
    path = packaged.get(scenario) or Path(scenario).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no scenario '{scenario}'. Packaged: {', '.join(packaged) or 'none'}; or give the "
            "path of a TOML file."
        )
    return to_flat(load_toml(path)) | dict(parse_override(text) for text in overrides)


def packaged_scenarios() -> dict[str, Path]:
    """Return the files of the packaged scenarios by name."""
    spec = importlib.util.find_spec("simulations")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return {p.stem: p for place in places for p in sorted(Path(place, "scenarios").glob("*.toml"))}


def new_run(coordinator: Coordinator, flat: Mapping[str, Scalar], name: str) -> Config:
    """Return the configuration of a new run NAME in this coordinator.

    Raises ``ResumeError`` where a run of this name began already, ``DataError`` for questions that
    cannot be read.
    """
    if stored_config(coordinator.runs / name) is not None:
        raise ResumeError(
            f"there is a run '{name}' already. Go on with it (fedalign-server resume {name}), or "
            "choose another --name."
        )
    fixed = _places(coordinator, name) | {"run.name": name, "run.resume": False}
    config = from_flat({**flat, **fixed})
    _check_prompts(config)
    return config


def _check_prompts(config: Config) -> None:
    """Refuse, before anything is sent, a reward federation that has nothing to ask."""
    if config.rewards.prompts:
        read_prompts(Path(config.rewards.prompts))
    elif config.run.mode == "rewards" and not config.data.path:
        raise ConfigError(
            "run.mode = 'rewards' needs questions to write answers to, and the coordinator holds "
            "no site's data. Give rewards.prompts: the absolute path of a file of JSON lines with "
            '"question" and "options", the same questions that sites hold.'
        )


def old_run(coordinator: Coordinator, name: str, overrides: Sequence[str]) -> Config:
    """Return the configuration with which the unfinished run NAME goes on."""
    stored = stored_config(coordinator.runs / name)
    if stored is None:
        known = sorted(p.name for p in coordinator.runs.iterdir() if p.is_dir())
        raise ResumeError(
            f"no run '{name}' has begun, so there is none to resume. Runs: "
            f"{', '.join(known) or 'none'}. Start one: fedalign-server run."
        )
    changed = dict(parse_override(text) for text in overrides)
    known_keys = to_flat(Config())
    kept = {key: value for key, value in stored.items() if key in known_keys}
    return from_flat(kept | changed | _places(coordinator, name) | {"run.resume": True})


def _places(coordinator: Coordinator, name: str) -> dict[str, Scalar]:
    return {
        "run.out": str(coordinator.runs / name),
        "deployment.registry": str(coordinator.registry),
        "deployment.audit": str(coordinator.audit),
    }


def stored_config(folder: Path) -> dict[str, Scalar] | None:
    """Return the flat configuration that a run folder's ledger holds; None before it began."""
    if not (folder / LEDGER).is_file() or is_blank(folder / LEDGER):
        return None
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        found = ledger.run().get("config")
    return dict(found) if found is not None else None


def submit(coordinator: Coordinator, admin: RunAdmin, config: Config, name: str) -> Submission:
    """Build, check and submit the bundle of a run; return once the SuperLink has accepted it.

    Raises ``BundleRefused`` before anything is sent, ``AdminUnavailable`` without a SuperLink, and
    ``ResumeError`` while an earlier submission of the same run goes on.
    """
    record = coordinator.apps / f"{name}.json"
    earlier = read_submission(record)
    if earlier is not None:
        state = admin.run_state(earlier.run_id)
        if state is not None and not state.finished:
            raise ResumeError(f"run '{name}' goes on: Flower says '{state.status}'.")
    else:
        admin.nodes()  # is there a SuperLink? Ask before building.
    write_connection(coordinator)
    if config.model.name == "pocket":
        keep_in_cache()  # a bundle holds code only, and making the pocket again takes a minute
    environment = flower_environment(coordinator)
    flat = to_flat(config)
    keep_files(flat, coordinator.state, name)
    app = make_app_folder(coordinator.apps / name, shorten(flat, coordinator.state))
    digest = _built_digest(app, environment)
    answer = flwr(environment, "run", str(app), CONNECTION, "--format", "json")
    if not answer.get("success"):
        text = str(answer.get("error-message", "no answer")).strip()
        raise AdminRefused(f"the SuperLink did not take the run: {text[-400:]}")
    submission = Submission(name, int(answer["run-id"]), digest, time.time())
    write_private(record, json.dumps(asdict(submission), sort_keys=True).encode())
    if not digest.startswith(str(answer.get("fab-hash", ""))) or not answer.get("fab-hash"):
        admin.stop_run(submission.run_id)
        raise AdminRefused("Flower sent another bundle than the one checked; the run was stopped.")
    return submission


def _built_digest(app: Path, environment: dict[str, str]) -> str:
    """Build the bundle as ``flwr run`` will, check it, return its SHA-256."""
    with tempfile.TemporaryDirectory() as folder:
        flwr(environment, "build", "--app", str(app), cwd=Path(folder))
        built = list(Path(folder).glob("*.fab"))
        if len(built) != 1:
            raise AdminRefused(f"flwr build made no bundle of {app}. Try: flwr build --app {app}")
        check_bundle(built[0])
        return hashlib.sha256(built[0].read_bytes()).hexdigest()


def read_submission(path: Path) -> Submission | None:
    """Return the last submission of a run; None where there is none."""
    try:
        return Submission(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: cannot be read. Remove it, and submit again.") from None
