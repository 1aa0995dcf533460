"""Arm ``fresh`` of ``deployment.py``: a ClientApp that has no resident trainer.

Flower starts a process for each message.  This one imports torch, transformers and peft, reads the
site's data, loads the base model, does the job, answers and ends.  The job itself is the product's:
the same handlers, settings, policy and budget of the enrolled site, so the adapter is the same.
Only a benchmark may do this: the code runs as the owner of the data.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalign import wire

BEGAN = time.time()

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """See ``clients/app.py``."""
    return _answer(wire.HELLO, message, context)


@app.evaluate("score")
def score(message: Message, context: Context) -> Message:
    """See ``clients/app.py``."""
    return _answer(wire.SCORE, message, context)


@app.train("round")
def train(message: Message, context: Context) -> Message:
    """See ``clients/app.py``."""
    return _answer(wire.TRAIN, message, context)


def _answer(kind: str, message: Message, context: Context) -> Message:
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import clients.trainer  # noqa: F401
    from clients.enrolled import EnrolledSite
    from clients.policy_toml import load_policy
    from clients.site import Home, load_settings

    imported = time.time()
    home = Home(Path(str(context.node_config["socket"])).parent.parent)
    site = EnrolledSite(home, load_settings(home.settings), load_policy(home.policy))
    content = site.serve(kind, message.content)
    marks = {"began": BEGAN, "imported": imported, "ended": time.time()}
    with (home.run / "jobs.jsonl").open("a") as f:
        f.write(json.dumps({"run": message.metadata.run_id, "kind": kind, **marks}) + "\n")
    return Message(content, reply_to=message)
