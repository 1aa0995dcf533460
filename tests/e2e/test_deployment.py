"""Several real sites: what a deployment gives is what a simulation of the same data gives.

What happens when parts of it die is in ``test_deployment_faults.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedalign.audit import verify
from fedalign.runfolder import ADAPTER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_deployment_gives_what_the_simulation_gives(
    federation: Any, undisturbed: Path, tmp_path: Path, deployed: ModuleType
) -> None:
    simulated = tmp_path / "simulated"
    data = ("data.source=survey", f"data.path={federation.merged}")
    dealt = ("data.partition=column", "data.partition-column=site")
    # A site trains alone; a cohort of sites would agree to a wider tolerance.
    alone = ("local.cohort-size=1",)
    words = [w for s in (*deployed.SETTINGS, *data, *dealt, *alone) for w in ("--set", s)]
    done = federation.command("simulations.cli", "simulate", "--out", str(simulated), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    deployed.same(simulated, undisturbed)
    expected, found = deployed.scores(simulated), deployed.scores(undisturbed)
    assert expected.keys() == found.keys()
    assert max(abs(expected[k] - found[k]) for k in expected) <= 1e-3
    for name in ("report.html", "summary.json", ADAPTER):
        assert (undisturbed / name).exists(), name
    assert "no-reply" not in deployed.events(undisturbed)


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
