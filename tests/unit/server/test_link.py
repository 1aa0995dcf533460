"""A SuperLink that breaks off costs an attempt at most, and changes nothing in the result."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Message

from fedalign.compat import LINK_ERRORS, NodeInfo
from fedalign.config import Config, from_flat
from fedalign.errors import RunFailed
from fedalign.ledger import Ledger
from fedalign.runfolder import CHECKPOINT, LEDGER, prepare
from server import link, presence
from server.asking import failure_reason
from server.checkpoint import load
from server.progress import LogProgress
from server.run import execute

_spec = importlib.util.spec_from_file_location(
    "sites_grid", Path(__file__).with_name("sites_grid.py")
)
assert _spec is not None
assert _spec.loader is not None
sites_grid = importlib.util.module_from_spec(_spec)
sys.modules["sites_grid"] = sites_grid
_spec.loader.exec_module(sites_grid)
_spec = importlib.util.spec_from_file_location(
    "numpy_clients", Path(__file__).with_name("conftest.py")
)
assert _spec is not None
assert _spec.loader is not None
numpy_clients = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(numpy_clients)

PUSHED = LINK_ERRORS[0]("object", 1, "session")
CUT = httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING]")


class BreakingGrid(sites_grid.SiteGrid):  # type: ignore[misc]
    """Breaks off at the calls whose numbers are given, by kind of call."""

    def __init__(self, push: Iterable[int], pull: Iterable[int], nodes: Iterable[int]) -> None:
        super().__init__(numpy_clients.numpy_app(), sites_grid.SITES)
        self.breaks = {"push": set(push), "pull": set(pull), "nodes": set(nodes)}
        self.calls = {"push": 0, "pull": 0, "nodes": 0}

    def _call(self, kind: str, error: Exception) -> None:
        self.calls[kind] += 1
        if self.calls[kind] in self.breaks[kind]:
            raise error

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        given = list(messages)
        self._call("push", PUSHED)
        return list(super().push_messages(given))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._call("pull", CUT)
        return list(super().pull_messages(message_ids))

    def get_nodes(self) -> Iterable[NodeInfo]:
        self._call("nodes", CUT)
        return list(super().get_nodes())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PAUSE", 0.0)
    monkeypatch.setattr(presence, "PAUSE", 0.0)


def config(folder: Path) -> Config:
    flat = {
        "run.out": str(folder),
        "run.rounds": 2,
        "run.quorum": 1.0,
        "run.round-timeout": 20.0,
        "model.rank": 2,
        "model.alpha": 4.0,
        "personal.steps": 0,
        "deployment.registry": str(folder / "registry"),
    }
    return prepare(from_flat(flat))


def run(folder: Path, grid: BreakingGrid) -> Path:
    registry = sites_grid.FakeRegistry(sites_grid.SITES)
    execute(grid, config(folder), LogProgress(), 0.001, registry.enrolled)
    return folder


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    return run(tmp_path / "whole", BreakingGrid((), (), ()))


def test_a_push_that_breaks_off_costs_an_attempt(tmp_path: Path, undisturbed: Path) -> None:
    # Calls: hello, base, round 1 (broken), round 1 again, ...
    folder = run(tmp_path / "run", BreakingGrid((3,), (), ()))
    assert np.array_equal(load(folder / CHECKPOINT).adapter, load(undisturbed / CHECKPOINT).adapter)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert ("train", 1, 2) in ledger.commits()
        (void,) = ledger.events("round-void")
        assert (void.phase, void.round, void.attempt) == ("train", 1, 1)
        assert "broke off" in void.detail


def test_a_message_whose_time_is_over_is_no_reply() -> None:
    reasons = {code: failure_reason(code) for code in (2, 3, 4, 5)}
    assert reasons == {2: "flower-error-2", 3: "no-reply", 4: "no-reply", 5: "offline"}


def test_pulls_and_lists_of_nodes_are_asked_again(tmp_path: Path, undisturbed: Path) -> None:
    folder = run(tmp_path / "run", BreakingGrid((), range(1, 30, 3), range(1, 9, 2)))
    assert np.array_equal(load(folder / CHECKPOINT).adapter, load(undisturbed / CHECKPOINT).adapter)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert {attempt for _, _, attempt in ledger.commits()} == {1}


def test_a_superlink_that_breaks_off_every_time_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="broke off 10 times in a row"):
        run(tmp_path / "nodes", BreakingGrid((), (), range(1, 1000)))
    with pytest.raises(RunFailed, match="broke off while messages were sent"):
        run(tmp_path / "hello", BreakingGrid((1,), (), ()))
    with pytest.raises(RunFailed, match="gave up after 2 attempts"):
        run(tmp_path / "push", BreakingGrid(range(2, 1000), (), ()))
    with Ledger(tmp_path / "push" / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"].startswith("failed: gave up")
