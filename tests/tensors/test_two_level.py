"""Parameters in two levels: the kernels equal the reference, and a tensor is what its decoded pairs make of it."""

import pickle

import numpy as np
import pytest
import reference

import fastopt as fo
from fastopt.tensors.quantized import QuantizedTensor

SHAPES = [(16, 4, -1, 96), (16, 4, -1, 531), (32, 6, 256, 600), (16, 4, 256, 512), (20, 8, -1, 50), (8, 6, 256, 7)]


def weight(rng, rows, cols):
    w = (rng.standard_t(5, (rows, cols)) / 10).astype("f4")
    w[1], w[2], w[3] = 2.5, 0, np.abs(w[3]) + 3
    w[4, : cols // 2] = 0
    return w


def require_equal(q, found, param_bits):
    codes, qs, qm, floats = found
    assert q.param_floats.dtype == floats.dtype
    assert np.array_equal(q.param_floats, floats)
    assert np.array_equal(q.scale, reference.pack(qs, param_bits))
    assert np.array_equal(q.minimum, reference.pack(qm, param_bits))
    assert np.array_equal(q.codes, reference.pack(codes, q.bits))


@pytest.mark.parametrize(("group_size", "param_bits", "param_group", "cols"), SHAPES)
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_fit_is_that_of_the_reference(bits, group_size, param_bits, param_group, cols, rng):
    w = weight(rng, 7, cols)
    for importance in (None, rng.random(cols).astype("f4") ** 4, rng.random(w.shape).astype("f4")):
        q = fo.quantize(
            w, bits, group_size=group_size, param_bits=param_bits, param_group=param_group, importance=importance
        )
        h = None if importance is None else importance.reshape(-1, cols)
        found = reference.quantize_two_level(w, bits, group_size, param_bits, param_group, True, h)
        require_equal(q, found, param_bits)
        codes, qs, qm, floats = found
        scale, minimum = reference.two_level_pairs(floats, qs, qm, group_size, param_group)
        assert np.array_equal(q.dequantize(), reference.dequantize(codes, scale, minimum, group_size))


def test_floats_that_float16_cannot_hold(rng):
    for w in (
        rng.standard_normal((3, 64)) * 1e-7,
        rng.standard_normal((3, 64)) * 1e30,
        1000 + rng.random((3, 64)) / 99,
    ):
        w = w.astype("f4")
        q = fo.quantize(w, 4, param_bits=6)
        assert q.param_dtype == np.float32
        require_equal(q, reference.quantize_two_level(w, 4, 16, 6), 6)
        assert np.abs(q.dequantize() - w).max() <= 0.1 * np.ptp(w)


@pytest.mark.parametrize(("bits", "group_size", "most"), [(4, 16, 0.066), (4, 32, 0.078), (3, 16, 0.13), (2, 16, 0.27)])
def test_less_error_than_one_level_of_as_many_bytes(bits, group_size, most, rng):
    w = rng.standard_normal((64, 768)).astype("f4")
    q, one = fo.quantize(w, bits, group_size=group_size, param_bits=4), fo.quantize(w, bits, group_size=64, fit="lsq")
    assert q.bits_per_weight < one.bits_per_weight + 0.13
    assert q.error(w).relative < most
    assert q.error(w).relative < 0.9 * one.error(w).relative


@pytest.fixture
def q(rng):
    return fo.quantize(weight(rng, 40, 300), 4, param_bits=4)


def test_everything_is_that_of_one_level(q, rng):
    one = q.one_level()
    assert one.one_level() is one
    assert one.param_bits is None
    assert np.array_equal(q.dequantize(), one.dequantize())
    x = rng.standard_normal((33, 300)).astype("f4")
    for rows in (1, 3, 5, 16, 33):
        for precision in ("exact", "int8", "blas"):
            assert np.array_equal(
                fo.linear(x[:rows], q, precision=precision), fo.linear(x[:rows], one, precision=precision)
            )
    x[0, 3] = np.inf
    assert np.array_equal(fo.linear(x, q), fo.linear(x, one), equal_nan=True)
    assert np.array_equal(q[3:9].dequantize(), one[3:9].dequantize())
    assert np.array_equal(fo.embedding(q, [7, 0]), fo.embedding(one, [7, 0]))


def test_value(q):
    assert pickle.loads(pickle.dumps(q)) == q == q.copy()
    assert q != q.one_level()
    assert q[[3, 4]] == q[3:5]
    assert q.nbytes == 40 * (150 + 2 * 10 + 6)
    assert "4-bit (float16 for a row) parameters" in repr(q)


def test_out_and_threads(q, rng, monkeypatch):
    w = weight(rng, 40, 300)
    fresh = fo.quantize(w, 4, param_bits=4)
    assert fo.quantize(w, 4, param_bits=4, out=q) is q
    assert q == fresh
    with pytest.raises(ValueError, match="out: expected param_bits 6"):
        fo.quantize(w, 4, group_size=16, param_bits=6, out=q)
    threads = fo.get_num_threads()
    try:
        fo.set_num_threads(1)
        assert fo.quantize(w, 4, param_bits=4) == fresh
    finally:
        fo.set_num_threads(threads)


def test_outliers_and_calibration(rng):
    w = weight(rng, 40, 300)
    w[0, 0] = 50
    q = fo.quantize(w, 4, param_bits=4, outliers=0.01)
    assert abs(q.dequantize()[0, 0] - 50) < 1e-4
    q = fo.quantize(w, 3, param_bits=4, max_error=0.05)
    assert np.abs(q.dequantize() - w).max() <= 0.05001
    calibration = fo.Calibration()
    calibration.update("w", rng.standard_normal((64, 300)).astype("f4"))
    q = fo.quantize(w, 4, param_bits=4, calibration=calibration["w"])
    assert q == fo.quantize(w, 4, param_bits=4, importance=calibration["w"].importance())


@pytest.mark.parametrize("param_group", [-1, 256])
@pytest.mark.parametrize(("rows", "cols"), [(3, 40), (60, 3000)])
def test_sparse_values(rows, cols, param_group, rng):
    s = fo.prune(rng.standard_normal((rows, cols)).astype("f4"), sparsity=0.5)
    q = s.quantize(4, group_size=16, param_bits=4, param_group=param_group)
    one = fo.SparseTensor(q.layout, q.positions, q.row_offsets, q.values.one_level(), q.shape)
    assert np.array_equal(q.to_dense(), one.to_dense())
    for batch in (1, 7):
        x = rng.standard_normal((batch, cols)).astype("f4")
        assert np.array_equal(fo.linear(x, q), fo.linear(x, one))


def test_no_rows_or_columns():
    for shape in ((0, 32), (5, 0), (0,)):
        q = fo.quantize(np.zeros(shape, "f4"), 4, param_bits=4)
        assert q.dequantize().shape == shape
        assert q.one_level().dequantize().shape == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_bits": 5}, "param_bits: expected 4, 6, 8 or None"),
        ({"param_bits": 4.0}, "param_bits: expected 4, 6, 8 or None"),
        ({"param_bits": 4, "param_group": 128}, "param_group: expected -1, a row, or 256"),
        ({"param_group": 256}, "param_group: expected -1 without param_bits"),
        ({"param_bits": 4, "group_size": None}, "group_size: expected a number of columns with param_bits"),
        ({"param_bits": 4, "group_size": 24, "param_group": 256}, "group_size: expected a divisor of param_group"),
        ({"param_bits": 4, "fit": "minmax"}, "fit: expected 'auto', 'lsq' or 'gptq' with param_bits"),
        ({"param_bits": 4, "fit": "gptq"}, "fit: 'gptq' needs calibration"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        fo.quantize(np.ones((4, 64), "f4"), 4, **options)


def test_bad_values():
    w = np.ones((4, 64), "f4")
    w[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"w: expected finite float32 values, got nan at \(2, 3\)"):
        fo.quantize(w, 4, param_bits=4)
    w = np.random.default_rng(0).choice([-65504, 65504], (4, 64)).astype("f2")
    w[:, ::3] = 0
    with pytest.raises(ValueError, match="too near the largest of float16 for param_bits"):
        fo.quantize(w, 4, param_bits=4)


def test_arrays_that_do_not_fit(q):
    fields = list(q._fields())
    for at, value in (
        (1, q.scale[:, 1:]),
        (2, q.minimum[1:]),
        (8, 6),
        (9, 256),
        (10, q.param_floats[..., :1]),
        (10, None),
    ):
        wrong = [*fields[:at], value, *fields[at + 1 :]]
        with pytest.raises((TypeError, ValueError), match=r"scale|minimum|param_"):
            QuantizedTensor(*wrong)
