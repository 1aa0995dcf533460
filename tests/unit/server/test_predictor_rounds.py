"""Federated averaging of the predictor: numpy clients behind the real grid, wire and strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalign import wire
from fedalign.ledger import Ledger
from fedalign.rewards.predictor_parameters import predictor_size
from fedalign.runfolder import LEDGER
from fedalign.wire.predictor import (
    PredictorReply,
    decode_predictor,
    encode_predictor_replies,
)
from server.directory import Directory, Member
from server.predictor import (
    aggregate_predictor,
    average,
    configure_predictor,
    first_predictor,
    fixed_weights,
)
from server.strategy import GroupStrategy, QuorumMissed
from simulations.grid import InProcessGrid

Make = Callable[..., Any]
P = 4
SIZES = {"east#0": 10, "east#1": 30, "north#0": 500, "south#0": 7}


def target(client: str) -> np.ndarray:
    return np.full(P, float(sorted(SIZES).index(client)), np.float32)


def app(bad: dict[str, str] | None = None) -> ClientApp:
    """Clients that move half of the way to a point of their own."""
    made = ClientApp()

    @made.train("predictor")
    def predictor(message: Message, context: Context) -> Message:
        request = wire.decode_request(message.content)
        assert request.phase == "predictor"
        flat = decode_predictor(message.content, P)
        replies, updates = [], []
        for c in request.clients:
            kind = (bad or {}).get(c)
            if kind == "raise":
                raise RuntimeError("secret of a client")
            status = wire.NO_DATA if kind == "status" else wire.OK
            replies.append(PredictorReply(c, status, 2.0, 1.0, 64, 0.25, 3))
            updates.append(flat + 0.5 * (target(c) - flat))
            if kind == "nan":
                updates[-1][1] = np.nan
        content = encode_predictor_replies(replies, np.asarray(updates, np.float32))
        return Message(content, reply_to=message)

    return made


@contextmanager
def strategy(settings: Make, folder: str = "run", **overrides: object) -> Iterator[GroupStrategy]:
    config = settings(folder, run__mode="rewards", site__answers="predictor", **overrides)
    members = {
        c: Member(c, c.split("#")[0], 1 + i % 2, 4, 3, 2, n)
        for i, (c, n) in enumerate(sorted(SIZES.items()))
    }
    layout = (("m.lora_A.weight", (2, 3)), ("m.lora_B.weight", (4, 2)))
    manifest = wire.Manifest(layout, 2, 4.0, ("m",), "base", "tok", False)
    directory = Directory(members, "survey", manifest, {})
    out = Path(config.run.out)
    with Ledger(out / LEDGER) as ledger:
        yield GroupStrategy(config, directory, ledger, out, "js_divergence")


def one_round(
    s: GroupStrategy, round_: int, flat: np.ndarray, bad: dict[str, str] | None = None
) -> np.ndarray:
    grid = InProcessGrid(app(bad), 2)
    replies = list(grid.send_and_receive(configure_predictor(s, round_, flat)))
    return aggregate_predictor(s, round_, flat, replies)


ZERO = np.zeros(P, np.float32)


def test_groups_count_alike_and_clients_by_capped_size(settings: Make) -> None:
    with strategy(settings) as s:
        weights = fixed_weights(s, tuple(SIZES))
        assert weights == pytest.approx(
            {"east#0": 1 / 12, "east#1": 3 / 12, "north#0": 1 / 3, "south#0": 1 / 3}
        )
        assert fixed_weights(s, ("east#0", "south#0")) == pytest.approx(
            {"east#0": 0.5, "south#0": 0.5}
        )


def test_a_round_by_hand(settings: Make) -> None:
    with strategy(settings) as s:
        flat = one_round(s, 1, ZERO)
        # Half way to 0, 1, 2, 3 with weights 1/12, 3/12, 1/3, 1/3.
        np.testing.assert_allclose(flat, 0.5 * (3 / 12 + 2 / 3 + 3 / 3), rtol=1e-6)
        s.ledger.commit("predictor", 1, 1)
        replies = {r.client: r for r in s.ledger.replies()}
        assert replies["east#1"].weight == pytest.approx(0.25)
        assert (replies["east#1"].examples, replies["east#1"].loss) == (64, 1.0)
        curves = {(c.client, c.name): c.value for c in s.ledger.curves()}
        assert curves["north#0", "predictor-error"] == 0.25
        assert curves["north#0", "predictor-loss"] == 1.0


def test_the_round_after_the_last_changes_nothing(settings: Make) -> None:
    with strategy(settings, predictor__rounds=2, run__clients_per_round=1) as s:
        start = np.linspace(0, 1, P).astype(np.float32)
        assert one_round(s, 3, start) is start
        s.ledger.commit("predictor", 3, 1)
        curves = s.ledger.curves()
        assert {c.name for c in curves} == {"predictor-error"}
        assert {c.client for c in curves} == set(SIZES)  # all clients, not a sample


def test_training_rounds_go_to_the_sampled_clients(settings: Make) -> None:
    with strategy(settings, run__clients_per_round=2) as s:
        asked = [wire.decode_request(m.content).clients for m in configure_predictor(s, 1, ZERO)]
        expected = s.directory.sample(0, 1, 2)
        assert sorted(c for names in asked for c in names) == sorted(expected)
        assert len(expected) == 2


@pytest.mark.parametrize(("what", "reason"), [("nan", "non-finite"), ("status", "no-data")])
def test_a_bad_row_is_left_out_and_recorded(settings: Make, what: str, reason: str) -> None:
    with strategy(settings) as s:
        flat = one_round(s, 1, ZERO, {"north#0": what})
        np.testing.assert_allclose(flat, 0.5 * (0.5 * 0.75 + 0.5 * 3), rtol=1e-6)
        s.ledger.commit("predictor", 1, 1)
        bad = [(r.client, r.reason) for r in s.ledger.replies() if r.status != "ok"]
        assert bad == [("north#0", reason)]


def test_below_quorum_the_attempt_is_void(settings: Make) -> None:
    with strategy(settings, run__quorum=0.9) as s:
        with pytest.raises(QuorumMissed, match="predictor 1"):
            one_round(s, 1, ZERO, {"north#0": "raise"})
        s.ledger.commit("predictor", 1, 1)
        reasons = {r.reason for r in s.ledger.replies()}
        assert reasons == {"flower-error-2"}
        assert s.ledger.curves() == []


def test_the_order_of_replies_does_not_matter(settings: Make) -> None:
    with strategy(settings) as s:
        weights = fixed_weights(s, tuple(SIZES))
        rng = np.random.default_rng(0)
        trained = {c: rng.normal(size=P).astype(np.float32) for c in SIZES}
        backwards = dict(reversed(list(trained.items())))
        turned = dict(reversed(list(weights.items())))
        assert np.array_equal(average(trained, weights), average(backwards, turned))


def test_the_start_is_keyed_by_seed(settings: Make) -> None:
    with strategy(settings, "a", run__seed=1) as s:
        flat = first_predictor(s, 8)
        assert flat.shape == (predictor_size(s.config.predictor, 8),)
        assert np.array_equal(flat, first_predictor(s, 8))
    with strategy(settings, "b", run__seed=2) as s:
        assert not np.array_equal(flat, first_predictor(s, 8))
