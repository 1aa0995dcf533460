"""The rows of the ledger, and the tables that hold them.

One frozen dataclass for each table.  A field ``group`` is the column ``grp``, because GROUP is a
word of SQL.  Tables are STRICT, and :mod:`fedalign.ledger` refuses a value of the wrong type.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT = 1
"""Written to ``PRAGMA user_version``; a ledger of another format is refused."""

WITHHELD = "withheld"
"""Status of a score that a site's policy keeps to itself: it exists, and nobody here knows it."""

Triple = tuple[str, int, int]
"""(phase, round, attempt)"""


@dataclass(frozen=True, kw_only=True)
class Dated:
    """What a phase or round produced.  :meth:`Ledger.write` fills these three fields."""

    phase: str = ""
    round: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class ClientRow:
    """One logical client: its group, its form of data, questions per split and its size."""

    client: str
    group: str
    form: str
    """``survey`` or ``pairs``."""
    train: int
    validation: int
    test: int
    size: int
    """Training examples, as counted for weights (capped)."""


@dataclass(frozen=True)
class ScoreRow(Dated):
    """The score of one client at one stage on one split; higher is better."""

    stage: str
    client: str
    group: str
    split: str
    metric: str
    n: int
    """Questions scored."""
    score: float | None = None
    """Mean over the client's questions; None exactly when ``status`` is not ``ok``."""
    option_mass: float | None = None
    """Mean probability of all answer options together, in [0, 1]; None for pairs."""
    uniform: float | None = None
    """Score of a uniform answerer on the same questions; None for pairs."""
    status: str = "ok"
    """``ok``, ``withheld`` or another word for why there is no score."""
    reason: str = ""
    """Short code of the failure; required when ``status`` is not ``ok``."""


@dataclass(frozen=True)
class ItemRow(Dated):
    """The score of one client on one question."""

    stage: str
    client: str
    group: str
    split: str
    question: str
    """Question key, the same over the whole federation."""
    score: float


@dataclass(frozen=True)
class WeightRow(Dated):
    """What the weight rule saw of a group in a round and the weight it gave."""

    group: str
    weight: float | None
    """In [0, 1], summing to 1 over present groups; None when the group was absent."""
    history: float | None = None
    """Running alignment after this round, in the unit of the score."""
    score: float | None = None
    """Validation score of the received adapter; None when absent."""
    present: bool = True
    coverage: float = 1.0
    """Share of the group's training examples whose clients replied, in [0, 1]."""


@dataclass(frozen=True)
class ReplyRow(Dated):
    """One client's reply to one message, usable or not."""

    client: str
    group: str
    node: str = ""
    status: str = "ok"
    reason: str = ""
    weight: float | None = None
    """Share of this client in the aggregate."""
    examples: int = 0
    norm: float | None = None
    """Frobenius norm of the update in product space."""
    array_hash: str = ""
    loss: float | None = None
    """Mean training loss of the round."""
    steps: int = 0


@dataclass(frozen=True)
class CurveRow(Dated):
    """A named training metric of one client in one round (margin, accuracy, ...)."""

    client: str
    name: str
    value: float


@dataclass(frozen=True)
class DiscardedRow(Dated):
    """Share of a group's update that the truncation to rank r removed, per layer, in [0, 1]."""

    layer: str
    group: str
    share: float


@dataclass(frozen=True)
class TimingRow(Dated):
    """Seconds spent on a named part of a round."""

    name: str
    seconds: float


@dataclass(frozen=True)
class ReferenceRow:
    """What an answerer that was not trained here scores.

    ``name`` is ``uniform``, ``mean_of_groups``, ``optimum_average`` or ``optimum_worst``.  One row
    for each group with ``quantity="score"``; average and worst follow from them.  The fairness
    index of the reference is one row with ``group=""`` and ``quantity="fairness_index"``.  A
    reference that is not defined is one row with ``group=""``, ``value=None`` and the reason as
    ``note``.

    Name ``closed_form`` holds what a reward run is measured by, with ``group=""``: quantities
    ``jsd_base``, ``jsd_model``, ``closed``, ``kl_model``, ``kl_optimum`` and ``mass``.
    """

    name: str
    group: str
    value: float | None
    split: str = "test"
    quantity: str = "score"
    note: str = ""


