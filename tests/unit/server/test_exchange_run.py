"""Exchanges of rollouts for rewards: the real grid, wire, strategy and loop; a policy of numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedalign import wire
from fedalign.aggregation.records import GroupHistory, RuleState
from fedalign.config import Config
from fedalign.errors import ResumeError, RunFailed
from fedalign.ledger import Ledger, canonical_rows
from fedalign.randomness import generator
from fedalign.runfolder import CHECKPOINT, LEDGER
from server import exchange_round
from server import run as loop
from server.checkpoint import Checkpoint, load
from server.directory import Directory
from server.progress import LogProgress
from server.questions import draw_questions, question_bank, read_prompts
from server.rlhf import Sampled, check_alive, group_rewards, with_newcomers
from server.strategy import QuorumMissed
from simulations.grid import InProcessGrid

Make = Callable[..., Any]
BANK = tuple(wire.Question(f"question {i}", ("yes", "no")) for i in range(5))
N = 12


class NumpyPolicy:
    """Writes keyed letters; an update adds the mean reward to the adapter and counts."""

    bank_hash = "bank"

    def __init__(self, config: Config, _: Directory, state: Checkpoint) -> None:
        self.config = config
        self.kl = config.ppo.kl
        self.adapter = state.adapter
        self.count = np.asarray(state.arrays.get("policy/count", np.zeros(1, np.float32)))
        self.seen: list[tuple[int, npt.NDArray[np.bool_]]] = []
        self._next: tuple[Any, Any] = (self.adapter, self.count)

    def sample(self, exchange: int) -> Sampled:
        rng = generator(self.config.run.seed, "fake-texts", exchange)
        texts = tuple(str(x) for x in rng.choice(["A", "B", "?"], N, p=[0.5, 0.4, 0.1]))
        formed = np.array([t != "?" for t in texts])
        rollouts = wire.Rollouts(BANK, tuple(i % len(BANK) for i in range(N)), texts)
        kl = 0.1 * float(self.count[0])
        return Sampled(rollouts, formed, formed, np.full(N, -0.5), kl, N, {"generate": 0.0})

    def improve(
        self, exchange: int, sampled: Sampled, rewards: Any
    ) -> tuple[Any, dict[str, Any], dict[str, float]]:
        keep = np.isfinite(rewards)
        self.seen.append((exchange, keep))
        adapter = (self.adapter + np.float32(rewards[keep].mean())).astype(np.float32)
        self._next = (adapter, self.count + 1)
        return adapter, {"policy/count": self._next[1]}, {"reward": float(rewards[keep].mean())}

    def adopt(self) -> None:
        self.adapter, self.count = self._next


@pytest.fixture
def federation(
    settings: Make, make_app: Make, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return a runner of a reward federation with numpy clients and a numpy policy."""
    policies: list[NumpyPolicy] = []

    def make_policy(*args: Any) -> NumpyPolicy:
        policies.append(NumpyPolicy(*args))
        return policies[-1]

    monkeypatch.setattr(exchange_round, "make_policy", make_policy)

    def go(
        folder: str = "run",
        tamper: Any = None,
        fault: Any = None,
        nodes: int = 1,
        **keys: object,
    ) -> Path:
        defaults = {"run__mode": "rewards", "run__rounds": 4, "personal__steps": 0}
        config = settings(folder, **(defaults | keys))
        grid = InProcessGrid(make_app(tamper), nodes, fault)
        loop.execute(grid, config, LogProgress(), poll=0.01)
        return Path(config.run.out)

    go.policies = policies  # type: ignore[attr-defined]
    return go


def curves(folder: Path, name: str) -> dict[int, float]:
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return {c.round: c.value for c in ledger.curves(name) if c.client == ""}


def test_a_run_of_exchanges_leaves_everything_behind(federation: Make) -> None:
    folder = federation()
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        commits = ledger.commits()
        assert [(p, r) for p, r, _ in commits] == [
            ("base", 0),
            ("final", 4),
            *[("train", r) for r in (1, 2, 3, 4)],
        ]
        weights = [w for w in ledger.weights() if w.round == 3]
        assert sum(w.weight or 0 for w in weights) == pytest.approx(1)
        assert all(w.present and w.coverage == 1.0 for w in weights)
        replies = [r for r in ledger.replies() if r.round == 1]
        assert len(replies) == 5
        assert all(r.examples > 0 for r in replies)
        assert ledger.run()["status"] == "completed"
    for name in ("reward", "format-rate", "reward-scale", "fairness-index", "adaptive-branch"):
        assert set(curves(folder, name)) == {1, 2, 3, 4}, name
    state = load(folder / CHECKPOINT)
    assert state.arrays["policy/count"].tolist() == [4.0]
    # History is in the unit of the reward, never of the base's score.
    assert all(0 <= h.value <= 1 for h in state.rule_state.history.values())
    assert all(h.observed == 4 for h in state.rule_state.history.values())


