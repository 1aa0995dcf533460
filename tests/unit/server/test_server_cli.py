"""The operator's command: what it prints where, exit codes, and that it loads little."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.audit import verify
from fedalign.compat import public_key_to_bytes
from fedalign.enrollment.invite import parse_invite
from fedalign.errors import ConfigError
from server import ca, cli
from server.coordinator import load
from server.registry import Refused, Registry

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command in this process; give back exit code, output and errors."""
    monkeypatch.setenv("FEDALIGN_STATE", str(tmp_path / "c"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedalign-server", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return (int(code or 0), out, err)

    return call


@pytest.fixture
def made(run: Run, tmp_path: Path) -> Path:
    code, out, _ = run("init", "--host", "hub.example.org, 127.0.0.1", "--port", "25000")
    assert code == 0
    assert "fedalign-server start" in out
    return tmp_path / "c"


def test_init_refuses_what_is_there(run: Run, made: Path) -> None:
    code, _, err = run("init", "--host", "hub.example.org")
    assert code == 2
    assert "exists already" in err
    code, _, err = run("init", "--host", "a b", "--state", str(made.parent / "d"))
    assert code == 2
    assert "neither a host name" in err


@pytest.mark.parametrize(
    "words",
    [
        ("start",), ("sites",), ("status",), ("revoke", "x"), ("run",), ("resume", "x"),
        ("renew-certificate",), ("invite", "--site", "s", "--group", "g"),
    ],
)  # fmt: skip
def test_every_command_says_when_there_is_no_coordinator(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert "fedalign-server init" in err
    assert out == ""


@pytest.mark.parametrize("words", [("run",), ("resume", "x")])
def test_runs_need_a_coordinator_that_runs(run: Run, made: Path, words: tuple[str, ...]) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert "does not run" in err
    assert "fedalign-server start" in err


def test_an_invite_is_alone_on_standard_output(run: Run, made: Path) -> None:
    code, out, err = run("invite", "--site", "north-clinic", "--group", "North (coast)")
    assert code == 0
    invite = parse_invite(out)
    assert out.count("\n") == 1
    assert invite.address == "hub.example.org:25000"
    assert invite.ca == ca.fingerprint(load(made).root.read_bytes())
    assert invite.token not in err
    assert invite.token not in (made / "audit.jsonl").read_text()
    assert "fedalign-client join" in err
    assert verify(made / "audit.jsonl") == 2
    key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    with Registry(made / "registry.sqlite") as registry:
        assert registry.claim(invite.token, key, 0.0).group == "North (coast)"


@pytest.mark.parametrize(
    ("site", "group", "expires"),
    [("Bad", "g", "7d"), ("s", "a@b", "7d"), ("s", "g", "7"), ("s", "g", "0d"), ("s", "g", "91d")],
)
def test_wrong_invites_are_refused(
    run: Run, made: Path, site: str, group: str, expires: str
) -> None:
    code, out, err = run("invite", "--site", site, "--group", group, "--expires", expires)
    assert code != 0
    assert out == ""
    assert err.startswith("error: ")


def test_lifetimes() -> None:
    assert cli.parse_lifetime("30m") == 1800.0
    assert cli.parse_lifetime("12h") == 43200.0
    assert cli.parse_lifetime("90d") == 90 * 86400.0
    for wrong in ("", "d", "-1d", "1.5h", "1w", "٣d2", "91d", "1 d"):
        with pytest.raises(ConfigError):
            cli.parse_lifetime(wrong)


def test_revoking_without_superlink_holds_and_says_what_is_left(run: Run, made: Path) -> None:
    _, line, _ = run("invite", "--site", "north-clinic", "--group", "north")
    token = parse_invite(line).token
    code, out, err = run("revoke", "north-clinic")
    assert (code, "is out" in out) == (0, True)
    with Registry(made / "registry.sqlite") as registry:
        key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
        with pytest.raises(Refused):
            registry.claim(token, key, 0.0)
    code, _, err = run("revoke", "nobody")
    assert code != 0
    assert "no site 'nobody'" in err


def test_sites_are_listed_without_a_superlink(run: Run, made: Path) -> None:
    _, line, _ = run("invite", "--site", "north-clinic", "--group", "north")
    code, out, err = run("sites")
    assert code == 0
    assert "no site has joined yet" in out
    assert "invited: north-clinic (north)" in out
    assert "nobody knows who is online" in err
    key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    with Registry(made / "registry.sqlite") as registry:
        site = registry.claim(parse_invite(line).token, key, 1.0)
    _, out, _ = run("sites")
    assert "pending" in out
    assert site.fingerprint[:16] in out


def test_a_new_certificate_keeps_the_root(run: Run, made: Path) -> None:
    root = load(made).root.read_bytes()
    code, out, _ = run("renew-certificate", "--host", "new.example.org")
    assert code == 0
    assert "new.example.org" in out
    assert load(made).root.read_bytes() == root
    code, _, err = run("start")
    assert code == 2
    assert "renew-certificate --host hub.example.org" in err


def test_status_of_a_coordinator_at_rest(run: Run, made: Path) -> None:
    code, out, _ = run("status")
    assert code == 0
    assert str(made) in out.replace("\n", "")


def test_help_loads_nothing_heavy(root: Path) -> None:
    code = (
        "import sys\nfrom server import cli\nsys.argv = ['fedalign-server', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'flwr', 'numpy', 'grpc', 'clients', 'simulations'}\n"
        "print('loaded', *sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.stdout.splitlines()[-1] == "loaded", done.stderr


@pytest.mark.parametrize(
    "module", ["server.front", "server.superlink", "server.submit", "server.follow"]
)
def test_no_torch_in_what_the_coordinator_runs(root: Path, module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print('loaded', *sorted({'torch', 'transformers', 'clients', 'simulations'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.stdout.splitlines()[-1] == "loaded", done.stderr
