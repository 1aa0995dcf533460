"""Rounds in few bytes: close to float32, the same bits when an attempt is repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from clients.coarse import receive, send
from fedalign import wire
from fedalign.aggregation.adapters import A_SUFFIX, initial_adapter
from fedalign.config import from_json
from fedalign.ledger import Ledger
from fedalign.models.layout import unpack
from fedalign.runfolder import CHECKPOINT, LEDGER
from server.checkpoint import load
from server.progress import LogProgress
from server.run import execute
from simulations.grid import InProcessGrid

Make = Callable[..., Any]
LAYOUT = (
    ("base_model.model.q.lora_A.weight", (2, 6)),
    ("base_model.model.q.lora_B.weight", (5, 2)),
)


def coarse_app(make_app: Make, frozen: bool) -> Callable[[Message, Context], Message]:
    """Return the numpy clients behind ``receive`` and ``send``, as real clients are."""
    manifest = wire.Manifest(LAYOUT, 2, 4.0, ("q",), "base", "tok", frozen)
    plain = replace(manifest, frozen_a=False)
    inner = make_app(manifest=manifest)
    mask = manifest.upload_mask()

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type != wire.TRAIN:
            return inner(message, context)
        request = wire.decode_request(message.content)
        config = from_json(request.config_json)
        whole = receive(message.content, config, manifest)
        message.content = wire.encode_request(request, wire.adapter_record(whole))
        reply = inner(message, context)
        rows, updates = wire.decode_train(reply.content, request.clients, plain, 0.0)
        sent = send(config, manifest, request.round, rows, whole[mask], updates[:, mask], None)
        reply.content = wire.encode_train(rows, sent)
        return reply

    return app


def run(app: Any, config: Any, fault: Any = None) -> np.ndarray:
    execute(InProcessGrid(app, 1, fault), config, LogProgress(), poll=0.01)
    return load(Path(config.run.out) / CHECKPOINT).adapter


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 0.01), ("int8", 0.02)])
@pytest.mark.parametrize("method", ["product", "frozen-a", "factor-mean"])
def test_close_to_float32(
    settings: Make, make_app: Make, method: str, precision: str, near: float
) -> None:
    app = coarse_app(make_app, method == "frozen-a")
    both = {"wire__upload": precision, "wire__download": precision}
    exact = run(app, settings("exact", aggregation__method=method, run__rounds=5))
    coarse = run(app, settings("coarse", aggregation__method=method, run__rounds=5, **both))
    assert not np.array_equal(coarse, exact)
    a, b = (unpack(x, LAYOUT) for x in (coarse, exact))
    products = [t[LAYOUT[1][0]] @ t[LAYOUT[0][0]] for t in (a, b)]
    difference = np.linalg.norm(products[0] - products[1])
    assert difference < near * np.linalg.norm(products[1])


@pytest.mark.parametrize("feedback", [False, True])
def test_a_repeated_attempt_changes_no_bit(
    settings: Make, make_app: Make, feedback: bool, tmp_path: Path
) -> None:
    keys = {
        "aggregation__method": "frozen-a",
        "wire__upload": "int8",
        "wire__download": "bfloat16",
        "wire__feedback": feedback,
        "run__quorum": 1.0,
        "run__rounds": 4,
    }
    lost: list[int] = []

    def fault(_: int, message: Message) -> str | None:
        # The last message of the first attempt at round 3: the others' residuals are written.
        request = wire.decode_request(message.content)
        if (message.metadata.message_type, request.round, request.attempt) == (wire.TRAIN, 3, 1):
            lost.append(1)
            return "error" if len(lost) == 3 else None
        return None

    app = coarse_app(make_app, True)
    whole = run(app, settings("whole", **keys))
    disturbed = run(app, settings("disturbed", **keys), fault)
    assert len(lost) == 3
    assert np.array_equal(whole, disturbed)
    with Ledger(tmp_path / "disturbed" / LEDGER, readonly=True) as ledger:
        assert ("train", 3, 2) in ledger.commits()
    first = initial_adapter(dict(LAYOUT), 0)
    assert np.array_equal(unpack(whole, LAYOUT)[LAYOUT[0][0]], first[LAYOUT[0][0]])
    assert LAYOUT[0][0].endswith(A_SUFFIX)


def test_a_client_that_sends_another_precision_is_left_out(
    settings: Make, make_app: Make, all_clients: tuple[str, ...]
) -> None:
    app = coarse_app(make_app, False)

    def stubborn(message: Message, context: Context) -> Message:
        reply = app(message, context)
        names = wire.decode_request(message.content).clients
        if message.metadata.message_type == wire.TRAIN and all_clients[0] in names:
            rows = [wire.TrainReply(n, wire.OK, wire.Score(0.5, 2, 0.9, 0.3)) for n in names]
            reply.content = wire.encode_train(rows, np.zeros((len(names), 22), np.float32))
        return reply

    config = settings(wire__upload="int8")
    run(stubborn, config)
    with Ledger(Path(config.run.out) / LEDGER, readonly=True) as ledger:
        reasons = {e.detail for e in ledger.events() if e.kind == "reply-rejected"}
    assert reasons == {"bad-array"}
