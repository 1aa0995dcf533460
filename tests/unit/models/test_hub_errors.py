"""What a user reads when a model cannot be had from the hub or a folder.  Nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from fedalign.config import ModelConfig
from fedalign.errors import ConfigError
from fedalign.models.source import model_folder


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
    asked: list[Any] = []

    def snapshot_download(name: str, **given: Any) -> str:
        asked.append((name, given))
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_gated_model_says_to_accept_its_licence(monkeypatch) -> None:
    error = GatedRepoError.__new__(GatedRepoError)  # its own constructor wants an HTTP response
    asked = refuse(monkeypatch, error)
    with pytest.raises(ConfigError, match=r"google/gemma-2-2b' is gated: accept its licence.*log"):
        model_folder(ModelConfig(name="google/gemma-2-2b"))
    assert asked[0][0] == "google/gemma-2-2b"


def test_without_a_network_it_says_what_else_to_give(monkeypatch) -> None:
    refuse(monkeypatch, LocalEntryNotFoundError("no network"))
    with pytest.raises(ConfigError, match=r"could not be fetched.*absolute path"):
        model_folder(ModelConfig(name="Qwen/Qwen3-0.6B"))


def test_pickled_weights_are_never_asked_for(monkeypatch) -> None:
    asked = refuse(monkeypatch, LocalEntryNotFoundError("no network"))
    with pytest.raises(ConfigError):
        model_folder(ModelConfig(name="Qwen/Qwen3-0.6B", revision="main"))
    given = asked[0][1]
    assert given["revision"] == "main"
    assert not any(p.endswith((".bin", ".pt", ".pth", ".py")) for p in given["allow_patterns"])


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["./my-model", "../place/my-model", "."])
def test_a_relative_folder_is_found_from_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_model(tmp_path / "place" / "my-model")
    monkeypatch.chdir(folder if name == "." else folder.parent)
    assert model_folder(ModelConfig(name=name)) == folder.resolve()


def test_a_relative_folder_that_is_elsewhere_is_named_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model(tmp_path / "place" / "my-model")
    asked = refuse(monkeypatch, LocalEntryNotFoundError("no network"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no such folder \(looked for from .*absolute"):
        model_folder(ModelConfig(name="./my-model"))
    assert not asked


def test_a_hub_name_is_the_hubs_even_where_a_folder_is_called_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model(tmp_path / "my-model")
    refuse(monkeypatch, LocalEntryNotFoundError("no network"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"A folder of that name is here: write './my-model'"):
        model_folder(ModelConfig(name="my-model"))
