"""The scenarios for published models: they parse, say what they cost, and fit the real data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedalign.config import Config, resolve_metric
from fedalign.data.load import load_dataset, names
from fedalign.errors import ConfigError
from simulations import scenario

COUNTRIES = {
    "Nigeria",
    "Egypt",
    "India (Current national sample)",
    "Germany",
    "United States",
    "Canada",
    "Argentina",
    "Australia",
}
GLOBAL = {
    "globalopinionqa-qwen3-0.6b": ("Qwen/Qwen3-0.6B", True),
    "globalopinionqa-llama-3.2-1b": ("meta-llama/Llama-3.2-1B", False),
    "globalopinionqa-gemma-2-2b": ("google/gemma-2-2b", False),
}
ALL = {**GLOBAL, "polis-qwen3-0.6b": ("Qwen/Qwen3-0.6B", True)}


def load(name: str, path: str = "opinions.csv", *more: str) -> Config:
    return scenario.load(name, [f"data.path={path}", *more])


def text(name: str) -> str:
    return scenario.packaged()[name].read_text(encoding="utf-8")


def test_every_packaged_scenario_parses() -> None:
    for name, path in scenario.packaged().items():
        needs_data = "[data]" in path.read_text() and 'source = "synthetic"' not in path.read_text()
        config = load(name) if needs_data else scenario.load(name)
        assert config.run.name == name


@pytest.mark.parametrize("name", ALL)
def test_settings_for_a_real_model(name: str) -> None:
    config = load(name)
    model, chat = ALL[name]
    assert (config.model.name, config.model.chat_template) == (model, chat)
    assert (config.model.rank, config.model.alpha, config.model.dtype) == (16, 32.0, "bfloat16")
    # Rates of the pocket model (0.006 and 0.003) would destroy a pretrained one.
    assert config.local.learning_rate <= 1e-4
    assert config.personal.learning_rate <= config.local.learning_rate
    assert resolve_metric(config, "survey") == "js_distance"
    assert Path(config.data.path).is_absolute()


@pytest.mark.parametrize("name", GLOBAL)
def test_eight_countries(name: str) -> None:
    assert set(names(load(name).data.groups)) == COUNTRIES


@pytest.mark.parametrize("name", ALL)
def test_the_path_of_the_data_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.path"):
        scenario.load(name)


@pytest.mark.parametrize("name", ALL)
def test_the_head_says_how_to_run_it_and_what_it_costs(name: str) -> None:
    head = text(name).split("[run]")[0]
    assert head.startswith(f"# fedalign simulate {name} --set data.path=")
    for fact in (r"GPU memory [\d.]+ GB", r"\d+ MB to and as much from", r"\d+ s a round", "A100"):
        assert re.search(fact, " ".join(head.split())), fact
    assert "not measured" in head
    assert ALL[name][0] in head


@pytest.mark.parametrize("name", GLOBAL)
def test_the_head_and_the_page_agree(name: str, root: Path) -> None:
    """The figures of a scenario's head are those of the table in docs/models.md."""
    head = " ".join(text(name).split("[run]")[0].replace("#", " ").split())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (root / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    column = next(r for r in rows if "Qwen/Qwen3-0.6B" in r and r[0] == "").index(GLOBAL[name][0])
    table = {r[0]: r[column] for r in rows if len(r) == 4}
    assert f"GPU memory {table['GPU memory in all (GB)']} GB" in head
    assert f"{float(table['to a client, a round (MB)']):.0f} MB to" in head
    assert f"{table['a round: 8 clients, 10 steps each (s)']} s a round" in head
    assert f"{table['10 rounds and the personal phase (min)']} min in all" in head


@pytest.mark.real_data
@pytest.mark.parametrize("name", GLOBAL)
def test_countries_are_in_the_real_data(name: str, real_data: Path) -> None:
    path = real_data / "globalopinionqa" / "goqa.jsonl"
    config = load(name, str(path), "data.source=goqa")
    dataset = load_dataset(config.data, config.run.seed)
    assert set(dataset.groups) == COUNTRIES
    assert len(dataset.items) == 1005


@pytest.mark.real_data
def test_clusters_are_in_the_real_data(real_data: Path) -> None:
    config = load("polis-qwen3-0.6b", str(real_data / "polis"))
    dataset = load_dataset(config.data, config.run.seed)
    assert set(dataset.groups) == {"bowling_green/g0", "bowling_green/g1"}
    assert len(dataset.items) == 607
