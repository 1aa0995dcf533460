"""Combining in blocks: the same bits as at once, whatever the method; memory stays bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedalign import wire
from fedalign.aggregation.adapters import METHODS, initial_adapter
from fedalign.models.layout import Layout, pack
from server import combining
from server.combining import blocks, combine
from server.recording import Combined
from server.spool import Spool

LAYOUT: Layout = tuple(
    (f"layer.{i}.{name}.lora_{factor}.weight", shape)
    for i in range(3)
    for name, (width, out) in (("down", (12, 6)), ("up", (6, 12)))
    for factor, shape in (("A", (2, width)), ("B", (out, 2)))
)
CLIENTS = {f"{g}#{i}": g for g in ("a", "b") for i in range(5)}


def run(folder: Path, method: str) -> Combined:
    manifest = wire.Manifest(LAYOUT, 2, 4.0, ("up",), "base", "tok", method == "frozen-a")
    received = pack(initial_adapter(dict(LAYOUT), 3), LAYOUT)
    spool = Spool(folder)
    draw = np.random.default_rng(5)
    for client in CLIENTS:
        change = draw.normal(size=received.shape).astype(np.float32)
        spool.write(client, (received + change)[manifest.upload_mask()])
    shares = {client: (1 + i) / 55 for i, client in enumerate(CLIENTS)}
    return combine(method, spool, manifest, received, shares, CLIENTS)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_do_not_change_the_adapter(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = run(tmp_path / "one", method)
    assert len(blocks(LAYOUT, len(CLIENTS))) == 1
    for most, parts in ((8 * len(CLIENTS) * 80, 3), (1, 6)):
        monkeypatch.setattr(combining, "BLOCK_BYTES", most)
        assert len(blocks(LAYOUT, len(CLIENTS))) == parts
        made = run(tmp_path / str(most), method)
        assert np.array_equal(made.adapter, at_once.adapter)
        assert sorted(made.discarded) == sorted(at_once.discarded)
        assert list(made.norms) == list(at_once.norms)
        np.testing.assert_allclose(
            list(made.norms.values()), list(at_once.norms.values()), rtol=1e-12
        )


def test_blocks_are_whole_modules_in_order_and_bounded() -> None:
    clients = combining.BLOCK_BYTES // (8 * 100)
    made = blocks(LAYOUT, clients)
    assert sum(made, ()) == LAYOUT
    for block in made:
        assert len(block) % 2 == 0
        assert sum(int(np.prod(shape)) for _, shape in block) <= 100
