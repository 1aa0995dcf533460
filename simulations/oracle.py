"""How close a trained policy came to the closed-form optimum of its own rewards.

After a simulated run in mode ``rewards`` with task ``letter`` or ``order``, every answer to a test
question can be listed, and every group's reward for it is known here (a server never knows it).
So the policy that maximises the run's combined reward under its KL penalty can be written down
(``fedalign.rewards.optimum``) and compared with the base and with the trained policy, exactly and
without sampling.  Test questions were never asked in training: this measures what carries over.

The rewards are combined by the run's rule as it stood in the last exchange: its weights, its branch
and its KL coefficient.  They are the groups' exact rewards: what a site's rounding, query budget or
predictor changed is not undone, so such a run is measured against what its groups really want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedalign.aggregation.group_rewards import SWITCHED, combine, mixture_scale
from fedalign.config import Config, from_flat, resolve_reward
from fedalign.data.records import ClientData, SurveyItem
from fedalign.errors import ConfigError, FedalignError
from fedalign.ledger import CurveRow, Ledger, ReferenceRow
from fedalign.metrics.alignment import is_defined
from fedalign.metrics.attainable import collect
from fedalign.models.base import ResidentModel
from fedalign.rewards.optimum import closed_share, divergence, kl_divergence, optimum, with_rest
from fedalign.rewards.text import Answer, reward_of_answer
from fedalign.runfolder import CHECKPOINT, LEDGER
from fedalign.training.tasks import MOST_ORDERED, answer_logps

NAME = "closed_form"
LISTED = ("letter", "order")


@dataclass(frozen=True)
class Asked:
    """A test question with the answers of every group that has one."""

    key: str
    question: str
    options: tuple[str, ...]
    shares: Mapping[str, Sequence[float]]
    """Group to (K,)."""
    ordinals: Sequence[float] | None = None


@dataclass(frozen=True)
class LastExchange:
    """The rule as it stood in the last committed exchange."""

    round: int
    weights: Mapping[str, float]
    """Group to weight; groups left out do not count."""
    adaptive: bool
    kl: float
    """KL coefficient, with the rule's factor."""


@dataclass(frozen=True)
class ClosedForm:
    """One number for each of Q questions, in the order of ``questions``."""

    questions: tuple[str, ...]
    jsd_base: NDArray[np.float64]
    """(Q,) JSD of base and optimum, bits."""
    jsd_model: NDArray[np.float64]
    """(Q,) JSD of trained policy and optimum, bits."""
    kl_model: NDArray[np.float64]
    """(Q,) KL(trained || base), nats a text."""
    kl_optimum: NDArray[np.float64]
    """(Q,) KL(optimum || base), nats a text."""
    mass: NDArray[np.float64]
    """(Q,) probability of well-formed answers under the trained policy."""
    left_out: int
    """Questions with too many options to list their answers, or whose reward is undefined."""

    @property
    def closed(self) -> float | None:
        """Share of the way to the optimum (``optimum.closed``), from the means over questions."""
        return closed_share(float(self.jsd_base.mean()), float(self.jsd_model.mean()))


def add_closed_form(folder: Path) -> None:
    """Write the rows ``closed_form`` of a finished run in mode ``rewards``; others stay.

    Where it is not defined (task ``shares``, or no question can be listed) the row says why.
    Raises ``FedalignError`` for a folder without a finished run of that mode.
    """
    from clients.resident import usable_clients
    from fedalign.models.resident import resident_model
    from server.checkpoint import load

    if not ((folder / LEDGER).exists() and (folder / CHECKPOINT).exists()):
        raise FedalignError(f"{folder} holds no finished run.")
    with Ledger(folder / LEDGER) as ledger:
        config = from_flat(ledger.run()["config"])
        if config.run.mode != "rewards":
            raise ConfigError(f"{folder}: run.mode is '{config.run.mode}'; this needs 'rewards'.")
        rows: list[ReferenceRow]
        if config.rewards.task not in LISTED:
            rows = [_undefined(f"the answers of task '{config.rewards.task}' cannot be listed")]
        elif absent := _absent_groups(ledger):
            rows = [
                _undefined(
                    f"the optimum belongs to the groups that were asked, and {absent} took no part "
                    "in some exchange"
                )
            ]
        else:
            asked = test_questions(tuple(usable_clients(config)[0].values()))
            resident = resident_model(config.model, config.aggregation.method == "frozen-a")
            adapter = load(folder / CHECKPOINT).adapter
            found = closed_form(config, resident, adapter, asked, last_exchange(ledger, config))
            rows = reference_rows(found)
        kept = [r for r in ledger.references() if r.name != NAME]
        ledger.put_references([*kept, *rows])


def _absent_groups(ledger: Ledger) -> str:
    """Return the groups that were absent from an exchange, as a list in words."""
    return ", ".join(sorted({f"'{w.group}'" for w in ledger.weights() if not w.present}))