@dataclass(frozen=True)
class EventRow:
    """Something that happened: a failure, a retry, a resume, an early stop.  Always counts."""

    time: float
    """Seconds since 1970."""
    kind: str
    phase: str
    round: int
    attempt: int
    client: str
    detail: str


TABLES: dict[type, str] = {
    ClientRow: "clients",
    ScoreRow: "scores",
    ItemRow: "item_scores",
    WeightRow: "weights",
    ReplyRow: "replies",
    CurveRow: "curves",
    DiscardedRow: "discarded",
    TimingRow: "timings",
    ReferenceRow: "refs",
    EventRow: "events",
}
DATED = (ScoreRow, ItemRow, WeightRow, ReplyRow, CurveRow, DiscardedRow, TimingRow)

_DATED_COLUMNS = "phase TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL"
SCHEMA = f"""
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE commits (
  phase TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
  PRIMARY KEY (phase, round)) STRICT;
CREATE TABLE written ({_DATED_COLUMNS}, PRIMARY KEY (phase, round, attempt)) STRICT;
CREATE TABLE clients (
  client TEXT PRIMARY KEY, grp TEXT NOT NULL, form TEXT NOT NULL, train INTEGER NOT NULL,
  validation INTEGER NOT NULL, test INTEGER NOT NULL, size INTEGER NOT NULL) STRICT;
CREATE TABLE scores ({_DATED_COLUMNS},
  stage TEXT NOT NULL, client TEXT NOT NULL, grp TEXT NOT NULL, split TEXT NOT NULL,
  metric TEXT NOT NULL, n INTEGER NOT NULL, score REAL, option_mass REAL, uniform REAL,
  status TEXT NOT NULL, reason TEXT NOT NULL,
  UNIQUE (phase, round, attempt, stage, client, split),
  CHECK ((status = 'ok') = (score IS NOT NULL)), CHECK (status = 'ok' OR reason <> '')) STRICT;
CREATE TABLE item_scores ({_DATED_COLUMNS},
  stage TEXT NOT NULL, client TEXT NOT NULL, grp TEXT NOT NULL, split TEXT NOT NULL,
  question TEXT NOT NULL, score REAL NOT NULL,
  UNIQUE (phase, round, attempt, stage, client, split, question)) STRICT;
CREATE TABLE weights ({_DATED_COLUMNS},
  grp TEXT NOT NULL, weight REAL, history REAL, score REAL, present INTEGER NOT NULL,
  coverage REAL NOT NULL, UNIQUE (phase, round, attempt, grp)) STRICT;
CREATE TABLE replies ({_DATED_COLUMNS},
  client TEXT NOT NULL, grp TEXT NOT NULL, node TEXT NOT NULL, status TEXT NOT NULL,
  reason TEXT NOT NULL, weight REAL, examples INTEGER NOT NULL, norm REAL,
  array_hash TEXT NOT NULL, loss REAL, steps INTEGER NOT NULL,
  UNIQUE (phase, round, attempt, client),
  CHECK (status = 'ok' OR reason <> '')) STRICT;
CREATE TABLE curves ({_DATED_COLUMNS},
  client TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
  UNIQUE (phase, round, attempt, client, name)) STRICT;
CREATE TABLE discarded ({_DATED_COLUMNS},
  layer TEXT NOT NULL, grp TEXT NOT NULL, share REAL NOT NULL,
  UNIQUE (phase, round, attempt, layer, grp)) STRICT;
CREATE TABLE timings ({_DATED_COLUMNS},
  name TEXT NOT NULL, seconds REAL NOT NULL, UNIQUE (phase, round, attempt, name)) STRICT;
CREATE TABLE refs (
  name TEXT NOT NULL, grp TEXT NOT NULL, value REAL, split TEXT NOT NULL, quantity TEXT NOT NULL,
  note TEXT NOT NULL, UNIQUE (name, grp, split, quantity),
  CHECK (value IS NOT NULL OR note <> '')) STRICT;
CREATE TABLE events (
  time REAL NOT NULL, kind TEXT NOT NULL, phase TEXT NOT NULL, round INTEGER NOT NULL,
  attempt INTEGER NOT NULL, client TEXT NOT NULL, detail TEXT NOT NULL) STRICT;
PRAGMA user_version = {FORMAT};
"""
