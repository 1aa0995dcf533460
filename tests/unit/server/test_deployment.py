"""A run over enrolled sites: who is asked, who comes back, who is revoked, who keeps scores."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedalign import wire
from fedalign.config import Config
from fedalign.errors import RunFailed
from fedalign.ledger import Ledger, canonical_rows
from fedalign.runfolder import CHECKPOINT, LEDGER, prepare
from server import presence
from server.checkpoint import load
from server.progress import LogProgress
from server.run import execute

Make = Callable[..., Any]

_spec = importlib.util.spec_from_file_location(
    "sites_grid", Path(__file__).with_name("sites_grid.py")
)
assert _spec is not None
assert _spec.loader is not None
sites_grid = importlib.util.module_from_spec(_spec)
sys.modules["sites_grid"] = sites_grid
_spec.loader.exec_module(sites_grid)
SITES, FakeRegistry, Row = sites_grid.SITES, sites_grid.FakeRegistry, sites_grid.Row
SiteGrid, key_of = sites_grid.SiteGrid, sites_grid.key_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "LONGEST", 1.0)
    monkeypatch.setattr(presence, "PAUSE", 0.02)


def run(config: Config, grid: Any, registry: Any = None) -> Path:
    registry = registry or FakeRegistry(SITES)
    execute(grid, config, LogProgress(), poll=0.005, enrolled=registry.enrolled)
    return Path(config.run.out)


def adapter(folder: Path) -> np.ndarray:
    return load(folder / CHECKPOINT).adapter


def events(folder: Path) -> list[tuple[str, str, str]]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return [(e.kind, e.client, e.detail) for e in ledger.events()]


def rejected(folder: Path) -> set[tuple[str, int, str]]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        found = [*ledger.replies(), *ledger.replies(committed=False)]
    return {(r.client, r.round, r.reason) for r in found if r.status != "ok"}


@pytest.mark.usefixtures("with_report")
def test_three_sites_in_two_groups(deployed: Make, make_app: Make, tmp_path: Path) -> None:
    registry = FakeRegistry(SITES)
    registry.rows += [
        Row("stranger", "east", b"pending key", "pending"),
        Row("ghost", "east", b"revoked key", "revoked"),
        Row("east-a", "east", b"old key", "replaced"),
    ]
    grid = SiteGrid(make_app(), SITES)
    for node, key in enumerate((b"unknown", b"pending key", b"revoked key", b"old key", b""), 50):
        grid.join(node, "east-x", key)
    config = deployed()
    config = replace(config, data=replace(config.data, path=str(tmp_path / "secret.jsonl")))
    folder = run(config, grid, registry)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"] == "completed"
        assert [(c.client, c.group) for c in ledger.clients()] == list(SITES.items())
        assert {w.group for w in ledger.weights()} == {"east", "north"}
    assert {node for node, _ in grid.handled} == {1, 2, 3}
    for _, message in grid.handled:
        sent = json.loads(wire.decode_request(message.content).config_json)
        kept = ("run.out", "data.path", "deployment.registry", "deployment.audit")
        assert not any(sent[key] for key in kept)
        assert str(tmp_path) not in json.dumps(sent)
    assert registry.notes == []
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["shared/worst"] < 1


def test_a_node_that_claims_more_than_it_is_enrolled_for_is_dropped(
    deployed: Make, make_app: Make
) -> None:
    registry = FakeRegistry(SITES | {"north-b": "north", "north-c": "north"})
    grid = SiteGrid(make_app(), SITES)
    grid.join(8, "north-b", key_of("north-b"), says_site="north-a")
    grid.join(9, "north-c", key_of("north-c"), says_group="east")
    folder = run(deployed(), grid, registry)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert [c.client for c in ledger.clients()] == list(SITES)
    assert [(e, c) for e, c, _ in events(folder)] == [
        ("claims-other-site", "north-b"),
        ("claims-other-group", "north-c"),
    ]
    assert [(e, f["site"]) for e, f in registry.notes] == [
        ("claims-other-site", "north-b"),
        ("claims-other-group", "north-c"),
    ]
    assert {n for n, m in grid.handled if m.metadata.message_type != wire.HELLO} == {1, 2, 3}


def test_a_policy_is_learnt_before_anything_is_trained(deployed: Make, make_app: Make) -> None:
    def refuses(kind: str, client: str, round_: int) -> str | None:
        return "refused-aggregation" if (kind, client) == ("hello", "north-a") else None

    grid = SiteGrid(make_app(refuses), SITES)
    with pytest.raises(RunFailed, match=r"group north.*north-a \(refused-aggregation\)"):
        run(deployed("strict"), grid)
    assert {m.metadata.message_type for _, m in grid.handled} == {wire.HELLO}
    # An operator who says how many sites suffice goes on without the group.
    folder = run(deployed("lax", deployment__min_sites=2), SiteGrid(make_app(refuses), SITES))
    assert ("site-refused", "north-a", "refused-aggregation") in events(folder)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert {w.group for w in ledger.weights()} == {"east"}
    with pytest.raises(RunFailed, match="2 of 3 sites can take part, 3 needed"):
        run(deployed("all", deployment__min_sites=3), SiteGrid(make_app(refuses), SITES))


def test_a_site_that_does_not_fit_does_not_stop_the_others(deployed: Make, make_app: Make) -> None:
    registry = FakeRegistry(SITES | {"east-c": "east", "east-d": "east"})
    grid = SiteGrid(make_app(), SITES)
    grid.join(8, "east-c", key_of("east-c"), model="another")
    grid.join(9, "east-d", key_of("east-d"), train=0)
    folder = run(deployed(), grid, registry)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert [c.client for c in ledger.clients()] == list(SITES)
    assert [e for e in events(folder) if e[0] == "site-refused"] == [
        ("site-refused", "east-c", "manifest-mismatch"),
        ("site-refused", "east-d", "no-data"),
    ]
    # Without a majority nobody can say whose model is the run's.
    grid = SiteGrid(make_app(), ["east-a"])
    grid.join(8, "north-a", key_of("north-a"), model="another")
    with pytest.raises(RunFailed, match="base_revision differ between the nodes of"):
        run(deployed("b", deployment__min_sites=2), grid)


def test_sites_that_are_missing_are_named(deployed: Make, make_app: Make) -> None:
    with pytest.raises(RunFailed, match=r"1 of 3 sites are online.*Missing: east-b, north-a"):
        run(deployed(), SiteGrid(make_app(), ["east-a"]))
    with pytest.raises(RunFailed, match=r"3 of 5 .*3 are enrolled. Missing: further sites"):
        run(deployed(deployment__min_sites=5), SiteGrid(make_app(), SITES))
    with pytest.raises(RunFailed, match="no site is enrolled"):
        run(deployed(), SiteGrid(make_app(), SITES), FakeRegistry({}))


def test_the_run_waits_for_sites_that_come(deployed: Make, make_app: Make) -> None:
    grid = SiteGrid(make_app(), ["east-a", "east-b"])
    polls = {"n": 0}

    def poll() -> None:
        polls["n"] += 1
        if polls["n"] == 4:
            grid.join(77, "north-a", key_of("north-a"))

    grid.on_poll = poll
    folder = run(deployed(deployment__wait=5.0), grid)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert [c.client for c in ledger.clients()] == list(SITES)


def test_an_offline_site_is_not_asked_and_counts_as_missing(deployed: Make, make_app: Make) -> None:
    grid = SiteGrid(make_app(), SITES)

    def leave(node: int, message: Any) -> None:
        request = wire.decode_request(message.content)
        if (request.phase, request.round) == ("train", 1):
            grid.online.discard(2)

    grid.before_handling = leave
    folder = run(deployed(personal__steps=0), grid)
    # Flower's error 5 in round 1, never asked in 2 and 3.
    assert rejected(folder) == {("east-b", r, "offline") for r in (1, 2, 3)}
    assert not [m for n, m in grid.handled if n == 2 and m.metadata.message_type == wire.TRAIN]
    assert [e for e in events(folder) if e[0] == "site-offline"] == [("site-offline", "east-b", "")]


def test_a_node_unregistered_under_a_message_is_no_reply(deployed: Make, make_app: Make) -> None:
    grid = SiteGrid(make_app(), SITES)
    grid.unregistered = {3}
    with pytest.raises(RunFailed, match=r"group north can take part.*north-a \(no-reply\)"):
        run(deployed("a"), grid)
    grid = SiteGrid(make_app(), SITES)
    grid.after_handling = lambda node, message: grid.unregistered.add(3)
    folder = run(deployed("b", personal__steps=0), grid)
    assert rejected(folder) == {("north-a", r, "no-reply") for r in (1, 2, 3)}


@pytest.mark.parametrize("renewed", [False, True])
def test_with_quorum_one_a_site_that_restarts_changes_nothing(
    deployed: Make, make_app: Make, renewed: bool
) -> None:
    undisturbed = run(deployed("a", run__quorum=1.0), SiteGrid(make_app(), SITES))
    registry = FakeRegistry(SITES)
    grid = SiteGrid(make_app(), SITES)
    gone_at: list[int] = []
    polls = {"n": 0}

    def leave(node: int, message: Any) -> None:
        request = wire.decode_request(message.content)
        if (request.phase, request.round, request.attempt) == ("train", 2, 1) and not gone_at:
            grid.online.discard(3)
            gone_at.append(polls["n"])

    def poll() -> None:
        polls["n"] += 1
        if gone_at and polls["n"] == gone_at[0] + 8:
            if renewed:
                grid.join(99, "north-a", registry.renew("north-a"))
            else:
                grid.online.add(3)

    grid.before_handling, grid.on_poll = leave, poll
    folder = run(deployed("b", run__quorum=1.0), grid, registry)
    assert np.array_equal(adapter(folder), adapter(undisturbed))
    with Ledger(folder / LEDGER, readonly=True) as x, Ledger(undisturbed / LEDGER) as y:
        assert canonical_rows(x) == canonical_rows(y)
        assert ("train", 2, 2) in x.commits()
    assert rejected(folder) == {("north-a", 2, "offline")}
    assert ("site-back", "north-a", "") in events(folder)


def test_a_site_that_does_not_come_back_fails_a_run_that_needs_all(
    deployed: Make, make_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "LONGEST", 0.05)
    grid = SiteGrid(make_app(), SITES)

    def leave(node: int, message: Any) -> None:
        if wire.decode_request(message.content).phase == "train":
            grid.online.discard(3)

    grid.before_handling = leave
    with pytest.raises(RunFailed, match=r"gave up after 2 attempts.*reasons: offline"):
        run(deployed(run__quorum=1.0), grid)


def test_a_fault_of_a_site_is_not_retried_at_once(
    deployed: Make, make_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "PAUSE", 0.3)
    times: list[float] = []
    import time

    def tamper(kind: str, client: str, round_: int) -> str | None:
        if (kind, client, round_) == ("train", "north-a", 1):
            times.append(time.monotonic())
            return "internal-error" if len(times) == 1 else None
        return None

    run(deployed(run__quorum=1.0, run__rounds=1), SiteGrid(make_app(tamper), SITES))
    assert len(times) == 2
    assert times[1] - times[0] >= 0.29


@pytest.mark.usefixtures("with_report")
def test_a_site_revoked_in_mid_round_is_dropped_at_once(deployed: Make, make_app: Make) -> None:
    registry = FakeRegistry(SITES)
    grid = SiteGrid(make_app(), SITES)

    def revoke(node: int, message: Any) -> None:
        request = wire.decode_request(message.content)
        if (request.phase, request.round, node) == ("train", 2, 3):
            registry.set_status("north-a", "revoked")  # after it has answered

    grid.after_handling = revoke
    folder = run(deployed(run__rounds=4), grid, registry)
    assert rejected(folder) == {("north-a", 2, "revoked")}
    assert [e for e, _ in registry.notes] == ["reply-of-revoked-site", "site-left-run"]
    assert ("site-revoked", "north-a", "") in events(folder)
    rounds = {wire.decode_request(m.content).round for n, m in grid.handled if n == 3}
    assert max(rounds) == 2
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert ledger.run()["status"] == "completed"
        weights = {(w.group, w.round): w.weight for w in ledger.weights()}
        assert [c.client for c in ledger.clients()] == list(SITES)
    assert weights[("north", 1)] is not None
    assert weights[("north", 2)] is None
    assert ("north", 3) not in weights
    assert weights[("east", 4)] == 1.0
    page = (folder / "report.html").read_text()
    assert "north (revoked)" in page
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["groups/counted"] == 1
    assert summary["shared/worst_group"] == "east"


def test_when_all_are_revoked_the_run_fails(deployed: Make, make_app: Make) -> None:
    registry = FakeRegistry(SITES)
    grid = SiteGrid(make_app(), SITES)

    def revoke(node: int, message: Any) -> None:
        if wire.decode_request(message.content).phase == "train":
            registry.rows = []

    grid.after_handling = revoke
    with pytest.raises(RunFailed, match="no site of this run is enrolled any more"):
        run(deployed(), grid, registry)


def test_a_key_renewed_in_mid_round_may_still_answer(deployed: Make, make_app: Make) -> None:
    undisturbed = run(deployed("a"), SiteGrid(make_app(), SITES))
    registry = FakeRegistry(SITES)
    grid = SiteGrid(make_app(), SITES)

    def renew(node: int, message: Any) -> None:
        request = wire.decode_request(message.content)
        if (request.phase, request.round, node) == ("train", 2, 3):
            grid.online.discard(3)
            grid.join(42, "north-a", registry.renew("north-a"))

    grid.after_handling = renew
    folder = run(deployed("b"), grid, registry)
    assert rejected(folder) == set()
    assert np.array_equal(adapter(folder), adapter(undisturbed))


def test_resumed_with_other_node_ids_it_ends_as_if_undisturbed(
    deployed: Make, make_app: Make
) -> None:
    class Killed(BaseException):
        pass

    undisturbed = run(deployed("a", run__quorum=1.0), SiteGrid(make_app(), SITES))
    config = deployed("b", run__quorum=1.0)
    grid = SiteGrid(make_app(), SITES)

    def kill(node: int, message: Any) -> None:
        if wire.decode_request(message.content).round == 2:
            raise Killed

    grid.before_handling = kill
    with pytest.raises(Killed):
        run(config, grid)
    resumed = prepare(replace(config, run=replace(config.run, resume=True)))
    # north-a is away at first and comes under a third node id; two of three are enough to begin.
    resumed = replace(resumed, deployment=replace(resumed.deployment, min_sites=2))
    grid = SiteGrid(make_app(), ["east-b", "east-a"], first_node=70)
    polls = {"n": 0}

    def poll() -> None:
        polls["n"] += 1
        if polls["n"] == 6:
            grid.join(90, "north-a", key_of("north-a"))

    grid.on_poll = poll
    folder = run(resumed, grid)
    assert np.array_equal(adapter(folder), adapter(undisturbed))
    with Ledger(folder / LEDGER, readonly=True) as x, Ledger(undisturbed / LEDGER) as y:
        assert canonical_rows(x) == canonical_rows(y)
    assert ("site-back", "north-a", "") in events(folder)
