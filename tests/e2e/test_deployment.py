"""Several real sites: what a deployment gives is what a simulation of the same data gives."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedalign.audit import verify
from fedalign.ledger import Ledger
from fedalign.runfolder import ADAPTER, LEDGER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SETTINGS = ("run.rounds=2", "run.quorum=1.0", "local.steps=4", "personal.steps=0")


@pytest.fixture(scope="module")
def loopback(root: Path) -> ModuleType:
    path = root / "benchmarks" / "loopback.py"
    spec = importlib.util.spec_from_file_location("loopback", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def federation(loopback: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loopback.Federation(tmp_path_factory.mktemp("federation")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(federation: Any) -> Path:
    """Return the folder of a run that nothing disturbed."""
    done = federation.run("plain", *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(federation.result("plain"))


def products(folder: Path) -> dict[str, np.ndarray]:
    """Return B A of every module of a run's final adapter."""
    factors = load_file(folder / ADAPTER / "adapter_model.safetensors")
    return {
        name: factors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        for name, a in factors.items()
        if "lora_A" in name
    }


def same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Assert that two adapters agree within a share of the largest entry of the product."""
    a, b = products(one), products(other)
    assert a.keys() == b.keys()
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= tolerance * np.abs(a[name]).max(), name


def scores(folder: Path) -> dict[tuple[str, str, str], float]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return {
            (stage, split, row.client): row.score
            for stage in ("base", "shared")
            for split in ("validation", "test")
            for row in ledger.scores(stage, split)
        }


def events(folder: Path) -> list[str]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return [e.kind for e in ledger.events()]


def test_deployment_gives_what_the_simulation_gives(
    federation: Any, undisturbed: Path, tmp_path: Path
) -> None:
    simulated = tmp_path / "simulated"
    data = ("data.source=survey", f"data.path={federation.merged}")
    dealt = ("data.partition=column", "data.partition-column=site")
    words = [w for s in (*SETTINGS, *data, *dealt) for w in ("--set", s)]
    done = federation.command("simulations.cli", "simulate", "--out", str(simulated), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    same(simulated, undisturbed)
    expected, found = scores(simulated), scores(undisturbed)
    assert expected.keys() == found.keys()
    assert max(abs(expected[k] - found[k]) for k in expected) <= 1e-3
    for name in ("report.html", "summary.json", ADAPTER):
        assert (undisturbed / name).exists(), name
    assert "no-reply" not in events(undisturbed)


def test_nothing_of_the_coordinators_machine_reaches_a_site(
    federation: Any, undisturbed: Path
) -> None:
    for site in federation.sites:
        node = federation.home(site) / "node"
        shipped = [p for p in node.rglob("*") if p.suffix in (".toml", ".py")]
        assert any(p.name == "app.py" for p in shipped)
        for path in shipped:
            if path.name != "site.toml":
                assert str(federation.state) not in path.read_text(errors="replace"), path


def test_audit_logs_of_all_sides_hold(federation: Any, undisturbed: Path) -> None:
    assert verify(federation.state / "audit.jsonl") > 5
    for site in federation.sites:
        log = federation.home(site) / "trainer" / "audit.jsonl"
        assert verify(log) >= 6
        text = log.read_text()
        assert "train" in text
        assert "Traceback" not in text


@pytest.mark.slow
def test_site_killed_and_restarted_in_mid_round(
    federation: Any, undisturbed: Path, loopback: ModuleType
) -> None:
    process = federation.begin("killed", *SETTINGS)
    ledger = federation.result("killed") / LEDGER
    loopback.wait(lambda: ledger.exists() and ("base", 0, 1) in commits(ledger), "the base")
    federation.kill_site("coast-b")
    federation.start_site("coast-b")
    assert process.wait(600) == 0
    same(undisturbed, federation.result("killed"))


@pytest.mark.slow
def test_superlink_killed_in_mid_round(
    federation: Any, undisturbed: Path, loopback: ModuleType
) -> None:
    process = federation.begin("superlink", *SETTINGS)
    ledger = federation.result("superlink") / LEDGER
    loopback.wait(lambda: ledger.exists() and ("base", 0, 1) in commits(ledger), "the base")
    os.kill(federation.pids()["superlink"], signal.SIGKILL)
    assert process.wait(600) == 0
    same(undisturbed, federation.result("superlink"))


@pytest.mark.slow
def test_serverapp_killed_and_resumed(
    federation: Any, undisturbed: Path, loopback: ModuleType
) -> None:
    process = federation.begin("server", *SETTINGS)
    ledger = federation.result("server") / LEDGER
    loopback.wait(lambda: ledger.exists() and ("base", 0, 1) in commits(ledger), "the base")
    apps = [
        pid
        for pid in loopback.descendants(federation.pids()["superexec"])
        if "flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert apps
    for pid in apps:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(600) == 5
    done = federation.command("server.cli", "resume", "server", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    same(undisturbed, federation.result("server"))


@pytest.mark.slow
def test_revoked_in_mid_run_and_the_rest_goes_on(
    federation: Any, undisturbed: Path, loopback: ModuleType
) -> None:
    process = federation.begin("revoked", *SETTINGS, "run.quorum=0.5", "run.rounds=3")
    folder = federation.result("revoked")
    loopback.wait(
        lambda: (folder / LEDGER).exists() and ("base", 0, 1) in commits(folder / LEDGER),
        "the base",
    )
    federation.check("server.cli", "revoke", "coast-b")
    assert process.wait(600) == 0
    assert "site-revoked" in events(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary


def commits(path: Path) -> set[tuple[str, int, int]]:
    with Ledger(path, readonly=True) as ledger:
        return set(ledger.commits())
