"""What is in a dataset, and how much the groups disagree: the room a weight rule has to work in.

Within a group: rows, questions (comparisons, where pairs are split by response), mean lengths of
chosen and rejected texts (a length bias shows here), and the disagreement rate = share of
comparisons the group has in both directions.

Between two groups, over what both have: the share on which they *reverse* order.  Pairs: the mean
vote share of a comparison lies on opposite sides of 1/2.  Survey: the modal options differ.  Ties
count as not reversed.  Below 2 % (a threshold of ours) no difference between weight rules is to be
expected.

For a survey, "chosen" is the modal option and "rejected" the mean over the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from fedalign.data.records import Dataset, Item, Pair, SurveyItem, plain
from fedalign.data.split import split_keys

LITTLE_CONFLICT = 0.02


@dataclass(frozen=True)
class GroupSummary:
    """One group; lengths in characters, disagreement in [0, 1] (None for a survey)."""

    group: str
    rows: int
    questions: int
    chosen_length: float
    rejected_length: float
    disagreement: float | None


@dataclass(frozen=True)
class Overlap:
    """Two groups: questions (survey) or comparisons (pairs) both have, and how many reverse."""

    a: str
    b: str
    shared: int
    reversed: int


@dataclass(frozen=True)
class Description:
    """A dataset in numbers."""

    name: str
    form: str
    bad_rows: int
    groups: tuple[GroupSummary, ...]
    overlaps: tuple[Overlap, ...]
    """Every pair of groups that shares something."""

    @property
    def shared(self) -> int:
        """Shared comparisons over all pairs of groups."""
        return sum(o.shared for o in self.overlaps)

    @property
    def conflict(self) -> float | None:
        """Share of shared comparisons on which two groups reverse order; None without any."""
        return sum(o.reversed for o in self.overlaps) / self.shared if self.shared else None


def describe(dataset: Dataset) -> Description:
    """Return the numbers of a dataset; pure, no files."""
    by_group: dict[str, list[Item]] = defaultdict(list)
    for item in dataset.items:
        for group in item.shares if isinstance(item, SurveyItem) else (item.group,):
            by_group[group].append(item)
    orders = {g: _orders(g, items) for g, items in by_group.items()}
    overlaps: list[Overlap] = []
    for a, b in combinations(sorted(orders), 2):
        both = orders[a].keys() & orders[b].keys()
        if both:
            turned = sum(_reverse(orders[a][key], orders[b][key]) for key in both)
            overlaps.append(Overlap(a, b, len(both), turned))
    return Description(
        name=dataset.name,
        form=dataset.form,
        bad_rows=len(dataset.bad_rows),
        groups=tuple(_summary(g, items) for g, items in sorted(by_group.items())),
        overlaps=tuple(overlaps),
    )


def table(description: Description, most: int = 10) -> str:
    """Return a plain-text table; at most ``most`` pairs of groups, most conflict first."""
    d = description
    width = max([5, *(len(g.group) for g in d.groups)])
    lines = [
        f"{d.name}: {d.form}, {len(d.groups)} groups, {d.bad_rows} entries left out",
        f"{'group':<{width}}   rows  questions  chosen  rejected  disagreement",
    ]
    for g in d.groups:
        rate = "-" if g.disagreement is None else f"{g.disagreement:.3f}"
        lines.append(
            f"{g.group:<{width}} {g.rows:>6} {g.questions:>10} {g.chosen_length:>7.1f} "
            f"{g.rejected_length:>9.1f} {rate:>13}"
        )
    if d.conflict is None:
        lines.append("No two groups share a comparison: how much they conflict is not defined.")
        return "\n".join(lines)
    ranked = sorted(d.overlaps, key=lambda o: (-o.reversed / o.shared, -o.shared, o.a, o.b))
    for o in ranked[:most]:
        lines.append(f"{o.a} / {o.b}: {o.shared} shared, {o.reversed / o.shared:.1%} reversed")
    if len(ranked) > most:
        lines.append(f"... and {len(ranked) - most} more pairs of groups")
    lines.append(f"All pairs of groups: {d.shared} shared, {d.conflict:.1%} reversed")
    if d.conflict < LITTLE_CONFLICT:
        lines.append(
            f"Below {LITTLE_CONFLICT:.0%}: expect no difference between weight rules on these data."
        )
    return "\n".join(lines)


def _orders(group: str, items: Iterable[Item]) -> dict[str, frozenset[int] | float]:
    """Return what a group prefers: modal options of a question, or a comparison's direction.

    The direction is the mean vote share of the response that comes first when both are sorted.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    out: dict[str, frozenset[int] | float] = {}
    for item in items:
        if isinstance(item, SurveyItem):
            out[item.key] = _modes(item.shares[group])
        else:
            votes[item.comparison].append(_first_share(item))
    return {**out, **{key: fmean(v) for key, v in votes.items()}}


def _first_share(pair: Pair) -> float:
    return pair.vote_share if plain(pair.chosen) < plain(pair.rejected) else 1 - pair.vote_share


def _modes(shares: tuple[float, ...]) -> frozenset[int]:
    return frozenset(i for i, s in enumerate(shares) if s == max(shares))


def _reverse(a: frozenset[int] | float, b: frozenset[int] | float) -> bool:
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return not a & b
    if isinstance(a, float) and isinstance(b, float):
        return (a - 0.5) * (b - 0.5) < 0
    return False


def _summary(group: str, items: list[Item]) -> GroupSummary:
    chosen: list[float] = []
    rejected: list[float] = []
    directions: dict[str, set[bool]] = defaultdict(set)
    for item in items:
        if isinstance(item, SurveyItem):
            top = item.shares[group].index(max(item.shares[group]))
            chosen.append(len(item.options[top]))
            rejected.append(fmean(len(o) for i, o in enumerate(item.options) if i != top))
        else:
            chosen.append(len(plain(item.chosen)))
            rejected.append(len(plain(item.rejected)))
            directions[item.comparison].add(_first_share(item) > 0.5)
    both = sum(len(d) == 2 for d in directions.values())
    return GroupSummary(
        group=group,
        rows=len(items),
        questions=len({split_keys(item) for item in items}),
        chosen_length=fmean(chosen),
        rejected_length=fmean(rejected),
        disagreement=both / len(directions) if directions else None,
    )
