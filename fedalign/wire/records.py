"""The records that travel: names, units and ranges.  What may be in them is in ``__init__``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedalign.errors import WireError

PROTOCOL = 4

HELLO = "query.hello"
SCORE = "evaluate.score"
TRAIN = "train.round"
PERSONAL = "train.personal"

F32 = npt.NDArray[np.float32]

# Status of one client in a reply.
OK = 0
UNKNOWN_CLIENT, NO_DATA, NON_FINITE, MANIFEST_MISMATCH, BAD_REQUEST, INTERNAL_ERROR = range(1, 7)
OUT_OF_RANGE = 7
# A site says these for itself, by its own policy.
REFUSED_BASE_MODEL, REFUSED_OBJECTIVE, REFUSED_AGGREGATION, REFUSED_SETTINGS = range(8, 12)
TOO_FEW_EXAMPLES, BUDGET_EXHAUSTED = 12, 13
STATUS = {
    OK: "ok",
    UNKNOWN_CLIENT: "unknown-client",
    NO_DATA: "no-data",
    NON_FINITE: "non-finite",
    MANIFEST_MISMATCH: "manifest-mismatch",
    BAD_REQUEST: "bad-request",
    INTERNAL_ERROR: "internal-error",
    OUT_OF_RANGE: "out-of-range",
    REFUSED_BASE_MODEL: "refused-base-model",
    REFUSED_OBJECTIVE: "refused-objective",
    REFUSED_AGGREGATION: "refused-aggregation",
    REFUSED_SETTINGS: "refused-settings",
    TOO_FEW_EXAMPLES: "too-few-examples",
    BUDGET_EXHAUSTED: "budget-exhausted",
}
POLICY_CODES = tuple(STATUS[s] for s in range(REFUSED_BASE_MODEL, BUDGET_EXHAUSTED + 1))
"""What a site says when its own policy, and not a fault, keeps it from taking part."""

MAX_CLIENTS = 100_000
MAX_ITEMS = 10_000_000
MAX_ENTRY = 1e4
"""Largest entry of a factor; trained LoRA factors stay below 10, and products of 1e4 are finite."""
MAX_SIZE = 2**31
"""Most entries of an adapter."""
MAX_RANK = 4096


A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


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
        return tuple((n, s) for n, s in self.layout if n.endswith(B_SUFFIX))

    @property
    def upload_size(self) -> int:
        """Entries a client sends back (P)."""
        return sum(math.prod(shape) for _, shape in self.upload)

    def upload_mask(self) -> npt.NDArray[np.bool_]:
        """Return which entries of a whole adapter clients send back, (size,)."""
        sent = {name for name, _ in self.upload}
        return np.concatenate([np.full(math.prod(s), n in sent) for n, s in self.layout])

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
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise WireError("bad-manifest") from None
        if not manifest.is_sound():
            raise WireError("bad-manifest", "no sorted layout of LoRA factors")
        return manifest

    def is_sound(self) -> bool:
        """Say whether the layout is a sorted list of LoRA factor pairs of one rank."""
        shapes = dict(self.layout)
        if (
            not shapes
            or len(shapes) != len(self.layout)
            or list(self.layout) != sorted(shapes.items())
        ):
            return False
        if not (1 <= self.rank <= MAX_RANK and 0 < self.alpha < math.inf):
            return False
        if not all(len(s) == 2 and min(s) > 0 for s in shapes.values()) or self.size > MAX_SIZE:
            return False
        a = {n.removesuffix(A_SUFFIX): s for n, s in shapes.items() if n.endswith(A_SUFFIX)}
        b = {n.removesuffix(B_SUFFIX): s for n, s in shapes.items() if n.endswith(B_SUFFIX)}
        return (
            a.keys() == b.keys()
            and len(a) + len(b) == len(shapes)
            and all(s[0] == self.rank <= s[1] for s in a.values())
            and all(s[1] == self.rank for s in b.values())
        )

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
    """One client's answer to ``score``: a status and a score for each stage or split.

    A site that withholds its scores answers ``ok`` without any.
    """

    client: str
    status: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class TrainReply:
    """One client's answer to ``train``."""

    client: str
    status: int
    score: Score | None = None
    """Of the received adapter; None with status ``ok``: the site withholds it."""
    loss: float = 0.0
    """Mean training loss over the steps."""
    loss_first: float = 0.0
    loss_last: float = 0.0
    pairs: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    """Tokens that went through the policy in training, generation included; no padding."""
