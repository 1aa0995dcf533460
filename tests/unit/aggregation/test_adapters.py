"""LoRA aggregation against the dense sum, which only a test can afford."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.aggregation.adapters import (
    A_SUFFIX,
    B_SUFFIX,
    METHODS,
    ROW_NORM,
    Contribution,
    aggregate,
    initial_adapter,
    modules,
    product_norm,
    update_norm,
)

SHAPES = {
    "q" + A_SUFFIX: (4, 12),
    "q" + B_SUFFIX: (20, 4),
    "k" + A_SUFFIX: (4, 12),
    "k" + B_SUFFIX: (20, 4),
    "down" + A_SUFFIX: (4, 30),
    "down" + B_SUFFIX: (9, 4),
}


def trained(seed: int, previous, amount: float = 0.3):
    rng = np.random.default_rng(seed)
    return {
        n: (x + amount * rng.standard_normal(x.shape)).astype(np.float32)
        for n, x in previous.items()
    }


def cohort(n: int, groups: int = 2, weights=None):
    previous = initial_adapter(SHAPES, 0)
    weights = weights if weights is not None else [1 / n] * n
    return previous, [
        Contribution(f"c{i}", f"g{i % groups}", w, trained(i, previous))
        for i, w in enumerate(weights)
    ]


def product(tensors, module):
    return tensors[module + B_SUFFIX].astype(np.float64) @ tensors[module + A_SUFFIX].astype(
        np.float64
    )


def dense(contributions, module):
    return sum(c.weight * product(c.tensors, module) for c in contributions)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 25])
def test_product_is_the_best_rank_r_approximation(n):
    rng = np.random.default_rng(n)
    previous, cs = cohort(n, weights=rng.dirichlet(np.ones(n)))
    got = aggregate("product", iter(cs), previous)
    for m in modules(previous):
        exact = dense(cs, m)
        u, s, vt = np.linalg.svd(exact)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        assert np.linalg.norm(product(got.tensors, m) - best) < 2e-6 * np.linalg.norm(exact)
        lost = np.sqrt((s[4:] ** 2).sum() / (s**2).sum())
        assert got.discarded[m] == pytest.approx(lost, abs=1e-7)
        p_left, p_right = u[:, :4] @ u[:, :4].T, vt[:4].T @ vt[:4]
        for g in ("g0", "g1")[: min(n, 2)]:
            own = dense([c for c in cs if c.group == g], m)
            gone = np.linalg.norm(own - p_left @ own @ p_right) / np.linalg.norm(own)
            assert got.discarded_by_group[m][g] == pytest.approx(gone, abs=1e-6)


def test_nothing_is_lost_while_the_rank_suffices():
    """Three clients that share A: the sum has rank 4 and survives exactly."""
    previous, cs = cohort(3, weights=[0.2, 0.3, 0.5])
    shared = cs[0].tensors
    cs = [
        c._replace(
            tensors={n: (shared[n] if n.endswith(A_SUFFIX) else x) for n, x in c.tensors.items()}
        )
        for c in cs
    ]
    got = aggregate("product", cs, previous)
    for m in modules(previous):
        assert np.allclose(product(got.tensors, m), dense(cs, m), atol=1e-6)
        assert got.discarded[m] < 1e-7


def test_one_client_returns_its_own_product():
    previous, cs = cohort(1)
    got = aggregate("product", cs, previous)
    for m in modules(previous):
        assert np.abs(product(got.tensors, m) - product(cs[0].tensors, m)).max() < 1e-6


def test_the_new_a_has_orthonormal_rows_and_fixed_signs():
    previous, cs = cohort(5)
    got = aggregate("product", cs, previous).tensors
    for m in modules(previous):
        a = got[m + A_SUFFIX].astype(np.float64)
        assert np.allclose(a @ a.T, ROW_NORM**2 * np.eye(4), atol=1e-6)
        assert (a[np.arange(4), np.abs(a).argmax(1)] > 0).all()
        assert got[m + A_SUFFIX].dtype == np.float32


def test_untrained_adapters_stay_trainable():
    """B = 0 everywhere: B stays 0, A stays an orthonormal basis of the previous row space."""
    previous = initial_adapter(SHAPES, 0)
    cs = [Contribution(f"c{i}", "g", 0.5, previous) for i in range(2)]
    got = aggregate("product", cs, previous)
    for m in modules(previous):
        a, before = (t[m + A_SUFFIX].astype(np.float64) for t in (got.tensors, previous))
        assert not got.tensors[m + B_SUFFIX].any()
        assert np.allclose(a @ a.T, ROW_NORM**2 * np.eye(4), atol=1e-6)
        assert np.allclose(3 * (a @ before.T) @ before, a, atol=1e-6)  # same row space
        assert got.discarded[m] == 0.0
        assert got.discarded_by_group[m] == {}


def test_rank_deficient_sums_get_a_full_basis():
    """Only the first of four ranks was trained; the other rows of A must not vanish."""
    previous = initial_adapter(SHAPES, 0)
    one = {n: x.copy() for n, x in previous.items()}
    for m in modules(previous):
        one[m + B_SUFFIX][:, 0] = np.arange(1, len(one[m + B_SUFFIX]) + 1)
    got = aggregate("product", [Contribution("c", "g", 1.0, one)], previous).tensors
    for m in modules(previous):
        a = got[m + A_SUFFIX].astype(np.float64)
        assert np.allclose(a @ a.T, ROW_NORM**2 * np.eye(4), atol=1e-6)
        assert not got[m + B_SUFFIX][:, 1:].any()
        assert np.allclose(product(got, m), product(one, m), atol=1e-5)


def test_more_ranks_than_outputs():
    shapes = {"m" + A_SUFFIX: (6, 10), "m" + B_SUFFIX: (3, 6)}
    previous = initial_adapter(shapes, 1)
    cs = [Contribution(f"c{i}", "g", 0.5, trained(i, previous)) for i in range(2)]
    got = aggregate("product", cs, previous)
    assert np.allclose(product(got.tensors, "m"), dense(cs, "m"), atol=1e-6)
    a = got.tensors["m" + A_SUFFIX].astype(np.float64)
    assert np.allclose(a @ a.T, ROW_NORM**2 * np.eye(6), atol=1e-6)


def test_rank_above_the_inputs_is_an_error():
    with pytest.raises(ValueError, match="Set a smaller"):
        initial_adapter({"m" + A_SUFFIX: (6, 5), "m" + B_SUFFIX: (9, 6)}, 0)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(2, 12))
def test_product_does_not_depend_on_order_or_grouping(data, n):
    """With recompression of every group's stack (twelve clients exceed it) and without."""
    rng = np.random.default_rng(n)
    previous, cs = cohort(n, weights=rng.dirichlet(np.ones(n)))
    mixed = data.draw(st.permutations(cs))
    alone = [c._replace(group=c.client) for c in mixed]
    one = aggregate("product", cs, previous).tensors
    two = aggregate("product", mixed, previous).tensors
    three = aggregate("product", alone, previous).tensors
    for m in modules(previous):
        assert np.allclose(product(one, m), product(two, m), atol=1e-5)
        assert np.allclose(product(one, m), product(three, m), atol=1e-5)


