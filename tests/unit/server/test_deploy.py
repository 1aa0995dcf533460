"""Units and compose file: they parse, start our commands and keep what the code relies on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

UNITS = ("fedalign-coordinator", "fedalign-site-trainer", "fedalign-site-supernode")


@pytest.fixture
def deploy(root: Path) -> Path:
    return root / "server" / "deploy"


def unit(path: Path) -> dict[str, list[str]]:
    """Return the settings of a unit by ``Section.Key``; continued lines are joined."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_units_come_back_always_and_are_confined(deploy: Path, name: str) -> None:
    found = unit(deploy / f"{name}.service")
    assert found["Service.Restart"] == ["always"]
    assert found["Service.RestartSec"] == ["15"]
    assert found["Service.KillMode"] == ["mixed"]
    assert found["Service.NoNewPrivileges"] == ["yes"]
    assert found["Service.ProtectSystem"] == ["strict"]
    assert found["Service.CapabilityBoundingSet"] == [""]
    assert found["Service.UMask"] == ["0077"]
    assert "root" not in found["Service.User"]
    assert "Install.WantedBy" in found


def test_data_and_untrusted_code_belong_to_two_users(deploy: Path) -> None:
    trainer = unit(deploy / "fedalign-site-trainer.service")
    node = unit(deploy / "fedalign-site-supernode.service")
    assert trainer["Service.User"] != node["Service.User"]
    assert trainer["Service.PrivateNetwork"] == ["yes"]
    assert node["Service.InaccessiblePaths"] == ["-/var/lib/fedalign-site/trainer"]


@pytest.mark.parametrize("name", UNITS)
def test_units_start_commands_that_exist(deploy: Path, name: str) -> None:
    (line,) = unit(deploy / f"{name}.service")["Service.ExecStart"]
    program, command, *options = line.split()
    module = {"fedalign-server": "server.cli", "fedalign-client": "clients.cli"}[Path(program).name]
    done = subprocess.run(
        [sys.executable, "-m", module, command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"COLUMNS": "200", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    for option in options:
        if option.startswith("--"):
            assert option in done.stdout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_the_unit(deploy: Path, name: str, tmp_path: Path) -> None:
    text = (deploy / f"{name}.service").read_text()
    # The programs are not installed there on this machine; everything else is checked as it is.
    for program in ("fedalign-server", "fedalign-client"):
        text = text.replace(f"/opt/fedalign/bin/{program}", "/bin/true")
    for other in UNITS:
        (tmp_path / f"{other}.service").write_text("[Service]\nExecStart=/bin/true\n")
    path = tmp_path / f"{name}.service"
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert not complaints, complaints


def test_compose_publishes_two_ports_of_an_unprivileged_container(deploy: Path) -> None:
    service = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]["coordinator"]
    assert service["ports"] == ["9443:9443", "9444:9444"]
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    assert service["restart"] == "always"
    assert service["init"] is True
    assert (deploy / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert any(place.endswith(":/state") for place in service["volumes"])


def test_the_container_does_not_run_as_root(deploy: Path) -> None:
    lines = (deploy / "Dockerfile").read_text().splitlines()
    assert "USER fedalign" in lines
    assert lines.index("USER fedalign") < lines.index('ENTRYPOINT ["fedalign-server"]')
