"""A small federation without torch: numpy clients behind the real grid, wire and strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalign import wire
from fedalign.config import Config, from_flat
from fedalign.randomness import generator
from fedalign.runfolder import prepare

GROUPS = {"east": 2, "north": 1, "south": 2}
CLIENTS = tuple(f"{g}#{i}" for g, n in GROUPS.items() for i in range(n))
LAYOUT = (
    ("base_model.model.q.lora_A.weight", (2, 6)),
    ("base_model.model.q.lora_B.weight", (5, 2)),
    ("base_model.model.v.lora_A.weight", (2, 6)),
    ("base_model.model.v.lora_B.weight", (4, 2)),
)
MANIFEST = wire.Manifest(LAYOUT, 2, 4.0, ("q", "v"), "base", "tok", False)


def group_of(client: str) -> str:
    """Return the group of a client (``east#1``) or of a site (``east-b``)."""
    return client.split("#")[0].split("-")[0]


def worth(client: str, text: str) -> float:
    """Return what a text is worth to a client of the fake federation, in [0, 1]."""
    return float(generator(0, "worth", group_of(client), text).random())


Tamper = Callable[[str, str, int], str | None]
"""(message type, client, round) -> what to break: 'nan', 'high', 'status', 'raise', 'shape';
in exchanges also 'silent', 'first-silent' and 'lies'; a site also 'withhold', or the code with
which it refuses."""


def code(word: str | None) -> int:
    """Return the status that is called ``word``; ``OK`` for any other word."""
    return {text: status for status, text in wire.STATUS.items()}.get(word or "", wire.OK)


def numpy_app(tamper: Tamper | None = None, manifest: wire.Manifest = MANIFEST) -> ClientApp:
    """Return a ClientApp whose clients pull the adapter towards a target of their own."""
    app = ClientApp()

    def broken(kind: str, clients: tuple[str, ...], round_: int) -> dict[str, str]:
        found = {c: tamper(kind, c, round_) if tamper else None for c in clients}
        if "raise" in found.values():
            raise RuntimeError("secret of a client")
        return {c: f for c, f in found.items() if f}

    def target(client: str) -> np.ndarray:
        return (
            generator(0, "target", group_of(client)).normal(size=manifest.size).astype(np.float32)
        )

    def score(client: str, adapter: np.ndarray, items: bool) -> wire.Score:
        value = float(1.0 / (1.0 + np.square(adapter - target(client)).mean()))
        keys = (("0" * 16, value), ("1" * 16, value)) if items else ()
        return wire.Score(value, 2, 0.99, 0.3, keys)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        node = context.node_config
        if "site" in node:
            mine = (str(node["site"]),)
            refused = code(broken("hello", mine, 0).get(mine[0]))
            if refused != wire.OK:
                return Message(wire.encode_failure(mine, refused), reply_to=message)
        else:
            mine = CLIENTS[int(node["partition-id"]) :: int(node["num-partitions"])]
        n = len(mine)
        content = wire.Hello(
            tuple(str(node.get("says-site", c)) for c in mine),
            tuple(str(node.get("says-group", group_of(c))) for c in mine),
            "survey",
            (int(node.get("train", 4)),) * n,
            (2,) * n,
            (2,) * n,
            tuple(10 + len(c) for c in mine),
            replace(manifest, base_revision=str(node.get("model", manifest.base_revision))),
            {"fedalign": "0"},
        )
        return Message(wire.encode_hello(content), reply_to=message)

    @app.evaluate("score")
    def evaluate(message: Message, context: Context) -> Message:
        request = wire.decode_request(message.content)
        bad = broken("score", request.clients, request.round)
        adapter = wire.decode_adapter(message.content, manifest)
        replies = []
        for c in request.clients:
            scores = {s: score(c, adapter, s == "test") for s in request.splits}
            if bad.get(c) == "high":
                scores = {s: replace(v, score=7.0) for s, v in scores.items()}
            if bad.get(c) == "withhold":
                scores = {}
            replies.append(wire.ScoreReply(c, wire.OK, scores))
        return Message(wire.encode_scores(replies, request.splits), reply_to=message)

    @app.train("round")
    def train(message: Message, context: Context) -> Message:
        request = wire.decode_request(message.content)
        bad = broken("train", request.clients, request.round)
        adapter = wire.decode_adapter(message.content, manifest)
        updates, replies = [], []
        for c in request.clients:
            noise = generator(0, "noise", c, request.round).normal(size=manifest.size)
            new = adapter + 0.3 * (target(c) - adapter) + 0.01 * noise.astype(np.float32)
            if bad.get(c) == "nan":
                new[0] = np.nan
            status = wire.NO_DATA if bad.get(c) == "status" else code(bad.get(c))
            s: wire.Score | None = score(c, adapter, False)
            if bad.get(c) == "withhold":
                s = None
            elif s is not None and bad.get(c) == "high":
                s = replace(s, score=1.5)
            replies.append(wire.TrainReply(c, status, s, 0.7, 0.9, 0.5, 8, 3, 0.01))
            updates.append(new)
        array = np.asarray(updates, dtype=np.float32)
        if "shape" in bad.values():
            array = array[:, :-1]
        return Message(wire.encode_train(replies, array), reply_to=message)

    @app.query("exchange")
    def exchange(message: Message, context: Context) -> Message:
        request = wire.decode_request(message.content)
        bad = broken("exchange", request.clients, request.round)
        rollouts = wire.decode_rollouts(message.content)
        n = len(rollouts.texts)
        replies = []
        for c in request.clients:
            rewards = np.array([worth(c, t) for t in rollouts.texts], dtype=np.float32)
            codes = np.array(
                [wire.MALFORMED if t == "?" else wire.FROM_SHARES for t in rollouts.texts], np.int8
            )
            rewards[codes == wire.MALFORMED] = 0.0
            match bad.get(c):
                case "nan":
                    rewards[0] = np.nan
                case "high":
                    rewards[codes == wire.FROM_SHARES] = 1.5
                case "silent":
                    codes[:] = wire.UNANSWERED
                case "first-silent":
                    codes[0] = wire.UNANSWERED
                case "lies":  # well-formed texts are called malformed
                    codes[:] = wire.MALFORMED
            status = wire.NO_DATA if bad.get(c) == "status" else wire.OK
            short = n - 1 if bad.get(c) == "shape" else n
            replies.append(wire.RewardReply(c, status, rewards[:short], codes[:short]))
        return Message(wire.encode_rewards(replies), reply_to=message)

    @app.train("personal")
    def personal(message: Message, context: Context) -> Message:
        request = wire.decode_request(message.content)
        bad = broken("personal", request.clients, request.round)
        adapter = wire.decode_adapter(message.content, manifest)
        stages = ("personal", "local_only", "local_only_total")
        replies = [
            wire.ScoreReply(
                c,
                wire.OK,
                {} if bad.get(c) == "withhold" else {s: score(c, adapter, True) for s in stages},
            )
            for c in request.clients
        ]
        return Message(wire.encode_scores(replies, stages), reply_to=message)

    return app


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Config]:
    """Return a maker of prepared configurations; ``section__key=value`` overrides."""

    def make(folder: str = "run", **overrides: object) -> Config:
        flat = {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
        flat = {
            "run.rounds": 3,
            "run.clients-per-message": 2,
            "run.round-timeout": 5.0,
            "model.rank": 2,
            "model.alpha": 4.0,
            "run.out": str(tmp_path / folder),
        } | flat
        return prepare(from_flat(flat))

    return make


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing reports, which takes a second each, except in tests that use ``with_report``."""
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("server.run.build_report", lambda folder: folder / "report.html")


@pytest.fixture
def with_report() -> None:
    """Ask for the real report."""


@pytest.fixture
def make_app() -> Callable[..., ClientApp]:
    """Return :func:`numpy_app`."""
    return numpy_app


@pytest.fixture
def all_clients() -> tuple[str, ...]:
    """Return the names of the small federation's clients."""
    return CLIENTS


@pytest.fixture
def deployed(settings: Callable[..., Config]) -> Callable[..., Config]:
    """Return a maker of configurations of a deployment."""

    def make(folder: str = "run", **keys: object) -> Config:
        # The registry is handed to `execute`, so this path is never opened.
        here = {"deployment__registry": "/nowhere/registry.sqlite", "deployment__wait": 0.1}
        return settings(folder, **(here | keys))

    return make
