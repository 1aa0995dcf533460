"""Cost of one exchange (texts out, rewards in): in process and under Flower's simulation engine.

    python benchmarks/exchange_cost.py [--rounds 8] [--skip-flower]

Both run the same seed, so the texts are the same.  Prints, for each, the median seconds an exchange
takes from sending the texts to having all rewards, and the bytes of one message each way; the ratio
is what the engine costs.  The first exchange, which warms caches, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fedalign import wire
from fedalign.config import Config
from fedalign.ledger import Ledger
from fedalign.runfolder import LEDGER


def seconds_of_exchanges(folder: Path, engine: str, rounds: int) -> list[float]:
    """Run a reward federation and return what its exchanges took, the first left out."""
    words = [sys.executable, "-m", "simulations.cli", "simulate", "rewards", "--out", str(folder)]
    words += ["--engine", engine, "--nodes", "2", "--set", f"run.rounds={rounds}"]
    subprocess.run(words, check=True, capture_output=True)
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return [t.seconds for t in ledger.timings() if t.name == "exchange"][1:]


def message_bytes(texts: int, words: int = 12) -> tuple[int, int]:
    """Return bytes of a request with ``texts`` one-letter texts, and of one client's answer."""
    from flwr.app import RecordDict

    questions = tuple(
        wire.Question("word " * words + str(i), ("agree", "disagree", "neither", "no answer"))
        for i in range(texts // Config().ppo.samples)
    )
    samples = Config().ppo.samples
    rollouts = wire.Rollouts(questions, tuple(i // samples for i in range(texts)), ("A",) * texts)
    request = wire.encode_rollouts(RecordDict(), rollouts)
    import numpy as np

    reply = wire.encode_rewards(
        [wire.RewardReply("c", 0, np.ones(texts, np.float32), np.zeros(texts, np.int8))]
    )
    return _size(request), _size(reply)


def _size(content: object) -> int:
    from flwr.common.serde import recorddict_to_proto

    return int(recorddict_to_proto(content).ByteSize())  # type: ignore[arg-type]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--skip-flower", action="store_true")
    options = parser.parse_args()
    out: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        engines = ["inprocess"] + ([] if options.skip_flower else ["flower"])
        for engine in engines:
            found = seconds_of_exchanges(Path(temporary) / engine, engine, options.rounds)
            out[engine] = statistics.median(found)
            print(f"{engine:>10}: {1e3 * statistics.median(found):8.1f} ms an exchange", flush=True)
    texts = Config().ppo.minibatches * Config().ppo.questions * Config().ppo.samples
    down, up = message_bytes(texts)
    print(f"{texts} texts: {down} bytes to a node, {up} bytes from each client")
    print(json.dumps({**out, "texts": texts, "bytes_down": down, "bytes_up": up}))


if __name__ == "__main__":
    main()
