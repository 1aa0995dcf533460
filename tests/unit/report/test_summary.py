"""The summary: names, hand-worked numbers, and what is missing is missing."""

from __future__ import annotations

import json
import math

import pytest

from fedalign.config import Config, to_flat
from fedalign.errors import FedalignError
from fedalign.ledger import ClientRow, ItemRow, Ledger, ReferenceRow, ScoreRow, WeightRow
from fedalign.report.facts import STAGES
from fedalign.report.summary import summarise, write_summary
from fedalign.runfolder import LEDGER


def read(folder):
    with Ledger(folder / LEDGER, readonly=True) as ledger:
        return summarise(ledger)


@pytest.fixture
def by_hand(tmp_path):
    """Two groups, three clients: numbers small enough to check on paper."""
    ledger = Ledger(tmp_path / LEDGER)
    ledger.put_run(config=to_flat(Config()), metric="js_divergence", status="completed")
    ledger.put_clients(
        [
            ClientRow("a0", "a", "survey", 4, 2, 1, 10),
            ClientRow("a1", "a", "survey", 4, 2, 3, 10),
            ClientRow("b0", "b", "survey", 4, 2, 4, 10),
        ]
    )

    def rows(stage, a0, a1, b0, mass=0.95):
        made = [("a0", "a", 1, a0), ("a1", "a", 3, a1), ("b0", "b", 4, b0)]
        return [
            ScoreRow(stage, c, g, "test", "js_divergence", n, s, mass, 0.5) for c, g, n, s in made
        ]

    ledger.write("base", 0, 1, scores=rows("base", 0.2, 0.6, 0.4))
    ledger.write("train", 1, 1, weights=[WeightRow("a", 0.25), WeightRow("b", 0.75)])
    absent = WeightRow("b", None, present=False)
    ledger.write("train", 2, 1, weights=[WeightRow("a", 1.0), absent])
    ledger.write("final", 2, 1, scores=rows("shared", 0.4, 0.8, 0.5))
    ledger.put_references(
        [
            ReferenceRow("optimum_average", "a", 0.9),
            ReferenceRow("optimum_average", "b", 0.7),
            ReferenceRow("optimum_worst", "a", 0.76),
            ReferenceRow("optimum_worst", "b", 0.6),
            ReferenceRow("mean_of_groups", "", None, note="not asked for"),
            ReferenceRow("optimum_average", "", 0.97, quantity="fairness_index"),
        ]
    )
    for triple in ledger.attempts():
        ledger.commit(*triple)
    yield ledger
    ledger.close()


def test_numbers_on_paper(by_hand):
    s = summarise(by_hand)
    expected = {
        "base/group/a/score": (1 * 0.2 + 3 * 0.6) / 4,  # 0.5
        "base/group/b/score": 0.4,
        "base/average": 0.45,
        "base/worst": 0.4,
        "base/worst_group": "b",
        "base/gap": 0.1,
        "base/std": 0.05,
        "base/worst_k20": 0.4,
        "base/jain_group_means": 0.9**2 / (2 * (0.25 + 0.16)),
        "base/cov_group_means": 0.05 / 0.45,
        "base/gini_group_means": 2 * 0.1 / (2 * 4 * 0.45),
        "base/option_mass": 0.95,
        "shared/group/a/score": 0.7,
        "shared/average": 0.6,
        "shared/worst": 0.5,
        "reference/optimum_average/average": 0.8,
        "reference/optimum_average/fairness_index": 0.97,
        "reference/optimum_worst/worst": 0.6,
        "reference/uniform/average": 0.5,
        "attained/average": (0.6 - 0.45) / (0.8 - 0.45),
        "attained/worst": (0.5 - 0.4) / (0.6 - 0.4),
        "weights/a/mean": 0.625,
        "weights/a/last": 1.0,
        "weights/b/mean": 0.75,
        "weights/b/last": 0.75,
        "rounds/completed": 2,
        "run/status": "completed",
    }
    for name, value in expected.items():
        assert s[name] == (value if isinstance(value, str) else pytest.approx(value)), name
    reasons = {m["name"]: m["reason"] for m in s["missing"]}
    assert reasons["reference/mean_of_groups/average"] == "not asked for"
    assert "score.items" in reasons["base/fairness_index"]
    assert "no score of this stage" in reasons["personal/average"]
    assert not any(n.endswith("/low") for n in s)


def test_uncommitted_rows_change_nothing(by_hand):
    before = summarise(by_hand)
    row = ScoreRow("shared", "a0", "a", "test", "js_divergence", 1, 0.0)
    by_hand.write("final", 2, 9, scores=[row])
    assert summarise(by_hand) == before


