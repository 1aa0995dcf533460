"""A site's settings and data: its own, strict, and the same client as in a simulation."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from clients.site import Home, SiteSettings, load_settings, local_flat, own_client, parse_settings
from clients.store import fingerprint, population
from fedalign.config import Config, from_flat, to_site_json
from fedalign.errors import ConfigError, DataError

SITE = {"name": "north-clinic", "group": "coast"}


def settings(path: Path, source: str = "survey", **more: object) -> SiteSettings:
    return parse_settings({"site": SITE, "data": {"source": source, "path": str(path), **more}})


def local(own: SiteSettings, run: Config) -> Config:
    return from_flat(local_flat(json.loads(to_site_json(run)), own, Path("/store")))


def stripped(rows: list[dict[str, object]], site: str) -> list[dict[str, object]]:
    """Return one site's rows as that site would have them: no group, no name of the site."""
    return [
        {k: v for k, v in row.items() if k not in ("group", "site")}
        for row in rows
        if row["site"] == site
    ]


@pytest.mark.parametrize("source", ["survey", "pairs"])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_client_is_the_one_of_a_simulation_of_all_sites(tmp_path, sites, source, seed):
    rows = sites.survey_rows() if source == "survey" else sites.pair_rows()
    merged = sites.write(tmp_path / "all.jsonl", rows)
    split = {"run.seed": seed, "data.validation": 0.25, "data.test": 0.15}
    run = from_flat(
        {
            **split,
            "data.source": source,
            "data.path": str(merged),
            "data.partition": "column",
            "data.partition-column": "site",
        }
    )
    simulated = {c.name: c for c in population(run)}
    assert set(simulated) == set(sites.groups)
    path = sites.write(tmp_path / "own.jsonl", stripped(rows, "north-clinic"))
    own = settings(path, source)
    client, dataset = own_client(own, local(own, run))
    assert fingerprint([client]) == fingerprint([simulated["north-clinic"]])
    theirs = simulated["north-clinic"]
    assert (client.name, client.group, client.size) == (theirs.name, theirs.group, theirs.size)
    assert len(dataset.items) == len(rows) // 2


def test_the_runs_data_settings_do_not_count_but_the_split_does(tmp_path):
    own = settings(tmp_path / "x.jsonl", **{"skip-bad": True})
    run = from_flat(
        {
            "data.source": "pairs",
            "data.path": "/etc/passwd",
            "data.groups": "a",
            "data.questions": 3,
            "data.validation": 0.3,
            "model.device": "cuda:3",
            "rewards.prompts": "/etc/shadow",
            "run.out": "/etc",
        }
    )
    flat = json.loads(to_site_json(run)) | {"data.path": "/etc/passwd", "run.out": "/etc"}
    found = from_flat(local_flat(flat, own, Path("/store")))
    assert (found.data.source, found.data.path) == ("survey", str(tmp_path / "x.jsonl"))
    assert (found.data.groups, found.data.questions, found.data.skip_bad) == ("", 0, True)
    assert found.data.validation == 0.3
    assert (found.model.device, found.rewards.prompts, found.run.out) == ("auto", "", "/store")


@pytest.mark.parametrize("layout", ["long", "wide"])
def test_a_row_of_another_group_is_named(tmp_path, sites, layout):
    rows = stripped(sites.survey_rows(), "north-clinic")
    if layout == "long":
        rows[3]["group"] = "inland"
    else:
        rows[3]["shares"] = {"coast": rows[3]["shares"], "inland": rows[3]["shares"]}
    path = sites.write(tmp_path / "own.jsonl", rows)
    own = settings(path)
    with pytest.raises(DataError, match=r"own\.jsonl:4.*'inland'.*enrolled in 'coast'"):
        own_client(own, local(own, Config()))


def test_a_bad_row_is_named(tmp_path, sites):
    rows = stripped(sites.survey_rows(), "north-clinic")
    rows[5]["shares"] = [2.0, 3.0]
    path = sites.write(tmp_path / "own.jsonl", rows)
    own = settings(path)
    with pytest.raises(DataError, match=r"own\.jsonl:6"):
        own_client(own, local(own, Config()))
    forgiving = settings(path, **{"skip-bad": True})
    _, dataset = own_client(forgiving, local(forgiving, Config()))
    assert len(dataset.bad_rows) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nsource='pairs'\npath='/x'", "no name"),
        ("[site]\nname='a'\n[data]\nsource='pairs'\npath='/x'", "no group"),
        ("[site]\nname='a'\ngroup='g'", "source and path"),
        ("[site]\nname='a'\ngroup='g'\n[data]\nsource='synthetic'", "source and path"),
        ("[site]\nname='a'\ngroup='g'\n[data]\nsource='pairs'", "needs data.path"),
        ("[site]\nname='a'\ngroup='g'\n[data]\nsource='pairs'\npath='x'", "absolute"),
        ("[site]\nname='a'\ngroup='g'\n[data]\nsurce='pairs'", "'surce'.*Did you mean 'source'"),
        ("[site]\nname='a'\ngroup='g'\n[data]\nvalidation=0.1", "unknown key of"),
        ("[site]\nname='a'\ngroup='g'\n[model]\nname='pocket'", "unknown key of"),
        ("[sites]\nname='a'", "unknown section 'sites'"),
        ("site = 3", "must be a table"),
        ("[site", "not valid TOML"),
    ],
)
def test_settings_that_are_not_clear_are_refused(tmp_path, text, message):
    path = tmp_path / "trainer.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_settings(path)
    assert str(path) in str(error.value)


def test_before_joining(tmp_path):
    with pytest.raises(ConfigError, match="Join first"):
        load_settings(Home(tmp_path).settings)


def test_a_home(tmp_path):
    home = Home(tmp_path)
    assert home.socket == tmp_path / "run" / "trainer.sock"
    path = home.settings
    path.parent.mkdir()
    path.write_text("[site]\nname='a'\ngroup='g'\n[data]\nsource='pairs'\npath='/x'\n")
    assert tomllib.loads(path.read_text())["site"] == {"name": "a", "group": "g"}
    assert load_settings(path).data.path == "/x"
