"""GPTQ: codes that make the errors of the outputs small."""

import numpy as np
import pytest
import reference
from helpers import BITS, same_bits

import fastopt as fo
from fastopt import _core
from fastopt.tensors.calibration import InputSums

pytestmark = pytest.mark.kernel


def inputs_of(x):
    sums = InputSums(x.shape[1], products=True)
    sums.update(x)
    return sums


def correlated(rng, rows, cols):
    """Inputs of very different sizes, that depend on each other."""
    mix = rng.standard_normal((cols, cols)) * np.exp(rng.standard_normal(cols))
    return (rng.standard_normal((rows, cols)) @ mix + rng.standard_normal(cols)).astype("f4")


def output_error(q, w, x):
    e = q.to_dense().astype("f8") - w
    return np.sqrt(np.square(x @ e.T).sum() / np.square(x @ w.astype("f8").T).sum())


@pytest.mark.parametrize("n", [1, 2, 5, 63, 64, 65, 150])
def test_cholesky_equals_reference(isa, threads, n, rng):
    x = rng.standard_normal((2 * n, n))
    a = x.T @ x
    lower = a.copy()
    assert _core.cholesky(lower)
    assert same_bits(np.tril(lower), reference.cholesky(a))
    np.testing.assert_allclose(np.tril(lower) @ np.tril(lower).T, a, rtol=1e-9, atol=1e-9)
    a[n // 2, n // 2] = -1
    assert not _core.cholesky(a)


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [-1, 5, 16, 48])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_equals_reference(isa, bits, group_size, param_dtype, rng):
    for rows, cols in [(3, 1), (2, 31), (65, 20), (4, 70)]:
        w, x = rng.standard_normal((rows, cols)).astype("f4"), correlated(rng, 40, cols)
        w[0] *= np.float32(1e-7) if cols == 31 else 1  # needs float32 parameters
        sums = inputs_of(x)
        q = fo.quantize(w, bits, group_size=group_size, param_dtype=param_dtype, fit="gptq", calibration=sums)
        half = param_dtype == "float16"
        codes, scale, minimum = reference.gptq(w, sums.products, sums.rows, bits, group_size, half, 1)
        assert same_bits(q.scale, scale)
        assert same_bits(q.minimum, minimum)
        assert np.array_equal(q.codes, reference.pack(codes, bits))


