"""Answers to an exchange: which texts a client rewards, and from what."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from clients import exchange
from clients.exchange import answer
from fedalign import wire
from fedalign.config import Config, from_flat
from fedalign.data.records import ClientData, SurveyItem
from fedalign.wire import FROM_SHARES, MALFORMED, PREDICTED, REFUSED, UNANSWERED

OPTIONS = ("Yes", "No", "Unsure")


def item(question: str, shares, options=OPTIONS, ordinals=None) -> SurveyItem:
    return SurveyItem(question, question, options, {"g": tuple(shares)}, ordinals)


def client(name: str = "c", train=(), validation=(), test=()) -> ClientData:
    return ClientData(name, "g", "survey", tuple(train), tuple(validation), tuple(test))


FERRY = item("Free ferries?", (0.5, 0.3, 0.2))
HELD = item("Higher taxes?", (0.6, 0.3, 0.1))
SECRET = item("Cut the forest?", (0.1, 0.2, 0.7))
SITE = client(train=[FERRY], validation=[HELD], test=[SECRET])


def config(**keys) -> Config:
    return from_flat(
        {"run.mode": "rewards", "personal.steps": 0}
        | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    )


def rollouts(*asked: tuple[str, str], options=OPTIONS) -> wire.Rollouts:
    questions = list(dict.fromkeys(q for q, _ in asked))
    return wire.Rollouts(
        tuple(wire.Question(q, options) for q in questions),
        tuple(questions.index(q) for q, _ in asked),
        tuple(t for _, t in asked),
    )


def one(sent: wire.Rollouts, site: ClientData = SITE, predict=None, **keys) -> wire.RewardReply:
    predictors = None if predict is None else {site.name: predict}
    (reply,) = answer(config(**keys), {site.name: site}, [site.name], sent, predictors)
    return reply


def ferry(*texts: str) -> wire.Rollouts:
    return rollouts(*((FERRY.question, t) for t in texts))


def guess(question: wire.Question) -> list[float]:
    return [0.2, 0.2, 0.6]


# --- true answers -------------------------------------------------------------------------------


def test_letters_by_hand():
    """log with floor .01: 1 + ln(p) / ln(100)."""
    reply = one(ferry(" A", " B", " B", " D", "A or B"))
    expected = [1 + math.log(p) / math.log(100) for p in (0.5, 0.3, 0.3)]
    assert reply.status == wire.OK
    assert reply.codes.tolist() == [FROM_SHARES] * 3 + [MALFORMED] * 2
    assert reply.rewards[:3] == pytest.approx(expected)
    assert reply.rewards[3:].tolist() == [0.0, 0.0]
    assert reply.rewards.dtype == np.float32
    assert reply.codes.dtype == np.int8


def test_shares_and_orders_by_hand():
    reply = one(ferry(" 5 3 2", " 5 3 3"), rewards__task="shares")
    assert reply.rewards == pytest.approx([1.0, 0.0])
    assert reply.codes.tolist() == [FROM_SHARES, MALFORMED]
    reply = one(ferry(" A B C", " C B A", " B A C"), rewards__task="order")
    assert reply.rewards == pytest.approx([1.0, 0.0, 0.75])


def test_case_and_white_space_of_the_question_do_not_matter():
    sent = rollouts(("  free   FERRIES?", " A"))
    assert one(sent).codes.tolist() == [FROM_SHARES]


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Free ferries?", ("No", "Yes", "Unsure")),
        ("Free ferries?", ("Yes", "No")),
        ("Free ferries?", ("yes", "No", "Unsure")),
        ("Free ferries!", OPTIONS),
        ("Dearer ferries?", OPTIONS),
    ],
)
def test_permuted_or_unknown_questions_are_unanswered(question, options):
    reply = one(rollouts((question, " A"), options=options))
    assert reply.codes.tolist() == [UNANSWERED]
    assert reply.rewards.tolist() == [0.0]


@pytest.mark.parametrize("held", [HELD, SECRET])
@pytest.mark.parametrize("answers", ["shares", "predictor", "both"])
@pytest.mark.parametrize("options", [OPTIONS, ("Unsure", "No", "Yes"), ("Yes", "No")])
def test_validation_and_test_answers_cannot_be_read(held, answers, options):
    """Whatever the source, the wording of the question in case or space, and its options."""
    for question in (held.question, held.question.upper(), f" {held.question} "):
        reply = one(
            rollouts((question, " A"), (question, " B"), options=options),
            predict=guess,
            site__answers=answers,
        )
        assert reply.status == wire.OK
        assert reply.codes.tolist() == [UNANSWERED] * 2
        assert reply.rewards.tolist() == [0.0] * 2


def test_a_hostile_server_that_asks_for_everything_reads_training_shares_only():
    asked = [(i.question, f" {x}") for i in (FERRY, HELD, SECRET) for x in "ABC"]
    reply = one(rollouts(*asked))
    assert reply.codes.tolist() == [FROM_SHARES] * 3 + [UNANSWERED] * 6
    assert not reply.rewards[3:].any()


def test_a_score_without_value_is_unanswered():
    keys = {"rewards__task": "shares", "rewards__score": "wasserstein"}
    assert one(ferry(" 5 3 2"), **keys).codes.tolist() == [UNANSWERED]
    ranked = client(train=[replace(FERRY, ordinals=(1.0, 3.0, 2.0))])
    reply = one(ferry(" 5 3 2", " 0 10 0"), ranked, **keys)
    assert reply.codes.tolist() == [FROM_SHARES] * 2
    # ordinal order A, C, B: cumulative .5, .7 against 0, 0; W1 = 1.2 of 2
    assert reply.rewards == pytest.approx([1.0, 0.4])


def test_more_options_than_letters_are_malformed_not_a_crash():
    reply = one(rollouts(("Which?", " A"), options=tuple(f"option {i}" for i in range(27))))
    assert reply.codes.tolist() == [MALFORMED]


# --- several clients ----------------------------------------------------------------------------


def test_every_named_client_answers_in_order():
    other = client("d", train=[item(FERRY.question, (0.0, 0.0, 1.0))])
    clients = {"c": SITE, "d": other}
    replies = answer(config(), clients, ["d", "nobody", "c"], ferry(" A", " C"))
    assert [r.client for r in replies] == ["d", "nobody", "c"]
    assert [r.status for r in replies] == [wire.OK, wire.UNKNOWN_CLIENT, wire.OK]
    assert replies[0].rewards.tolist() == [0.0, 1.0]
    assert replies[1].codes.tolist() == [UNANSWERED] * 2
    assert replies[2].rewards[0] == pytest.approx(1 + math.log(0.5) / math.log(100))


def test_replies_survive_the_wire():
    replies = answer(config(), {"c": SITE}, ["c", "nobody"], ferry(" A", "x", " C"))
    back = wire.decode_rewards(wire.encode_rewards(replies), ["c", "nobody"], 3)
    for sent, got in zip(replies, back, strict=True):
        assert got.status == sent.status
        assert (got.rewards == sent.rewards).all()
        assert (got.codes == sent.codes).all()


def test_each_distinct_text_is_parsed_once(monkeypatch):
    calls = []

    def counting(task, text, k):
        calls.append(text)
        return real(task, text, k)

    real = exchange.parse
    monkeypatch.setattr(exchange, "parse", counting)
    clients = {n: replace(SITE, name=n) for n in "abcdefgh"}
    answer(config(), clients, list(clients), ferry(*([" A", " B", "bad"] * 20)))
    assert sorted(calls) == [" A", " B", "bad"]


def test_one_broken_client_does_not_silence_the_others():
    def broken(question):
        return [0.5, float("nan"), 0.5]

    clients = {"c": SITE, "d": replace(SITE, name="d")}
    replies = answer(
        config(site__answers="predictor"), clients, ["c", "d"], ferry(" A"),
        {"c": broken, "d": guess},
    )  # fmt: skip
    assert [r.status for r in replies] == [wire.INTERNAL_ERROR, wire.OK]
    assert replies[0].codes.tolist() == [UNANSWERED]


# --- the predictor ------------------------------------------------------------------------------


def test_predictor_only_never_uses_true_answers():
    reply = one(ferry(" A"), predict=guess, site__answers="predictor")
    assert reply.codes.tolist() == [PREDICTED]
    assert reply.rewards[0] == pytest.approx(1 + math.log(0.2) / math.log(100))


def test_both_takes_true_answers_first():
    sent = rollouts((FERRY.question, " A"), ("New question?", " C"))
    reply = one(sent, predict=guess, site__answers="both")
    assert reply.codes.tolist() == [FROM_SHARES, PREDICTED]
    expected = [1 + math.log(p) / math.log(100) for p in (0.5, 0.6)]
    assert reply.rewards == pytest.approx(expected)


@pytest.mark.parametrize("answers", ["predictor", "both"])
def test_a_missing_predictor_is_said(answers):
    reply = one(ferry(" A"), site__answers=answers)
    assert reply.status == wire.NO_DATA
    assert reply.codes.tolist() == [UNANSWERED]


def test_shares_only_ignores_a_predictor():
    reply = one(rollouts(("New question?", " A")), predict=guess)
    assert reply.codes.tolist() == [UNANSWERED]


# --- the policy ---------------------------------------------------------------------------------


def test_rounding():
    reply = one(ferry(" A", " C"), site__rounding=0.25)
    assert reply.rewards.tolist() == [0.75, 0.75]  # .849 and .651


def test_budget_over_exchanges(tmp_path):
    keys = {"run__out": str(tmp_path), "site__query_budget": 2}
    first = one(ferry("no", " A", "A ", " C", " B", " A"), **keys)
    assert first.codes.tolist() == [
        MALFORMED, FROM_SHARES, FROM_SHARES, FROM_SHARES, REFUSED, FROM_SHARES,
    ]  # fmt: skip
    assert first.rewards[4] == 0.0
    again = one(ferry(" B", " C", " A"), **keys)
    assert again.codes.tolist() == [REFUSED, FROM_SHARES, FROM_SHARES]
    assert again.rewards.tolist() == [0.0, first.rewards[3], first.rewards[1]]
    varied = one(rollouts(("FREE ferries?", " B")), **keys)
    assert varied.codes.tolist() == [REFUSED]


def test_each_client_has_its_own_budget(tmp_path):
    clients = {n: replace(SITE, name=n) for n in ("a b", "a-b")}
    settings = config(run__out=str(tmp_path), site__query_budget=1)
    replies = answer(settings, clients, list(clients), ferry(" A"))
    assert [r.codes.tolist() for r in replies] == [[FROM_SHARES]] * 2
    assert len(list((tmp_path / "site").iterdir())) == 2


def test_a_damaged_record_condemns_its_client_alone(tmp_path):
    clients = {n: replace(SITE, name=n) for n in ("a", "b")}
    settings = config(run__out=str(tmp_path), site__query_budget=1)
    answer(settings, clients, ["a", "b"], ferry(" A"))
    (tmp_path / "site" / "00000-a.sqlite").write_bytes(b"")
    replies = answer(settings, clients, ["a", "b"], ferry(" A"))
    assert [r.status for r in replies] == [wire.INTERNAL_ERROR, wire.OK]
    assert replies[0].codes.tolist() == [UNANSWERED]


def test_no_budget_leaves_no_file(tmp_path):
    one(ferry(" A"), run__out=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
