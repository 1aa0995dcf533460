"""What travels: the name, shape, type and range of every array and metric, in both directions.

This is the whole list of what leaves a client:

==========  ====================================================================================
reply to    content (k = clients named in the message, P = entries of the trained factors)
==========  ====================================================================================
hello       client names, groups, question counts, size claims; model manifest; library versions
score       per client and split: mean score, questions, option mass, score of a uniform answerer;
            on test, when ``score.items`` is on: question keys (hashes) and their scores
train       LoRA factors, float32 (k, P); validation score of the *received* adapter and its
            question count, option mass, uniform score; loss (mean, first, last), pairs, steps,
            seconds
personal    per client and stage: test score, question count, option mass; question scores as above
==========  ====================================================================================

and a status code for each client.  Nothing else: no text of a question or answer, no exception
message, no path.  Every message names its clients and carries protocol version, phase, round,
attempt and the run's configuration.

Decoding is strict.  A broken record condemns the message (``WireError``); a broken row (non-finite
entries, score out of range) condemns that client alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedalign.errors import WireError

PROTOCOL = 1

HELLO = "query.hello"
SCORE = "evaluate.score"
TRAIN = "train.round"
PERSONAL = "train.personal"

F32 = npt.NDArray[np.float32]

# Status of one client in a reply.
OK = 0
STATUS = {
    OK: "ok",
    1: "unknown-client",
    2: "no-data",
    3: "non-finite",
    4: "manifest-mismatch",
    5: "bad-request",
    6: "internal-error",
}
UNKNOWN_CLIENT, NO_DATA, NON_FINITE, MANIFEST_MISMATCH, BAD_REQUEST, INTERNAL_ERROR = range(1, 7)

MAX_CLIENTS = 100_000
MAX_ITEMS = 10_000_000


@dataclass(frozen=True)
class Manifest:
    """What an adapter array of a run means; equal on all clients, else the run does not start."""

    layout: tuple[tuple[str, tuple[int, ...]], ...]
    """(PEFT tensor name, shape), sorted by name; the flat array holds them in this order."""
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_revision: str
    tokenizer_hash: str
    frozen_a: bool
    """Under frozen A clients send ``lora_B`` factors only."""

    @property
    def size(self) -> int:
        """Entries of the whole adapter."""
        return sum(math.prod(shape) for _, shape in self.layout)

    @property
    def upload(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Layout of what a client sends back."""
        if not self.frozen_a:
            return self.layout
        return tuple((n, s) for n, s in self.layout if n.endswith("lora_B.weight"))

    @property
    def upload_size(self) -> int:
        """Entries a client sends back (P)."""
        return sum(math.prod(shape) for _, shape in self.upload)

    def to_json(self) -> str:
        """Return canonical JSON."""
        return json.dumps(
            {
                "layout": [[n, list(s)] for n, s in self.layout],
                "rank": self.rank,
                "alpha": self.alpha,
                "targets": list(self.targets),
                "base_revision": self.base_revision,
                "tokenizer_hash": self.tokenizer_hash,
                "frozen_a": self.frozen_a,
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Inverse of :meth:`to_json`; raises ``WireError`` for anything else."""
        try:
            d = json.loads(text)
            manifest = Manifest(
                layout=tuple((str(n), tuple(int(x) for x in s)) for n, s in d["layout"]),
                rank=int(d["rank"]),
                alpha=float(d["alpha"]),
                targets=tuple(str(t) for t in d["targets"]),
                base_revision=str(d["base_revision"]),
                tokenizer_hash=str(d["tokenizer_hash"]),
                frozen_a=bool(d["frozen_a"]),
            )
        except (ValueError, KeyError, TypeError):
            raise WireError("bad-manifest") from None
        if list(manifest.layout) != sorted(manifest.layout) or not manifest.layout:
            raise WireError("bad-manifest", "layout is empty or not sorted")
        return manifest

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """The part every message to a client shares."""

    phase: str
    round: int
    attempt: int
    clients: tuple[str, ...]
    config_json: str
    manifest_hash: str = ""
    splits: tuple[str, ...] = ()
    """Which splits to score (``score`` only)."""


@dataclass(frozen=True)
class Hello:
    """What a node says of the clients it hosts."""

    clients: tuple[str, ...]
    groups: tuple[str, ...]
    form: str
    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    size: tuple[int, ...]
    manifest: Manifest
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Score:
    """How well one adapter serves one client on one split."""

    score: float
    """Mean over questions, higher is better."""
    n: int
    """Questions scored."""
    option_mass: float
    """Mean probability on the answer options, in [0, 1]; 1 for pair data."""
    uniform: float
    """Score of a uniform answerer on the same questions."""
    items: tuple[tuple[str, float], ...] = ()
    """(question key, score); empty unless asked for and allowed."""


@dataclass(frozen=True)
class ScoreReply:
    """One client's answer to ``score``: a status and a score for each stage or split."""

    client: str
    status: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class TrainReply:
    """One client's answer to ``train``."""

    client: str
    status: int
    score: Score | None = None
    loss: float = 0.0
    """Mean training loss over the steps."""
    loss_first: float = 0.0
    loss_last: float = 0.0
    pairs: int = 0
    steps: int = 0
    seconds: float = 0.0


# --- requests -----------------------------------------------------------------------------------


def encode_request(request: Request, adapter: ArrayRecord | None = None) -> RecordDict:
    """Return the content of a message to a node; ``adapter`` is shared between messages."""
    config: dict[str, str | int | list[str]] = {
        "protocol": PROTOCOL,
        "phase": request.phase,
        "round": request.round,
        "attempt": request.attempt,
        "clients": list(request.clients),
        "config": request.config_json,
        "manifest": request.manifest_hash,
        "splits": list(request.splits),
    }
    records: dict[str, ArrayRecord | ConfigRecord] = {"request": ConfigRecord(config)}  # type: ignore[arg-type]
    if adapter is not None:
        records["adapter"] = adapter
    return RecordDict(records)  # type: ignore[arg-type]


def decode_request(content: RecordDict) -> Request:
    """Read the shared part of a message; ``WireError`` for another protocol or a broken record."""
    try:
        c = content.config_records["request"]
        protocol = int(c["protocol"])  # type: ignore[arg-type]
        request = Request(
            phase=str(c["phase"]),
            round=int(c["round"]),  # type: ignore[arg-type]
            attempt=int(c["attempt"]),  # type: ignore[arg-type]
            clients=tuple(str(x) for x in c["clients"]),  # type: ignore[union-attr]
            config_json=str(c["config"]),
            manifest_hash=str(c["manifest"]),
            splits=tuple(str(x) for x in c["splits"]),  # type: ignore[union-attr]
        )
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-request") from None
    if protocol != PROTOCOL:
        raise WireError("protocol", f"this side speaks {PROTOCOL}, the message {protocol}")
    return request


def adapter_record(flat: F32) -> ArrayRecord:
    """Wrap a flat adapter (P,) float32 for sending."""
    return ArrayRecord({"adapter": Array(np.ascontiguousarray(flat, dtype=np.float32))})


def decode_adapter(content: RecordDict, manifest: Manifest) -> F32:
    """Return the broadcast adapter (manifest.size,) float32; anything else is a ``WireError``."""
    return _array(content, "adapter", (manifest.size,))


# --- replies ------------------------------------------------------------------------------------


def encode_hello(hello: Hello) -> RecordDict:
    """Return the content of the answer to ``hello``."""
    config = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "clients": list(hello.clients),
            "groups": list(hello.groups),
            "form": hello.form,
            "manifest": hello.manifest.to_json(),
            "versions": json.dumps(dict(hello.versions), sort_keys=True),
        }
    )
    counts: dict[str, list[int]] = {
        "train": list(hello.train),
        "validation": list(hello.validation),
        "test": list(hello.test),
        "size": list(hello.size),
    }
    return RecordDict({"hello": config, "counts": MetricRecord(counts)})  # type: ignore[arg-type]


