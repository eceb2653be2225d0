from dataclasses import replace

import numpy as np
import pytest
import reference
from helpers import BITS, FLOATS, Guarded, dtype_of, same_bits

import fastopt as fo
from fastopt.tensors.quantized import Outliers

pytestmark = pytest.mark.kernel


def packed(w):
    """The weight with different bits, groups and parameters."""
    yield fo.quantize(w, 8)
    yield fo.quantize(w, 4)
    yield fo.quantize(w, 2, group_size=5)
    yield fo.quantize(w, 4, group_size=None, param_dtype="float32")


def dense(t):
    return t.dequantize()


def expected(x, t, bias=None, precision="exact"):
    cols = int(np.prod(t.shape[1:]))
    codes = np.array([fo.unpack_bits(row, t.bits, cols) for row in t.codes]).reshape(t.shape[0], cols)
    return reference.linear(x, codes, t.scale, t.minimum, t.bits, t.group_size, bias, precision)


@pytest.mark.parametrize("batch", [1, 3])
def test_linear_equals_reference(isa, batch, rng):
    for rows, cols in [(1, 1), (3, 7), (5, 16), (4, 33), (2, 511), (3, 513), (2, 1500), (7, 0), (0, 7)]:
        w = rng.standard_normal((rows, cols)).astype("f4")
        x = Guarded(rng.standard_normal((batch, cols)).astype("f4"), 1)
        bias = rng.standard_normal(rows).astype("f4")
        for t in packed(w):
            out = Guarded(np.zeros((batch, rows), "f4"), 3)
            assert fo.linear(x.array, t, bias, out=out.array) is out.array
            assert same_bits(out.array, expected(x.array, t, bias))
            assert x.intact()
            assert out.intact()


