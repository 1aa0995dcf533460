"""What leaves: rounded or withheld scores that decode; clipped and noised updates."""

from __future__ import annotations

import math
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.noise import clip, load_key, protect, rho
from clients.release import (
    nearest,
    release_predictor,
    release_score,
    release_scores,
    release_training,
)
from clients.site_policy import ScoresPolicy, UpdatePolicy
from fedalign import wire
from fedalign.aggregation.adapters import ROW_NORM
from fedalign.errors import DataError
from fedalign.wire.predictor import (
    PredictorReply,
    decode_predictor_replies,
    encode_predictor_replies,
)

EXACT, ROUNDED, WITHHELD = (ScoresPolicy(r, 0.05) for r in ("exact", "rounded", "withheld"))
KEYS = tuple(f"{i:016x}" for i in range(3))


def score(values=(0.51, 0.62, 0.73), items=True) -> wire.Score:
    listed = tuple(zip(KEYS, values, strict=True)) if items else ()
    return wire.Score(math.fsum(values) / 3, 3, 0.97, 0.33, listed)


@pytest.mark.parametrize(
    ("value", "multiple", "expected"),
    [(0.337, 0.1, 0.3), (0.15, 0.1, 0.2), (0.12, 0.25, 0.0), (1.0, 0.3, 0.9), (-0.15, 0.1, -0.1)],
)
def test_nearest_by_hand(value, multiple, expected):
    assert nearest(value, multiple) == pytest.approx(expected, abs=1e-12)


@given(st.floats(0.17, 1), st.floats(0.001, 0.999))
def test_nearest_stays_in_range(value, multiple):
    assert 0.1674 <= nearest(value, multiple, 0.1674, 1.0) <= 1.0


def test_scores_pass_exactly_or_rounded_and_decode():
    whole = score()
    assert release_score(EXACT, whole, 0.0) is whole
    found = release_score(ROUNDED, whole, 0.0)
    assert found is not None
    assert [v for _, v in found.items] == pytest.approx([0.5, 0.6, 0.75])
    assert found.score == pytest.approx(1.85 / 3)
    assert (found.option_mass, found.uniform) == pytest.approx((0.95, 0.35))
    without = release_score(ROUNDED, score(items=False), 0.0)
    assert without is not None
    assert without.score == pytest.approx(0.6)
    for policy, there in ((EXACT, True), (ROUNDED, True), (WITHHELD, False)):
        replies = release_scores(policy, [wire.ScoreReply("a", wire.OK, {"test": whole})], 0.0)
        (back,) = wire.decode_scores(wire.encode_scores(replies, ("test",)), ("a",), ("test",), 0)
        assert back.status == wire.OK
        assert ("test" in back.scores) == there


def test_a_round_without_scores_decodes():
    manifest = wire.Manifest(
        (("m.lora_A.weight", (1, 2)), ("m.lora_B.weight", (2, 1))), 1, 1.0, ("m",), "b", "t", False
    )
    reply = wire.TrainReply("a", wire.OK, score(items=False), 0.512, 0.7, 0.3, 5, 2, 0.1, 40)
    updates = np.ones((1, 4), dtype=np.float32)
    rounded = release_training(ROUNDED, reply, 0.0)
    assert (rounded.loss, rounded.loss_first) == pytest.approx((0.5, 0.7))
    hidden = release_training(WITHHELD, reply, 0.0)
    assert (hidden.score, hidden.loss, hidden.loss_last, hidden.steps) == (None, 0.0, 0.0, 2)
    for sent in (rounded, hidden):
        (back,), _ = wire.decode_train(wire.encode_train([sent], updates), ("a",), manifest, 0.0)
        assert back.status == wire.OK
    assert back.score is None


def test_the_predictor_without_its_error_decodes():
    reply = PredictorReply("a", wire.OK, 0.51, 0.42, 10, 0.31, 7)
    for policy, error in ((EXACT, 0.31), (ROUNDED, 0.3), (WITHHELD, 0.0)):
        sent = release_predictor(policy, reply)
        content = encode_predictor_replies([sent], np.ones((1, 3), dtype=np.float32))
        (back,), _ = decode_predictor_replies(content, ("a",), 3)
        assert (back.status, back.error) == (wire.OK, pytest.approx(error))


# --- updates ------------------------------------------------------------------------------------


def test_clip_by_hand():
    d = np.array([3.0, 4.0], dtype=np.float32)
    assert clip(d, 10.0) is d
    small = clip(d, 1.0)
    assert ROW_NORM * np.linalg.norm(small) == pytest.approx(1.0)
    assert small / np.linalg.norm(small) == pytest.approx([0.6, 0.8])


def test_the_norm_is_that_of_the_product():
    from fedalign.aggregation.adapters import initial_adapter, update_norm

    shapes = {"m.lora_A.weight": (2, 6), "m.lora_B.weight": (5, 2)}
    old = initial_adapter(shapes, 0)
    rng = np.random.default_rng(0)
    trained = rng.normal(size=10).astype(np.float32)
    sent = protect(UpdatePolicy(clip=0.7), b"", 1, np.zeros(10, dtype=np.float32), trained)
    new = old | {"m.lora_B.weight": sent.reshape(5, 2)}
    assert update_norm(new, old) == pytest.approx(0.7, rel=1e-5)


def test_noise_has_the_stated_deviation_and_only_the_key_knows_it():
    n = 40_000
    settings = UpdatePolicy(clip=2.0, noise=0.5)
    received, trained = np.zeros(n, np.float32), np.full(n, 0.001, np.float32)
    sent = protect(settings, b"k" * 32, 3, received, trained)
    noise = sent - clip(trained, 2.0)
    assert noise.std() == pytest.approx(0.5 * 2.0 / ROW_NORM, rel=0.02)
    assert abs(noise.mean()) < 0.05
    again = protect(settings, b"k" * 32, 3, received, trained)
    assert (again == sent).all()
    for key, round_, b in (
        (b"j" * 32, 3, trained),
        (b"k" * 32, 4, trained),
        (b"k" * 32, 3, -trained),
    ):
        other = protect(settings, key, round_, received, b) - clip(b, 2.0)
        assert abs(np.corrcoef(other, noise)[0, 1]) < 0.03


def test_a_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "noise.key"
    key = load_key(path)
    assert len(key) == 32
    assert load_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="noise key"):
        load_key(path)


def test_rho_by_hand():
    assert rho(2.0) == 0.5
