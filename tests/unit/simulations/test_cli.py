"""The command: what it prints, and the exit code that a script reads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedalign.config import Config
from fedalign.errors import RunFailed
from fedalign.runfolder import CHECKPOINT, LEDGER, REPORT, SUMMARY
from simulations import cli

TINY = (
    "run.rounds=1",
    "local.steps=1",
    "local.batch-size=2",
    "data.questions=24",
    "personal.steps=0",
    "data.clients-per-group=1",
)


def tiny(*more: str) -> list[str]:
    """Return ``--set`` options of a run that takes seconds."""
    settings = [*TINY, *more]
    return [word for s in settings for word in ("--set", s)]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def fedalign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run the command in this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["fedalign", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    subprocess.run(
        [sys.executable, "-m", "simulations.cli", "simulate", *tiny(), "--out", str(folder)],
        check=True,
        capture_output=True,
    )
    return folder


def test_help_lists_the_commands(fedalign: Callable[..., Done]) -> None:
    done = fedalign("--help")
    assert done.code == 0
    for command in ("simulate", "compare", "reproduce", "report", "export", "doctor"):
        assert command in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no scenario 'nothing'"),
        (["--set", "run.round=3"], "Did you mean 'run.rounds'?"),
        (["--set", "run.rounds=0"], "run.rounds = 0 is outside"),
        (["--set", "run.rounds"], "is not an override"),
        (["--set", "score.metric=pair_accuracy"], "does not fit survey data"),
        (["--engine", "cluster"], "engine 'cluster' is not one of"),
    ],
)
def test_bad_settings_exit_2(
    fedalign: Callable[..., Done], arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = fedalign("simulate", *arguments, "--out", out)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (out / LEDGER).exists()


def test_missing_ray_exits_2_before_anything_is_written(
    fedalign: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "ray" else find_spec(name)
    )
    done = fedalign("simulate", "--engine", "flower", "--out", tmp_path / "run")
    assert done.code == 2
    assert "pip install -e '.[ray]'" in done.err
    assert not (tmp_path / "run").exists()


def test_bad_data_exits_3_and_names_the_file(fedalign: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("this,is\nnot,a survey\n")
    settings = ["--set", "data.source=survey", "--set", f"data.path={path}"]
    done = fedalign("simulate", *settings, "--out", tmp_path / "run")
    assert done.code == 3
    assert "answers.csv" in done.err
    assert not (tmp_path / "run").exists()


def test_lost_option_mass_exits_5(fedalign: Callable[..., Done], tmp_path: Path) -> None:
    settings = tiny("score.min-option-mass=1.0")
    done = fedalign("simulate", *settings, "--out", tmp_path / "run")
    assert done.code == 5
    assert "option mass" in done.err
    assert (tmp_path / "run" / REPORT).exists()


def test_no_reply_in_time_exits_5(fedalign: Callable[..., Done], tmp_path: Path) -> None:
    done = fedalign("simulate", *tiny("run.round-timeout=1e-9"), "--out", tmp_path / "run")
    assert done.code == 5
    assert "no-reply" in done.err


def test_folder_that_holds_a_run_exits_6(fedalign: Callable[..., Done], finished: Path) -> None:
    before = (finished / CHECKPOINT).read_bytes()
    done = fedalign("simulate", "--out", finished)
    assert done.code == 6
    assert "already holds a run" in done.err
    assert (finished / CHECKPOINT).read_bytes() == before


def test_resume_of_a_missing_folder_exits_6(fedalign: Callable[..., Done], tmp_path: Path) -> None:
    done = fedalign("simulate", "--resume", tmp_path / "gone")
    assert done.code == 6
    assert "holds no run to resume" in done.err
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("arguments", "name", "mode", "partition"),
    [
        ([], "default", "adapters", "sizes"),
        (["--mode", "rewards"], "rewards", "rewards", "group"),
        (["--mode", "adapters"], "default", "adapters", "sizes"),
        (["default", "--mode", "rewards"], "default", "rewards", "sizes"),
        (["rewards"], "rewards", "rewards", "group"),
    ],
)
def test_mode_chooses_the_scenario_or_sets_the_mode(
    fedalign: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    name: str,
    mode: str,
    partition: str,
) -> None:
    asked: list[Config] = []

    def stop(config: Config, *_: object) -> None:
        asked.append(config)
        raise RunFailed("far enough")

    monkeypatch.setattr("simulations.simulate.simulate", stop)
    assert fedalign("simulate", *arguments).code == 5
    config = asked[0]
    assert (config.run.name, config.run.mode, config.data.partition) == (name, mode, partition)


def test_unknown_mode_exits_2_and_a_resumed_run_keeps_its_own(
    fedalign: Callable[..., Done], finished: Path
) -> None:
    done = fedalign("simulate", "--mode", "reward")
    assert done.code == 2
    assert "run.mode = 'reward' is not one of adapters, rewards" in done.err
    done = fedalign("simulate", "--resume", finished, "--mode", "rewards")
    assert done.code == 2
    assert "leave out scenario, --mode" in done.err


def test_unknown_part_of_the_reproduction_exits_2(
    fedalign: Callable[..., Done], tmp_path: Path
) -> None:
    done = fedalign("reproduce", "--out", tmp_path / "r", "--parts", "core,every")
    assert done.code == 2
    assert "part 'every' is not one of core, oracle" in done.err
    assert not (tmp_path / "r").exists()


def test_doctor_is_content_here(fedalign: Callable[..., Done]) -> None:
    done = fedalign("doctor")
    assert done.code == 0, done.out
    assert "FAIL" not in done.out
    for word in ("packages", "torch", "pocket model in", "scenarios: ", "run folders go to"):
        assert word in done.out


def test_doctor_names_what_is_missing(
    fedalign: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.doctor.REQUIRED", ("numpy", "no-such-library"))
    done = fedalign("doctor")
    assert done.code == 1
    assert "FAIL  no-such-library is not installed" in done.out


def without_torch(arguments: list[str]) -> None:
    """Run the command in a fresh interpreter; fail when it loads torch, transformers or Ray."""
    script = (
        "import sys\nfrom simulations import cli\n"
        f"sys.argv = ['fedalign', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'ray', 'datasets', 'clients'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_report_is_built_again_without_torch(finished: Path) -> None:
    before = json.loads((finished / SUMMARY).read_text())
    (finished / SUMMARY).unlink()
    (finished / REPORT).unlink()
    without_torch(["report", str(finished)])
    assert json.loads((finished / SUMMARY).read_text()) == before
    assert (finished / REPORT).stat().st_size > 10_000


def test_export_writes_the_run_s_adapter_without_torch(finished: Path, tmp_path: Path) -> None:
    without_torch(["export", str(finished), str(tmp_path / "adapter")])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        given, made = (finished / "adapter" / name), (tmp_path / "adapter" / name)
        assert made.read_bytes() == given.read_bytes()


def test_run_in_process_loads_no_ray(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom simulations import cli\n"
        f"sys.argv = ['fedalign', 'simulate', *{tiny()!r}, '--out', {str(tmp_path / 'run')!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'ray', 'trl', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("package_file", [True, False])
def test_shadowing_folder_is_named(tmp_path: Path, package_file: bool) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / ("__init__.py" if package_file else "notes.txt")).write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "simulations.cli", "doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "something shadows it" in done.stderr
    assert str(tmp_path / "server") in done.stderr
    assert "Traceback" not in done.stderr
