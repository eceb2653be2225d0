import copy
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import reference
from helpers import BITS, FLOATS, SIZES, Guarded, dtype_of, same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastopt as fo
from fastopt import _core
from fastopt.tensors.quantized import Outliers

pytestmark = pytest.mark.kernel

GROUPS = [None, -1, 1, 3, 16, 32, 50]


def weights(rng, rows, cols):
    """Gaussian rows, some of them constant, tiny, huge or far from zero."""
    w = rng.standard_normal((rows, cols)).astype("f4")
    for i, change in enumerate(
        [
            lambda r: r * 0 + np.float32(3.7),
            lambda r: r * np.float32(1e-7),
            lambda r: r * np.float32(1e5),
            lambda r: 1000 + r * np.float32(1e-3),
            lambda r: r * np.float32(1e-40),
            lambda r: np.abs(r),
            lambda r: np.sign(r) * np.float32(3e38),
            lambda r: r * 0,
        ]
    ):
        if i + 1 < rows:
            w[i + 1] = change(w[i + 1])
    return w


def check(w, bits, group_size, param_dtype, fit="minmax"):
    q = fo.quantize(w, bits, group_size=group_size, param_dtype=param_dtype, fit=fit)
    codes, scale, minimum = reference.quantize(w, bits, group_size, param_dtype == "float16", fit == "lsq")
    assert q.scale.dtype == scale.dtype
    assert same_bits(q.scale, scale)
    assert same_bits(q.minimum, minimum)
    assert np.array_equal(q.codes, reference.pack(codes, bits))
    assert same_bits(q.dequantize(), reference.dequantize(codes, scale, minimum, group_size))
    return q


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_equals_reference(isa, bits, group_size, param_dtype, rng):
    for cols in [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000]:
        check(weights(rng, 2, cols), bits, group_size, param_dtype)
    check(weights(rng, 10, 70), bits, group_size, param_dtype)
    for row in weights(rng, 10, 70):
        check(row[None], bits, group_size, param_dtype)


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [None, -1, 4, 8, 16, 32, 64, 544])
@pytest.mark.parametrize("bits", BITS)
def test_groups_that_fill_vectors_equal_reference(isa, bits, group_size, param_dtype, rng):
    for rows, cols in [(1, 64), (3, 1088)]:  # 1088 / 64 is 17: the last groups of a row are fewer
        check(rng.standard_normal((rows, cols)).astype("f4"), bits, group_size, param_dtype)
    check(weights(rng, 10, 320), bits, group_size, param_dtype)


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_correctly_rounded(isa, bits):
    width = np.arange(0x3F800000, 0x40000000, 61, np.uint32).view("f4")  # significands of all kinds
    w = np.stack([np.zeros_like(width), width], axis=1).reshape(1, -1)
    scale = fo.quantize(w, bits, group_size=2, param_dtype="float32", fit="minmax").scale
    assert same_bits(scale[0], width / np.float32((1 << bits) - 1))


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [None, -1, 7, 32])
@pytest.mark.parametrize("bits", BITS)
def test_least_squares_equals_reference(isa, bits, group_size, param_dtype, rng):
    for cols in [0, 1, 16, 200, 576]:
        check(weights(rng, 2, cols), bits, group_size, param_dtype, "lsq")
    for row in weights(rng, 10, 70):
        check(row[None], bits, group_size, param_dtype, "lsq")


# Bounds on the relative RMSE; the ranges alone are a fifteenth to a half above them.
@pytest.mark.parametrize(
    ("bits", "group_size", "bound"),
    [
        (4, 128, 0.0995),
        (4, 64, 0.0876),
        (4, 32, 0.0745),
        (2, 128, 0.350),
        (2, 64, 0.337),
        (2, 32, 0.314),
        (2, -1, 0.360),
    ],
)
def test_least_squares_on_gaussian_weights(bits, group_size, bound, rng):
    w = rng.standard_normal((64, 4096)).astype("f4")
    fitted = fo.quantize(w, bits, group_size=group_size, fit="lsq").error(w)
    assert fitted.rmse <= bound * np.sqrt(np.mean(w**2))
    assert fitted.rmse < fo.quantize(w, bits, group_size=group_size, fit="minmax").error(w).rmse