@pytest.mark.parametrize(
    ("rows", "cols", "group_size", "param_bits", "param_group"),
    [(3, 1, 16, 4, -1), (67, 70, 16, 4, -1), (18, 300, 32, 6, 256), (5, 50, 20, 8, -1)],
)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_two_levels_equal_reference(isa, bits, rows, cols, group_size, param_bits, param_group, rng):
    w, x = rng.standard_normal((rows, cols)).astype("f4"), correlated(rng, 40, cols)
    w[0] = 1.5
    w[2] = abs(w[2]) * np.float32(1e-7 if cols == 50 else 1)  # 1e-7 needs float32 parameters
    sums = inputs_of(x)
    options = {"group_size": group_size, "param_bits": param_bits, "param_group": param_group}
    q = fo.quantize(w, bits, fit="gptq", calibration=sums, **options)
    floats = fo.quantize(w, bits, calibration=sums, **options).param_floats
    assert same_bits(q.param_floats, floats)
    per_part = -(-cols // group_size) if param_group == -1 else param_group // group_size
    two_level = param_bits, floats, per_part
    found = reference.gptq(w, sums.products, sums.rows, bits, group_size, True, 1, two_level=two_level)
    for ours, theirs, width in zip((q.codes, q.scale, q.minimum), found, (bits, param_bits, param_bits), strict=True):
        assert np.array_equal(ours, reference.pack(theirs, width))


@pytest.mark.parametrize("options", [{}, {"param_bits": 4}])
def test_the_same_bits_for_any_number_of_threads(threads, options, rng):
    w, x = rng.standard_normal((200, 96)).astype("f4"), correlated(rng, 300, 96)
    sums = inputs_of(x)
    q = fo.quantize(w, 4, fit="gptq", calibration=sums, **options)
    fo.set_num_threads(1)
    assert q == fo.quantize(w, 4, fit="gptq", calibration=sums, **options)


@pytest.mark.parametrize(
    ("bits", "group_size", "param_bits"),
    [(4, 32, None), (2, 16, None), (2, 64, None), (4, -1, None), (3, 16, 4), (2, 16, 4)],
)
def test_errors_of_outputs_are_much_smaller(bits, group_size, param_bits, rng):
    w, x = rng.standard_normal((128, 192)).astype("f4"), correlated(rng, 4000, 192)
    seen, others = x[:3000], x[3000:]
    sums = inputs_of(seen)
    plain, diagonal, gptq = (
        output_error(fo.quantize(w, bits, group_size=group_size, param_bits=param_bits, **options), w, others)
        for options in ({"fit": "lsq"}, {"calibration": sums}, {"calibration": sums, "fit": "gptq"})
    )
    assert gptq < 0.8 * diagonal < 0.8 * plain


def test_columns_that_are_always_zero(rng):
    w, x = rng.standard_normal((64, 64)).astype("f4"), correlated(rng, 500, 64)
    x[:, 10:20] = 0
    q = fo.quantize(w, 4, fit="gptq", calibration=inputs_of(x))
    two = fo.quantize(w, 4, fit="gptq", param_bits=6, calibration=inputs_of(x))
    assert output_error(two, w, x) < output_error(fo.quantize(w, 4, fit="lsq"), w, x)
    assert np.abs(q.dequantize() - w)[:, 10:20].max() < 1
    assert output_error(q, w, x) < output_error(fo.quantize(w, 4, fit="lsq"), w, x)
    nothing = inputs_of(np.zeros((5, 64), "f4"))
    for params in ({}, {"param_bits": 4}):
        plain = fo.quantize(w, 4, fit="lsq", **params)
        assert fo.quantize(w, 4, fit="gptq", calibration=nothing, **params) == plain


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_few_rows_are_damped(rows, rng):
    w, x = rng.standard_normal((64, 64)).astype("f4"), correlated(rng, 1000, 64)
    q = fo.quantize(w, 4, fit="gptq", calibration=inputs_of(x[:rows]))
    assert output_error(q, w, x) < 1.3 * output_error(fo.quantize(w, 4), w, x)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes_shapes_and_out(dtype, rng):
    w, x = rng.standard_normal((16, 4, 3, 3)).astype(dtype), correlated(rng, 100, 36)
    sums = inputs_of(x)
    q = fo.quantize(w, 4, fit="gptq", calibration=sums)
    assert (q.shape, q.dtype) == (w.shape, w.dtype)
    again = fo.quantize(np.zeros_like(w), 4)
    assert fo.quantize(w, 4, fit="gptq", calibration=sums, out=again) is again
    assert again == q
    row = fo.quantize(w[0].reshape(-1), 4, fit="gptq", calibration=sums)
    assert row.shape == (36,)
    kept = fo.quantize(w, 2, fit="gptq", calibration=sums, outliers=0.01)
    assert kept.outliers.indices.size == 6
    assert fo.quantize(np.zeros((0, 36), dtype), 4, fit="gptq", calibration=sums).shape == (0, 36)


def test_refused(rng):
    w, sums = np.ones((2, 32), "f4"), InputSums(32)
    products = inputs_of(correlated(rng, 100, 32))
    with pytest.raises(ValueError, match="fit: 'gptq' needs calibration"):
        fo.quantize(w, fit="gptq")
    with pytest.raises(ValueError, match="'gptq' needs the products of inputs"):
        fo.quantize(w, fit="gptq", calibration=sums)
    with pytest.raises(ValueError, match="group_size: expected a number of columns"):
        fo.quantize(w, fit="gptq", calibration=products, group_size=None)
    bad = w.copy()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"w: expected finite float32 values, got nan at \(1, 2\)"):
        fo.quantize(bad, fit="gptq", calibration=products)
    with pytest.raises(ValueError, match="fit: 'gptq' needs calibration"):
        fo.quantize(w, fit="gptq", importance=np.ones(32))
    products.products[3, 4] = products.products[4, 3] = 1e9
    with pytest.raises(ValueError, match="not positive definite"):
        fo.quantize(w, fit="gptq", calibration=products)
