"""Scenarios: packaged files parse, overrides win in order, relative paths become absolute."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedalign.config import Config, flatten, to_flat
from fedalign.errors import ConfigError
from simulations.scenario import FOLDER, load, packaged


def test_there_are_packaged_scenarios() -> None:
    assert "default" in packaged()
    assert all(path.parent == FOLDER for path in packaged().values())


@pytest.mark.parametrize("name", sorted(packaged()))
def test_every_packaged_scenario_parses(name: str, tmp_path: Path) -> None:
    given = flatten(tomllib.loads(packaged()[name].read_text(encoding="utf-8")))
    needs_data = given.get("data.source", "synthetic") != "synthetic"
    config = load(name, options={"data.path": str(tmp_path / "data.csv")} if needs_data else None)
    flat = to_flat(config)
    for key, value in given.items():
        if key != "data.path":
            assert flat[key] == value, key


def test_default_scenario_is_what_flwr_run_starts(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert flatten(project["tool"]["flwr"]["app"]["config"]) == to_flat(load("default"))


def test_bundle_without_scenario_files_still_has_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.scenario.FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load("default") == Config()
    with pytest.raises(ConfigError, match="no scenario 'balanced'"):
        load("balanced")


def test_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nrounds = 3\nseed = 4\nquorum = 0.75\n")
    config = load(str(path), ["run.rounds=5", "run.rounds=6", "run.seed=7"], {"run.seed": 9})
    assert (config.run.rounds, config.run.seed, config.run.quorum) == (6, 9, 0.75)
    assert config.run.max_attempts == Config().run.max_attempts


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("default", ["data.source=survey", "data.path=in/x.csv"], {"run.out": "out"})
    assert config.data.path == str(tmp_path / "in" / "x.csv")
    assert config.run.out == str(tmp_path / "out")


def test_hub_name_is_no_path_but_the_run_folder_still_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("default", ["data.source=hf", "data.path=owner/name"], {"run.out": "out"})
    assert config.data.path == "owner/name"
    assert config.run.out == str(tmp_path / "out")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("default", ["run.out=~/run"]).run.out == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nrounds = ", "not valid TOML"),
        ("[run]\nround = 3\n", "Did you mean 'run.rounds'"),
        ("[run]\nrounds = 0\n", r"outside \[1"),
        ("rounds = 3\n", "unknown key 'rounds'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_unknown_scenario_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"no scenario 'nothing'\. Packaged: .*default"):
        load("nothing")
