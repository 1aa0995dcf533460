"""The attacks on rewards do read what they claim to read, through the site's own function."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedalign.data.records import SurveyItem
from fedalign.metrics.alignment import score

ITEMS = (
    SurveyItem("1", "Free ferries?", ("Yes", "No", "Unsure"), {"g": (0.5, 0.38, 0.12)}),
    SurveyItem("2", "Higher taxes?", ("Yes", "No", "Unsure", "Pass"), {"g": (0.1, 0.2, 0.4, 0.3)}),
)


@pytest.fixture(scope="module")
def leak(root: Path) -> ModuleType:
    path = root / "benchmarks" / "reward_leak.py"
    spec = importlib.util.spec_from_file_location("reward_leak", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward_leak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["letter", "shares"])
def test_exact_rewards_give_the_shares_away(leak, task):
    found = leak.attack(task, "exact", ITEMS, "g", 0)
    assert found.texts == 3.5
    assert found.error < 1e-6
    assert found.pairs == 1.0


def test_exact_rewards_give_the_order_away_in_few_texts(leak):
    found = leak.attack("order", "exact", ITEMS, "g", 0)
    assert found.pairs == 1.0
    assert found.texts <= 3


def test_nothing_asked_is_a_guess(leak):
    found = leak.attack("letter", leak.NOTHING, ITEMS, "g", 0)
    by_hand = [np.abs(np.array(i.shares["g"]) - 1 / len(i.options)).mean() for i in ITEMS]
    assert found.error == pytest.approx(np.mean(by_hand))
    assert found.pairs == 0.5
    assert found.texts == 0


def test_the_budget_is_what_is_answered(leak):
    found = leak.attack("letter", "budget 2", ITEMS, "g", 0)
    assert found.texts == 2
    assert 1e-3 < found.error < leak.attack("letter", "budget 1", ITEMS, "g", 0).error


def test_rounding_hides_letters_but_not_shares(leak):
    letters = leak.attack("letter", "rounding .25", ITEMS, "g", 0)
    printed = leak.attack("shares", "rounding .25", ITEMS, "g", 0)
    assert printed.texts == (66 + 286) / 2
    assert printed.error < letters.error / 2


def test_all_tenths_of_one_option_show_its_share_alone():
    """The score of (1, 0, 0) is the same however the rest is dealt out."""
    corner = [1.0, 0.0, 0.0]
    one, two = (score("js_divergence", corner, [0.4, *rest]) for rest in ([0.6, 0.0], [0.1, 0.5]))
    assert one == pytest.approx(two, abs=1e-12)
    assert one == pytest.approx(score("js_divergence", [1.0, 0.0], [0.4, 0.6]), abs=1e-12)
