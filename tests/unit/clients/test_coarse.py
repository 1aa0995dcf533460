"""Error feedback, its residuals, and a site's bound."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clients.coarse import bounded, receive, send
from clients.residuals import FOLDER, Residuals
from fedalign import wire
from fedalign.aggregation import adapters
from fedalign.config import Config, from_flat
from fedalign.errors import ConfigError
from fedalign.models.layout import pack, unpack
from fedalign.wire.coarse import decode

LAYOUT = (("m.lora_A.weight", (2, 6)), ("m.lora_B.weight", (5, 2)))
MANIFEST = wire.Manifest(LAYOUT, 2, 4.0, ("m",), "base", "tok", True)
P = MANIFEST.upload_size
OK = (wire.TrainReply("a", wire.OK),)
FEEDBACK = {
    "aggregation.method": "frozen-a",
    "wire.upload": "int8",
    "wire.feedback": True,
    "model.rank": 2,
}


def config(folder: Path, **more: object) -> Config:
    flat = {k.replace("__", "."): v for k, v in more.items()}
    return from_flat({**FEEDBACK, "run.out": str(folder), **flat})


def one_round(settings: Config, round_: int, change: np.ndarray, bound: float | None = None):
    """Return what the server adds for client ``a``, and the bytes that travelled."""
    received = np.zeros(P, np.float32)
    sent = send(settings, MANIFEST, round_, OK, received, change[None], bound)
    assert isinstance(sent, wire.Coarse)
    return decode(sent, MANIFEST.upload)[0], sent.entries.tobytes() + sent.scales.tobytes()


@pytest.fixture
def changes() -> np.ndarray:
    """Changes with a component far below a step of int8, as late rounds have them."""
    rng = np.random.default_rng(1)
    large = np.array([1.0, -1.0] * (P // 2), np.float32) * 10
    large[::3] = 0
    drift = np.where(large == 0, np.float32(0.01), np.float32(0))
    noise = 0.001 * rng.normal(size=(20, P)).astype(np.float32)
    return (large + drift + noise).astype(np.float32)


def test_with_feedback_nothing_is_lost_but_the_last_residual(
    tmp_path: Path, changes: np.ndarray
) -> None:
    settings = config(tmp_path)
    sent = sum(one_round(settings, t, d)[0].astype(np.float64) for t, d in enumerate(changes, 1))
    residual = Residuals(tmp_path, "a").before(len(changes) + 1, P)
    assert sent + residual == pytest.approx(changes.astype(np.float64).sum(0), abs=1e-4)
    assert np.abs(residual).max() <= 0.51 * 10.1 / 127
    without = config(tmp_path, wire__feedback=False)
    lossy = sum(one_round(without, t, d)[0].astype(np.float64) for t, d in enumerate(changes, 1))
    small = np.abs(changes).max(0) < 1
    exact = changes.astype(np.float64).sum(0)
    assert np.abs(lossy - exact)[small].min() > 0.1  # every round drops the drift
    assert np.abs(sent - exact)[small].max() < 0.05


def test_a_repeated_round_sends_the_same_bytes(tmp_path: Path, changes: np.ndarray) -> None:
    settings = config(tmp_path)
    first = [one_round(settings, t, d)[1] for t, d in enumerate(changes[:4], 1)]
    assert one_round(settings, 4, changes[3])[1] == first[3]
    assert one_round(settings, 4, changes[3])[1] == first[3]
    # going back a round, as from an older checkpoint: what lies there of later rounds is not read
    assert one_round(settings, 3, changes[2])[1] != b""
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_only_two_files_a_client_are_kept(tmp_path: Path, changes: np.ndarray) -> None:
    settings = config(tmp_path)
    for t, d in enumerate(changes[:6], 1):
        one_round(settings, t, d)
    names = sorted(p.name for p in (tmp_path / FOLDER).iterdir())
    assert [n[-19:] for n in names] == ["0000005.safetensors", "0000006.safetensors"]


def test_a_run_begun_anew_in_the_same_store_starts_from_zero(
    tmp_path: Path, changes: np.ndarray
) -> None:
    settings = config(tmp_path)
    first = [one_round(settings, t, d)[1] for t, d in enumerate(changes[:5], 1)]
    assert [one_round(settings, t, d)[1] for t, d in enumerate(changes[:5], 1)] == first


@pytest.mark.parametrize("damage", ["missing", "garbage", "size", "nan"])
def test_a_lost_residual_is_zero_and_the_log_says_so(
    tmp_path: Path, changes: np.ndarray, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path)
    one_round(settings, 1, changes[0])
    (path,) = (tmp_path / FOLDER).iterdir()
    kept = Residuals(tmp_path, "a")
    match damage:
        case "missing":
            path.unlink()
        case "garbage":
            path.write_bytes(b"not a tensor")
        case "size":
            kept.keep(1, np.zeros(P + 1, np.float32))
        case "nan":
            kept.keep(1, np.full(P, np.nan, np.float32))
    with caplog.at_level(logging.INFO, logger="fedalign.client"):
        after = one_round(settings, 2, changes[1])
    assert "zero" in caplog.text
    assert str(tmp_path) not in caplog.text
    without = one_round(config(tmp_path, wire__feedback=False), 2, changes[1])
    assert after[1] == without[1]


def test_a_client_that_failed_keeps_its_residual(tmp_path: Path, changes: np.ndarray) -> None:
    settings = config(tmp_path)
    one_round(settings, 1, changes[0])
    kept = Residuals(tmp_path, "a").before(2, P)
    failed = (wire.TrainReply("a", wire.NON_FINITE),)
    zeros = np.zeros((1, P), np.float32)
    sent = send(settings, MANIFEST, 2, failed, zeros[0], zeros, None)
    assert isinstance(sent, wire.Coarse)
    assert not decode(sent, MANIFEST.upload).any()
    assert np.array_equal(Residuals(tmp_path, "a").before(3, P), kept)


def test_clients_of_one_message_keep_residuals_apart(tmp_path: Path, changes: np.ndarray) -> None:
    settings = config(tmp_path / "both")
    names = ("a", "b")
    both = tuple(wire.TrainReply(n, wire.OK) for n in names)
    zeros = np.zeros(P, np.float32)
    for t in (1, 2):
        sent = send(settings, MANIFEST, t, both, zeros, changes[[t, t + 5]], None)
    assert isinstance(sent, wire.Coarse)
    alone = config(tmp_path / "alone")
    for t in (1, 2):
        row, _ = one_round(alone, t, changes[t])
    assert np.array_equal(decode(sent, MANIFEST.upload)[0], row)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_sites_bound_holds_for_what_travels(
    tmp_path: Path, changes: np.ndarray, precision: str
) -> None:
    settings = config(tmp_path, wire__upload=precision)
    bound = 3.0
    for t, change in enumerate(changes, 1):
        clipped = (change * (bound / np.linalg.norm(change))).astype(np.float32)
        sent, _ = one_round(settings, t, clipped, bound)
        assert float(np.linalg.norm(sent.astype(np.float64))) <= bound
        assert float(np.linalg.norm(sent.astype(np.float64))) > 0.95 * bound
        owed = Residuals(tmp_path, "a").before(t + 1, P)
        assert float(np.linalg.norm(owed)) < 0.05 * bound  # clipping is not paid back


def test_within_the_bound_nothing_is_scaled(changes: np.ndarray) -> None:
    free = bounded(changes[0], MANIFEST.upload, "int8", None)
    held = bounded(changes[0], MANIFEST.upload, "int8", 1e6)
    assert np.array_equal(free[0].entries, held[0].entries)
    assert np.array_equal(free[1], held[1])


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_frozen_a_is_made_from_the_seed(tmp_path: Path, precision: str) -> None:
    settings = config(tmp_path, wire__upload=precision, wire__download=precision)
    rng = np.random.default_rng(2)
    start = adapters.initial_adapter(dict(LAYOUT), settings.run.seed)
    start["m.lora_B.weight"] = rng.normal(size=(5, 2)).astype(np.float32)
    flat = pack(start, LAYOUT)
    request = wire.Request("train", 1, 1, ("a",), "{}")
    content = wire.encode_request(request, wire.broadcast_record(flat, MANIFEST, precision))
    got = unpack(receive(content, settings, MANIFEST), LAYOUT)
    assert np.array_equal(got["m.lora_A.weight"], start["m.lora_A.weight"])
    assert got["m.lora_B.weight"] == pytest.approx(start["m.lora_B.weight"], abs=0.02)


def test_under_product_the_basis_of_a_residual_does_not_stay() -> None:
    """Why feedback is refused there: the same entries stand for another matrix a round later."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    before = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    one = adapters.Contribution("a", "g", 1.0, before)
    after = adapters.aggregate("product", [one], before).tensors
    assert after["m.lora_B.weight"] @ after["m.lora_A.weight"] == pytest.approx(b @ a, abs=1e-5)
    residual = 0.01 * rng.normal(size=(5, 2))
    lost, added = residual @ a, residual @ after["m.lora_A.weight"]
    assert np.linalg.norm(added - lost) > 0.5 * np.linalg.norm(lost)
    frozen = adapters.aggregate("frozen-a", [one], before).tensors
    assert np.array_equal(frozen["m.lora_A.weight"], a)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"wire.upload": "int4"}, "float32, bfloat16, int8"),
        ({"wire.download": "int8"}, "needs wire.upload"),
        ({"wire.feedback": True}, "nothing is lost"),
        ({"wire.feedback": True, "wire.upload": "int8"}, "frozen-a"),
        (
            {
                "wire.feedback": True,
                "wire.upload": "int8",
                "aggregation.method": "factor-mean",
            },
            "frozen-a",
        ),
        ({"wire.upload": "int8", "run.mode": "rewards"}, "mode 'rewards'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_flat(settings)


def test_float32_leaves_as_it_is(tmp_path: Path) -> None:
    settings = replace(Config())
    updates = np.ones((1, P), np.float32)
    assert send(settings, MANIFEST, 1, OK, np.zeros(P, np.float32), updates, None) is updates
