import pickle

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import FLOATS, Guarded, same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastopt as fo
from fastopt import _core


def weights(rng, rows, cols, dtype="float32"):
    w = rng.standard_normal((rows, cols))
    w[rng.random((rows, cols)) < 0.6] = 0
    w[rng.random((rows, cols)) < 0.1] = -0.0
    w[rng.random((rows, cols)) < 0.02] = np.nan
    w[rng.random((rows, cols)) < 0.02] = 1e-42
    return w.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_from_and_to_dense_equal_reference(isa, dtype, rng):
    for cols in [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000]:
        w = weights(rng, 5, cols, dtype)
        s = fo.SparseTensor.from_dense(w)
        mask, row_offsets, values = reference.compress(w)
        assert np.array_equal(s.mask, mask)
        assert np.array_equal(s.row_offsets, row_offsets)
        assert same_bits(s.values, values)
        out = Guarded(np.full_like(w, 7), 3)
        s.to_dense(out=out.array)
        assert same_bits(out.array, reference.expand(mask, values, cols))
        assert out.intact()


def test_any_number_of_threads(isa, threads, rng):
    w = weights(rng, 301, 700)
    s = fo.SparseTensor.from_dense(w)
    assert same_bits(s.to_dense(), np.where(w == 0, np.float32(0), w))
    assert np.array_equal(s.mask, reference.compress(w)[0])


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)))
def test_round_trip_of_any_shape(w):
    s = fo.SparseTensor.from_dense(w)
    assert same_bits(s.to_dense(), np.where(w == 0, np.float32(0), w))
    assert s.nnz == np.count_nonzero(w)


def test_all_zero_and_all_dense():
    assert fo.SparseTensor.from_dense(np.zeros((3, 9), "f4")).nnz == 0
    full = np.ones((3, 9), "f4")
    assert same_bits(fo.SparseTensor.from_dense(full).to_dense(), full)


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-4, 4, width=32)),
    st.sampled_from([8, 4, 2]),
    st.sampled_from(["auto", 1, 5, -1, None]),
)
def test_quantized_values(w, bits, group_size):
    s = fo.SparseTensor.from_dense(w).quantize(bits, group_size=group_size)
    values = fo.quantize(
        w[w != 0], bits, group_size={8: 128, 4: 32, 2: 16}[bits] if group_size == "auto" else group_size
    )
    assert same_bits(s.to_dense(), reference.expand(s.mask, values.dequantize(), w.shape[1]))


def test_layouts_of_the_input(rng):
    w = weights(rng, 8, 40)
    want = fo.SparseTensor.from_dense(w)
    for other in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], w.astype(">f4"), w.tolist()):
        s = fo.SparseTensor.from_dense(other)
        assert np.array_equal(s.mask, want.mask) or isinstance(other, list)
        assert s.values.dtype.isnative
    with pytest.raises(TypeError, match="w: expected float32, float64, float16 or bfloat16, got int64"):
        fo.SparseTensor.from_dense(np.ones(3, np.int64))


def test_out_is_checked(rng):
    s = fo.SparseTensor.from_dense(weights(rng, 8, 40))
    for bad, error, message in [
        (np.empty((8, 41), "f4"), ValueError, r"out: expected shape \(8, 40\), got \(8, 41\)"),
        (np.empty((8, 40)), TypeError, "out: expected float32, got float64"),
        (np.empty((8, 80), "f4")[:, ::2], ValueError, "out: must be C-contiguous"),
        ([1.0], TypeError, "out: expected a NumPy array, got list"),
    ]:
        with pytest.raises(error, match=message):
            s.to_dense(out=bad)


def test_a_sparse_tensor_checks_its_arrays(rng):
    s = fo.SparseTensor.from_dense(weights(rng, 4, 13))
    flipped, behind, swapped = s.mask.copy(), s.mask.copy(), s.row_offsets.copy()
    flipped[2, 0] ^= 1
    behind[1, 1] |= 0x80
    behind[1, 0] &= behind[1, 0] - 1  # as many bits as before
    swapped[[1, 2]] = swapped[[2, 1]] + np.array([1, 0])
    parts = {"mask": s.mask, "row_offsets": s.row_offsets, "values": s.values, "shape": s.shape}
    for change, error, message in [
        ({"mask": flipped}, ValueError, "mask: row 2 has"),
        ({"mask": behind}, ValueError, "mask: row 1 has"),
        ({"mask": s.mask[:, :1]}, ValueError, r"mask: expected shape \(4, 2\)"),
        ({"mask": s.mask.astype("i1")}, TypeError, "mask: expected uint8"),
        ({"row_offsets": s.row_offsets[1:]}, ValueError, "row_offsets: expected 5 elements, got 4"),
        ({"row_offsets": swapped}, ValueError, "row_offsets: must rise from 0 to the number of values"),
        ({"row_offsets": s.row_offsets.astype("i4")}, TypeError, "row_offsets: expected int64, got int32"),
        ({"values": s.values[:-1]}, ValueError, "row_offsets: must rise from 0 to the number of values"),
        ({"values": s.values[None]}, ValueError, "values: expected one dimension"),
        ({"shape": (4, 14)}, ValueError, "mask"),
    ]:
        if "shape" in change:
            fo.SparseTensor(**{**parts, **change})  # one more column, which is empty, is as good
            continue
        with pytest.raises(error, match=message):
            fo.SparseTensor(**{**parts, **change})
    with pytest.raises(ValueError, match="read-only"):
        s.mask[0, 0] = 0


def test_compress_refuses_offsets_that_lie(rng):
    w = weights(rng, 3, 20)
    mask, row_offsets, values = reference.compress(w)
    row_offsets[1] += 1
    with pytest.raises(ValueError, match="row_offsets: do not match the non-zeros of x"):
        _core.compress(w, row_offsets, mask, values)


def test_sparse_tensor_is_a_value(rng):
    s = fo.SparseTensor.from_dense(weights(rng, 4, 40))
    assert same_bits(pickle.loads(pickle.dumps(s)).to_dense(), s.to_dense())
    assert s.nbytes == 4 * 5 + 5 * 8 + s.nnz * 4
    assert s.dtype == np.float32
    assert 0 < s.density < 1
    assert repr(s).startswith("SparseTensor(shape=(4, 40), density=0.")
