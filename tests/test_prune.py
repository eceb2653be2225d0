import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import FLOATS, SIZES, Guarded, same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastopt as fo
from fastopt import _core


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


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


def test_bad_arguments(rng):
    w = np.ones((4, 4), "f4")
    readonly = w.copy()
    readonly.flags.writeable = False
    for call, error, message in [
        (lambda: fo.prune_(w), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: fo.prune_(w, threshold=1, sparsity=0.5), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: fo.prune_(w, threshold=-1), ValueError, "threshold: expected a number, 0 or more, got -1"),
        (lambda: fo.prune_(w, threshold=np.nan), ValueError, "threshold: expected a number"),
        (lambda: fo.prune_(w, sparsity=1.1), ValueError, "sparsity: expected a share from 0 to 1, got 1.1"),
        (lambda: fo.prune_(w, sparsity=0.1, scope="all"), ValueError, "scope: expected 'local' or 'global'"),
        (lambda: fo.prune_(readonly, sparsity=0.1), ValueError, "array '0': is read-only"),
        (lambda: fo.prune_(w[:, ::2], sparsity=0.1), ValueError, "array '0': must be C-contiguous"),
        (lambda: fo.prune_({"a": w, "b": w.view()}, sparsity=0.1), ValueError, "shares memory"),
        (lambda: fo.prune_([w, np.ones(3, int)], sparsity=0.1), TypeError, "array '1': expected float32"),
        (lambda: fo.prune_([w, np.ones(3)], sparsity=0.1, scope="global"), TypeError, "must have one dtype"),
        (lambda: fo.prune(np.ones(3, int), sparsity=0.1), TypeError, "w: expected float32"),
        (lambda: fo.prune(w), ValueError, "threshold, sparsity: expected exactly one"),
        (lambda: _core.kth_magnitude([w], 17), ValueError, "k: expected 1 to 16, got 17"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert (w == 1).all()
