"""What untrained answerers score on the test questions, for the report's reference lines.

Only a simulation can compute these, because here one process holds all groups' answers: in a
deployment the server never sees them, and the report says "not defined".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedalign.config import Config, from_flat, resolve_metric
from fedalign.data.records import ClientData, Pair, SurveyItem
from fedalign.errors import FedalignError
from fedalign.ledger import Ledger, ReferenceRow
from fedalign.metrics import attainable, fairness, pairwise
from fedalign.metrics.alignment import UndefinedScore
from fedalign.runfolder import LEDGER


def references(config: Config, clients: Sequence[ClientData]) -> list[ReferenceRow]:
    """Return the reference rows for a population's test questions."""
    metric = resolve_metric(config, clients[0].form)
    groups = sorted({c.group for c in clients})
    if clients[0].form == "pairs":
        return _pair_references(clients, groups)
    items = [i for c in clients for i in c.test if isinstance(i, SurveyItem)]
    shares, ordinals = attainable.collect(items)
    rows = []
    for name, solve in attainable.ANSWERERS.items():
        try:
            answer = solve(metric, shares, ordinals)
        except UndefinedScore as error:
            rows.append(ReferenceRow(name, "", None, note=str(error)))
            continue
        found_only = name.startswith("optimum") and not answer.is_bound
        note = "a policy that was found, not a proven optimum" if found_only else ""
        rows += _rows(name, answer.group_scores, answer.scores, groups, note)
    return rows


def add_references(folder: Path) -> None:
    """Compute the references of a finished run from its own settings and write them."""
    from clients.resident import usable_clients

    if not (folder / LEDGER).exists():
        raise FedalignError(f"{folder} holds no run.")
    with Ledger(folder / LEDGER) as ledger:
        config = from_flat(ledger.run()["config"])
        clients = tuple(usable_clients(config)[0].values())
        # What training came to (``oracle``) is not computed here, and is kept.
        others = [r for r in ledger.references() if r.name not in attainable.ANSWERERS]
        ledger.put_references([*references(config, clients), *others])


def _pair_references(clients: Sequence[ClientData], groups: Sequence[str]) -> list[ReferenceRow]:
    pairs = [p for c in clients for p in c.test if isinstance(p, Pair)]
    rows = _rows("uniform", dict.fromkeys(groups, 0.5), {}, groups, "")
    given = pairwise.votes(pairs)
    if not pairwise.shares_comparisons(given):
        note = "no two groups share a comparison, so no shared answer is defined"
        names = ("mean_of_groups", "optimum_average", "optimum_worst")
        return rows + [ReferenceRow(name, "", None, note=note) for name in names]
    for name, solve in (
        ("mean_of_groups", pairwise.mean_of_groups),
        ("optimum_average", pairwise.optimum_average),
        ("optimum_worst", pairwise.optimum_worst),
    ):
        scores = solve(given)
        rows += _rows(name, fairness.group_means(scores), scores, groups, "")
    return rows


def _rows(
    name: str,
    by_group: dict[str, float],
    by_question: dict[str, dict[str, float]],
    groups: Sequence[str],
    note: str,
) -> list[ReferenceRow]:
    rows = [ReferenceRow(name, g, by_group[g], note=note) for g in groups if g in by_group]
    index = fairness.fairness_index(by_question, groups) if by_question else None
    if index is not None and index.value is not None:
        rows.append(ReferenceRow(name, "", index.value, quantity="fairness_index"))
    return rows
