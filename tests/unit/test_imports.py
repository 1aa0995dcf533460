"""Who may import whom, and what stays out of memory; checked in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "ray", "datasets")
CORE = (
    "fedalign.config",
    "fedalign.wire",
    "fedalign.aggregation",
    "fedalign.metrics.alignment",
    "fedalign.metrics.fairness",
    "fedalign.metrics.intervals",
    "fedalign.metrics.attainable",
    "fedalign.metrics.pairwise",
    "fedalign.ledger",
    "fedalign.randomness",
    "fedalign.errors",
    "fedalign.data",
    "fedalign.data.load",
    "fedalign.report.html",
    "fedalign.export",
)
MAY_IMPORT = {
    "fedalign": {"fedalign"},
    "server": {"fedalign", "server"},
    "clients": {"fedalign", "clients"},
    "simulations": {"fedalign", "server", "clients", "simulations"},
}


def loaded(code: str, watched: tuple[str, ...], root: Path) -> set[str]:
    """Run ``code`` in a fresh interpreter; return which watched packages it loaded."""
    script = f"import sys\n{code}\nprint('loaded', *sorted({set(watched)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split()[1:])


def imported(path: Path) -> set[str]:
    """Return the top-level packages a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module).split(".")[0])
    return found


def test_the_check_sees_a_heavy_import(root: Path) -> None:
    assert loaded("import torch", HEAVY, root) >= {"torch"}


def test_core_leaves_heavy_libraries_out(root: Path) -> None:
    modules = ", ".join(CORE)
    assert loaded(f"import {modules}", (*HEAVY, "server", "clients", "simulations"), root) == set()


@pytest.mark.parametrize("module", ["server.app", "server.run", "server.export"])
def test_server_loads_without_clients_and_without_torch(module: str, root: Path) -> None:
    assert loaded(f"import {module}", (*HEAVY, "clients", "simulations"), root) == set()


def test_client_app_loads_without_server_and_before_torch(root: Path) -> None:
    assert loaded("import clients.app", (*HEAVY, "server", "simulations"), root) == set()


def test_trainer_loads_without_server(root: Path) -> None:
    assert loaded("import clients.trainer", ("server", "simulations", "trl", "ray"), root) == set()


def test_command_is_light(root: Path) -> None:
    watched = (*HEAVY, "flwr", "numpy", "scipy", "matplotlib", "server", "clients")
    assert loaded("import simulations.cli", watched, root) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str], root: Path) -> None:
    code = (
        "from simulations import cli\n"
        f"sys.argv = ['fedalign', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
    )
    assert loaded(code, (*HEAVY, "flwr", "matplotlib"), root) == set()


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_rooms_import_only_what_they_may(package: str, root: Path) -> None:
    files = sorted((root / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = imported(path) & set(MAY_IMPORT) - MAY_IMPORT[package]
        assert not forbidden, f"{path.relative_to(root)} imports {sorted(forbidden)}"


def test_flower_internals_are_imported_in_one_place(root: Path) -> None:
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")
    strays = []
    for package in MAY_IMPORT:
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [str(node.module)]
                strays += [
                    f"{path.relative_to(root)}: {name}"
                    for name in names
                    if name.split(".")[0] == "flwr" and not name.startswith(public)
                ]
    assert {s.split(":")[0] for s in strays} == {"fedalign/compat.py"}, strays


def test_nothing_is_pickled(root: Path) -> None:
    for package in MAY_IMPORT:
        for path in (root / package).rglob("*.py"):
            assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path
