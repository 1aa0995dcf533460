"""A site's folder, its settings, and its one client.

::

    HOME/node/     owner: the node's user, 0700     key, ca.crt, site.toml       (by `join`)
    HOME/trainer/  owner: the trainer's user, 0700  trainer.toml, policy.toml, audit.jsonl, store/
    HOME/run/      trainer.sock

``trainer.toml`` says who the site is and where its data are::

    [site]
    name = "north-clinic"            # as enrolled; the name of its one client
    group = "north"                  # as enrolled

    [data]
    source = "pairs"                 # survey, pairs, globalopinionqa, goqa, polis or hf
    path = "/srv/preferences.jsonl"  # file or folder; for hf the dataset's name
    # form, hf-split, keep-nonresponse, min-votes, skip-bad: as in a scenario

    [model]                          # optional
    device = "auto"

A run's own ``[data]`` section does not count here, but for what decides the role of a question:
``data.validation``, ``data.test`` and ``run.seed``.  Every row belongs to the enrolled group; a row
that names another one stops the site, a row that names none takes it.  The client is then what a
simulation makes of all sites' rows in one file with ``data.partition = column`` and the questions
in the same order.  (Two rules reach over sites and cannot hold here: a split that another site's
file declares for a question, and the merging of repeated questions.)
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedalign.config import Config, DataConfig, ModelConfig, RunConfig, from_flat
from fedalign.data.duplicates import merge_duplicates
from fedalign.data.load import FORMS, load_dataset
from fedalign.data.pairs import parse_pairs
from fedalign.data.partition import build_clients
from fedalign.data.records import ClientData, Dataset, Item, SurveyItem
from fedalign.data.rejects import Rejects
from fedalign.data.survey import parse_survey
from fedalign.data.tables import Row, rows
from fedalign.errors import ConfigError, DataError
from fedalign.runfolder import data_directory

COLUMN = "fedalign-site"
"""Column that names the client while it is built."""
DATA_KEYS = ("source", "path", "form", "hf-split", "keep-nonresponse", "min-votes", "skip-bad")
MODEL_KEYS = ("device",)


@dataclass(frozen=True)
class Home:
    """Where everything of a site lies."""

    path: Path

    @property
    def node(self) -> Path:
        """Folder of the node's user."""
        return self.path / "node"

    @property
    def trainer(self) -> Path:
        """Folder of the trainer's user."""
        return self.path / "trainer"

    @property
    def run(self) -> Path:
        """Folder that both can reach."""
        return self.path / "run"

    @property
    def socket(self) -> Path:
        """Where the trainer listens."""
        return self.run / "trainer.sock"

    @property
    def logs(self) -> Path:
        """Folder of the logs of both."""
        return self.path / "logs"

    @property
    def settings(self) -> Path:
        """``trainer.toml``."""
        return self.trainer / "trainer.toml"

    @property
    def policy(self) -> Path:
        """``policy.toml``."""
        return self.trainer / "policy.toml"

    @property
    def audit(self) -> Path:
        """The site's audit log."""
        return self.trainer / "audit.jsonl"

    @property
    def budget(self) -> Path:
        """What was spent, by day."""
        return self.trainer / "budget.sqlite"

    @property
    def store(self) -> Path:
        """Folder of what runs leave here: personal adapters, answers given."""
        return self.trainer / "store"


def default_home() -> Path:
    """Return the usual folder of a site (not created)."""
    return data_directory() / "site"


@dataclass(frozen=True)
class SiteSettings:
    """What ``trainer.toml`` says."""

    name: str
    group: str
    data: DataConfig
    model: ModelConfig
    """Only ``device`` is read."""


