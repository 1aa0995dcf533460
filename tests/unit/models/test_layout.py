"""The flat layout: round trip, strictness, no shared memory, no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedalign.errors import ConfigError, WireError
from fedalign.models.layout import check_flat, layout_of, pack, read_peft_folder, size, unpack

TENSORS = {
    "b.lora_B.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "a.lora_A.weight": np.arange(10, 18, dtype=np.float32).reshape(2, 4),
}
LAYOUT = (("a.lora_A.weight", (2, 4)), ("b.lora_B.weight", (3, 2)))


def test_sorted_names_row_major_values_by_hand() -> None:
    assert layout_of(TENSORS) == LAYOUT
    assert size(LAYOUT) == 14
    assert pack(TENSORS, LAYOUT).tolist() == [*range(10, 18), *range(6)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_round_trip(shapes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t{k}": rng.normal(size=s).astype(np.float32) for k, s in enumerate(shapes)}
    layout = layout_of(tensors)
    back = unpack(pack(tensors, layout), layout)
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)


def test_unpacked_tensors_are_copies() -> None:
    flat = pack(TENSORS, LAYOUT)
    tensors = unpack(flat, LAYOUT)
    flat[:] = 0
    assert tensors["a.lora_A.weight"][0, 0] == 10


@pytest.mark.parametrize(
    ("flat", "reason"),
    [
        (np.zeros(13, np.float32), "adapter_size"),
        (np.zeros((1, 14), np.float32), "adapter_size"),
        (np.zeros(14, np.float64), "adapter_dtype"),
        (np.full(14, np.nan, np.float32), "adapter_not_finite"),
        (np.full(14, np.inf, np.float32), "adapter_not_finite"),
    ],
)
def test_anything_else_is_refused(flat: np.ndarray, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        check_flat(flat, LAYOUT)
    assert caught.value.reason == reason


def test_wrong_names_and_shapes_are_refused() -> None:
    with pytest.raises(WireError, match="1 tensors missing"):
        pack({"a.lora_A.weight": TENSORS["a.lora_A.weight"]}, LAYOUT)
    with pytest.raises(WireError, match="1 unknown"):
        pack({**TENSORS, "c": np.zeros(1, np.float32)}, LAYOUT)
    with pytest.raises(WireError, match="shape"):
        pack({**TENSORS, "b.lora_B.weight": np.zeros((2, 3), np.float32)}, LAYOUT)


def test_a_number_too_large_for_float32_is_refused() -> None:
    tensors = {k: v.astype(np.float64) for k, v in TENSORS.items()}
    tensors["b.lora_B.weight"][0, 0] = 1e300
    with np.errstate(over="ignore"), pytest.raises(WireError, match="not_finite"):
        pack(tensors, LAYOUT)


def write(folder, **changes) -> None:
    save_file(TENSORS, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_reads_a_peft_folder(tmp_path) -> None:
    write(tmp_path)
    flat = read_peft_folder(tmp_path, LAYOUT, rank=2, alpha=4.0)
    assert np.array_equal(flat, pack(TENSORS, LAYOUT))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 3}, "r is 3"),
        ({"lora_alpha": 8}, "lora_alpha is 8"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"x": 1}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, changes, named) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=named):
        read_peft_folder(tmp_path, LAYOUT, rank=2, alpha=4.0)


def test_a_missing_or_misfit_folder_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_peft_folder(tmp_path, LAYOUT, rank=2, alpha=4.0)
    write(tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        read_peft_folder(tmp_path, LAYOUT[:1], rank=2, alpha=4.0)


def test_imports_no_torch(root) -> None:
    code = "import sys, fedalign.models.layout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
