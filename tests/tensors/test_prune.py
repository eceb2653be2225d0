import numpy as np
import pytest
import reference
from helpers import FLOATS, SIZES, Guarded, dtype_of, same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastopt as fo
from fastopt import _core
from fastopt.tensors import sparse

pytestmark = pytest.mark.kernel


def values(rng, n, dtype):
    """Numbers with ties, zeros of both signs, infinities and NaN among them."""
    x = np.round(rng.standard_normal(n) * 4) / 4
    x[: n // 2] = rng.standard_normal(n // 2)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-42]
    at = rng.permutation(n)[: n // 5]
    x[at] = np.resize(special, at.size)
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_prune_equals_reference(isa, dtype, rng):
    for n in SIZES:
        w = values(rng, n, dtype_of(dtype))
        for threshold in (0.0, 0.25, 1e-42, 1e30, np.inf):
            pruned = Guarded(w, n % 4)
            kept = reference.kept_above(w, threshold)
            assert np.array_equal(fo.prune_(pruned.array, threshold=threshold), kept)
            assert same_bits(pruned.array, reference.prune(w, kept))
            assert pruned.intact()
        for sparsity in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0):
            pruned = Guarded(w, n % 4)
            kept = reference.kept_of_share(w, sparsity)
            assert np.array_equal(fo.prune_(pruned.array, sparsity=sparsity), kept), (n, sparsity)
            assert same_bits(pruned.array, reference.prune(w, kept))
            assert pruned.intact()


def test_ties_over_chunks_and_any_number_of_threads(isa, threads, rng):
    w = np.resize(np.array([1, -1, 0.5], "f4"), 300001)
    for sparsity in (0.2, 1 / 3, 0.7, 0.999):
        pruned = w.copy()
        kept = reference.kept_of_share(w, sparsity)
        assert np.array_equal(fo.prune_(pruned, sparsity=sparsity), kept)
        assert same_bits(pruned, reference.prune(w, kept))


@given(hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32)), st.floats(0, 1))
def test_exactly_that_share_and_the_largest_stay(w, sparsity):
    pruned = w.copy()
    kept = fo.prune_(pruned, sparsity=sparsity)
    assert (~kept).sum() == round(sparsity * w.size)
    key = np.minimum(np.abs(w).view("u4"), 0x7F800001)
    assert kept.all() or not kept.any() or key[kept].min() >= key[~kept].max()
    assert not pruned[~kept].view("u4").any()  # +0, not -0
    assert same_bits(pruned[kept], w[kept])


def test_threshold_is_strict():
    w = np.array([0.5, -0.5, 0.50001, -0.4], "f4")
    assert fo.prune_(w, threshold=0.5).tolist() == [False, False, True, False]


def test_several_arrays(rng):
    arrays = {"a": rng.standard_normal((5, 7)).astype("f4"), "b": 10 * rng.standard_normal(40).astype("f4")}
    together = np.concatenate([arrays["a"].reshape(-1), arrays["b"]])
    kept = reference.kept_of_share(together, 0.4)
    local = {name: w.copy() for name, w in arrays.items()}
    masks = fo.prune_(local, sparsity=0.4)
    assert {name: int((~m).sum()) for name, m in masks.items()} == {"a": 14, "b": 16}
    everywhere = [w.copy() for w in arrays.values()]
    masks = fo.prune_(everywhere, sparsity=0.4, scope="global")
    assert np.array_equal(np.concatenate([m.reshape(-1) for m in masks]), kept)
    assert masks[0].shape == (5, 7)


def test_global_ties_run_through_the_arrays():
    arrays = [np.ones(4, "f4"), np.ones(4, "f4"), np.ones(4, "f4")]
    masks = fo.prune_(arrays, sparsity=0.5, scope="global")
    assert [m.tolist() for m in masks] == [[True] * 4, [True, True, False, False], [False] * 4]


def test_prune_leaves_its_input_alone(rng):
    w = rng.standard_normal((6, 5)).astype("f4")
    before = w.copy()
    s = fo.prune(w, sparsity=0.5)
    assert np.array_equal(w, before)
    assert s.nnz == 15
    fo.prune_(before, sparsity=0.5)
    assert np.array_equal(s.to_dense(), before)
    assert fo.prune(w.T, sparsity=0.5).shape == (5, 6)


