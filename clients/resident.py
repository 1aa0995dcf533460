"""What stays in memory of a process: the population that its base model can take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from clients.store import population
from fedalign.config import Config, DataConfig, ModelConfig, RunConfig
from fedalign.data.records import BadRow, ClientData
from fedalign.errors import DataError
from fedalign.models.base import ResidentModel
from fedalign.models.resident import forget_models, resident_model
from fedalign.training.examples import drop_unusable


def usable_clients(config: Config) -> tuple[Mapping[str, ClientData], tuple[BadRow, ...]]:
    """Return the population this model can take, by name, and the rows it cannot.

    Such rows are too long, have more than 26 options, or a prompt that is no token prefix.
    Raises ``DataError`` naming the first one unless ``data.skip-bad`` is on, and for a client that
    keeps no training or validation question.
    """
    frozen_a = config.aggregation.method == "frozen-a"
    return _usable_clients(config.model, frozen_a, config.data, config.run.seed)


def usable(
    model: ResidentModel, population: Iterable[ClientData], skip_bad: bool
) -> tuple[Mapping[str, ClientData], tuple[BadRow, ...]]:
    """Return the clients of a population that ``model`` can take, as :func:`usable_clients`."""
    clients: dict[str, ClientData] = {}
    bad: list[BadRow] = []
    for client in population:
        kept, rows = drop_unusable(model, client)
        if rows and not skip_bad:
            raise DataError(
                f"{rows[0].source}: {rows[0].reason} Correct the row, or use --set "
                "data.skip-bad=true, which leaves such rows out and lists them."
            )
        if not (kept.train and kept.validation):
            raise DataError(
                f"client '{client.name}': the model can take none of its training or validation "
                f"questions; {len(rows)} were left out. First: {rows[0].reason}"
            )
        clients[client.name] = kept
        bad += rows
    return clients, tuple(bad)


@lru_cache(maxsize=1)
def _usable_clients(
    settings: ModelConfig, frozen_a: bool, data: DataConfig, seed: int
) -> tuple[Mapping[str, ClientData], tuple[BadRow, ...]]:
    found = population(Config(run=RunConfig(seed=seed), data=data))
    return usable(resident_model(settings, frozen_a), found, data.skip_bad)


def forget_base() -> None:
    """Let go of the base model; for a process whose work on it was cut short."""
    forget_models()
