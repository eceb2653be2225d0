import numpy as np
import pytest
import reference
from conftest import Guarded, same_bits

import fastopt as fo


def packed(w):
    """The weight in every storage, with what it decodes to."""
    yield fo.quantize(w, 8)
    yield fo.quantize(w, 4)
    yield fo.quantize(w, 2, group_size=5)
    yield fo.quantize(w, 4, group_size=None, param_dtype="float32")
    sparse = fo.prune(w, sparsity=0.6)
    yield sparse
    yield sparse.quantize(4)
    yield sparse.quantize(8, group_size=3)


def dense(t):
    return t.dequantize() if isinstance(t, fo.QuantizedTensor) else t.to_dense()


@pytest.mark.parametrize("batch", [1, 3])
def test_linear_equals_reference(isa, batch, rng):
    for rows, cols in [(1, 1), (3, 7), (5, 16), (4, 33), (2, 511), (3, 513), (2, 1500), (7, 0), (0, 7)]:
        w = rng.standard_normal((rows, cols)).astype("f4")
        x = Guarded(rng.standard_normal((batch, cols)).astype("f4"), 1)
        bias = rng.standard_normal(rows).astype("f4")
        for t in packed(w):
            out = Guarded(np.zeros((batch, rows), "f4"), 3)
            assert fo.linear(x.array, t, bias, out=out.array) is out.array
            assert same_bits(out.array, reference.linear(x.array, dense(t), bias))
            assert x.intact()
            assert out.intact()


def test_any_number_of_threads(isa, threads, rng):
    w = rng.standard_normal((301, 700)).astype("f4")
    x = rng.standard_normal((5, 700)).astype("f4")
    for t in packed(w):
        assert same_bits(fo.linear(x, t), reference.linear(x, dense(t)))


def test_close_to_float64(rng):
    w = rng.standard_normal((64, 4096)).astype("f4")
    x = rng.standard_normal((8, 4096)).astype("f4")
    for t in packed(w):
        want = x.astype("f8") @ dense(t).astype("f8").T
        assert np.linalg.norm(fo.linear(x, t) - want) <= 5e-7 * np.linalg.norm(want)


def test_nan_and_infinity_of_x_reach_what_numpy_says(rng):
    w = rng.standard_normal((9, 40)).astype("f4")
    x = rng.standard_normal((3, 40)).astype("f4")
    x[1, 3], x[2, 39] = np.nan, np.inf
    q = fo.quantize(w)
    with np.errstate(invalid="ignore"):
        want = x @ q.dequantize().T
    got = fo.linear(x, q)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(np.isinf(got), np.isinf(want))


def test_shapes_and_matmul(rng):
    w = rng.standard_normal((6, 2, 5)).astype("f4")
    x = rng.standard_normal((2, 3, 10)).astype("f4")
    q = fo.quantize(w, 8)
    assert fo.linear(x, q).shape == (2, 3, 6)
    assert fo.linear(x[0, 0], q).shape == (6,)
    assert fo.linear(np.empty((0, 10), "f4"), q).shape == (0, 6)
    for t in packed(w.reshape(6, 10)):
        assert same_bits(t @ x[0].T, fo.linear(x[0], t).T)
        assert same_bits(t @ x[0, 0], fo.linear(x[0, 0], t))
    np.testing.assert_allclose(fo.linear(x, w), x @ w.reshape(6, 10).T, rtol=1e-5)
    np.testing.assert_allclose(fo.linear(x, w, np.ones(6, "f4")), x @ w.reshape(6, 10).T + 1, rtol=1e-5, atol=1e-6)


def test_half_values_of_a_sparse_weight(rng):
    w = rng.standard_normal((6, 40)).astype("f2")
    s = fo.prune(w, sparsity=0.5)
    x = rng.standard_normal((2, 40)).astype("f4")
    assert same_bits(fo.linear(x, s), reference.linear(x, s.to_dense().astype("f4")))


@pytest.mark.parametrize("make", [fo.quantize, lambda w: fo.prune(w, sparsity=0.5), np.asarray])
def test_bad_arguments(make, rng):
    w = make(rng.standard_normal((6, 40)).astype("f4"))
    x = np.ones((2, 40), "f4")
    buffer = np.zeros(200, "f4")
    for call, error, message in [
        (lambda: fo.linear(x.astype("f8"), w), TypeError, "x: expected float32, got float64"),
        (lambda: fo.linear(x[:, 1:], w), ValueError, r"x: expected shape \(..., 40\) for w of shape \(6, 40\)"),
        (lambda: fo.linear(np.float32(1), w), ValueError, "x: expected shape"),
        (lambda: fo.linear(x, w, out=np.empty((2, 7), "f4")), ValueError, r"out: expected a C-contiguous array of"),
        (lambda: fo.linear(x, w, out=np.empty((2, 6))), TypeError, "out: expected a float32 array"),
        (lambda: fo.linear(x, w, np.zeros(5, "f4")), ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
        (lambda: fo.linear(x, w, np.zeros(6)), TypeError, "bias: expected a float32 array, got float64"),
        (
            lambda: fo.linear(buffer[:80].reshape(2, 40), w, out=buffer[70:82].reshape(2, 6)),
            ValueError,
            "shares memory",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_double_values_are_refused(rng):
    s = fo.prune(rng.standard_normal((6, 40)), sparsity=0.5)
    with pytest.raises(TypeError, match="w: expected values of float32, float16 or bfloat16, got float64"):
        fo.linear(np.ones((1, 40), "f4"), s)
