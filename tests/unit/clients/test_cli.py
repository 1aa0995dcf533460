"""The site's command: what it prints, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.check import check, leaving
from clients.cli import app
from clients.policy_toml import parse_policy
from clients.site import Home
from clients.site_policy import Policy
from clients.start import STATE
from fedalign.audit import AuditLog

ME = str(os.geteuid())


def test_check_counts_what_is_there_and_says_what_would_leave(make_home):
    found = check(Home(make_home()), node_user=ME, trainer_user=ME)
    said = "\n".join(found.lines)
    assert "site north-clinic, group coast: 40 rows of survey data, 0 left out" in said
    splits = ("train", "validation", "test")
    rows = [
        int(line.split()[1])
        for line in found.lines
        if line.startswith("  ") and line.split()[0] in splits
    ]
    assert (len(rows), sum(rows)) == (3, 40)
    assert "topics: " in said
    assert "ok    at least 10 training examples" in said
    assert "mean scores" in said
    assert "THE POLICY IS ADVISORY" in said
    assert (found.healthy, found.enforced) == (True, False)


def test_check_says_that_every_run_would_be_refused(make_home):
    found = check(Home(make_home(policy="[training]\nmin-examples = 1000\n")), node_user=ME)
    assert not found.healthy
    assert any(line.startswith("FAIL") and "min-examples = 1000" in line for line in found.lines)


@pytest.mark.parametrize(
    ("policy", "what", "how"),
    [
        ("", "mean scores", "exact"),
        ("[scores]\nrelease = 'withheld'", "mean scores", "withheld"),
        ("[scores]\nrelease = 'withheld'\nquestion-scores = true", "question scores", "not sent"),
        ("[scores]\nrelease = 'rounded'\nrounding = 0.1", "losses", "multiples of 0.1"),
        ("[scores]\nquestion-scores = true", "question scores", "hash"),
        ("[update]\nclip = 2\nnoise = 0.5", "update of a round", "norm 2, noise 0.5"),
        ("[training]\nobjectives = ['exchange']", "update of a round", "not sent"),
        ("[exchange]\nquery-budget = 3\nrounding = 0.2", "rewards of texts", "3 different texts"),
        ("[exchange]\nanswers = 'both'", "preference predictor", "parameters exact"),
    ],
)
def test_the_table_follows_the_policy(policy, what, how):
    table = dict(leaving(parse_policy(tomllib.loads(policy))))
    assert how in table[what]


def test_objectives_that_are_not_allowed_are_not_in_the_table():
    given = parse_policy({"training": {"objectives": ["dpo"]}})
    assert "rewards of texts" not in dict(leaving(given))
    assert "rewards of texts" in dict(leaving(Policy()))


def run(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clients.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=200,
        check=False,
    )


def test_exit_codes(make_home, sites, root, short_tmp):
    home = make_home()
    good = run("check", "--home", str(home), "--node-user", ME, root=root)
    assert good.returncode == 0, good.stderr
    rows = [r for r in sites.survey_rows() if r["site"] == "north-clinic"]
    rows[1]["shares"] = [0.2]
    broken = sites.write(short_tmp / "broken.jsonl", rows)
    bad = run("check", str(broken), "--home", str(home), root=root)
    assert bad.returncode == 3
    assert "broken.jsonl:2" in bad.stderr
    nowhere = run("check", "--home", str(short_tmp / "nowhere"), root=root)
    assert nowhere.returncode == 2
    assert "Join first" in nowhere.stderr


def test_policy_is_written_once(tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["policy", "--home", str(tmp_path)])
    assert done.exit_code == 0
    path = tmp_path / "trainer" / "policy.toml"
    assert parse_policy(tomllib.loads(path.read_text())) == Policy()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("[scores]\nrelease = 'withheld'\n")
    assert "withheld" in runner.invoke(app, ["policy", "--home", str(tmp_path)]).stdout


def test_status(make_home):
    home = Home(make_home())
    AuditLog(home.audit).append("job", kind="train.round", code="ok", seconds=1.5)
    done = CliRunner().invoke(app, ["status", "--home", str(home.path)])
    assert done.exit_code == 0, done.output
    assert "not running" in done.stdout
    assert "1000 of 1000 left" in done.stdout
    assert "kind=train.round code=ok seconds=1.5" in done.stdout
    assert not home.budget.exists()
    home.logs.mkdir(exist_ok=True)
    state = {"supervisor": os.getpid(), "supernode": {"code": 305}}
    (home.logs / STATE).write_text(json.dumps(state))
    said = CliRunner().invoke(app, ["status", "--home", str(home.path)]).stdout
    assert f"supervisor  runs, process {os.getpid()}" in said
    assert "supernode   DOWN, ended with code 305" in said
    assert "supernode.log" in said
