"""Arms ``floor`` and ``stock`` of ``deployment.py``: a round of Flower in which nothing is done.

One message to each node and one back, each with one float32 array of the size of our adapter; numpy
only.  ``poll`` is the pause of the ServerApp between two looks for replies; 0 takes Flower's own
``Grid.send_and_receive``, which pauses 3 seconds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

BEGAN = time.time()

LONGEST = 120.0
"""Seconds that a round may take."""

client = ClientApp()
server = ServerApp()


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Send the array back."""
    place = Path(str(context.node_config["socket"])).parent / "jobs.jsonl"
    array = message.content.array_records["adapter"]["adapter"].numpy()
    reply = RecordDict({"adapter": ArrayRecord({"adapter": Array(array + np.float32(1))})})
    marks = {"began": BEGAN, "imported": BEGAN, "ended": time.time()}
    with place.open("a") as f:
        f.write(json.dumps({"run": message.metadata.run_id, "kind": "train", **marks}) + "\n")
    return Message(reply, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Do the rounds and write when each began and had its replies."""
    config = context.run_config
    array = Array(np.zeros(int(config["bench.floats"]), dtype=np.float32))
    marks = []
    for round_ in range(1, int(config["bench.rounds"]) + 1):
        began = time.time()
        messages = [
            Message(
                RecordDict(
                    {
                        "adapter": ArrayRecord({"adapter": array}),
                        "round": ConfigRecord({"round": round_}),
                    }
                ),
                node,
                MessageType.TRAIN,
                ttl=LONGEST,
                group_id=f"train-{round_}-1",
            )
            for node in grid.get_node_ids()
        ]
        replies = _exchange(grid, messages, float(config["bench.poll"]))
        marks.append([began, time.time()])
        if len(replies) != int(config["bench.nodes"]) or any(
            reply.has_error() for reply in replies
        ):
            raise RuntimeError(f"round {round_}: {len(replies)} replies, or an error")
    Path(str(config["bench.out"])).write_text(json.dumps(marks))


def _exchange(grid: Grid, messages: list[Message], poll: float) -> list[Message]:
    if not poll:
        return list(grid.send_and_receive(messages, timeout=LONGEST))
    waiting = set(grid.push_messages(messages))
    end = time.monotonic() + LONGEST
    replies: list[Message] = []
    while waiting and time.monotonic() < end:
        got = list(grid.pull_messages(list(waiting)))
        replies += got
        waiting -= {reply.metadata.reply_to_message_id for reply in got}
        if not got and waiting:
            time.sleep(poll)
    return replies