def test_the_kth_of_many(isa, threads, rng):
    """Enough for a bracket from a sample, which clustered and sorted weights mislead."""
    n = 200001
    normal = rng.standard_normal(n)
    ties = np.round(normal * 50) / 50
    steps = np.repeat(10.0 ** rng.integers(-30, 30, n // 1000 + 1), 1000)[:n]
    for w in (normal, np.sort(np.abs(normal)), ties, steps, np.zeros(n), np.where(np.arange(n) < 9, np.nan, 1.0)):
        for dtype in ("f4", "f8"):
            x = w.astype(dtype)
            for k in (1, n // 3, n - 3, n):
                key, below, equal = _core.kth_magnitude([x[: n // 4], x[n // 4 :]], k)
                magnitude = np.sort(np.where(np.isnan(x), np.inf, np.abs(x)))
                assert below < k <= below + equal
                if not np.isnan(x).any():
                    value = np.array(key, f"u{x.itemsize}").view(dtype)
                    assert value == magnitude[k - 1]
                    assert below == np.searchsorted(magnitude, value)


def test_masks_are_optional(isa, rng):
    w = rng.standard_normal(3000).astype("f4")
    with_mask, without = w.copy(), w.copy()
    fo.prune_(with_mask, sparsity=0.4)
    assert fo.prune_(without, sparsity=0.4, return_mask=False) is None
    assert same_bits(with_mask, without)


@pytest.mark.parametrize("dtype", FLOATS)
def test_groups_equal_reference(isa, dtype, rng):
    for cols in (0, 1, 3, 4, 7, 16, 33):
        w = values(rng, 5 * cols, dtype_of(dtype)).reshape(5, cols)
        for n, m in ((2, 4), (1, 2), (4, 8), (3, 16), (1, 7)):
            pruned = w.copy()
            kept = reference.kept_of_groups(w, n, m)
            assert np.array_equal(fo.prune_(pruned, pattern=f"{n}:{m}"), kept)
            assert same_bits(pruned, reference.prune(w, kept))
    s = fo.prune(w, pattern="2:4")
    assert s.layout == "2:4"
    assert same_bits(s.to_dense(), reference.prune(w, reference.kept_of_groups(w, 2, 4) & (w != 0)))
    assert fo.prune(w, pattern="1:7").layout in ("mask", "index16")


def test_blocks_equal_reference(isa, rng):
    for shape in ((7, 100), (3, 16), (40,), (2, 3, 9), (4, 0)):
        w = np.round(rng.standard_normal(shape) * 2).astype("f4")  # many norms are equal
        for choice in ({"sparsity": 0.5}, {"sparsity": 0.9}, {"threshold": 8.0}):
            pruned = w.copy()
            kept = reference.kept_blocks(w, **choice)
            assert np.array_equal(fo.prune_(pruned, pattern="1x16", **choice), kept)
            assert same_bits(pruned, reference.prune(w, kept))
            s = fo.prune(w, pattern="1x16", **choice)
            assert s.layout == "1x16"
            assert np.array_equal(s.to_dense(), pruned)
    both = [np.ones((2, 32), "f4"), 2 * np.ones((2, 32), "f4")]
    fo.prune_(both, pattern="1x16", sparsity=0.5, scope="global")
    assert [w.any() for w in both] == [False, True]


def test_importance(isa, rng):
    w = {name: rng.standard_normal((6, 40)).astype("f4") for name in "ab"}
    score = {name: rng.standard_normal((6, 40)).astype("f2") for name in "ba"}
    together = np.stack([score["a"], score["b"]])
    pruned = {name: x.copy() for name, x in w.items()}
    masks = fo.prune_(pruned, sparsity=0.6, importance=score, scope="global")
    kept = reference.kept_of_share(together, 0.6)
    assert np.array_equal(np.stack([masks["a"], masks["b"]]), kept)
    assert same_bits(pruned["b"], reference.prune(w["b"], kept[1]))
    for options in ({"pattern": "2:4"}, {"threshold": 0.5}, {"pattern": "1x16", "sparsity": 0.5}):
        x, y = w["a"].copy(), w["a"].copy()
        assert np.array_equal(fo.prune_(x, importance=score["a"], **options), fo.prune_(score["a"].copy(), **options))
        fo.prune_(y, importance=y.copy(), **options)
        assert same_bits(y, np.where(fo.prune_(w["a"].copy(), **options), w["a"], np.float32(0)))
    s = fo.prune(w, sparsity=0.6, importance=score, scope="global")
    assert same_bits(s["a"].to_dense(), pruned["a"])
    for bad, message in [
        (score["a"], r"importance: expected 2 arrays, arranged like w"),
        ({"a": score["a"]}, "importance: expected the names of w, 'b' is missing"),
        ({"a": score["a"], "b": score["b"].T}, r"importance: expected shape \(6, 40\) for 'b', got \(40, 6\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            fo.prune_(pruned, sparsity=0.6, importance=bad)


def test_several_arrays_to_sparse(rng):
    w = [rng.standard_normal((6, 40)).astype("f4"), rng.standard_normal(9).astype("f4")]
    s = fo.prune(w, sparsity=0.5)
    assert [t.nnz for t in s] == [120, 5]
    assert sparse.sparsity(s) == 124 / 249
    assert sparse.sparsity({"a": w[0], "b": s[1]}) == 4 / 249
    assert fo.prune({"x": w[0]}, threshold=1)["x"].shape == (6, 40)
    assert sparse.sparsity([]) == 0


def test_pruned_negatives_infinities_and_nan(rng):
    """Not as theta * mask: that leaves -0, and makes NaN of a pruned infinity."""
    w = np.array([-0.1, np.inf, np.nan, -5.0], "f4")
    kept = fo.prune_(w, importance=np.array([1, 2, 3, 4], "f4"), sparsity=0.75)
    assert kept.tolist() == [False, False, False, True]
    assert w.view("u4")[:3].tolist() == [0, 0, 0]


def test_cubic_schedule():
    schedule = fo.schedules.cubic_sparsity(0.9, 1000, initial=0.1, begin=50)
    values = [schedule(step) for step in range(1200)]
    assert values == sorted(values)
    assert values[:51] == [0.1] * 51
    assert values[1050:] == [0.9] * 150
    assert values[550] == pytest.approx(0.9 - 0.8 / 8)
    for bad in ({"final": 1.1, "steps": 3}, {"final": 0.5, "steps": 0}, {"final": 0.5, "steps": 3, "initial": -1}):
        with pytest.raises(ValueError, match="expected"):
            fo.schedules.cubic_sparsity(**bad)


def test_bad_arguments(rng):
    w = np.ones((4, 4), "f4")
    readonly = w.copy()
    readonly.flags.writeable = False
    for call, error, message in [
        (lambda: fo.prune_(w), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: fo.prune_(w, threshold=1, sparsity=0.5), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: fo.prune_(w, threshold=-1), ValueError, "threshold: expected a number, 0 or more, got -1"),
        (lambda: fo.prune_(w, threshold=np.nan), ValueError, "threshold: expected a number"),
        (lambda: fo.prune_(w, sparsity=1.1), ValueError, "sparsity: expected a fraction from 0 to 1, got 1.1"),
        (lambda: fo.prune_(w, sparsity=0.1, scope="all"), ValueError, "scope: expected 'local' or 'global'"),
        (lambda: fo.prune_(readonly, sparsity=0.1), ValueError, "array '0': is read-only"),
        (lambda: fo.prune_(w[:, ::2], sparsity=0.1), ValueError, "array '0': must be C-contiguous"),
        (lambda: fo.prune_({"a": w, "b": w.view()}, sparsity=0.1), ValueError, "shares memory"),
        (lambda: fo.prune_([w, np.ones(3, int)], sparsity=0.1), TypeError, "array '1': expected float32"),
        (lambda: fo.prune_([w, np.ones(3)], sparsity=0.1, scope="global"), TypeError, "must have one dtype"),
        (lambda: fo.prune_(w, sparsity=0.1, pattern="2:4"), ValueError, "threshold, sparsity: expected neither"),
        (lambda: fo.prune_(w, pattern="1x16"), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: fo.prune_(w, pattern="4:2"), ValueError, "pattern: expected 'N:M' with N < M"),
        (lambda: fo.prune_(w, pattern="4x4", sparsity=0.5), ValueError, "pattern: expected 'N:M' with N < M"),
        (lambda: fo.prune(w, sparsity=0.5, layout="2:3"), ValueError, "layout: expected 'mask'"),
        (lambda: fo.prune(np.ones(3, int), sparsity=0.1), TypeError, "w: expected float32"),
        (lambda: fo.prune(w), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: _core.kth_magnitude([w], 17), ValueError, "k: expected 1 to 16, got 17"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert (w == 1).all()
