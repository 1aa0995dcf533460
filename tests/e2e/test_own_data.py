"""A person's own files through the command: odd names, rows the model cannot take, changed data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = [
    "--set=run.rounds=1",
    "--set=local.steps=1",
    "--set=personal.steps=0",
    "--set=score.min-option-mass=0.0",
]


def fedalign(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simulations.cli", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def survey(groups: tuple[str, ...], n: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Question {i}: more of it?",
            "options": ["yes", "no"],
            "shares": {g: [0.2 + 0.6 * (k % 2), 0.8 - 0.6 * (k % 2)] for k, g in enumerate(groups)},
        }
        for i in range(n)
    ]


def test_the_readmes_command_and_odd_group_names(tmp_path: Path) -> None:
    groups = ("[/red]oops", "a,b = c/d", "<b>bold</b>")
    path = write(tmp_path / "survey.jsonl", survey(groups))
    out = tmp_path / "run"
    source = ["--set=data.source=survey", f"--set=data.path={path}"]
    done = fedalign("simulate", *source, *QUICK, "--out", str(out))
    assert done.returncode == 0, done.stderr
    for group in groups:
        assert group in done.stdout
    html = (out / "report.html").read_text()
    assert "<b>bold</b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_rows_the_model_cannot_take(tmp_path: Path) -> None:
    rows = survey(("north", "south"))
    options = [f"option {k}" for k in range(27)]
    even = [1 / 27] * 27
    for i in range(3):
        shares = {"north": even, "south": even}
        rows.insert(5, {"question": f"Long {i}?", "options": options, "shares": shares})
    path = write(tmp_path / "survey.jsonl", rows)
    out = tmp_path / "run"
    source = ["--set=data.source=survey", f"--set=data.path={path}", "--out", str(out)]
    refused = fedalign("simulate", *source, *QUICK)
    assert refused.returncode == 3
    assert "survey.jsonl:" in refused.stderr
    assert not out.exists()
    done = fedalign("simulate", *source, *QUICK, "--set=data.skip-bad=true")
    assert done.returncode == 0, done.stderr
    listed = [json.loads(x) for x in (out / "left_out.jsonl").read_text().splitlines()]
    assert len({r["source"] for r in listed}) == 3
    summary = json.loads((out / "summary.json").read_text())
    best = summary["reference/optimum_average/average"]
    assert summary["shared/average"] <= best + 1e-6
    # Changed data are noticed before anything is computed from them.
    write(path, survey(("north", "south"), 50))
    changed = fedalign("simulate", "--resume", str(out))
    assert changed.returncode == 6
    assert "have changed" in changed.stderr


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["--set=model.targets=nope"], 2, "nope"),
        (["--set=model.name=/nonexistent/model"], 2, "nonexistent"),
        (["--set=data.groups=coast"], 0, ""),
        (["--set=data.groups=mars"], 3, "mars"),
    ],
)
def test_settings_that_only_the_model_or_data_can_judge(
    tmp_path: Path, settings: list[str], code: int, words: str
) -> None:
    out = tmp_path / "run"
    small = ["--set=data.questions=60"]
    done = fedalign("simulate", *small, *QUICK, *settings, "--out", str(out))
    assert done.returncode == code, done.stderr
    assert words in done.stderr


def test_resume_takes_what_does_not_count_and_refuses_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (
        fedalign("simulate", *QUICK, "--set=data.questions=60", "--out", str(out)).returncode == 0
    )
    assert fedalign("simulate", "--resume", str(out), "--set=run.max-attempts=5").returncode == 0
    assert fedalign("simulate", "--resume", str(out), "--set=weights.rule=size").returncode == 6
    assert fedalign("simulate", "--resume", str(out), "--set=nonsense.key=1").returncode == 2
    assert fedalign("simulate", "--resume", str(out), "--seed", "3").returncode == 2