def test_weights_of_an_exchange_use_the_history_before_it(federation: Make) -> None:
    folder = federation(weights__temperature=0.1, weights__floor=0.0, weights__ceiling=1e6)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        rows = {(w.round, w.group): w for w in ledger.weights()}
        used = {
            (c.round, c.client.removeprefix("group:")): c.value for c in ledger.curves("weight")
        }
    groups = ("east", "north", "south")
    for round_ in (1, 3):
        # Exchange 1 is its own cold start: its texts come from the untouched base.
        before = [
            rows[(1, g)].score if round_ == 1 else rows[(round_ - 1, g)].history for g in groups
        ]
        raw = np.exp((1 - np.array(before, dtype=float)) / 0.1)
        expected = np.minimum(raw / raw.sum(), (1 + 1 / 3) / 2)
        found = np.array([used[(round_, g)] for g in groups])
        if expected.sum() > 0.999:  # the cap of (1 + 1/n) / 2 did not bind
            assert found == pytest.approx(expected, abs=1e-9)
        assert found.sum() == pytest.approx(1)


def test_nodes_and_message_sizes_do_not_matter(federation: Make) -> None:
    a = federation("a")
    b = federation("b", nodes=3, run__clients_per_message=1)
    assert np.array_equal(load(a / CHECKPOINT).adapter, load(b / CHECKPOINT).adapter)
    with Ledger(a / LEDGER, readonly=True) as x, Ledger(b / LEDGER, readonly=True) as y:
        assert canonical_rows(x) == canonical_rows(y)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("nan", "non-finite"), ("high", "out-of-range"), ("status", "no-data")],
)
def test_a_bad_answer_is_recorded_and_left_out(federation: Make, what: str, reason: str) -> None:
    def tamper(kind: str, client: str, round_: int) -> str | None:
        return what if (kind, client, round_) == ("exchange", "north#0", 2) else None

    folder = federation(tamper=tamper)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        bad = [(r.client, r.round, r.reason) for r in ledger.replies() if r.status != "ok"]
        assert bad == [("north#0", 2, reason)]
        north = {w.round: w for w in ledger.weights() if w.group == "north"}
    assert [north[r].present for r in (1, 2, 3, 4)] == [True, False, True, True]
    assert north[2].weight is None
    assert north[2].history == north[1].history
    assert north[2].coverage == 0.0


@pytest.mark.parametrize(("what", "reason"), [("raise", "flower-error-2"), ("shape", "bad-array")])
def test_a_broken_answer_condemns_its_message(federation: Make, what: str, reason: str) -> None:
    def tamper(kind: str, client: str, round_: int) -> str | None:
        return what if (kind, client, round_) == ("exchange", "south#1", 1) else None

    folder = federation(tamper=tamper, run__clients_per_message=1)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        bad = [(r.client, r.reason) for r in ledger.replies() if r.status != "ok"]
    assert bad == [("south#1", reason)]
    assert b"secret of a client" not in (folder / LEDGER).read_bytes()


def test_a_lost_answer_voids_the_exchange_and_it_is_tried_again(federation: Make) -> None:
    calls = {"n": 0}

    def fault(_: int, message: Any) -> str | None:
        if message.metadata.message_type == wire.EXCHANGE:
            calls["n"] += 1
            return "error" if calls["n"] <= 3 else None
        return None

    folder = federation("a", fault=fault, run__quorum=1.0)
    undisturbed = federation("b", run__quorum=1.0)
    assert np.array_equal(load(folder / CHECKPOINT).adapter, load(undisturbed / CHECKPOINT).adapter)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert ledger.commits()[2] == ("train", 1, 2)
        assert [e.kind for e in ledger.events("round-void")] == ["round-void"]


def test_a_text_nobody_answered_is_left_out_of_the_update(federation: Make) -> None:
    folder = federation(tamper=lambda kind, c, r: "first-silent" if kind == "exchange" else None)
    first = federation.policies[0]  # type: ignore[attr-defined]
    for exchange, keep in first.seen:
        text = first.sample(exchange).rollouts.texts[0]
        assert keep[0] == (text == "?")  # a malformed text has a reward without anybody's word
        assert keep[1:].all()
    assert all(v == 5 for v in curves(folder, "unanswered").values())


def test_calling_good_texts_malformed_is_no_answer(federation: Make) -> None:
    folder = federation(tamper=lambda k, c, r: "lies" if c.startswith("east") else None)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        assert not any(w.present for w in ledger.weights() if w.group == "east")


def test_without_any_answer_the_run_fails(federation: Make) -> None:
    with pytest.raises(RunFailed, match="no client has a reward"):
        federation(tamper=lambda kind, c, r: "silent" if kind == "exchange" else None)