ACTIVATIONS = {
    "gaussian": lambda r: r,
    "relu": lambda r: np.maximum(r, 0),
    "outliers": lambda r: np.where(np.arange(r.shape[1]) % 1009 == 5, 50 * r, r),
    "mixed sizes": lambda r: r * np.float32(10.0) ** (np.arange(r.shape[1]) % 61 - 30),
    "subnormal": lambda r: r * 1e-40,
    "zeros": lambda r: r * 0,
    "special": lambda r: np.where(
        np.arange(r.shape[1]) % 200 == 7, np.float32([[np.nan], [np.inf], [1], [3e38], [-1]]), r
    ),
}


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 128, 256, 512, -1, None])
def test_whole_numbers_equal_reference(isa, bits, group_size, precision, rng):
    """Every width of a group in words, short last groups and runs, and a long row; every kind of x."""
    for i, (name, change) in enumerate(ACTIVATIONS.items()):
        cols = [1024, 1000, 515, 128, 64, 31, 9000][i]
        w = rng.standard_normal((3, cols)).astype("f4")
        x = change(rng.standard_normal((5, cols)).astype("f4")).astype("f4")
        q = fo.quantize(w, bits, group_size=group_size, param_dtype=["float16", "float32"][i % 2])
        assert same_bits(fo.linear(x, q, precision=precision), expected(x, q, None, precision)), name


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 48, 32, 128, 1024, -1, None])
def test_panels_of_x_equal_reference(isa, bits, group_size, precision, rng):
    """Whole panels of 16 rows and short ones, rows left over, more panels than go together; rows of W by 32."""
    for batch, rows, cols in [(12, 3, 1100), (27, 33, 200), (16, 1, 31), (83, 5, 70), (16, 70, 1024), (130, 2, 40)]:
        w = rng.standard_normal((rows, cols)).astype("f4")
        x = rng.standard_normal((batch, cols)).astype("f4")
        x[1] *= np.float32(1e-40)
        x[2] *= np.float32(10.0) ** (np.arange(cols) % 61 - 30)
        x[5, cols // 2], x[7, 0] = np.nan, np.inf
        bias = rng.standard_normal(rows).astype("f4") if rows > 1 else None
        q = fo.quantize(w, bits, group_size=group_size, param_dtype="float16" if rows != 5 else "float32")
        assert same_bits(fo.linear(x, q, bias, precision=precision), expected(x, q, bias, precision)), (batch, cols)


def test_blas_of_a_weight_of_one_axis(rng):
    q, x = fo.quantize(rng.standard_normal(100).astype("f4")), rng.standard_normal((3, 100)).astype("f4")
    np.testing.assert_allclose(fo.linear(x, q, precision="blas"), fo.linear(x, q), rtol=1e-4, atol=1e-5)


def test_huge_weights_equal_reference(isa, rng):
    w = np.sign(rng.standard_normal((4, 100))).astype("f4") * np.float32(3e38)
    x = rng.standard_normal((2, 100)).astype("f4") * np.float32(0.01)
    q = fo.quantize(w, 4)
    assert np.isfinite(fo.linear(x, q)).any()
    assert same_bits(fo.linear(x, q), expected(x, q))


@pytest.mark.parametrize("batch", [1, 5])
def test_outliers_count(isa, threads, batch, rng):
    w = rng.standard_normal((70, 200)).astype("f4")
    x = rng.standard_normal((batch, 200)).astype("f4")
    q = fo.quantize(w, 2, group_size=16, outliers=0.01)
    rows, cols = np.divmod(q.outliers.indices.astype(np.int64), 200)
    plain = fo.QuantizedTensor(q.codes, q.scale, q.minimum, 2, 16, q.shape, q.dtype)
    want = fo.linear(x, plain).astype("f8")
    for r, c, v in zip(rows, cols, q.outliers.values.astype("f8"), strict=True):
        want[:, r] += x[:, c].astype("f8") * v
    assert same_bits(fo.linear(x, q), want.astype("f4"))
    wide = Outliers(q.outliers.indices.astype(np.int64), q.outliers.values)
    q = fo.QuantizedTensor(q.codes, q.scale, q.minimum, 2, 16, q.shape, q.dtype, wide)
    assert same_bits(fo.linear(x, q), want.astype("f4"))


def test_any_number_of_threads(isa, threads, rng):
    w = rng.standard_normal((301, 1700)).astype("f4")
    x = rng.standard_normal((5, 1700)).astype("f4")
    for t in packed(w):
        if isinstance(t, fo.SparseTensor) or t.group_size in (5, 32):
            assert same_bits(fo.linear(x, t), expected(x, t))


@pytest.mark.parametrize("kind", ["gaussian", "relu", "outliers", "mixed sizes"])
@pytest.mark.parametrize("bits", BITS)
def test_close_to_float64(bits, kind, rng):
    w = rng.standard_normal((64, 4096)).astype("f4")
    x = ACTIVATIONS[kind](rng.standard_normal((8, 4096)).astype("f4")).astype("f4")
    for group_size in (16, 32, 128, -1, 5):
        q = fo.quantize(w, bits, group_size=group_size, fit="minmax")
        want = x.astype("f8") @ q.dequantize().astype("f8").T
        error = np.linalg.norm(fo.linear(x, q) - want, axis=1)
        assert (error <= 5e-7 * np.linalg.norm(want, axis=1)).all()
        error = np.linalg.norm(fo.linear(x, q, precision="int8") - want, axis=1)
        bound = 1.5e-2 if bits in (8, 4, 2) else 2e-2  # about 1.5e-2 whatever the width: it is the error of x
        assert (error <= bound * np.linalg.norm(want, axis=1)).all()
    s = fo.prune(w, sparsity=0.6)
    want = x.astype("f8") @ s.to_dense().astype("f8").T
    assert np.linalg.norm(fo.linear(x, s) - want) <= 5e-7 * np.linalg.norm(want)


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


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("batch", [1, 13, 130])
def test_infinity_where_an_outlier_is(isa, batch, precision, rng):
    """The correction of an outlier may have another sign than its code: then their sum decides, as in NumPy."""
    for group_size in (16, None):
        q = fo.quantize(rng.standard_normal((37, 300)).astype("f4"), 2, group_size=group_size, outliers=0.05)
        x = rng.standard_normal((batch, 300)).astype("f4")
        x[0, 77], x[-1, 299], x[batch // 2, 3] = np.inf, -np.inf, np.inf
        with np.errstate(invalid="ignore"):
            want = x @ q.dequantize().T
        got = fo.linear(x, q, np.ones(37, "f4"), precision=precision)
        at = ~np.isfinite(x).all(axis=1)
        assert np.array_equal(got[at], want[at], equal_nan=True)


def test_products_with_stacks_of_matrices(rng):
    w = rng.standard_normal((7, 7)).astype("f4")
    x = rng.standard_normal((7, 7, 7)).astype("f4")
    for t, dense in ((q := fo.quantize(w), q.dequantize()), (fo.SparseTensor.from_dense(w), w)):
        np.testing.assert_allclose(t @ x, dense @ x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(t @ x[:, :, :3], dense @ x[:, :, :3], rtol=1e-4, atol=1e-5)


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
        if isinstance(t, fo.QuantizedTensor):
            assert same_bits(x @ t.T, fo.linear(x, t))
            with pytest.raises(TypeError):
                x @ t
    # One product of all rows of x: `x @ w.T` would be a product for each x[i], and round in another order.
    assert same_bits(fo.linear(x, w), (x.reshape(6, 10) @ w.reshape(6, 10).T).reshape(2, 3, 6))
    np.testing.assert_allclose(fo.linear(x, w, np.ones(6, "f4")), x @ w.reshape(6, 10).T + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [fo.quantize, lambda w: fo.prune(w, sparsity=0.5), np.asarray])
def test_bad_arguments(make, rng):
    w = make(rng.standard_normal((6, 40)).astype("f4"))
    x = np.ones((2, 40), "f4")
    buffer = np.zeros(200, "f4")
    for call, error, message in [
        (lambda: fo.linear(x.astype("i8"), w), TypeError, "x: expected float32, float64, float16 or bfloat16"),
        (lambda: fo.linear(None, w), TypeError, "x: expected float32, float64, float16 or bfloat16, got object"),
        (
            lambda: fo.linear(np.full((2, 40), 1e39), w),
            ValueError,
            "x: expected values that float32 can hold",
        ),
        (
            lambda: fo.linear(np.ones((2, 6)), w),
            ValueError,
            r"\(2, 6\); a weight is \[out, in\]",
        ),
        (lambda: fo.linear(x[:, 1:], w), ValueError, r"x: expected shape \(..., 40\) for w of shape \(6, 40\)"),
        (lambda: fo.linear(np.float32(1), w), ValueError, "x: expected shape"),
        (lambda: fo.linear(x, w, precision="int4"), ValueError, "precision: expected 'exact', 'int8' or 'blas', got"),
        (lambda: fo.linear(x, w, out=np.empty((2, 7), "f4")), ValueError, r"out: expected a C-contiguous array of"),
        (lambda: fo.linear(x, w, out=np.empty((2, 6))), TypeError, "out: expected a float32 array"),
        (lambda: fo.linear(x, w, np.zeros(5, "f4")), ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
        (lambda: fo.linear(x, w, np.zeros(6, "i4")), TypeError, "bias: expected float32, float64, float16 or bfloat16"),
        (
            lambda: fo.linear(x, w, [None] * 6),
            TypeError,
            "bias: expected float32, float64, float16 or bfloat16, got obj",
        ),
        (
            lambda: fo.linear(x, w, np.full(6, -1e39)),
            ValueError,
            "bias: expected values that float32 can hold",
        ),
        (
            lambda: fo.linear(buffer[:80].reshape(2, 40), w, out=buffer[70:82].reshape(2, 6)),
            ValueError,
            "shares memory",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("make", [fo.quantize, lambda w: fo.prune(w, sparsity=0.5), np.asarray])
def test_x_and_bias_may_have_any_strides(make, rng):
    w = make(rng.standard_normal((6, 40)).astype("f4"))
    x, bias = rng.standard_normal((3, 80)).astype("f4")[:, ::2], rng.standard_normal(12).astype("f4")[::-2]
    assert same_bits(fo.linear(x, w, bias), fo.linear(x.copy(), w, bias.copy()))


@pytest.mark.parametrize("make", [fo.quantize, lambda w: fo.prune(w, sparsity=0.5), np.asarray])
def test_out_must_be_writable(make, rng):
    w = make(rng.standard_normal((6, 40)).astype("f4"))
    out = np.zeros((2, 6), "f4")
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: is read-only"):
        fo.linear(np.ones((2, 40), "f4"), w, out=out)


def test_what_is_no_weight_is_refused():
    with pytest.raises(TypeError, match="w: expected a QuantizedTensor, a SparseTensor or an array, got list"):
        fo.linear(np.ones(2, "f4"), [[1.0, 2.0]])


@pytest.mark.parametrize("batch", [1, 7, 20])
@pytest.mark.parametrize("dtype", FLOATS)
def test_other_float_types_are_converted(dtype, batch, rng):
    """float64 is what NumPy and scikit-learn make, and what `pack` keeps of such a model."""
    kind = dtype_of(dtype)
    x, bias = rng.standard_normal((batch, 40)).astype(kind), rng.standard_normal(6).astype(kind)
    dense = rng.standard_normal((6, 40)).astype(kind)
    x4, bias4 = x.astype("f4"), bias.astype("f4")
    for w, w4 in [
        (dense, dense.astype("f4")),
        (fo.quantize(dense), fo.quantize(dense.astype("f4"))),
        *(
            (fo.prune(dense, sparsity=0.5, layout=layout), fo.prune(dense.astype("f4"), sparsity=0.5, layout=layout))
            for layout in ("mask", "index16", "index8", "1x16")
        ),
    ]:
        want = fo.linear(x4, w4, bias4)
        assert want.dtype == np.float32
        for given in (x, x.astype(kind.newbyteorder(">")), x.tolist() if dtype == "float64" else x):
            assert same_bits(fo.linear(given, w, bias), want)
        assert same_bits(fo.linear(x, w, bias, precision="blas"), fo.linear(x4, w4, bias4, precision="blas"))
        out = np.empty((batch, 6), "f4")
        assert fo.linear(x, w, bias, out=out) is out
        assert same_bits(out, want)
        if not isinstance(w, np.ndarray):
            assert same_bits(w @ x.T, w4 @ x4.T)
            assert same_bits(x @ w.T, x4 @ w4.T)


def test_a_packed_bias(rng):
    x, w, bias = (rng.standard_normal(shape).astype("f4") for shape in ((3, 40), (6, 40), 6))
    packed = fo.quantize(bias)
    assert same_bits(fo.linear(x, fo.quantize(w), packed), fo.linear(x, fo.quantize(w), packed.to_dense()))


@pytest.mark.parametrize("make", [fo.quantize, lambda w: fo.prune(w, sparsity=0.5)])
def test_x_times_w_says_that_weights_are_out_in(make, rng):
    """A square weight that is [in, out] would give wrong numbers without a word."""
    w, x = make(rng.standard_normal((40, 40)).astype("f4")), np.ones((2, 40), "f4")
    with pytest.raises(TypeError, match=r"a packed weight is \[out, in\]: use x @ w.T"):
        x @ w
    with pytest.raises(TypeError, match=r"a packed weight is \[out, in\]: use x @ w.T"):
        x.tolist() @ w


@pytest.mark.parametrize("shape", [(600, 1000), (30, 5, 2, 4), (1, 5), (0, 5), (5, 0)])
def test_many_rows_of_x(shape, rng):
    w = rng.standard_normal(shape).astype("f4")
    q = fo.quantize(w, 4, outliers=0.01)
    cols = int(np.prod(shape[1:]))
    x = rng.standard_normal((2, 70, cols)).astype("f4")
    bias = rng.standard_normal(shape[0]).astype("f4")
    want = x.astype("f8") @ q.dequantize().reshape(shape[0], cols).T.astype("f8") + bias
    got = fo.linear(x, q, bias)
    assert got.shape == (2, 70, shape[0])
    assert np.linalg.norm(got - want) <= 5e-7 * np.linalg.norm(want)
    assert np.linalg.norm(fo.linear(x, q, bias, precision="int8") - want) <= 1.5e-2 * np.linalg.norm(want)
    assert np.linalg.norm(fo.linear(x, q, bias, precision="blas") - want) <= 5e-7 * np.linalg.norm(want)
    out = np.empty_like(got)
    assert fo.linear(x, q, bias, out=out, precision="blas") is out
    assert np.linalg.norm(out - want) <= 5e-7 * np.linalg.norm(want)
    assert fo.linear(x, q, bias, out=out) is out
    assert same_bits(out, got)
    if shape[0] > 5 and cols == 1000:
        with pytest.raises(ValueError, match="shares memory with"):
            fo.linear(x, q[:1000], out=x.reshape(-1)[: 140 * 600].reshape(2, 70, 600))


@pytest.mark.parametrize("pack", [fo.quantize, fo.SparseTensor.from_dense, np.asarray])
def test_out_shares_memory_with_nothing(pack, rng):
    memory = rng.standard_normal(3 * 64).astype("f4")
    x, bias, out = memory[:64], memory[64:128], memory[128:]
    w = rng.standard_normal((64, 64)).astype("f4")
    assert same_bits(fo.linear(x, pack(w), bias, out=out), fo.linear(x, pack(w), bias))
    for name, alias in (("x", memory[:64]), ("bias", memory[96:160])):
        with pytest.raises(ValueError, match=f"shares memory with (out|{name})"):
            fo.linear(x, pack(w), bias, out=alias)


@pytest.mark.parametrize("precision", ["exact", "blas"])
@pytest.mark.parametrize("batch", [1, 200])
@pytest.mark.parametrize("name", ["codes", "scale", "minimum"])
def test_out_shares_no_memory_with_the_weight(isa, batch, name, precision, rng):
    q = fo.quantize(rng.standard_normal((64, 64)).astype("f4"), param_dtype="float32")
    memory = np.zeros(1 << 16, "u1")
    array = getattr(q, name)
    q = replace(q, **{name: memory[: array.nbytes].view(array.dtype).reshape(array.shape)})
    with pytest.raises(ValueError, match=f"{name}: shares memory with out|out: shares memory with {name}"):
        fo.linear(
            np.ones((batch, 64), "f4"), q, out=memory.view("f4")[: batch * 64].reshape(batch, 64), precision=precision
        )


def test_out_shares_no_memory_with_a_sparse_or_a_transposed_weight(rng):
    memory = np.zeros(64 * 64, "f4")
    memory[:] = rng.standard_normal(memory.size)
    s = fo.SparseTensor.from_dense(memory.reshape(64, 64).copy())
    s = replace(s, values=memory)
    with pytest.raises(ValueError, match="shares memory with"):
        fo.linear(np.ones(64, "f4"), s, out=memory[-64:])
    for w in (memory.reshape(64, 64).T, memory.reshape(64, 64)[::-1]):
        with pytest.raises(ValueError, match="shares memory with"):
            fo.linear(np.ones(64, "f4"), w, out=memory[-64:])


@pytest.mark.parametrize("cols", [1024, 1000])
@pytest.mark.parametrize("group_size", [16, 128])
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(isa, cols, group_size, rng):
    x = rng.standard_normal((1, cols)).astype("f4")
    for bits in BITS:
        q = fo.quantize(rng.standard_normal((4, cols)).astype("f4"), bits, group_size=group_size)
        alone = [fo.linear(x, q[row : row + 1])[0, 0] for row in range(4)]
        q.scale[1, 0], q.minimum[2, -1] = np.inf, np.nan
        got = fo.linear(x, q)[0]
        assert same_bits(got[[0, 3]], np.array(alone, "f4")[[0, 3]])
        assert not np.isfinite(got[[1, 2]]).any()


def test_a_message_does_not_contradict_itself(rng):
    q = fo.quantize(rng.standard_normal((32, 32)).astype("f4"), bits=4)
    for out, got in ((q, "QuantizedTensor"), (np.empty((2, 32)), "float64"), ([0.0], "list")):
        with pytest.raises(TypeError, match=f"out: expected a float32 array, got {got}"):
            fo.linear(np.ones((2, 32), "f4"), q, out=out)
