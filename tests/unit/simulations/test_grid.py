"""The in-process grid keeps Flower's contract: ids, error replies, lost messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.grid import ERROR_CLIENT_APP, InProcessGrid


@pytest.fixture
def handled() -> list[str]:
    return []


@pytest.fixture
def app(handled: list[str]) -> ClientApp:
    """Answers with its node's place; raises when asked to."""
    client = ClientApp()

    @client.query("ask")
    def ask(message: Message, context: Context) -> Message:
        word = str(message.content["request"]["word"])
        handled.append(word)
        if word == "raise":
            raise ValueError("a private sentence")
        node = context.node_config
        answer = {
            "word": word,
            "partition": int(node["partition-id"]),
            "of": int(node["num-partitions"]),
        }
        return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)

    return client


def ask(node: int, word: str) -> Message:
    content = RecordDict({"request": ConfigRecord({"word": word})})
    return Message(content, node, "query.ask", ttl=60.0, group_id="g")


def lose(word: str, how: str) -> Callable[[int, Message], str | None]:
    return lambda _, message: how if message.content["request"]["word"] == word else None


def test_replies_come_one_at_a_time_and_only_then_is_work_done(
    app: ClientApp, handled: list[str]
) -> None:
    grid = InProcessGrid(app, nodes=2)
    ids = list(grid.push_messages([ask(1, "a"), ask(2, "b"), ask(1, "c")]))
    assert len(set(ids)) == 3
    assert handled == []
    first = list(grid.pull_messages(ids))
    assert [r.metadata.reply_to_message_id for r in first] == [ids[0]]
    assert handled == ["a"]
    assert [len(list(grid.pull_messages(ids))) for _ in range(3)] == [1, 1, 0]
    assert handled == ["a", "b", "c"]


def test_only_what_is_asked_for_is_pulled(app: ClientApp, handled: list[str]) -> None:
    grid = InProcessGrid(app)
    ids = list(grid.push_messages([ask(1, "a"), ask(1, "b")]))
    assert list(grid.pull_messages(["unknown"])) == []
    assert handled == []
    (reply,) = grid.pull_messages([ids[1]])
    assert reply.content["answer"]["word"] == "b"
    assert list(grid.pull_messages([ids[1]])) == []  # a reply is given once
    assert handled == ["b"]


def test_nodes_know_their_place(app: ClientApp) -> None:
    grid = InProcessGrid(app, nodes=3)
    nodes = list(grid.get_node_ids())
    assert len(nodes) == 3
    assert [n.node_id for n in grid.get_nodes()] == nodes
    replies = grid.send_and_receive([ask(n, "x") for n in nodes])
    found = [(r.content["answer"]["partition"], r.content["answer"]["of"]) for r in replies]
    assert found == [(0, 3), (1, 3), (2, 3)]


def test_exception_becomes_an_error_reply_without_its_text(app: ClientApp) -> None:
    grid = InProcessGrid(app)
    ids = list(grid.push_messages([ask(1, "raise"), ask(1, "after")]))
    (reply,) = grid.pull_messages(ids)
    assert reply.has_error()
    assert reply.error.code == ERROR_CLIENT_APP
    assert "private" not in reply.error.reason
    assert reply.metadata.reply_to_message_id == ids[0]
    (after,) = grid.pull_messages(ids)
    assert not after.has_error()


def test_dropped_message_is_never_answered(app: ClientApp, handled: list[str]) -> None:
    grid = InProcessGrid(app, fault=lose("a", "drop"))
    ids = list(grid.push_messages([ask(1, "a"), ask(1, "b")]))
    assert list(grid.pull_messages(ids)) == []
    (reply,) = grid.pull_messages(ids)
    assert reply.content["answer"]["word"] == "b"
    assert list(grid.pull_messages(ids)) == []
    assert handled == ["b"]


def test_injected_error_does_not_reach_the_client(app: ClientApp, handled: list[str]) -> None:
    grid = InProcessGrid(app, fault=lose("a", "error"))
    replies = list(grid.send_and_receive([ask(1, "a"), ask(1, "b")]))
    assert [r.has_error() for r in replies] == [True, False]
    assert handled == ["b"]


def test_send_and_receive_ends_when_a_message_is_lost(app: ClientApp) -> None:
    grid = InProcessGrid(app, fault=lose("a", "drop"))
    replies = list(grid.send_and_receive([ask(1, "a"), ask(1, "b")], timeout=30.0))
    assert [r.content["answer"]["word"] for r in replies] == ["b"]


def test_send_and_receive_stops_at_its_time(app: ClientApp, handled: list[str]) -> None:
    grid = InProcessGrid(app)
    assert list(grid.send_and_receive([ask(1, "a")], timeout=0.0)) == []
    assert handled == []


def test_unknown_node_answers_with_an_error(app: ClientApp, handled: list[str]) -> None:
    grid = InProcessGrid(app)
    (reply,) = grid.send_and_receive([ask(99, "a")])
    assert reply.has_error()
    assert handled == []
