"""The page: whole, self-contained, safe, and honest about what is not there."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedalign.errors import FedalignError
from fedalign.ledger import Ledger
from fedalign.report.facts import gather
from fedalign.report.html import build_report, render
from fedalign.report.summary import summarise_facts
from fedalign.report.verdict import judge
from fedalign.runfolder import LEDGER

ROOT = Path(__file__).resolve().parents[3]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Tree(HTMLParser):
    """Fails on a tag that is closed out of order; keeps tags, attributes and visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def page(folder) -> tuple[str, Tree]:
    text = build_report(folder).read_text(encoding="utf-8")
    tree = Tree()
    tree.feed(text)
    tree.close()
    assert tree.open == []
    return text, tree


def words(tree: Tree) -> str:
    return " ".join(" ".join(tree.text).split())


def verdict(folder):
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        facts = gather(ledger)
    return judge(facts, summarise_facts(facts))


def test_whole_page_and_summary(run_folder):
    folder = run_folder()
    text, tree = page(folder)
    assert (folder / "summary.json").exists()
    said = words(tree)
    for heading in (
        "Each group, before and after",
        "Scores by group",
        "Weights over rounds",
        "Validation score over rounds",
        "Training loss over rounds",
        "Average, worst group and spread",
        "Failures and events",
        "How to read this",
    ):
        assert heading in said
    for what in ("River & Lakes", "js_divergence", "temperature 0.05", "seed 0", "non_finite_loss"):
        assert what in said
    assert text.count("<svg viewBox") >= 8
    assert tree.tags.count("h1") == 1


def test_no_network_no_script_and_nothing_undefined(run_folder):
    text, tree = page(run_folder())
    assert not {"script", "link", "iframe", "img", "object"} & set(tree.tags)
    for name, value in tree.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {
        f"#{i}" for i in re.findall(r'id="([^"]+)"', text)
    }
    assert not re.search(r"\bnan\b|\binf\b|None|Undefined", words(tree))
    # Every colour of a drawing is a variable that the page defines, in both schemes.
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = text.split("prefers-color-scheme: dark")
    for name in used - {"to", "fill"}:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


def test_ids_are_unique(run_folder):
    text, _ = page(run_folder())
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_names_from_data_cannot_inject(run_folder):
    names = ('<script>alert(1)</script>"', "$x_1$ & ]]>", "日本語の組", "a" * 200)
    text, tree = page(run_folder(names=names))
    assert "<script" not in text
    assert "script" not in tree.tags
    assert "$x_1$ & ]]>" in words(tree)
    assert "日本語の組" in words(tree)


@pytest.mark.parametrize("groups", [2, 3, 9, 60])
def test_any_number_of_groups(run_folder, groups):
    text, tree = page(run_folder(groups=groups, rounds=3, questions=12))
    with_rows = sum(1 for g in range(5, groups + 1) if f"Region {g:02d}" in words(tree))
    assert with_rows == max(0, groups - 4)
    assert len(text) < 3_000_000


def test_five_hundred_clients_quickly_and_small(run_folder):
    folder = run_folder(groups=50, clients_per_group=10, rounds=20, questions=40)
    start = time.perf_counter()
    path = build_report(folder)
    assert time.perf_counter() - start < 30
    assert path.stat().st_size < 3_000_000


def test_a_long_list_of_missing_numbers_is_cut_on_the_page_only(run_folder):
    folder = run_folder()
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        facts = gather(ledger)
    missing = [{"name": "shared/group", "reason": f"client-{i:03d}: no-reply"} for i in range(500)]
    page = render(facts, {**summarise_facts(facts), "missing": missing})
    assert "500 numbers are missing (the first 60 are shown" in page
    assert "client-059" in page
    assert "client-060" not in page


def test_missing_optimum_is_not_defined_with_its_reason(run_folder):
    _, tree = page(run_folder(optimum=False))
    said = words(tree)
    assert "not defined (the groups share no comparison)" in said
    assert "Attained not defined" in said


def test_without_items_there_are_no_intervals_but_a_page(run_folder):
    _, tree = page(run_folder(items=False))
    assert "95% interval +" not in words(tree)


def test_failed_and_running_runs_have_a_page(run_folder):
    _, tree = page(run_folder(status="failed"))
    assert "Failed: round 5 missed its quorum twice." in words(tree)
    _, tree = page(run_folder(status="running"))
    assert "Not finished: 4 of 8 rounds done." in words(tree)


def test_low_option_mass_is_a_banner_without_gains(run_folder):
    folder = run_folder(option_mass=0.62)
    said = verdict(folder)
    assert said.level == "failed"
    assert "option mass 0.6" in said.title
    assert not any("went from" in s for s in said.sentences)
    _, tree = page(folder)
    assert ("class", "verdict failed") in tree.attributes


def test_verdict_of_a_good_run_and_of_a_run_with_a_gap(run_folder):
    good = verdict(run_folder())
    assert good.level == "ok"
    assert good.title == "Both the worst-served group and the average gained."
    warned = verdict(run_folder(failed_client=True))
    assert warned.level == "warning"
    assert any("Coast/0 (group Coast): non_finite_score" in s for s in warned.sentences)


def test_no_path_of_this_machine(run_folder):
    config = {
        "model.name": "/home/someone/models/tiny",
        "data.path": "/home/someone/data/poll.csv",
        "run.out": "/home/someone/runs/1",
        "local.reference": "/home/someone/adapters/old",
    }
    text, tree = page(run_folder(config=config))
    assert "someone" not in text
    assert "tiny" in words(tree)


def test_an_empty_ledger_has_a_page(tmp_path):
    Ledger(tmp_path / LEDGER).close()
    _, tree = page(tmp_path)
    assert "Not finished" in words(tree)


def test_same_ledger_same_page(run_folder):
    assert page(run_folder())[0] == page(run_folder())[0]


def test_a_folder_without_ledger_is_refused(tmp_path):
    with pytest.raises(FedalignError, match="no such ledger"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_report_needs_the_ledger_only_and_loads_nothing_heavy(run_folder):
    folder = run_folder()
    assert [p.name for p in folder.iterdir()] == [LEDGER]
    code = (
        "import sys; from pathlib import Path\n"
        "import fedalign.ledger, fedalign.export, fedalign.report.card\n"
        "import fedalign.report.html as h\n"
        "light = {'matplotlib', 'jinja2', 'scipy'} & set(sys.modules)\n"
        "assert not light, light\n"
        "h.build_report(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'ray', 'flwr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True)
    assert (folder / "report.html").exists()