def decode_hello(content: RecordDict) -> Hello:
    """Read and check the answer to ``hello``."""
    try:
        c = content.config_records["hello"]
        m = content.metric_records["counts"]
        if int(c["protocol"]) != PROTOCOL:  # type: ignore[arg-type]
            raise WireError("protocol")
        clients = tuple(str(x) for x in c["clients"])  # type: ignore[union-attr]
        counts = {n: _ints(m[n], len(clients)) for n in ("train", "validation", "test", "size")}
        hello = Hello(
            clients=clients,
            groups=tuple(str(x) for x in c["groups"]),  # type: ignore[union-attr]
            form=str(c["form"]),
            manifest=Manifest.from_json(str(c["manifest"])),
            versions={str(k): str(v) for k, v in json.loads(str(c["versions"])).items()},
            **counts,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise WireError("bad-hello") from None
    if len(hello.groups) != len(clients) or len(set(clients)) != len(clients):
        raise WireError("bad-hello", "groups or names do not match the clients")
    if len(clients) > MAX_CLIENTS or hello.form not in ("survey", "pairs"):
        raise WireError("bad-hello", "too many clients or unknown data form")
    return hello


def encode_failure(clients: Sequence[str], status: int) -> RecordDict:
    """Return a reply in which every named client failed with the same code."""
    k = len(clients)
    return RecordDict(
        {
            "reply": ConfigRecord({"protocol": PROTOCOL, "clients": list(clients)}),
            "status": MetricRecord({"status": [status] * k}),
        }
    )


def encode_scores(replies: Sequence[ScoreReply], stages: Sequence[str]) -> RecordDict:
    """Return the answer to ``score`` or ``personal``; ``stages`` are splits or stages, in order."""
    metrics: dict[str, list[int] | list[float]] = {"status": [r.status for r in replies]}
    keys: list[str] = []
    values: list[float] = []
    for stage in stages:
        rows = [r.scores.get(stage) for r in replies]
        metrics.update(_score_columns(stage, rows))
        metrics[f"{stage}.items"] = [len(s.items) if s else 0 for s in rows]
        for s in rows:
            if s:
                keys += [k for k, _ in s.items]
                values += [float(v) for _, v in s.items]
    config: dict[str, int | list[str]] = {
        "protocol": PROTOCOL,
        "clients": [r.client for r in replies],
        "stages": list(stages),
        "item-keys": keys,
    }
    return RecordDict(
        {
            "reply": ConfigRecord(config),  # type: ignore[arg-type]
            "status": MetricRecord(metrics),  # type: ignore[arg-type]
            "items": MetricRecord({"scores": values}),
        }
    )


def decode_scores(
    content: RecordDict, clients: Sequence[str], stages: Sequence[str], low: float
) -> list[ScoreReply]:
    """Read the answer to ``score`` or ``personal`` for exactly the clients asked, in their order.

    A client whose row is broken comes back with status ``non-finite``; a broken message raises.
    ``low`` is the lower end of the score's range.
    """
    status = _open_reply(content, clients)
    if all(s != OK for s in status):
        return [ScoreReply(c, s, {}) for c, s in zip(clients, status, strict=True)]
    m = content.metric_records["status"]
    try:
        c = content.config_records["reply"]
        if tuple(str(x) for x in c["stages"]) != tuple(stages):  # type: ignore[union-attr]
            raise WireError("bad-reply", "other stages than asked")
        keys = [str(x) for x in c["item-keys"]]  # type: ignore[union-attr]
        values = [float(x) for x in content.metric_records["items"]["scores"]]  # type: ignore[union-attr]
        counts = {s: _ints(m[f"{s}.items"], len(clients)) for s in stages}
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    if len(keys) != len(values) or len(keys) > MAX_ITEMS:
        raise WireError("bad-reply", "question scores do not match their keys")
    if sum(sum(n) for n in counts.values()) != len(keys):
        raise WireError("bad-reply", "question scores do not match their counts")
    found: list[dict[str, Score]] = [{} for _ in clients]
    bad: set[int] = set()
    at = 0
    for stage in stages:
        columns = _columns(m, stage, len(clients))
        for i in range(len(clients)):
            n = counts[stage][i]
            items = tuple(zip(keys[at : at + n], values[at : at + n], strict=True))
            at += n
            if status[i] != OK or columns[1][i] == 0:
                continue  # n = 0: this client holds no question of this split
            score = _score(columns, i, items, low)
            if score is None:
                bad.add(i)
            else:
                found[i][stage] = score
    return [
        ScoreReply(c, NON_FINITE if i in bad else status[i], {} if i in bad else found[i])
        for i, c in enumerate(clients)
    ]


def encode_train(replies: Sequence[TrainReply], updates: F32) -> RecordDict:
    """Return the answer to ``train``; ``updates`` (k, P) float32, zero rows for failed clients."""
    metrics: dict[str, list[int] | list[float]] = {"status": [r.status for r in replies]}
    metrics.update(_score_columns("received", [r.score for r in replies]))
    metrics["loss"] = [float(r.loss) for r in replies]
    metrics["loss-first"] = [float(r.loss_first) for r in replies]
    metrics["loss-last"] = [float(r.loss_last) for r in replies]
    metrics["pairs"] = [r.pairs for r in replies]
    metrics["steps"] = [r.steps for r in replies]
    metrics["seconds"] = [float(r.seconds) for r in replies]
    config = ConfigRecord({"protocol": PROTOCOL, "clients": [r.client for r in replies]})
    return RecordDict(
        {
            "reply": config,
            "status": MetricRecord(metrics),  # type: ignore[arg-type]
            "update": ArrayRecord({"update": Array(np.ascontiguousarray(updates, np.float32))}),
        }
    )


def decode_train(
    content: RecordDict, clients: Sequence[str], manifest: Manifest, low: float
) -> tuple[list[TrainReply], F32]:
    """Read the answer to ``train``: one record for each client asked, and factors (k, P)."""
    status = _open_reply(content, clients)
    k = len(clients)
    if all(s != OK for s in status):
        failed = [TrainReply(c, s) for c, s in zip(clients, status, strict=True)]
        return failed, np.zeros((k, 0), dtype=np.float32)
    updates = _array(content, "update", (k, manifest.upload_size))
    m = content.metric_records["status"]
    columns = _columns(m, "received", k)
    try:
        first, last = _floats(m["loss-first"], k), _floats(m["loss-last"], k)
        loss = _floats(m["loss"], k)
        pairs, steps = _ints(m["pairs"], k), _ints(m["steps"], k)
        seconds = _floats(m["seconds"], k)
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    replies = []
    for i, client in enumerate(clients):
        if status[i] != OK:
            replies.append(TrainReply(client, status[i]))
            continue
        score = _score(columns, i, (), low)
        finite = bool(np.isfinite(updates[i]).all()) and math.isfinite(loss[i] + first[i] + last[i])
        if score is None or not finite:
            replies.append(TrainReply(client, NON_FINITE))
            continue
        replies.append(
            TrainReply(
                client, OK, score, loss[i], first[i], last[i], pairs[i], steps[i], seconds[i]
            )
        )
    return replies, updates


# --- pieces -------------------------------------------------------------------------------------


def _score_columns(name: str, rows: Sequence[Score | None]) -> dict[str, list[int] | list[float]]:
    return {
        f"{name}.score": [float(s.score) if s else 0.0 for s in rows],
        f"{name}.n": [int(s.n) if s else 0 for s in rows],
        f"{name}.mass": [float(s.option_mass) if s else 0.0 for s in rows],
        f"{name}.uniform": [float(s.uniform) if s else 0.0 for s in rows],
    }


def _columns(m: MetricRecord, name: str, k: int) -> tuple[tuple[float, ...], ...]:
    try:
        return (
            _floats(m[f"{name}.score"], k),
            tuple(float(x) for x in _ints(m[f"{name}.n"], k)),
            _floats(m[f"{name}.mass"], k),
            _floats(m[f"{name}.uniform"], k),
        )
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None


def _score(
    columns: tuple[tuple[float, ...], ...],
    i: int,
    items: tuple[tuple[str, float], ...],
    low: float,
) -> Score | None:
    score, n, mass, uniform = (c[i] for c in columns)
    tolerance = 1e-6
    in_range = all(
        math.isfinite(x) and low - tolerance <= x <= 1 + tolerance
        for x in (score, uniform, *(v for _, v in items))
    )
    if not in_range or not (math.isfinite(mass) and -tolerance <= mass <= 1 + 1e-3) or n < 1:
        return None
    return Score(score, int(n), mass, uniform, items)


def _open_reply(content: RecordDict, clients: Sequence[str]) -> tuple[int, ...]:
    try:
        c = content.config_records["reply"]
        if int(c["protocol"]) != PROTOCOL:  # type: ignore[arg-type]
            raise WireError("protocol")
        named = tuple(str(x) for x in c["clients"])  # type: ignore[union-attr]
        status = _ints(content.metric_records["status"]["status"], len(clients))
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-reply") from None
    if named != tuple(clients):
        raise WireError("bad-reply", "other clients than asked")
    if any(s not in STATUS for s in status):
        raise WireError("bad-reply", "unknown status code")
    return status


def _array(content: RecordDict, name: str, shape: tuple[int, ...]) -> F32:
    try:
        record = content.array_records[name]
        array = record[name].numpy()
    except (KeyError, TypeError, ValueError):
        raise WireError("bad-array") from None
    if len(record) != 1 or array.dtype != np.float32 or array.shape != shape:
        raise WireError("bad-array", f"expected float32 {shape}")
    return np.asarray(array, dtype=np.float32)


def _floats(values: object, k: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != k:
        raise ValueError("length")
    return tuple(float(v) for v in values)


def _ints(values: object, k: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) != k:
        raise ValueError("length")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ValueError("counts")
    return tuple(int(v) for v in values)