def test_same_input_same_bytes():
    previous, cs = cohort(7)
    one, two = (aggregate("product", cs, previous).tensors for _ in range(2))
    assert all(np.array_equal(one[n], two[n]) for n in one)


def test_frozen_a_is_exact_and_a_plain_mean_bit_for_bit():
    previous, cs = cohort(7)
    cs = [
        c._replace(tensors={n: x for n, x in c.tensors.items() if n.endswith(B_SUFFIX)}) for c in cs
    ]
    got = aggregate("frozen-a", cs, previous).tensors
    for m in modules(previous):
        assert np.array_equal(got[m + A_SUFFIX], previous[m + A_SUFFIX])
        plain = np.mean([c.tensors[m + B_SUFFIX].astype(np.float64) for c in cs], axis=0)
        assert np.array_equal(got[m + B_SUFFIX], plain.astype(np.float32))


def test_frozen_a_weighted_equals_the_dense_sum():
    previous, cs = cohort(3, weights=[0.5, 0.2, 0.3])
    a = {n: x for n, x in previous.items() if n.endswith(A_SUFFIX)}
    cs = [c._replace(tensors={**c.tensors, **a}) for c in cs]
    got = aggregate("frozen-a", cs, previous).tensors
    for m in modules(previous):
        assert np.allclose(product(got, m), dense(cs, m), atol=1e-6)


def test_frozen_a_refuses_a_changed_a():
    previous, cs = cohort(2)
    with pytest.raises(ValueError, match="A is frozen"):
        aggregate("frozen-a", cs, previous)


