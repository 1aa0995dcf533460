"""Rewards of texts against hand-worked numbers and their own definitions."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.config import RewardsConfig
from fedalign.config_rules import TASK_SCORES
from fedalign.errors import ConfigError, DataError
from fedalign.metrics import alignment, ranking
from fedalign.metrics.alignment import UndefinedScore
from fedalign.rewards.text import parse, reward, reward_of_answer

LETTER, SHARES, ORDER = (RewardsConfig(task=t) for t in ("letter", "shares", "order"))
Y = (0.5, 0.3, 0.1, 0.1)
ORDINALS = (1.0, 2.0, 3.0, 4.0)


def test_letter_by_hand():
    """floor .01: ln .1 / ln .01 = 1/2."""
    y = (0.1, 0.899, 0.001)
    assert reward(LETTER, "log", " A", y, None) == pytest.approx(0.5)
    assert reward(LETTER, "log", "C", y, None) == 0.0
    assert reward(LETTER, "log", " A", (1.0, 0.0), None) == 1.0
    assert reward(LETTER, "log", " B", (1.0, 0.0), None) == 0.0
    assert reward(LETTER, "share", " B", y, None) == pytest.approx(0.899)
    stricter = RewardsConfig(task="letter", floor=0.1)
    assert reward(stricter, "log", " A", y, None) == pytest.approx(0.0)


def test_shares_by_hand():
    assert reward(SHARES, "js_divergence", " 5 3 1 1", Y, None) == pytest.approx(1.0)
    opposed = reward(SHARES, "js_divergence", " 0 10", (1.0, 0.0), None)
    assert opposed == pytest.approx(0.0)
    # All on the second option against Y: W1 = .5 * 1 + .1 * 1 + .1 * 2, over 3.
    got = reward(SHARES, "wasserstein", " 0 10 0 0", Y, ORDINALS)
    assert got == pytest.approx(1 - 0.8 / 3)
    tenths = (2, 3, 4, 1)
    for kind in TASK_SCORES["shares"]:
        expected = alignment.score(kind, np.array(tenths) / 10, Y, ORDINALS)
        assert reward(SHARES, kind, " 2 3 4 1", Y, ORDINALS) == expected


def test_order_by_hand():
    y = (0.1, 0.4, 0.3, 0.2)
    assert reward(ORDER, "borda", " B C D A", y, None) == 1.0
    assert reward(ORDER, "borda", " B D C A", y, None) == pytest.approx(0.9)
    assert reward(ORDER, "kendall", " A D C B", y, None) == 0.0
    assert reward(ORDER, "binary", " B A C D", y, None) == 1.0
    assert reward(ORDER, "kendall", " B D C A", y, None) == ranking.score(
        "kendall", [1, 3, 2, 0], y
    )


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        (LETTER, "log", ""),
        (LETTER, "log", " E"),
        (LETTER, "share", " A B"),
        (LETTER, "log", " A…"),
        (SHARES, "js_divergence", " 5 3 1"),
        (SHARES, "js_divergence", " 5 3 1 2"),
        (SHARES, "wasserstein", " 5 3 1 1…"),
        (SHARES, "cosine", " 0 0 0 0"),
        (ORDER, "borda", " A B C"),
        (ORDER, "borda", " A B C C"),
        (ORDER, "binary", " A B C D…"),
    ],
)
def test_a_malformed_text_has_no_reward(settings, kind, text):
    assert parse(settings.task, text, 4) is None
    assert reward(settings, kind, text, Y, ORDINALS) is None


@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(any),
    st.integers(0, 10_000),
)
def test_every_reward_is_in_the_unit_interval(counts, seed):
    k, rng = len(counts), np.random.default_rng(seed)
    y = [c / sum(counts) for c in counts]
    answers = {
        "letter": int(rng.integers(k)),
        "shares": rng.multinomial(10, np.ones(k) / k).tolist(),
        "order": rng.permutation(k).tolist(),
    }
    for settings in (LETTER, SHARES, ORDER):
        for kind in TASK_SCORES[settings.task]:
            ordinals = [float(i) for i in range(k)]
            value = reward_of_answer(settings, kind, answers[settings.task], y, ordinals)
            assert 0.0 <= value <= 1.0


@given(st.floats(0.011, 1.0), st.floats(0.011, 1.0))
def test_log_rewards_differ_by_the_log_ratio(a, b):
    """Above the floor a difference of rewards is ln(a / b) / -ln(floor)."""
    ra, rb = (reward(LETTER, "log", " A", (s, 1 - s), None) for s in (a, b))
    assert ra - rb == pytest.approx(math.log(a / b) / -math.log(0.01), abs=1e-9)


def test_errors_say_what_is_allowed():
    with pytest.raises(UndefinedScore, match="ordinals"):
        reward(SHARES, "wasserstein", " 5 3 1 1", Y, None)
    with pytest.raises(UndefinedScore, match="ordinals"):
        reward(SHARES, "wasserstein", " 5 3 1 1", Y, (2.0, 2.0, 2.0, 2.0))
    with pytest.raises(ConfigError, match="use borda, kendall, binary"):
        reward(ORDER, "log", " A B C D", Y, None)
    with pytest.raises(ConfigError, match="use log, share"):
        reward(LETTER, "js_divergence", " A", Y, None)
    with pytest.raises(ConfigError, match="letter, shares, order"):
        parse("essay", " A", 4)
    with pytest.raises(DataError, match="not finite"):
        reward(LETTER, "log", " A", (math.nan, 0.5), None)
    with pytest.raises(DataError, match=r"options are 0\.\.3"):
        reward_of_answer(LETTER, "log", 4, Y, None)


def test_rewards_load_no_heavy_library():
    code = (
        "import sys, fedalign.rewards.text, fedalign.rewards.optimum, fedalign.metrics.ranking;"
        "print(sorted({'torch', 'transformers', 'scipy', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
