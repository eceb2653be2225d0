"""Fits that weigh the errors of some weights more than those of others."""

import numpy as np
import pytest
import reference
from helpers import BITS, same_bits
from test_quant import weights

import fastopt as fo
from fastopt.tensors.calibration import InputSums
from fastopt.tensors.error import ErrorSums

pytestmark = pytest.mark.kernel


def importances(rng, shape):
    """Numbers of all magnitudes, some of them 0."""
    v = np.exp(3 * rng.standard_normal(shape)).astype("f4")
    v[rng.random(shape) < 0.1] = 0
    return v


def check(w, v, bits, group_size, param_dtype):
    q = fo.quantize(w, bits, group_size=group_size, param_dtype=param_dtype, importance=v)
    full = np.broadcast_to(v, w.shape)
    codes, scale, minimum = reference.quantize(w, bits, group_size, param_dtype == "float16", True, importance=full)
    assert same_bits(q.scale, scale)
    assert same_bits(q.minimum, minimum)
    assert np.array_equal(q.codes, reference.pack(codes, bits))
    return q


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [None, -1, 7, 16, 32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_weighted_least_squares_equals_reference(isa, bits, group_size, param_dtype, rng):
    long = 576 if group_size in (None, -1, 64) else 260  # more groups than one step of the kernel takes
    for cols in [1, 16, 200, long]:
        w = weights(rng, 2, cols)
        check(w, importances(rng, w.shape), bits, group_size, param_dtype)
        check(w, importances(rng, cols), bits, group_size, param_dtype)
    for row in weights(rng, 10, 70):
        check(row[None], importances(rng, (1, 70)), bits, group_size, param_dtype)
    if long == 576:
        w = rng.standard_normal((2, 1088)).astype("f4")
        check(w, importances(rng, w.shape), bits, group_size, param_dtype)


def test_equal_importance_weighs_nothing(rng):
    w = rng.standard_normal((8, 96)).astype("f4")
    for weight in (1.0, 1e-30, 7e30):
        q = fo.quantize(w, 2, importance=np.full(96, weight, "f4"), param_dtype="float32")
        assert q.error(w).rmse == pytest.approx(
            fo.quantize(w, 2, fit="lsq", param_dtype="float32").error(w).rmse, rel=1e-3
        )


@pytest.mark.parametrize("bits", BITS)
def test_the_weighted_error_is_less(bits, threads, rng):
    w, v = rng.standard_normal((64, 512)).astype("f4"), importances(rng, 512)

    def error(q):
        sums = ErrorSums()
        sums.add(q.dequantize() * np.sqrt(v), w * np.sqrt(v))
        return sums.error().rmse

    plain, weighted = (fo.quantize(w, bits, group_size=32, fit="lsq", importance=i) for i in (None, v))
    assert error(weighted) < 0.8 * error(plain)
    assert plain.error(w).rmse < weighted.error(w).rmse


def test_one_column_that_counts_alone(rng):
    """Every line through its code fits it: the pair of the range stays."""
    w, v = rng.standard_normal((4, 64)).astype("f4"), np.zeros(64, "f4")
    v[5] = 1
    q = check(w, v, 4, 32, "float32")
    assert np.isfinite(q.dequantize()).all()
    check(w, np.zeros(64, "f4"), 4, 32, "float32")


def test_magnitude_needs_no_data(rng):
    w = rng.standard_t(3, (64, 256)).astype("f4")
    largest = np.abs(w) > 3
    plain = fo.quantize(w, 2, fit="lsq").dequantize() - w
    weighted = fo.quantize(w, 2, importance="magnitude").dequantize() - w
    assert np.square(weighted[largest]).sum() < np.square(plain[largest]).sum()
    assert fo.quantize(np.zeros((2, 32), "f4"), importance="magnitude").dequantize().max() == 0


def test_outliers_are_those_that_count(rng):
    w, v = rng.standard_normal((16, 64)).astype("f4"), np.ones(64, "f4")
    v[::2] = 0
    q = fo.quantize(w, 2, group_size=-1, importance=v, outliers=0.05)
    assert (q.outliers.indices % 2 == 1).all()


def test_calibration_gives_the_importance(rng):
    w, x = rng.standard_normal((16, 64)).astype("f4"), importances(rng, (100, 64))
    sums = InputSums(64)
    sums.update(x)
    assert fo.quantize(w, 4, calibration=sums) == fo.quantize(w, 4, importance=sums.importance())
    assert fo.quantize(w, 4, calibration=sums, fit="minmax") == fo.quantize(w, 4)


@pytest.mark.parametrize("layout", ["mask", "index16", "index8", "1x16", "2:4"])
def test_values_of_sparse_weights_are_weighted(layout, rng):
    w = fo.prune(rng.standard_normal((16, 70 if layout != "2:4" else 72)).astype("f4"), sparsity=0.5).to_dense()
    if layout == "2:4":
        w = fo.prune(w, pattern="2:4").to_dense()
    v = importances(rng, w.shape)
    s = fo.SparseTensor.from_dense(w, layout=layout)
    q = s.quantize(2, importance=v)
    error = [float((np.square(t.to_dense() - w) * v).sum()) for t in (q, s.quantize(2, fit="lsq"))]
    assert error[0] < 0.8 * error[1]
    column = v[0]
    assert s.quantize(2, importance=column) == s.quantize(2, importance=np.broadcast_to(column, w.shape).copy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": np.ones(31)}, r"importance: expected shape \(32,\) or \(2, 32\), got \(31,\)"),
        ({"importance": -np.ones(32)}, "importance: expected finite numbers, 0 or more"),
        ({"importance": np.full(32, np.nan)}, "importance: expected finite numbers, 0 or more"),
        ({"importance": "size"}, "importance: expected an array or 'magnitude', got 'size'"),
        ({"importance": np.ones(32), "fit": "minmax"}, "importance: expected None with fit='minmax'"),
        ({"importance": np.ones(32), "calibration": InputSums(32)}, "expected one of them, got both"),
        ({"calibration": InputSums(31)}, "calibration: expected sums of 32 columns, got 31"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fo.quantize(np.ones((2, 32), "f4"), 4, **options)