def test_factor_mean_misses_by_the_cross_covariance():
    """Two clients: the error is w1 w2 (B1 - B2)(A1 - A2)."""
    previous, cs = cohort(2, weights=[0.3, 0.7])
    got = aggregate("factor-mean", cs, previous).tensors
    x, y = cs[0].tensors, cs[1].tensors
    for m in modules(previous):
        a, b = m + A_SUFFIX, m + B_SUFFIX
        cross = 0.21 * (x[b] - y[b]).astype(np.float64) @ (x[a] - y[a])
        assert np.allclose(dense(cs, m) - product(got, m), cross, atol=1e-5)
        assert np.abs(cross).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_client_of_weight_zero_changes_nothing(method):
    previous, cs = cohort(2, weights=[1.0, 0.0])
    a = {n: x for n, x in previous.items() if n.endswith(A_SUFFIX)}
    cs = [c._replace(tensors={**c.tensors, **a}) for c in cs]
    with_zero, alone = aggregate(method, cs, previous), aggregate(method, cs[:1], previous)
    assert all(np.array_equal(with_zero.tensors[n], alone.tensors[n]) for n in alone.tensors)


def broken(tensors, name, value):
    return {**tensors, name: value}


@pytest.mark.parametrize("method", ["product", "factor-mean"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(weight=0.4), "sum to"),
        (lambda c: c._replace(weight=float("nan")), "weight nan"),
        (lambda c: c._replace(tensors={}), "missing"),
        (lambda c: c._replace(tensors=broken(c.tensors, "x" + A_SUFFIX, np.ones(2))), "unknown"),
        (lambda c: c._replace(tensors=broken(c.tensors, "q" + A_SUFFIX, np.ones((4, 11)))), "not"),
        (
            lambda c: c._replace(
                tensors=broken(c.tensors, "q" + B_SUFFIX, np.full((20, 4), np.nan))
            ),
            "not finite",
        ),
    ],
)
def test_errors_name_the_client_or_the_sum(method, change, message):
    previous, cs = cohort(2)
    with pytest.raises(ValueError, match=message):
        aggregate(method, [cs[0], change(cs[1])], previous)


def test_nothing_to_aggregate_and_unknown_method():
    previous, cs = cohort(1)
    for method in METHODS:
        with pytest.raises(ValueError, match="no adapter"):
            aggregate(method, [], previous)
    with pytest.raises(ValueError, match="not one of product"):
        aggregate("mean", cs, previous)
    with pytest.raises(ValueError, match="not a LoRA adapter"):
        modules({"x.bias": np.ones(3)})


def test_norms_equal_the_dense_ones():
    _, cs = cohort(2)
    new, old = cs[0].tensors, cs[1].tensors
    total = sum(np.linalg.norm(product(new, m) - product(old, m)) ** 2 for m in modules(new))
    assert update_norm(new, old) == pytest.approx(np.sqrt(total), rel=1e-10)
    assert update_norm(new, new) == pytest.approx(0.0, abs=1e-12)
    for m in modules(new):
        got = product_norm(new[m + A_SUFFIX], new[m + B_SUFFIX])
        assert got == pytest.approx(np.linalg.norm(product(new, m)), rel=1e-10)


def test_initial_adapter_is_keyed_by_seed_and_name():
    one, same, other = (
        initial_adapter(SHAPES, 5),
        initial_adapter(SHAPES, 5),
        initial_adapter(SHAPES, 6),
    )
    a = "q" + A_SUFFIX
    assert np.array_equal(one[a], same[a])
    assert not np.array_equal(one[a], other[a])
    assert not np.array_equal(one[a], one["k" + A_SUFFIX])
    assert np.allclose(one[a] @ one[a].T, np.eye(4) / 3, atol=1e-6)
    assert not one["q" + B_SUFFIX].any()


def test_speed_at_pocket_size():
    """28 modules of 64 x 64, rank 8, 8 clients: measured 14 ms on one core; the bound is loose."""
    shapes = {}
    for m in range(28):
        shapes |= {f"m{m}{A_SUFFIX}": (8, 64), f"m{m}{B_SUFFIX}": (64, 8)}
    previous = initial_adapter(shapes, 0)
    cs = [Contribution(f"c{i}", f"g{i}", 1 / 8, trained(i, previous)) for i in range(8)]
    best = min(_timed(lambda: aggregate("product", cs, previous)) for _ in range(5))
    assert best < 0.25


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
