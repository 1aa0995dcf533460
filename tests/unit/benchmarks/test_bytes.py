"""What ``benchmarks/bytes.py`` makes of the files that runs leave."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedalign.config import from_flat
from simulations.scenario import load


@pytest.fixture(scope="module")
def bench(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bytes_bench", root / "benchmarks" / "bytes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bytes_bench"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_arm_is_allowed_and_has_a_name_of_its_own(bench: ModuleType) -> None:
    every = bench.arms(bench.RANKS)
    assert len({a.name for a in every}) == len(every) == 30
    assert bench.DEFAULT in every
    for arm in every:
        load("default", [*bench.COMMON, *arm.settings])
    default = load("default", list(bench.DEFAULT.settings))
    plain = load("default", [])
    assert (default.model, default.aggregation, default.wire) == (
        plain.model,
        plain.aggregation,
        plain.wire,
    )
    assert from_flat({}).wire == plain.wire


def test_differences_are_paired_and_what_is_missing_is_named(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse, gone = bench.Arm(8, "product", "int8", "int8"), bench.Arm(8, "frozen-a")
    for arm, drop in ((bench.DEFAULT, 0.0), (coarse, 0.01)):
        (tmp_path / f"{arm.name}-bytes.json").write_text(json.dumps({"down": 90_000, "up": 35_000}))
        for seed in range(3):
            values = {"worst": 0.7 + 0.1 * seed - drop, "average": 0.8 + 0.02 * seed}
            (tmp_path / f"{arm.name}-{seed}.json").write_text(json.dumps(values))
    rows = bench.gather([bench.DEFAULT, coarse, gone], [0, 1, 2], tmp_path)
    assert [r["name"] for r in rows] == [bench.DEFAULT.name, coarse.name]
    assert gone.name in capsys.readouterr().err
    assert "worst_minus_default" not in rows[0]
    assert rows[1]["worst_minus_default"] == pytest.approx([-0.01, 0.0], abs=1e-9)
    assert rows[1]["average_minus_float32"] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert rows[1]["seconds_at_1_mbit"] == pytest.approx(1.0)
    text = bench.table(rows)
    assert "| product, rank 8 | int8 | int8 | 35,000 | 90,000 | 1.00 | 0.7900 |" in text
    assert "-10.00 ± 0.00" in text
    bench.plot(tmp_path / "plot.svg", rows)
    assert (tmp_path / "plot.svg").stat().st_size > 1000