def load_settings(path: Path, data: Mapping[str, Any] | None = None) -> SiteSettings:
    """Read ``trainer.toml``; ``data`` replaces keys of its ``[data]``.

    Raises ``ConfigError`` that names the file and what is wrong.
    """
    tables = _toml(path)
    try:
        if data:
            tables["data"] = {**tables.get("data", {}), **data}
        return parse_settings(tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_settings(tables: Mapping[str, Any]) -> SiteSettings:
    """Return the settings of a parsed ``trainer.toml``."""
    _known("section", tables, ("site", "data", "model"))
    for name in tables:
        if not isinstance(tables[name], Mapping):
            raise ConfigError(f"'{name}' must be a table: [{name}].")
    site, data, model = (dict(tables.get(name, {})) for name in ("site", "data", "model"))
    _known("key of [site]", site, ("name", "group"))
    _known("key of [data]", data, DATA_KEYS)
    _known("key of [model]", model, MODEL_KEYS)
    for key in ("name", "group"):
        if not isinstance(site.get(key), str) or not site[key]:
            raise ConfigError(f"[site] has no {key}; it is the one the site was enrolled with.")
    if data.get("source", "synthetic") == "synthetic":
        raise ConfigError(
            "[data] needs the source and path of this site's own data: survey, pairs, "
            "globalopinionqa, goqa, polis or hf."
        )
    flat = {f"data.{k}": v for k, v in data.items()} | {f"model.{k}": v for k, v in model.items()}
    config = from_flat(flat)
    return SiteSettings(site["name"], site["group"], config.data, config.model)


def local_flat(flat: Mapping[str, Any], settings: SiteSettings, out: Path) -> dict[str, Any]:
    """Return a run's flat settings as they hold here: own data, own device, own store."""
    kept = ("data.validation", "data.test")
    foreign = ("data.", "deployment.")
    mine = {k: v for k, v in flat.items() if not k.startswith(foreign) or k in kept}
    own = settings.data
    return mine | {
        "data.source": own.source,
        "data.path": own.path,
        "data.form": own.form,
        "data.hf-split": own.hf_split,
        "data.keep-nonresponse": own.keep_nonresponse,
        "data.min-votes": own.min_votes,
        "data.skip-bad": own.skip_bad,
        "data.partition": "column",
        "data.partition-column": COLUMN,
        "model.device": settings.model.device,
        "rewards.prompts": "",
        "run.out": str(out),
        "run.resume": False,
    }


def load_data(settings: SiteSettings, data: DataConfig, seed: int) -> Dataset:
    """Return the site's rows, all of the enrolled group.

    Raises ``DataError`` with file and line for a bad row, and for one of another group.
    """
    if data.form != "auto" and data.form not in FORMS[data.source]:
        allowed = " or ".join(FORMS[data.source])
        raise ConfigError(f"data.form = '{data.form}', but source '{data.source}' gives {allowed}.")
    if data.source in ("survey", "pairs"):
        rejects = Rejects(skip=data.skip_bad)
        table = _grouped(rows(Path(data.path), rejects), settings.group)
        items: list[Item] = (
            [*parse_survey(table, rejects, data.keep_nonresponse)]
            if data.source == "survey"
            else [*parse_pairs(table, rejects)]
        )
        items = merge_duplicates(items, rejects)
        name = f"{data.source}:{Path(data.path).name}"
        dataset = Dataset(data.source, tuple(items), tuple(rejects.rows), name)
    else:
        dataset = load_dataset(data, seed)
    if not dataset.items:
        raise DataError(f"{data.path}: no usable row; {len(dataset.bad_rows)} left out.")
    for item in dataset.items:
        named = set(item.shares) if isinstance(item, SurveyItem) else {item.group}
        if named != {settings.group}:
            other = min(named - {settings.group})
            raise DataError(
                f"{item.source or item.id}: names group '{other}', but this site is enrolled in "
                f"'{settings.group}'. A site holds rows of its own group only."
            )
    return dataset


def own_client(settings: SiteSettings, config: Config) -> tuple[ClientData, Dataset]:
    """Return the site's client under a run's split, and the rows it was made from.

    Reads ``data.*`` and ``run.seed`` of a configuration made by :func:`local_flat`.
    """
    dataset = load_data(settings, config.data, config.run.seed)
    items = tuple(_named(item, settings) for item in dataset.items)
    reduced = Config(run=RunConfig(seed=config.run.seed), data=config.data)
    (client,) = build_clients(replace(dataset, items=items), reduced)
    return client, dataset


def _named(item: Item, settings: SiteSettings) -> Item:
    """Return an item whose column :data:`COLUMN` is the site's name, in both layouts."""
    columns = dict(item.columns) | {
        COLUMN: settings.name,
        f"{COLUMN}@{settings.group}": settings.name,
    }
    return replace(item, columns=columns)


def _grouped(table: Iterable[Row], group: str) -> Iterator[Row]:
    """Give rows that name no group the site's own."""
    for row in table:
        values = row.values
        named = values.get("group") is not None
        cells = values.get("shares", values.get("votes"))
        wide = isinstance(cells, Mapping) or str(cells).lstrip().startswith("{")
        yield row if named or wide else row._replace(values=values | {"group": group})


def node_settings(home: Home) -> dict[str, str]:
    """Return what the node needs of ``node/site.toml``: name, group, enrollment, gateway.

    Raises ``ConfigError`` before the site has joined.
    """
    path = home.node / "site.toml"
    tables = _toml(path)
    found: dict[str, str] = {}
    for section, keys in (
        ("site", ("name", "group", "fingerprint")),
        ("coordinator", ("enrollment", "gateway")),
    ):
        table = tables.get(section)
        for key in keys:
            value = table.get(key) if isinstance(table, Mapping) else None
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{path}: no text '{key}' in [{section}]. Join again.")
            found[key] = value
    return found


def _toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as f:
            return tomllib.load(f)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Join first (fedalign-client join), or give the site's folder "
            "with --home."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _known(what: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
            raise ConfigError(f"unknown {what} '{key}'.{hint}")
