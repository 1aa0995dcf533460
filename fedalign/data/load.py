"""From ``[data]`` settings to a validated dataset: read, keep the groups and questions asked for.

Order: read the source; keep ``groups``; keep the ``max_groups`` with most questions (ties by name);
keep ``questions`` drawn by seed (those with the lowest hash, so the draw does not depend on order).
Rows that could not be used, and things left out by rule, are in ``Dataset.bad_rows``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fedalign.config import DataConfig
from fedalign.data import globalopinionqa, polis, polis_export
from fedalign.data.columns import nearest
from fedalign.data.duplicates import merge_duplicates
from fedalign.data.hub import read_hub
from fedalign.data.pairs import read_pairs
from fedalign.data.records import Dataset, Item, Pair, SurveyItem
from fedalign.data.rejects import Rejects
from fedalign.data.split import split_keys
from fedalign.data.survey import read_survey
from fedalign.errors import ConfigError, DataError
from fedalign.randomness import unit_interval

Read = tuple[str, list[Item], str]
"""Form, items, licence."""


def load_dataset(data: DataConfig, seed: int) -> Dataset:
    """Return the dataset that ``data`` describes.

    Raises ``ConfigError`` when the source has not the form asked for, ``DataError`` for the first
    bad row (unless ``skip_bad``), an unknown group, and a dataset that ends up empty.
    """
    forms = FORMS[data.source]
    if data.form != "auto" and data.form not in forms:
        raise ConfigError(
            f"data.form = '{data.form}', but source '{data.source}' gives {' or '.join(forms)}."
        )
    rejects = Rejects(skip=data.skip_bad)
    form, items, licence = READERS[data.source](data, seed, rejects)
    if not items:
        reasons = "".join(f"\n  {r.source}: {r.reason}" for r in rejects.rows[:3])
        raise DataError(
            f"{data.path or data.source}: no usable row; {len(rejects.rows)} left out.{reasons}"
        )
    items = keep_groups(merge_duplicates(items, rejects), data.groups)
    items = _largest_groups(items, data.max_groups)
    items = _draw_questions(items, data.questions, seed)
    name = data.world if data.source == "synthetic" else Path(data.path).name
    return Dataset(
        form=form,
        items=tuple(items),
        bad_rows=tuple(rejects.rows),
        name=f"{data.source}:{name}",
        licence=licence,
    )


def names(text: str) -> list[str]:
    """Split a list setting at ``;`` where it holds one, else at commas; drops empty parts."""
    parts = text.split(";" if ";" in text else ",")
    return [p.strip() for p in parts if p.strip()]


def keep_groups(items: list[Item], wanted: str) -> list[Item]:
    """Return the items of the named groups; survey items keep those groups' shares only.

    A name that is no group but the part of groups before "/" (a conversation) stands for them all.
    """
    if not wanted.strip():
        return items
    have = sorted({g for item in items for g in _groups(item)})
    keep: set[str] = set()
    for name in names(wanted):
        prefix = name.rstrip("/") + "/"
        below = [g for g in have if g.startswith(prefix)]
        if name in have:
            keep.add(name)
        elif below:
            keep.update(below)
        else:
            shown = ", ".join(have[:10]) + (", ..." if len(have) > 10 else "")
            raise DataError(
                f"data.groups: no group '{name}'.{nearest(name, have)} There are {len(have)}: "
                f"{shown}"
            )
    return _only(items, keep)


def _largest_groups(items: list[Item], most: int) -> list[Item]:
    if not most:
        return items
    questions: dict[str, set[tuple[str, ...]]] = {}
    for item in items:
        for group in _groups(item):
            questions.setdefault(group, set()).add(split_keys(item))
    ranked = sorted(questions, key=lambda g: (-len(questions[g]), g))
    return _only(items, set(ranked[:most]))


def _draw_questions(items: list[Item], most: int, seed: int) -> list[Item]:
    """Keep ``most`` question keys; a pair with two keys stays only when both are kept."""
    keys = sorted({key for item in items for key in _question_keys(item)})
    if not most or most >= len(keys):
        return items
    drawn = set(sorted(keys, key=lambda k: unit_interval(seed, "questions", k))[:most])
    kept = [item for item in items if drawn.issuperset(_question_keys(item))]
    lost = {g for i in items for g in _groups(i)} - {g for i in kept for g in _groups(i)}
    if lost:
        raise DataError(
            f"data.questions = {most} leaves no question for {len(lost)} groups, such as "
            f"'{min(lost)}'. Take more questions, or fewer groups with data.groups."
        )
    return kept


def _question_keys(item: Item) -> tuple[str, ...]:
    return (item.key,) if isinstance(item, SurveyItem) else split_keys(item)


def _groups(item: Item) -> Iterable[str]:
    return (item.group,) if isinstance(item, Pair) else item.shares


def _only(items: list[Item], keep: set[str]) -> list[Item]:
    out: list[Item] = []
    for item in items:
        if isinstance(item, SurveyItem):
            shares = {g: s for g, s in item.shares.items() if g in keep}
            if shares:
                out.append(
                    item if len(shares) == len(item.shares) else replace(item, shares=shares)
                )
        elif item.group in keep:
            out.append(item)
    return out


def _synthetic(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    from fedalign.data.synthetic import generate

    made = generate(data.world, seed)
    return made.form, list(made.items), made.licence


def _survey(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    return "survey", [*read_survey(Path(data.path), rejects, data.keep_nonresponse)], ""


def _pairs(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    return "pairs", [*read_pairs(Path(data.path), rejects)], ""


def _published(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    items = globalopinionqa.read_published(Path(data.path), rejects, data.keep_nonresponse)
    return "survey", [*items], globalopinionqa.LICENCE


def _rebuilt(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    items = globalopinionqa.read_rebuilt(Path(data.path), rejects, data.keep_nonresponse)
    return "survey", [*items], globalopinionqa.LICENCE


def _polis(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    path = Path(data.path)
    exported = polis_export.export_folders(path)
    if exported:
        statements = [s for f in exported for s in polis_export.read_export(f, rejects)]
    else:
        statements = polis.read_statements(path, rejects)
    if data.form == "survey":
        items = polis.survey_items(statements, data.min_votes, rejects)
        return "survey", [*items], polis.LICENCE
    pairs = polis.preference_pairs(
        statements, data.min_votes, seed, data.validation, data.test, rejects
    )
    return "pairs", [*pairs], polis.LICENCE


def _hub(data: DataConfig, seed: int, rejects: Rejects) -> Read:
    form, items = read_hub(data.path, data.hf_split, data.form, rejects, data.keep_nonresponse)
    return form, items, ""


READERS: dict[str, Callable[[DataConfig, int, Rejects], Read]] = {
    "synthetic": _synthetic,
    "survey": _survey,
    "pairs": _pairs,
    "globalopinionqa": _published,
    "goqa": _rebuilt,
    "polis": _polis,
    "hf": _hub,
}
FORMS: dict[str, tuple[str, ...]] = {
    "synthetic": ("survey",),
    "survey": ("survey",),
    "pairs": ("pairs",),
    "globalopinionqa": ("survey",),
    "goqa": ("survey",),
    "polis": ("pairs", "survey"),
    "hf": ("survey", "pairs"),
}
