"""Floor and ceiling."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalign.aggregation.bounds import bound, limits, project

logs = st.dictionaries(
    st.text("abcdefgh", min_size=1), st.floats(-1e6, 1e6), min_size=1, max_size=9
)
floors, ceilings = st.floats(0, 1), st.floats(1, 50)


def test_limits_by_hand():
    assert limits(2, 0.2, 3.0) == (0.1, 0.75)
    assert limits(8, 0.2, 3.0) == (0.025, 0.375)
    assert limits(1, 0.2, 3.0) == (0.2, 1.0)


def test_bound_by_hand():
    """.8, .15, .05 with floor .3/3 = .1 and ceiling 1.8/3 = .6: the middle one is scaled to .3."""
    given_ = {g: math.log(w) for g, w in {"a": 0.8, "b": 0.15, "c": 0.05}.items()}
    assert bound(given_, 0.3, 1.8) == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})


def test_within_bounds_nothing_changes():
    given_ = {"a": math.log(0.5), "b": math.log(0.3), "c": math.log(0.2)}
    assert bound(given_, 0.2, 3.0) == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})


@given(x=logs, floor=floors, ceiling=ceilings)
def test_bounds_hold_and_order_is_kept(x, floor, ceiling):
    low, high = limits(len(x), floor, ceiling)
    for got in (bound(x, floor, ceiling), project(x, floor, ceiling)):
        assert math.fsum(got.values()) == pytest.approx(1.0, abs=1e-9)
        assert all(low - 1e-9 <= w <= high + 1e-9 for w in got.values())
        order = sorted(x, key=lambda g: x[g])
        assert all(got[a] <= got[b] + 1e-9 for a, b in pairwise(order))


@given(x=logs, floor=st.floats(1e-3, 1), ceiling=ceilings)
def test_idempotent(x, floor, ceiling):
    once = bound(x, floor, ceiling)
    twice = bound({g: math.log(w) for g, w in once.items()}, floor, ceiling)
    assert twice == pytest.approx(once, abs=1e-9)
    once = project(x, floor, ceiling)
    assert project(once, floor, ceiling) == pytest.approx(once, abs=1e-9)


def test_projection_is_the_nearest_point():
    from scipy.optimize import minimize

    rng = np.random.default_rng(1)
    for _ in range(5):
        x = rng.normal(size=5)
        low, high = limits(5, 0.3, 2.0)
        got = project({str(i): float(v) for i, v in enumerate(x)}, 0.3, 2.0)
        best = minimize(
            lambda w, x=x: ((w - x) ** 2).sum(),
            np.full(5, 0.2),
            bounds=[(low, high)] * 5,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        ).x
        assert np.allclose([got[str(i)] for i in range(5)], best, atol=1e-4)


@pytest.mark.parametrize(("floor", "ceiling"), [(-0.1, 3), (1.1, 3), (0.2, 0.9), (math.nan, 3)])
def test_infeasible_bounds_are_errors(floor, ceiling):
    with pytest.raises(ValueError, match=r"floor|ceiling"):
        bound({"a": 0.0, "b": 1.0}, floor, ceiling)


def test_non_finite_weights_are_errors():
    with pytest.raises(ValueError, match="finite"):
        bound({"a": -math.inf, "b": 1.0}, 0.2, 3.0)
