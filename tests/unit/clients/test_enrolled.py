"""The enrolled site in this process: policy on the way out, seconds of the day, failures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

import clients.enrolled
from clients.enrolled import EnrolledSite
from clients.policy_toml import load_policy
from clients.site import Home, load_settings
from clients.site_policy import Spent
from fedalign import wire
from fedalign.aggregation.adapters import ROW_NORM, initial_adapter
from fedalign.config import from_flat, to_site_json
from fedalign.errors import DataError
from fedalign.models.layout import pack

SITE = "north-clinic"
SMALL = {
    "model.rank": 2,
    "model.device": "cpu",
    "local.steps": 1,
    "local.batch-size": 2,
    "personal.steps": 0,
}
NOON = 1_800_000_000.0


def site(home: Path) -> EnrolledSite:
    places = Home(home)
    settings, policy = load_settings(places.settings), load_policy(places.policy)
    return EnrolledSite(places, settings, policy, lambda: NOON)


def message(settings: dict[str, object], adapter=None, **more: object) -> RecordDict:
    config = to_site_json(from_flat({**SMALL, **settings}))
    facts = {"phase": "x", "round": 1, "attempt": 1, "clients": (SITE,), **more}
    record = None if adapter is None else wire.adapter_record(adapter)
    return wire.encode_request(wire.Request(config_json=config, **facts), record)


def status(content: RecordDict) -> list[int]:
    return list(content.metric_records["status"]["status"])


def test_clipped_noised_rounded_and_withheld(make_home):
    """One model, four policies; what leaves decodes as the contract says."""
    run = {"aggregation.method": "frozen-a"}
    home = make_home()
    places = Home(home)

    def train(policy: str, round_: int = 1):
        places.policy.write_text(policy)
        one = site(home)
        hello = wire.decode_hello(one.serve(wire.HELLO, message(run, clients=())))
        flat = pack(initial_adapter(dict(hello.manifest.layout), 0), hello.manifest.layout)
        asked = message(run, flat, manifest_hash=hello.manifest.hash, round=round_)
        content = one.serve(wire.TRAIN, asked)
        (reply,), updates = wire.decode_train(content, (SITE,), hello.manifest, 0.0)
        assert reply.status == wire.OK
        return reply, updates[0]  # B started from zero

    exact, whole = train("")
    norm = ROW_NORM * float(np.linalg.norm(whole))
    assert exact.score is not None
    assert norm > 0.01
    bound = norm / 4
    same, clipped = train(f"[update]\nclip = {bound}\n")
    assert same.score == exact.score
    assert ROW_NORM * float(np.linalg.norm(clipped)) == pytest.approx(bound, rel=1e-4)
    assert clipped == pytest.approx(whole / 4, abs=1e-6)

    hidden = f"[scores]\nrelease = 'withheld'\n[update]\nclip = {bound}\nnoise = 0.1\n"
    silent, noised = train(hidden)
    assert (silent.score, silent.loss, silent.loss_first) == (None, 0.0, 0.0)
    assert silent.pairs == exact.pairs
    spread = float(np.std(noised - clipped))
    assert spread == pytest.approx(0.1 * bound / ROW_NORM, rel=0.1)
    assert (train(hidden)[1] == noised).all()  # repeating the round averages nothing away
    assert (train(hidden, 2)[1] != noised).any()

    rounded, _ = train("[scores]\nrelease = 'rounded'\nrounding = 0.25\n")
    assert rounded.score is not None
    for value in (rounded.score.score, rounded.score.uniform, rounded.loss):
        assert value % 0.25 == 0.0
    assert rounded.score.n == exact.score.n


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_coarse_updates_stay_within_the_policys_bound_and_repeat(make_home, precision):
    """Clipping goes before rounding, and what travels is within the bound all the same."""
    bound = 0.02
    home = make_home(policy=f"[update]\nclip = {bound}\n")
    run = {
        "aggregation.method": "frozen-a",
        "wire.upload": precision,
        "wire.download": precision,
        "wire.feedback": True,
    }
    one = site(home)
    hello = wire.decode_hello(one.serve(wire.HELLO, message(run, clients=())))
    manifest = hello.manifest
    flat = pack(initial_adapter(dict(manifest.layout), 0), manifest.layout)
    sent = wire.broadcast_record(flat, manifest, precision)
    received = flat[manifest.upload_mask()]

    def train(round_: int, by: EnrolledSite):
        asked = message(run, manifest_hash=manifest.hash, round=round_)
        asked["adapter"] = sent
        content = by.serve(wire.TRAIN, asked)
        (reply,), factors = wire.decode_train(content, (SITE,), manifest, 0.0, precision, received)
        assert reply.status == wire.OK
        return factors[0]

    first, second = train(1, one), train(2, one)
    for change in (first, second):  # B is zero at the start
        norm = ROW_NORM * float(np.linalg.norm(change.astype(np.float64)))
        assert 0.98 * bound < norm <= bound
    again = site(home)  # another process: the residual is on disk
    assert np.array_equal(train(2, again), second)
    kept = list((Home(home).store).rglob("residuals/*"))
    assert len(kept) == 2


def test_an_exchange_is_rounded_and_counted_as_the_stricter_side_wants(make_home):
    """Of a training question one text is answered, the next refused; the count is kept."""
    home = make_home(policy="[exchange]\nrounding = 0.25\nquery-budget = 1\n")
    run = {"run.mode": "rewards", "site.rounding": 0.01, "site.query-budget": 9}
    one = site(home)
    request = message(run)
    client = one._own(one.config(wire.EXCHANGE, wire.decode_request(request)))
    one._settle()
    known, hidden = client.train[0], client.test[0]
    asked = tuple(wire.Question(i.question, i.options) for i in (known, hidden))
    texts = wire.Rollouts(asked, (0, 0, 0, 1), ("A", "B", "?", "A"))
    content = one.serve(wire.EXCHANGE, wire.encode_rollouts(request, texts))
    (reply,) = wire.decode_rewards(content, (SITE,), 4)
    assert reply.status == wire.OK
    codes = [wire.FROM_SHARES, wire.REFUSED, wire.MALFORMED, wire.UNANSWERED]
    assert reply.codes.tolist() == codes
    assert reply.rewards[0] % 0.25 == 0.0
    again = wire.Rollouts(asked, (0, 0), ("B", "A"))
    later = site(home).serve(wire.EXCHANGE, wire.encode_rollouts(message(run), again))
    (reply,) = wire.decode_rewards(later, (SITE,), 2)
    assert reply.codes.tolist() == [wire.REFUSED, wire.FROM_SHARES]


def test_without_frozen_a_a_clipping_site_refuses_from_hello_on(make_home):
    one = site(make_home(policy="[update]\nclip = 1.0\n"))
    for kind in (wire.HELLO, wire.TRAIN):
        assert status(one.serve(kind, message({}))) == [wire.REFUSED_AGGREGATION]


def test_what_is_refused_costs_nothing_and_what_fails_costs(make_home, monkeypatch):
    one = site(make_home())
    budget = one._budget
    assert status(one.serve(wire.TRAIN, message({"model.name": "a/b"}))) == [
        wire.REFUSED_BASE_MODEL
    ]
    assert status(one.serve(wire.TRAIN, message({}, clients=("x",)))) == [wire.UNKNOWN_CLIENT]
    assert status(one.serve(wire.PERSONAL, message({}, round=10**6))) == [wire.REFUSED_SETTINGS]
    assert budget.spent(NOON) == Spent()

    def fails(config):
        raise RuntimeError("/private/path")

    monkeypatch.setattr(one, "trainer", fails)
    reply = one.serve(wire.TRAIN, message({}))
    assert status(reply) == [wire.INTERNAL_ERROR]
    assert "private" not in repr(reply)
    assert budget.spent(NOON).jobs == 1


def test_a_job_is_stopped_when_the_seconds_are_used_up(make_home, monkeypatch):
    monkeypatch.setattr(clients.enrolled, "TICK", 0.05)
    one = site(make_home(policy="[budget]\nmax-seconds-per-day = 0.4\n"))

    def spins(config):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                sum(range(1000))
            except Exception:
                pytest.fail("swallowed")

    monkeypatch.setattr(one, "trainer", spins)
    began = time.monotonic()
    assert status(one.serve(wire.TRAIN, message({}))) == [wire.BUDGET_EXHAUSTED]
    assert time.monotonic() - began < 10
    assert one._budget.spent(NOON).seconds >= 0.4
    assert status(one.serve(wire.SCORE, message({}))) == [wire.BUDGET_EXHAUSTED]
    time.sleep(0.2)  # a timer that was left on would strike here


def test_without_a_budget_nothing_is_answered(make_home):
    one = site(make_home())
    Home(one._home.path).budget.write_bytes(b"damaged" * 1000)
    assert status(one.serve(wire.HELLO, message({}, clients=()))) == [wire.INTERNAL_ERROR]
    with pytest.raises(DataError):
        site(one._home.path)


def test_too_few_examples(make_home):
    one = site(make_home(policy="[training]\nmin-examples = 1000\n"))
    assert status(one.serve(wire.HELLO, message({}, clients=()))) == [wire.TOO_FEW_EXAMPLES]
    # The data were read for it, which is work: it counts.
    assert one._budget.spent(NOON).jobs == 1


def test_what_the_policy_refuses_does_not_read_the_data(make_home, monkeypatch):
    one = site(make_home(policy="[budget]\nmax-jobs-per-day = 1\n"))
    seeds = [message({"run.seed": n}, clients=()) for n in range(3)]
    assert "status" not in one.serve(wire.HELLO, seeds[0]).metric_records
    monkeypatch.setattr(one, "_own", lambda config: pytest.fail("read the data"))
    for seed in seeds:
        assert status(one.serve(wire.HELLO, seed)) == [wire.BUDGET_EXHAUSTED]
    assert status(one.serve(wire.TRAIN, message({"model.name": "a/b"}))) == [
        wire.REFUSED_BASE_MODEL
    ]


def test_what_the_audit_log_is_told(make_home):
    one = site(make_home())
    one.serve(wire.TRAIN, message({"model.name": "a/b"}, round=4))
    assert one.last["round"] == 4
    assert len(str(one.last["run"])) == 16
    one.serve(wire.TRAIN, RecordDict())
    assert one.last == {}
    assert json.dumps(one.last)
