"""Homes of enrolled sites, and the file that a simulation of the same sites reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

SITES = {"north-clinic": "coast", "south-clinic": "inland"}
"""Site and group."""


def survey_rows(questions: int = 40) -> list[dict[str, object]]:
    """Return long survey rows of two sites over the same questions, each with a column ``site``."""
    from fedalign.data.records import SurveyItem
    from fedalign.data.synthetic import generate

    made = generate("balanced", 0)
    sources = made.groups[:2]
    rows: list[dict[str, object]] = []
    for item in made.items[:questions]:
        assert isinstance(item, SurveyItem)
        for source, (site, group) in zip(sources, SITES.items(), strict=True):
            rows.append(
                {
                    "question": item.question,
                    "options": list(item.options),
                    "group": group,
                    "shares": list(item.shares[source]),
                    "ordinals": list(item.ordinals or ()),
                    "topic": item.topic,
                    "site": site,
                }
            )
    return rows


def pair_rows() -> list[dict[str, object]]:
    """Return pairs of two sites; prompts repeat, so that rows and prompts are counted apart."""
    rows: list[dict[str, object]] = []
    for site, group in SITES.items():
        for n in range(60):
            rows.append(
                {
                    "id": f"{site}-{n}",
                    "prompt": f"What about matter {n // 2}?",
                    "chosen": f"We of {group} say yes to {n}.",
                    "rejected": f"No, never {n}.",
                    "group": group,
                    "vote_share": 0.5 + n / 200,
                    "site": site,
                }
            )
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write JSON lines that only the owner can read."""
    path.touch(mode=0o600)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sites() -> SimpleNamespace:
    """Return the makers of this file."""
    return SimpleNamespace(groups=SITES, survey_rows=survey_rows, pair_rows=pair_rows, write=write)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a name short enough for a socket, which other users can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="fa"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


MakeHome = Callable[..., Path]


@pytest.fixture
def make_home(short_tmp: Path) -> MakeHome:
    """Return a maker of site folders: ``make_home(rows, source, policy, site)``."""

    def make(
        rows: list[dict[str, object]] | None = None,
        source: str = "survey",
        policy: str = "",
        site: str = "north-clinic",
    ) -> Path:
        home = short_tmp / site
        for folder, mode in ((home, 0o711), (home / "node", 0o700), (home / "trainer", 0o700)):
            folder.mkdir()
            folder.chmod(mode)
        if rows is None:
            rows = [r for r in survey_rows() if r["site"] == site]
        data = write(home / "trainer" / "data.jsonl", rows)
        (home / "trainer" / "trainer.toml").write_text(
            f'[site]\nname = "{site}"\ngroup = "{SITES[site]}"\n'
            f'[data]\nsource = "{source}"\npath = "{data}"\n[model]\ndevice = "cpu"\n'
        )
        (home / "trainer" / "policy.toml").write_text(policy)
        return home

    return make