@pytest.mark.parametrize("bits", BITS)
def test_a_long_row_and_any_number_of_threads(isa, threads, bits, rng):
    check(rng.standard_normal((1, 100003)).astype("f4"), bits, 50, "float16")
    check(rng.standard_normal((300, 1000)).astype("f4"), bits, None, "float32")


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack(isa, bits, rng):
    for n in SIZES:
        codes = Guarded(rng.integers(0, 1 << bits, n, dtype=np.uint8), n % 4)
        packed = Guarded(np.zeros(-(-n * bits // 8), np.uint8), 1)
        _core.pack(codes.array, bits, packed.array)
        assert np.array_equal(packed.array, reference.pack(codes.array, bits))
        back = Guarded(np.zeros(n, np.uint8), 3)
        _core.unpack(packed.array, bits, back.array)
        assert np.array_equal(back.array, codes.array)
        assert codes.intact()
        assert packed.intact()
        assert back.intact()
        assert np.array_equal(fo.unpack_bits(fo.pack_bits(codes.array, bits), bits, n), codes.array)


def test_writes_stay_inside(isa, rng):
    for n in SIZES[:-1]:
        x = Guarded(rng.standard_normal((3, n)).astype("f4"), n % 4)
        codes, out = Guarded(np.zeros((3, -(-n // 2)), np.uint8), 1), Guarded(np.zeros((3, n), "f4"), 2)
        scale = Guarded(np.zeros((3, -(-n // 32)), "f2"), 1)
        minimum = Guarded(np.zeros((3, -(-n // 32)), "f2"), 3)
        _core.quantize(x.array, codes.array, scale.array, minimum.array, 4, 32)
        _core.dequantize(codes.array, scale.array, minimum.array, 4, 32, out.array)
        assert all(a.intact() for a in (x, codes, scale, minimum, out))


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 70)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.sampled_from(BITS),
    st.sampled_from(GROUPS),
    st.sampled_from(["float16", "float32"]),
)
def test_whatever_the_values_within_half_a_step(w, bits, group_size, param_dtype):
    q = check(w, bits, group_size, param_dtype)
    cols = w.shape[1]
    size = cols if group_size in (None, -1) else group_size
    scale = np.broadcast_to(np.repeat(q.scale.astype("f8"), size, axis=1)[:, :cols], w.shape)
    minimum = np.broadcast_to(np.repeat(q.minimum.astype("f8"), size, axis=1)[:, :cols], w.shape)
    error = np.abs(q.dequantize().astype("f8") - w)
    # Half a step, the rounding of the scale (float16: 2^-11 of it, times the code) and that of float32 sums.
    slack = (2**bits - 1) * 2.0**-11 if q.scale.dtype == np.float16 else 2.0**-12
    rounding = np.maximum(np.abs(minimum), np.abs(w).astype("f8")) * 2.0**-21 + 2.0**-147
    constant = np.where(scale == 0, 2.0**-11 * np.abs(w) if q.scale.dtype == np.float16 else 0.0, 0.0)
    assert (error <= (0.5 + slack) * scale + rounding + constant).all()


def test_formula_of_float32_parameters(rng):
    w = rng.standard_normal((5, 33)).astype("f4")
    q = fo.quantize(w, 4, group_size=-1, param_dtype="float32")
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    want = np.round((w - low) / (high - low) * np.float32(15)).astype(np.uint8)
    assert np.array_equal(fo.unpack_bits(q.codes[0], 4, 33), want[0])
    assert q.minimum.tolist() == low.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_quotients_are_correctly_rounded(isa, bits, rng):
    """Quotients t / d next to the middle of two floats, which are next to where codes change.

    With significands T and D of 24 bits and an odd M of 25, t / d is as near to a middle as floats come where
    T * 2^k - M * D is a small number j: D follows from M and j.
    """
    top = 2**bits - 1
    ties = (2 * np.arange(top) + 1) / (2 * top)
    half = np.floor(np.log2(ties)).astype(int)
    middles = np.rint(ties * 2.0 ** (24 - half)).astype(np.int64)[:, None] | 1
    middles = (middles + 2 * np.arange(-8, 9)).reshape(-1, 1)
    j = np.concatenate([np.arange(-7, 8, 2), [0]])
    t, d = [], []
    for k in (24, 25):
        inverse = np.ones_like(middles)
        for _ in range(6):  # of M, modulo 2^k
            inverse = inverse * (2 - middles * inverse) % 2**k
        divisor = -j * inverse % 2**k
        dividend = (j + middles * divisor) >> k
        fits = (divisor >= 2**23) & (divisor < 2**24) & (dividend >= 2**23) & (dividend < 2**24)
        fits &= (dividend >= divisor) if k == 24 else (dividend < divisor)
        t += dividend[fits].tolist()
        d += divisor[fits].tolist()
    assert len(t) > 8 * top
    t, d = np.array(t, "f4"), np.array(d, "f4")
    t = np.where(t < d, t, t / 2)  # a power of two less of one changes no significand
    for exponent in (-136, -110, -84, -82, -24, 0, 36, 38, 100):
        shift = np.float32(2.0 ** (exponent // 2))
        w = np.stack([0 * t, t, d], axis=1) * shift * np.float32(2.0 ** (exponent - exponent // 2))
        q = fo.quantize(w, bits, group_size=-1, param_dtype="float32", fit="minmax")
        want = np.rint(w / w[:, 2:] * np.float32(top)).astype(np.uint8)
        assert np.array_equal(q.codes, reference.pack(want, bits))


@pytest.mark.parametrize("bits", BITS)
def test_values_at_ties(isa, bits, rng):
    """Values half way between two steps, and those up to two floats off, once more on the grid they were made with."""
    first = fo.quantize(rng.standard_normal((40, 256)).astype("f4"), bits, group_size=64, fit="minmax")
    top, scale, minimum = 2**bits - 1, first.scale.astype("f4"), first.minimum.astype("f4")
    k = rng.integers(0, top, (40, 4, 64)).astype("f4") + np.float32(0.5)
    w = k * scale[..., None] + minimum[..., None]
    w = (w.view("i4") + rng.integers(-2, 3, w.shape, dtype="i4")).view("f4")
    w[..., 0], w[..., 1] = minimum, minimum + scale * np.float32(top)
    q = fo.quantize(w.reshape(40, 256), bits, group_size=64, fit="minmax")
    s, m = (p.astype("f4")[..., None] for p in (q.scale, q.minimum))
    want = np.clip(np.rint((w - m) / s), 0, top).astype(np.uint8).reshape(40, 256)
    assert np.array_equal(q.codes, reference.pack(want, bits))


# Each row is one that some peer corrupts silently.
EDGES = {
    "constant": np.full(64, 3.7),
    "overflowing range": np.resize([-3e38, 3e38, 1e38], 64),
    "beyond float16": np.linspace(-1e5, 1e5, 64),
    "around 1e-7": np.linspace(-1e-7, 1e-7, 64),
    "around 1e-9": np.linspace(-1e-9, 1e-9, 64),
    "subnormal": np.linspace(-1e-40, 1e-40, 64),
    "few subnormal steps": np.linspace(0, 300e-45, 64),
    "far from zero": 1000 + np.linspace(-1e-3, 1e-3, 64),
    "five to six": np.linspace(5, 6, 64),
    "minus zero": np.resize([-0.0, 0.0, 1.0], 64),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", EDGES)
def test_edges_stay_within_half_a_step(name, bits):
    w = EDGES[name].astype("f4")
    q = fo.quantize(w, bits, group_size=32, fit="minmax")
    scale = np.repeat(q.scale.astype("f8"), 32, axis=1)[0]
    error = np.abs(q.dequantize().astype("f8") - w)
    if name == "constant":
        assert (error <= 3.7 * 2.0**-11).all()
        assert fo.quantize(w, bits, param_dtype="float32").dequantize().tolist() == w.tolist()
    else:
        assert (error <= 0.63 * scale + np.abs(w).astype("f8") * 2.0**-21 + 2.0**-147).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_non_finite_is_refused_with_its_place(value):
    for shape, row, col in [((3, 40), 1, 35), ((3, 1088), 0, 0), ((3, 1088), 1, 1023), ((3, 1088), 2, 1087)]:
        w = np.zeros(shape)
        w[row, col] = value
        for group_size in (None, -1, 16, 32, 64):
            with pytest.raises(ValueError, match=rf"w: expected finite float32 values, got .* at \({row}, {col}\)"):
                fo.quantize(w, 4, group_size=group_size)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype, rng):
    w = rng.standard_normal((6, 40)).astype(dtype_of(dtype))
    q = fo.quantize(w, 8)
    assert q.dtype == w.dtype
    back = q.dequantize()
    assert back.dtype == w.dtype
    assert abs(back.astype("f4") - w.astype("f4")).max() < 0.03
    assert np.array_equal(q.codes, fo.quantize(w.astype("f4"), 8).codes)


def test_rows_without_columns_take_no_time():
    """A file of a few bytes may claim any number of them."""
    w = np.zeros((1 << 40, 0), np.float32)
    for options in ({"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 8, "param_bits": 4, "param_group": 256}):
        assert fo.quantize(w, **options).dequantize().shape == w.shape


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0), (0, 3), (4, 5), (4, 3, 2, 2)])
@pytest.mark.parametrize("group_size", ["auto", None, -1, 7])
def test_shapes(shape, group_size, rng):
    w = rng.standard_normal(shape).astype("f4")
    q = fo.quantize(w, 8, group_size=group_size)
    assert q.shape == shape
    assert q.dequantize().shape == shape
    assert np.allclose(q.dequantize(), w, atol=0.02)


def test_layouts_of_the_input(rng):
    w = rng.standard_normal((8, 40)).astype("f4")
    want = fo.quantize(w)
    readonly = w.copy()
    readonly.flags.writeable = False
    misaligned = np.zeros(w.nbytes + 1, np.uint8)[1:].view("f4").reshape(w.shape)
    misaligned[...] = w
    for other in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], w.astype(">f4"), readonly, misaligned):
        assert np.array_equal(fo.quantize(other).codes, want.codes)


def test_dequantize_into_out(rng):
    w = rng.standard_normal((8, 40)).astype("f4")
    q = fo.quantize(w)
    out = np.empty_like(w)
    assert q.dequantize(out=out) is out
    assert np.array_equal(out, q.dequantize())
    readonly = w.copy()
    readonly.flags.writeable = False
    misaligned = np.zeros(w.nbytes + 1, np.uint8)[1:].view("f4").reshape(w.shape)
    for name in ("codes", "scale", "minimum"):
        array, memory = getattr(q, name), np.zeros((8, 40), "f4")
        lent = replace(q, **{name: memory.reshape(-1).view(array.dtype)[: array.size].reshape(array.shape)})
        with pytest.raises(ValueError, match=f"{name}: shares memory with out|out: shares memory with {name}"):
            lent.dequantize(out=memory)
    for bad, error, message in [
        (np.empty((8, 41), "f4"), ValueError, r"out: expected shape \(8, 40\), got \(8, 41\)"),
        (np.empty((8, 40)), TypeError, "out: expected float32, got float64"),
        (np.empty((8, 80), "f4")[:, ::2], ValueError, "out: must be C-contiguous"),
        (np.empty((40, 8), "f4").T, ValueError, "out: must be C-contiguous"),
        (np.empty((8, 40), ">f4"), TypeError, "out: expected float32, got float32 in the other byte order"),
        (readonly, ValueError, "out: is read-only"),
        (misaligned, ValueError, "out: must be aligned"),
        ([1.0], TypeError, "out: expected a NumPy array, got list"),
    ]:
        before = np.array(bad, copy=True) if isinstance(bad, np.ndarray) else None
        with pytest.raises(error, match=message):
            q.dequantize(out=bad)
        assert before is None or same_bits(before, bad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.quantize(np.zeros(3), bits=7), ValueError, "bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        (lambda: fo.quantize(np.zeros(3), group_size=0), ValueError, "group_size: expected a positive number"),
        (lambda: fo.quantize(np.zeros(3), group_size=-2), ValueError, "group_size: expected"),
        (lambda: fo.quantize(np.zeros(3), group_size=1.5), TypeError, "group_size: expected an integer.*, got 1.5"),
        (lambda: fo.quantize(np.zeros(3), group_size="row"), TypeError, "group_size: expected an integer.*, got 'row'"),
        (lambda: fo.quantize(np.zeros(3), group_size=True), TypeError, "group_size: expected an integer.*, got True"),
        (lambda: fo.quantize(np.zeros(3), param_dtype="half?"), ValueError, "param_dtype: expected .*, got 'half\\?'"),
        (lambda: fo.quantize(np.zeros(3), outliers="a"), TypeError, "outliers: expected a number, got str"),
        (lambda: fo.quantize(np.zeros(3), max_error="a"), TypeError, "max_error: expected a number, got str"),
        (lambda: fo.quantize(fo.quantize(np.zeros((3, 4)))), TypeError, "w: expected an array, got a QuantizedTensor"),
        (lambda: fo.unpack_bits(np.zeros(3, "u1"), 2, 12.0), TypeError, "count: expected an integer, got 12.0"),
        (lambda: fo.embedding(np.zeros((3, 4)), [0]), TypeError, "q: expected a QuantizedTensor, got ndarray"),
        (lambda: fo.quantize(np.zeros(3), param_dtype="int8"), ValueError, "param_dtype: expected float16 or float32"),
        (
            lambda: fo.quantize(np.zeros(3, int)),
            TypeError,
            "w: expected float32, float64, float16 or bfloat16, got int",
        ),
        (lambda: fo.quantize("w"), TypeError, "w: expected float32"),
        (
            lambda: fo.quantize(np.zeros(3), fit="hqq"),
            ValueError,
            "fit: expected 'auto', 'minmax', 'lsq' or 'gptq', got 'hqq'",
        ),
        (lambda: fo.quantize(np.zeros(3), outliers=1.5), ValueError, "outliers: expected a share between 0 and 1"),
        (lambda: fo.quantize(np.zeros(3), max_error=np.nan), ValueError, "max_error: expected at least 0, got nan"),
        (lambda: fo.pack_bits(np.array([4], "u1"), 2), ValueError, "codes: expected values below 4, got 4"),
        (lambda: fo.pack_bits(np.array([4]), 2), TypeError, "codes: expected uint8, got int64"),
        (lambda: fo.unpack_bits(np.zeros(3, "u1"), 2, 13), ValueError, "count: 3 bytes do not hold 13 codes"),
        (lambda: fo.unpack_bits(np.zeros(3, "u1"), 2, -1), ValueError, "count: 3 bytes do not hold -1 codes"),
        (lambda: fo.unpack_bits(np.zeros(3), 2, 12), TypeError, "packed: expected uint8, got float64"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_quantized_tensor_checks_its_arrays(rng):
    q = fo.quantize(rng.standard_normal((4, 40)).astype("f4"))
    parts = {"codes": q.codes, "scale": q.scale, "minimum": q.minimum, "bits": 4, "group_size": 32, "shape": (4, 40)}
    for change, error, message in [
        ({"codes": q.codes[:, :-1]}, ValueError, r"codes: expected shape \(4, 20\), got \(4, 19\)"),
        ({"scale": q.scale[:, :1]}, ValueError, r"scale: expected shape \(4, 2\)"),
        ({"minimum": q.minimum.astype("f4")}, TypeError, "scale, minimum: expected float16 or float32, the same"),
        ({"codes": q.codes.astype("i1")}, TypeError, "codes: expected uint8"),
        ({"bits": 7}, ValueError, "bits: expected 8, 6, 5, 4, 3 or 2"),
        ({"group_size": "auto"}, TypeError, "group_size: expected an integer"),
        ({"codes": q.codes.tolist()}, TypeError, "codes: expected a NumPy array, got list"),
        ({"shape": [4, 40]}, TypeError, r"shape: expected a tuple of integers, got \[4, 40\]"),
        ({"shape": (4, 41)}, ValueError, "codes: expected shape"),
    ]:
        with pytest.raises(error, match=message):
            fo.QuantizedTensor(**{**parts, **change}, dtype=np.dtype("f4"))


def test_quantized_tensor_is_a_value(rng):
    q = fo.quantize(rng.standard_normal((4, 40)).astype("f4"))
    for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert np.array_equal(other.dequantize(), q.dequantize())
    assert q.nbytes == 4 * (20 + 4 + 4)
    assert q.bits_per_weight == 8 * q.nbytes / 160
    assert repr(q) == (
        "QuantizedTensor(shape=(4, 40), bits=4, group_size=32, float16 parameters, 5.60 bits per weight)"
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [None, -1, 50])
def test_outliers_keep_what_is_off_furthest(dtype, group_size, rng):
    w = rng.standard_normal((20, 300)).astype(dtype_of(dtype))
    limit = np.sort(np.abs(w), axis=None)[-61]
    plain = fo.quantize(np.clip(w, -limit, limit), 2, group_size=group_size, fit="lsq")  # fitted to all others
    missing = w.astype("f4") - plain.dequantize(dtype="f4")
    q = fo.quantize(w, 2, group_size=group_size, fit="lsq", outliers=0.01)
    worst = np.sort(np.argsort(-np.abs(missing), axis=None, kind="stable")[:60])
    assert np.array_equal(q.outliers.indices, worst)
    assert q.outliers.indices.dtype == np.uint32
    assert same_bits(q.outliers.values, missing.reshape(-1)[worst])
    want = plain.dequantize(dtype="f4")
    want.reshape(-1)[worst] += missing.reshape(-1)[worst]
    assert same_bits(q.dequantize(dtype="f4"), want)
    assert q.nbytes == plain.nbytes + 8 * 60
    assert "60 outliers" in repr(q)
    limited = fo.quantize(w, 2, group_size=group_size, max_error=0.5)
    assert limited.error(w.astype("f4")).max <= 0.5
    both = fo.quantize(w, 2, group_size=group_size, outliers=0.5, max_error=0.5)
    assert len(both.outliers.indices) >= 3000
    assert fo.quantize(w, 2, outliers=0.0) == fo.quantize(w, 2, max_error=np.inf) == fo.quantize(w, 2)
    assert fo.quantize(np.ones((2, 3), "f4"), 4, outliers=1.0).outliers is None


@pytest.mark.parametrize("fit", ["minmax", "lsq"])
def test_a_few_large_weights_cost_the_others_nothing(fit, rng):
    w = rng.standard_normal((20, 300)).astype("f4")
    without = fo.quantize(w, 4, group_size=-1, fit=fit).error(w).rmse
    w.reshape(-1)[[7, 4000, 5999]] = 60, -80, 100
    assert fo.quantize(w, 4, group_size=-1, fit=fit, outliers=3 / w.size).error(w).rmse < 1.05 * without
    assert fo.quantize(w, 4, group_size=-1, fit=fit).error(w).rmse > 1.2 * without
    with pytest.raises(ValueError, match=r"w: expected finite float32 values, got inf at \(0, 7\)"):
        fo.quantize(np.where(w == 60, np.inf, w), 4, outliers=0.1)


def test_outliers_in_rows_copies_and_pickles(rng):
    w = rng.standard_normal((20, 30)).astype("f4")
    q = fo.quantize(w, 2, outliers=0.05)
    dense = q.dequantize()
    for rows in (slice(3, 9), slice(None), [5, 0, 19, 5], 4, -1, np.arange(20) % 3 == 0):
        assert same_bits(q[rows].dequantize(), dense[rows])
    assert same_bits(q.dequantize(rows=slice(3, 9)), dense[3:9])
    assert same_bits(fo.embedding(q, [[5, 0], [19, 5]]), dense[[[5, 0], [19, 5]]])
    for other in (q.copy(), pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert other == q
        assert other.outliers is not q.outliers
    assert q != fo.quantize(w, 2)
    assert q[:0].outliers is None


@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 2, 4), (6, 0), (0, 40)])
@pytest.mark.parametrize("group_size", [None, -1, 7])
def test_rows(shape, group_size, rng):
    w = rng.standard_normal(shape).astype("f4")
    q = fo.quantize(w, 4, group_size=group_size)
    dense = q.dequantize()
    assert len(q) == len(w)
    for rows in (slice(1, 4), slice(None, None, 2), slice(5, 5), np.array([], np.int64), np.arange(len(w))[::-1]):
        part = q[rows]
        assert part.shape == w[rows].shape
        assert same_bits(part.dequantize(), dense[rows])
    assert q[1:3].codes.base is not None
    if w.size:
        out = np.empty((2, *shape[1:]), "f4")
        assert fo.embedding(q, np.array([5, 2], np.uint8), out=out) is out
        assert same_bits(out, dense[[5, 2]])
        assert same_bits(q.dequantize(rows=slice(-2, None)), dense[-2:])


def test_bad_rows(rng):
    q = fo.quantize(rng.standard_normal((6, 40)).astype("f4"))
    for call, error, message in [
        (lambda: q[6], IndexError, "out of bounds"),
        (lambda: q[:, 1], IndexError, "too many indices"),
        (lambda: q[[[1, 2]]], IndexError, "rows: expected a slice or numbers along one axis"),
        (
            lambda: fo.quantize(np.zeros(8, "f4"))[0],
            IndexError,
            r"rows: expected a weight of two or more axes, got shape \(8,\)",
        ),
        (lambda: fo.quantize(np.zeros((2, 3, 4), "f4"))[0], IndexError, "rows: expected a slice"),
        (lambda: q.dequantize(rows=slice(0, 4, 2)), ValueError, "rows: expected a slice of step 1"),
        (lambda: q.dequantize(rows=3), ValueError, "rows: expected a slice of step 1, got 3"),
        (lambda: fo.embedding(q, [0, 6]), IndexError, "ids: expected 0 to 5, got 6"),
        (lambda: fo.embedding(q, [0, -1]), IndexError, "ids: expected 0 to 5, got -1"),
        (lambda: fo.embedding(q, [0.5]), TypeError, "ids: expected integers, got float64"),
        (lambda: fo.embedding(fo.quantize(np.zeros(8, "f4")), [0]), ValueError, "q: expected at least two axes"),
        (lambda: fo.embedding(q, [1], out=np.empty((2, 40), "f4")), ValueError, r"out: expected shape \(1, 40\)"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert fo.embedding(q, []).shape == (0, 40)


def test_iteration_gives_rows_or_says_that_there_are_none(rng):
    q = fo.quantize(rng.standard_normal((6, 40)).astype("f4"))
    assert all(row == q[i] for i, row in enumerate(q))
    assert len(list(q)) == 6
    for shape in [(8,), (2, 3, 4)]:
        with pytest.raises(IndexError, match="rows: "):
            list(fo.quantize(np.zeros(shape, "f4")))


@pytest.mark.parametrize("dtype", FLOATS)
def test_error(dtype, rng):
    w = rng.standard_normal((30, 50)).astype(dtype_of(dtype))
    q = fo.quantize(w, 4)
    exact, ours = w.astype("f8"), q.dequantize().astype("f8")
    error = q.error(w)
    assert error.rmse == pytest.approx(np.sqrt(np.mean((ours - exact) ** 2)))
    assert error.max == abs(ours - exact).max()
    assert error.relative == pytest.approx(error.rmse / np.sqrt(np.mean(exact**2)))
    assert error.snr == pytest.approx(-20 * np.log10(error.relative))
    assert error.cosine == pytest.approx((ours * exact).sum() / np.sqrt((ours**2).sum() * (exact**2).sum()))
    zeros = np.zeros((2, 3), "f4")
    assert fo.quantize(zeros).error(zeros) == (0, 0, 0, np.inf, 1)
    assert fo.quantize(np.zeros((0, 3), "f4")).error(np.zeros((0, 3), "f4")).max == 0
    with pytest.raises(ValueError, match=r"w: expected shape \(30, 50\), got \(50, 30\)"):
        q.error(w.T)
    w[3, 3] = np.nan
    assert np.isnan(q.error(w)).all()


@pytest.mark.parametrize("fit", ["minmax", "lsq"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_into_out(fit, dtype, rng):
    first, second = (rng.standard_normal((30, 50)).astype(dtype_of(dtype)) for _ in range(2))
    q = fo.quantize(first, 4, fit=fit)
    codes = q.codes
    assert fo.quantize(second, 4, fit=fit, out=q) is q
    assert q.codes is codes
    assert q == fo.quantize(second, 4, fit=fit)
    for call, error, message in [
        (lambda: fo.quantize(first, 8, out=q), ValueError, r"out: expected shape \(30, 50\), 8 bits and group_size -1"),
        (lambda: fo.quantize(first[1:], out=q), ValueError, r"out: expected shape \(29, 50\)"),
        (lambda: fo.quantize(first, out=first), TypeError, "out: expected a QuantizedTensor, got ndarray"),
        (lambda: fo.quantize(first, out=q, outliers=0.1), ValueError, "out: cannot be given together with outliers"),
        (lambda: fo.quantize(first * 0 + 1e-6, out=q), ValueError, "out: has float16 parameters, which cannot hold"),
    ]:
        with pytest.raises(error, match=message):
            call()
    readonly = q.copy()
    readonly.codes.flags.writeable = False
    with pytest.raises(ValueError, match="codes: is read-only"):
        fo.quantize(first, out=readonly)


def test_large_inputs_of_other_types_are_converted_in_panels(rng):
    w = rng.standard_normal((1500, 2000))
    q = fo.quantize(w, 4)
    assert q.codes.tobytes() == fo.quantize(w.astype("f4"), 4).codes.tobytes()
    w[1400, 7] = np.nan
    with pytest.raises(ValueError, match=r"got nan at \(1400, 7\)"):
        fo.quantize(w, 4)


def test_a_quantized_tensor_checks_its_outliers(rng):
    q = fo.quantize(rng.standard_normal((4, 40)).astype("f4"))
    parts = [q.codes, q.scale, q.minimum, q.bits, q.group_size, q.shape, q.dtype]
    good = np.array([3, 159], np.int64), np.array([1, 2], np.float32)
    assert fo.QuantizedTensor(*parts, Outliers(*good)).dequantize()[0, 3] == q.dequantize()[0, 3] + 1
    for indices, values, error, message in [
        (good[0].astype("i4"), good[1], TypeError, "outlier_index: expected uint32 or int64, got int32"),
        (good[0], good[1].astype("f8"), TypeError, "outlier_value: expected float32, got float64"),
        (good[0][:1], good[1], ValueError, "outlier_index, outlier_value: expected one dimension of equal length"),
        (good[0] + 1, good[1], ValueError, "outlier_index: expected rising places below 160"),
        (good[0][::-1], good[1], ValueError, "outlier_index: expected rising"),
        (good[0] - 4, good[1], ValueError, "outlier_index: expected rising"),
    ]:
        with pytest.raises(error, match=message):
            fo.QuantizedTensor(*parts, Outliers(indices, values))


def near_the_limit(rng, dtype):
    """Rows with values next to the largest number of a dtype, in many ways."""
    top = float(np.finfo(np.float32).max) if dtype in ("float32", "float64") else float(ml_dtypes.finfo(dtype).max)
    w = rng.standard_normal((12, 96))
    w[0] *= top
    w[1] *= top * 0.45
    w[2, 5] = top
    w[3, 40] = -top
    w[4] = np.where(rng.random(96) < 0.5, top, -top)
    w[5] = np.linspace(-top, top, 96)
    w[6] = top * (1 - np.abs(w[6]) * 1e-2)
    w[7] = -top * (1 - np.abs(w[7]) * 1e-2)
    w[8] = np.where(rng.random(96) < 0.9, top, 0)
    w[9] = top * (1 - rng.integers(0, 3, 96) * 2.0**-7)
    w[10] = top
    w[11] = np.abs(w[11]) * top
    return np.clip(w, -top, top).astype(dtype_of(dtype))


@pytest.mark.parametrize("fit", ["minmax", "lsq"])
@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_finite_weights_come_back_finite(isa, bits, dtype, param_dtype, fit, rng):
    """Rounding the scale or fitting it may carry the ends of a group beyond the largest number."""
    whole = near_the_limit(rng, dtype)
    for w in (whole, *whole[:, None]):  # a row that float16 parameters cannot hold makes float32 of all
        for group_size in (None, -1, 8, 16, 32, 64, 50) if w is whole else (None, 16, 50):
            q = fo.quantize(w, bits, group_size=group_size, param_dtype=param_dtype, fit=fit)
            x, half, limit = w.astype("f4"), param_dtype == "float16", reference.LIMITS[dtype]
            codes, scale, minimum = reference.quantize(x, bits, group_size, half, fit == "lsq", limit)
            assert np.array_equal(q.codes, reference.pack(codes, bits))
            assert same_bits(q.scale, scale)
            assert same_bits(q.minimum, minimum)
            assert np.isfinite(q.dequantize()).all()
            assert np.isfinite(q.error(w).rmse)
            if fit == "minmax":
                step = (x.max() / (2**bits - 1) - x.min() / (2**bits - 1)).astype("f8")
                assert q.error(w).max <= 0.76 * step + 2.0**-7 * float(np.abs(x).max())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{"outliers": 0.01}, {"max_error": 1.0}, {"outliers": 0.02, "fit": "lsq"}])
def test_finite_weights_with_outliers_come_back_finite(bits, dtype, options, rng):
    for w in near_the_limit(rng, dtype)[:, None]:
        q = fo.quantize(w, bits, **options)
        assert np.isfinite(q.dequantize()).all()
        if "max_error" in options and dtype in ("float16", "bfloat16"):
            # A correction is added in float32: beside a code that decodes to 1e31, it cannot say 1.
            decoded = fo.quantize(w, bits).dequantize(dtype=np.float32)
            off = np.abs(w.astype("f8") - q.dequantize().astype("f8"))
            assert (off <= 1.0 + np.spacing(np.abs(decoded)).astype("f8")).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_errors_are_those_of_the_dtype_that_a_reader_gets(dtype, rng):
    w = rng.standard_normal((64, 128)).astype(dtype_of(dtype))
    q = fo.quantize(w, 8)
    off = w.astype("f8") - q.dequantize().astype("f8")
    assert q.error(w).max == np.abs(off).max()
    assert q.error(w).rmse == pytest.approx(np.sqrt(np.square(off).mean()), rel=1e-12)
    assert fo.quantize(w, 8, max_error=0.01).error(w).max <= 0.01


def test_out_of_a_narrower_dtype():
    out = fo.quantize(np.zeros((2, 32), "f2"), 8, param_dtype="float32")
    w = np.linspace(-65519, 65519, 64, dtype="f4").reshape(2, 32)
    assert np.isfinite(fo.quantize(w, 8, out=out).dequantize()).all()
    with pytest.raises(ValueError, match=r"^w: expected values that float16"):
        fo.quantize(w * 2, 8, out=out)


def test_the_byte_order_of_the_weight_is_not_that_of_the_result():
    q = fo.quantize(np.arange(8, dtype=">f4"), 8)
    assert q.dtype == np.dtype("f4")
    assert q.dtype.isnative
    assert replace(q, dtype=np.dtype(">f8")).dtype.isnative