@pytest.mark.parametrize("moment", ["sample", "improve", "save", "adopt"])
def test_killed_anywhere_a_run_resumes_to_the_same_end(
    federation: Make, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> Any:
        raise Killed

    undisturbed = federation("a")
    calls = {"n": 0}
    if moment == "save":
        real = loop.checkpoints.save

        def save(path: Path, state: Checkpoint) -> None:
            calls["n"] += 1
            if calls["n"] == 3:
                kill()
            real(path, state)

        monkeypatch.setattr(loop.checkpoints, "save", save)
    else:
        whole = getattr(NumpyPolicy, moment)

        def third(self: Any, *args: Any) -> Any:
            calls["n"] += 1
            return kill() if calls["n"] == 3 else whole(self, *args)

        monkeypatch.setattr(NumpyPolicy, moment, third)
    with pytest.raises(Killed):
        federation("b")
    monkeypatch.undo()
    monkeypatch.setattr(exchange_round, "make_policy", NumpyPolicy)
    monkeypatch.setattr(loop, "build_report", lambda folder: folder / "report.html")
    folder = federation("b", run__resume=True)
    assert np.array_equal(load(folder / CHECKPOINT).adapter, load(undisturbed / CHECKPOINT).adapter)
    with Ledger(folder / LEDGER, readonly=True) as x, Ledger(undisturbed / LEDGER) as y:
        assert canonical_rows(x) == canonical_rows(y)


def test_reference_correction_takes_the_bases_taste_off(federation: Make) -> None:
    plain = federation("a", rewards__rule="mean")
    corrected = federation(
        "b", rewards__rule="mean", rewards__reference_correction=True, ppo__kl=0.4
    )
    # pi_ref is exp(-.5) everywhere: well-formed texts gain .4 * .5, malformed ones nothing.
    gained = np.array(list(curves(corrected, "reward").values())) - np.array(
        list(curves(plain, "reward").values())
    )
    rates = np.array(list(curves(plain, "format-rate").values()))
    assert gained == pytest.approx(0.2 * rates, abs=1e-6)


def reply(client: str, rewards: list[float], codes: list[int]) -> wire.RewardReply:
    return wire.RewardReply(
        client, wire.OK, np.array(rewards, np.float32), np.array(codes, np.int8)
    )


def test_group_rewards_by_hand() -> None:
    formed = np.array([True, True, False])
    given = group_rewards(
        {
            "a#0": reply("a#0", [0.25, 0.0, 0.0], [0, 2, 1]),
            "a#1": reply("a#1", [0.75, 0.5, 0.0], [0, 4, 1]),
            "b": reply("b", [0.0, 1.0, 0.0], [3, 0, 1]),
            "c": reply("c", [0.0, 0.0, 0.0], [2, 3, 1]),
        },
        {"a#0": "a", "a#1": "a", "b": "b", "c": "c"},
        (0, 1, 0),
        formed,
        malformed=0.1,
    )
    assert given.groups == ("a", "b")  # c answered nothing
    assert given.rewards == pytest.approx(
        np.array([[0.5, 0.5, 0.1], [np.nan, 1.0, 0.1]]), nan_ok=True
    )
    assert given.coverage == {"a": 1.0, "b": 0.5, "c": 0.0}
    # Malformed texts are in R and not in the means, which history is made of.
    assert given.means == pytest.approx({"a": 0.5, "b": 1.0})
    assert given.codes == {
        "shares": 3,
        "malformed": 4,
        "unanswered": 2,
        "refused": 2,
        "predicted": 1,
    }
    with pytest.raises(QuorumMissed, match="What came back: nothing"):
        group_rewards({}, {"a": "a"}, (0, 0, 0), formed, 0.0)
    silent = {"a": reply("a", [0.0, 0.0, 0.0], [2, 3, 1])}
    with pytest.raises(QuorumMissed, match="1 malformed, 1 unanswered, 1 refused"):
        group_rewards(silent, {"a": "a"}, (0, 0, 0), formed, 0.0)


def test_true_shares_win_over_a_siblings_prediction() -> None:
    formed = np.array([True])
    replies = {"a#0": reply("a#0", [0.9], [0]), "a#1": reply("a#1", [0.1], [4])}
    given = group_rewards(replies, {"a#0": "a", "a#1": "a"}, (0,), formed, 0.0)
    assert given.rewards[0, 0] == pytest.approx(0.9)


def test_low_coverage_does_not_look_like_bad_service() -> None:
    # Both groups are served at .8 by what they answer; b holds one question of four.
    formed = np.array([True, False] * 4)
    question_of = tuple(i // 2 for i in range(8))
    a = reply("a", [0.8] * 8, [0, 1] * 4)
    b = reply("b", [0.8] + [0.0] * 7, [0, 1] + [2, 1] * 3)
    given = group_rewards({"a": a, "b": b}, {"a": "a", "b": "b"}, question_of, formed, 0.0)
    assert given.means == pytest.approx({"a": 0.8, "b": 0.8})


def test_a_question_that_nobody_holds_teaches_nothing() -> None:
    # Question 0 is answered; nobody holds 1; 2 has no well-formed text, so its format is taught.
    formed = np.array([True, False, True, False, False, False])
    codes = [0, 1, 2, 1, 1, 1]
    given = group_rewards(
        {"a": reply("a", [0.5] * 6, codes)}, {"a": "a"}, (0, 0, 1, 1, 2, 2), formed, 0.1
    )
    assert given.rewards[0] == pytest.approx([0.5, 0.1, np.nan, np.nan, 0.1, 0.1], nan_ok=True)


def test_changed_questions_stop_a_resume(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    whole = NumpyPolicy.improve
    monkeypatch.setattr(
        NumpyPolicy, "improve", lambda self, t, *a: stop() if t == 3 else whole(self, t, *a)
    )
    with pytest.raises(KeyboardInterrupt):
        federation("x")
    monkeypatch.setattr(NumpyPolicy, "improve", whole)
    monkeypatch.setattr(NumpyPolicy, "bank_hash", "another")
    with pytest.raises(ResumeError, match=r"questions of .* have changed"):
        federation("x", run__resume=True)


def test_a_newcomer_starts_from_its_own_reward() -> None:
    state = RuleState(history={"a": GroupHistory(0.5, 3, 0)})
    after = with_newcomers(state, {"a": 0.9, "b": 0.3})
    assert after.history["a"] == GroupHistory(0.5, 3, 0)
    assert after.history["b"].value == 0.3


def sampled(rate: float, kl: float) -> Sampled:
    formed = np.arange(100) < rate * 100
    rollouts = wire.Rollouts(BANK, (0,) * 100, ("A",) * 100)
    return Sampled(rollouts, formed, formed, np.zeros(100), kl, 100, {})


def test_a_collapse_is_named(settings: Make) -> None:
    rewards = settings("x").rewards
    check_alive(rewards, 5.0, sampled(0.9, 4.9), 3)
    with pytest.raises(RunFailed, match=r"collapsed: it writes a well-formed answer in 20%"):
        check_alive(rewards, 5.0, sampled(0.2, 0.1), 3)
    with pytest.raises(RunFailed, match="untouched base writes"):
        check_alive(rewards, 5.0, sampled(0.2, 0.0), 1)
    with pytest.raises(RunFailed, match=r"5\.1 nats a text"):
        check_alive(rewards, 5.0, sampled(1.0, 5.1), 2)
    with pytest.raises(RunFailed, match="nan nats"):
        check_alive(rewards, 5.0, sampled(1.0, float("nan")), 2)


def test_every_question_comes_up_equally_often() -> None:
    drawn = [i for t in range(1, 6) for i in draw_questions(10, 4, seed=0, exchange=t)]
    assert sorted(drawn) == sorted(list(range(10)) * 2)
    assert draw_questions(10, 4, 0, 3) == drawn[8:12]
    assert sorted(draw_questions(3, 9, 0, 2)) == sorted([0, 1, 2] * 3)


def test_the_bank_holds_training_questions_without_answers(settings: Make) -> None:
    from clients.store import population

    config = settings("x")
    bank = question_bank(config)
    train = {(i.question, i.options) for c in population(config) for i in c.train}  # type: ignore[union-attr]
    assert {(q.question, q.options) for q in bank} == train
    assert list(bank) == sorted(bank, key=lambda q: (q.question, q.options))


def test_a_file_of_prompts_is_checked(tmp_path: Path) -> None:
    from fedalign.errors import DataError

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "Q?", "options": ["a", "b"]}\n\n{"question": "R?"}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:3: not a JSON object with"):
        read_prompts(path)
    path.write_text('{"question": "Q?", "options": "ab"}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:1: 'question' must be text"):
        read_prompts(path)
    path.write_text("")
    with pytest.raises(DataError, match="no question"):
        read_prompts(path)
    path.write_text('{"question": "Q?", "options": ["a", "b"], "split": "test", "x": 1}\n')
    read = read_prompts(path)[0]
    assert (read.options, read.split) == (("a", "b"), "test")  # sites honour a declared role too


def test_the_rate_rises_then_falls_to_nothing() -> None:
    from server.policy_trainer import rate_of

    rates = [rate_of(t, 20) for t in range(1, 21)]
    assert rates[:4] == pytest.approx([0.25, 0.475, 0.675, 0.85])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 20)
    assert max(rates) <= 1.0