def test_a_failed_client_is_named_and_a_group_without_score_has_no_average(by_hand):
    failed = ScoreRow("personal", "b0", "b", "test", "m", 0, status="failed", reason="timeout")
    good = [ScoreRow("personal", c, "a", "test", "m", 2, 0.9) for c in ("a0", "a1")]
    by_hand.write("personal", 2, 1, scores=[*good, failed])
    by_hand.commit("personal", 2, 1)
    s = summarise(by_hand)
    assert s["personal/group/a/score"] == pytest.approx(0.9)
    assert "personal/group/b/score" not in s
    assert "personal/average" not in s
    assert "personal/worst" not in s
    reasons = [m["reason"] for m in s["missing"] if m["name"].startswith("personal")]
    assert "b0 (group b): timeout" in reasons
    assert "no score for b" in reasons


def test_one_failed_client_of_a_group_leaves_the_others_mean(by_hand):
    rows = [
        ScoreRow("personal", "a0", "a", "test", "m", 0, status="failed", reason="timeout"),
        ScoreRow("personal", "a1", "a", "test", "m", 3, 0.9),
        ScoreRow("personal", "b0", "b", "test", "m", 4, 0.7),
    ]
    by_hand.write("personal", 2, 1, scores=rows)
    by_hand.commit("personal", 2, 1)
    s = summarise(by_hand)
    assert s["personal/average"] == pytest.approx(0.8)
    assert any(m["reason"] == "a0 (group a): timeout" for m in s["missing"])


def test_low_option_mass_fails_a_completed_run(run_folder):
    assert read(run_folder())["run/status"] == "completed"
    s = read(run_folder(option_mass=0.62))
    assert s["run/status"] == "failed"
    assert "option mass 0.6" in s["run/status_reason"]


def test_the_reason_of_a_failed_run_is_kept(run_folder):
    s = read(run_folder(status="failed"))
    assert s["run/status"] == "failed"
    assert "quorum" in s["run/status_reason"]
    assert s["rounds/completed"] == 4
    assert "shared/average" not in s


def test_a_full_run_has_every_name_finite_and_ordered_intervals(run_folder):
    s = read(run_folder(groups=5, clients_per_group=2))
    for stage in STAGES:
        for name in ("average", "worst", "gap", "std", "worst_k20", "fairness_index"):
            low, value, high = (s[f"{stage}/{name}{x}"] for x in ("/low", "", "/high"))
            assert low <= high
            assert low - 0.05 <= value <= high + 0.05
    assert s["change/average/low"] <= s["change/average"] <= s["change/average/high"]
    for name, value in s.items():
        if isinstance(value, float):
            assert math.isfinite(value), name
    assert s["missing"] == []


def test_same_ledger_same_summary(run_folder):
    assert read(run_folder()) == read(run_folder())


def test_attained_needs_room(by_hand):
    by_hand.put_references(
        [ReferenceRow("optimum_average", "a", 0.5), ReferenceRow("optimum_average", "b", 0.402)]
    )
    s = summarise(by_hand)
    assert "attained/average" not in s
    assert any("above the base" in m["reason"] for m in s["missing"])


def test_items_of_one_group_only_give_no_interval(by_hand):
    items = [ItemRow("shared", "a1", "a", "test", f"q{i}", 0.7) for i in range(9)]
    rows = by_hand.scores("shared")
    by_hand.write("final", 2, 1, scores=rows, items=items)
    s = summarise(by_hand)
    assert "shared/average/low" not in s
    assert any(m["name"] == "shared/average/low" for m in s["missing"])


def test_an_empty_ledger_says_what_is_missing(tmp_path):
    with Ledger(tmp_path / LEDGER) as ledger:
        s = summarise(ledger)
    assert s["run/status"] == "running"
    assert s["rounds/completed"] == 0
    assert {m["name"] for m in s["missing"]} >= {"base/average", "shared/average"}


def test_written_json_is_whole_and_without_nan(tmp_path, by_hand):
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_summary(path, summarise(by_hand))
    assert json.loads(path.read_text())["base/worst_group"] == "b"
    with pytest.raises(ValueError, match="JSON"):
        write_summary(path, {"x": math.nan})
    assert json.loads(path.read_text())["base/worst_group"] == "b"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".summary")]
    with pytest.raises(FedalignError, match="cannot be written"):
        write_summary(tmp_path / "absent" / "summary.json", {})