def closed_form(
    config: Config,
    resident: ResidentModel,
    adapter: NDArray[np.float32],
    asked: Sequence[Asked],
    last: LastExchange,
) -> ClosedForm:
    """Compare base, optimum and trained policy on every question whose answers can be listed.

    Args:
        config: the run's settings; ``rewards`` and ``local`` decide task, reward and rule.
        adapter: (P,) float32 of the trained policy; left loaded.
        asked: the questions, each with at least one group.
    """
    kind, task = resolve_reward(config), config.rewards.task
    usable = [
        q
        for q in asked
        if is_defined(kind, q.ordinals) and (task == "letter" or len(q.options) <= MOST_ORDERED)
    ]
    resident.load(adapter)
    rows: list[tuple[float, ...]] = []
    for q in usable:
        answers, trained = answer_logps(resident, task, q.question, q.options)
        with resident.reference("base"):
            _, reference = answer_logps(resident, task, q.question, q.options)
        combined = combined_rewards(config, kind, answers, q, last)
        best = optimum(
            reference,
            combined[:-1],
            last.kl,
            malformed=float(combined[-1]),
            corrected=config.rewards.reference_correction,
        )
        base, model = with_rest(reference), with_rest(trained)
        rows.append(
            (
                divergence(base, best),
                divergence(model, best),
                kl_divergence(model, base),
                kl_divergence(best, base),
                1.0 - float(model[-1]),
            )
        )
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 5).T
    jsd_base, jsd_model, kl_model, kl_optimum, mass = columns
    return ClosedForm(
        questions=tuple(q.key for q in usable),
        jsd_base=jsd_base,
        jsd_model=jsd_model,
        kl_model=kl_model,
        kl_optimum=kl_optimum,
        mass=mass,
        left_out=len(asked) - len(usable),
    )


def combined_rewards(
    config: Config, kind: str, answers: Sequence[Answer], asked: Asked, last: LastExchange
) -> NDArray[np.float64]:
    """Return the combined reward (M + 1,) of each answer, and of a malformed text (last).

    Only groups that answered the question take part; the last exchange's weights are restricted to
    them and renormalised.
    """
    settings = config.rewards
    groups = sorted(asked.shares)
    rewards = np.array(
        [
            [
                *(
                    reward_of_answer(settings, kind, a, asked.shares[g], asked.ordinals)
                    for a in answers
                ),
                settings.malformed,
            ]
            for g in groups
        ]
    )  # (G, M + 1)
    weights = np.array([last.weights.get(g, 0.0) for g in groups])
    total = float(weights.sum())
    return combine(
        settings.rule,
        rewards,
        weights / total if total > 0 else np.full(len(groups), 1.0 / len(groups)),
        adaptive=last.adaptive,
        sharpness=settings.sharpness,
        log_scale=mixture_scale(kind, settings.floor),
    ).values


def last_exchange(ledger: Ledger, config: Config) -> LastExchange:
    """Read weights, branch and KL coefficient of the last committed exchange.

    Raises ``FedalignError`` where the ledger lacks what the rule needs.
    """
    curves = [c for c in ledger.curves() if c.phase == "train"]
    if not curves:
        raise FedalignError(f"{ledger.path}: no exchange was committed, so there is no optimum.")
    number = max(c.round for c in curves)
    rows = [c for c in curves if c.round == number]
    weights = {
        c.client.removeprefix("group:"): c.value
        for c in rows
        if c.client.startswith("group:") and c.name == "weight"
    }
    switched = config.rewards.rule in SWITCHED
    return LastExchange(
        round=number,
        weights=weights,
        adaptive=switched and _server_value(rows, "adaptive-branch", ledger) > 0,
        kl=_server_value(rows, "kl-coefficient", ledger),
    )


def test_questions(clients: Sequence[ClientData]) -> list[Asked]:
    """Return the population's test questions with all groups' answers, sorted by key."""
    items = [i for c in clients for i in c.test if isinstance(i, SurveyItem)]
    shares, ordinals = collect(items)
    texts = {i.key: (i.question, i.options) for i in items}
    return [Asked(k, *texts[k], shares[k], ordinals[k]) for k in sorted(shares) if shares[k]]


def reference_rows(found: ClosedForm) -> list[ReferenceRow]:
    """Return the ledger's rows: means over questions, and the share of the way from the means."""
    if not found.questions:
        why = f"no test question can be listed: {found.left_out} have more than {MOST_ORDERED} "
        return [_undefined(why + "options, or an undefined reward")]
    note = f"{found.left_out} questions left out" if found.left_out else ""
    values = {
        "jsd_base": float(found.jsd_base.mean()),
        "jsd_model": float(found.jsd_model.mean()),
        "kl_model": float(found.kl_model.mean()),
        "kl_optimum": float(found.kl_optimum.mean()),
        "mass": float(found.mass.mean()),
    }
    rows = [ReferenceRow(NAME, "", v, quantity=k, note=note) for k, v in values.items()]
    share = found.closed
    if share is None:
        note = "base and optimum are equal: the rewards do not tell the answers apart"
    return [*rows, ReferenceRow(NAME, "", share, quantity="closed", note=note)]


def _undefined(why: str) -> ReferenceRow:
    return ReferenceRow(NAME, "", None, quantity="closed", note=why)


def _server_value(rows: Sequence[CurveRow], name: str, ledger: Ledger) -> float:
    for row in rows:
        if row.client == "" and row.name == name:
            return row.value
    raise FedalignError(f"{ledger.path}: the last exchange recorded no '{name}'.")
