"""An argument of the wrong kind raises a TypeError or a ValueError that begins with its name."""

import numpy as np
import pytest

import fastopt as fo
from fastopt.tensors import sparse

W = np.linspace(-1, 1, 6 * 48, dtype="f4").reshape(6, 48)
Q = fo.quantize(W)
S = fo.prune(W, sparsity=0.5)
X = np.ones((2, 48), "f4")


class Odd:
    """An object that nothing can be done with."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no array")


NO_NUMBERS = [None, "4", b"4", [4], (4,), {}, 4j, Odd(), object, True, np.True_, np.array([4, 8]), np.array("4")]
NO_ARRAYS = [
    None,
    "abc",
    3j,
    Odd(),
    object,
    {1},
    [None],
    [[1.0], [1.0, 2.0]],
    ["a"],
    np.ones(3, "i4"),
    X.astype("c8"),
]
NO_PARTS = [None, "abc", 1.5, [1.0, 2.0], (), Odd(), np.float32(1), np.array(["a"]), np.array([None]), np.ones(2, "c8")]
FLOATS_TOO = [4.5, np.float64(4), 4.0, float("nan"), float("inf")]

CASES = {
    "bits": (
        [*NO_NUMBERS, *FLOATS_TOO, 0, -4, 7, 300, 10**30],
        [
            lambda v: fo.quantize(W, v),
            lambda v: S.quantize(v),
            lambda v: fo.pack_bits(np.zeros(4, "u1"), v),
            lambda v: fo.unpack_bits(np.zeros(2, "u1"), v, 4),
            lambda v: fo.QuantizedTensor(Q.codes, Q.scale, Q.minimum, v, 32, (6, 48), np.dtype("f4")),
        ],
    ),
    "group_size": (
        [*NO_NUMBERS[1:], *FLOATS_TOO, 0, -2, 1 << 62, 10**30],
        [
            lambda v: fo.quantize(W, group_size=v),
            lambda v: S.quantize(8, group_size=v),
            lambda v: fo.QuantizedTensor(Q.codes, Q.scale, Q.minimum, 4, v, (6, 48), np.dtype("f4")),
        ],
    ),
    "param_dtype": ([None, "f8", "abc", 3, Odd(), np.int8], [lambda v: fo.quantize(W, param_dtype=v)]),
    "fit": ([None, "max", 3, [], Odd()], [lambda v: fo.quantize(W, fit=v), lambda v: S.quantize(8, fit=v)]),
    "outliers": ([*NO_NUMBERS[1:], -0.1, 1.1, float("nan")], [lambda v: fo.quantize(W, outliers=v)]),
    "max_error": ([*NO_NUMBERS[1:], -0.1, float("nan")], [lambda v: fo.quantize(W, max_error=v)]),
    "out": (
        [*NO_PARTS[1:], S, fo.quantize(W, 8), fo.quantize(W[:5]), np.empty((6, 48), "i4"), np.empty((5, 48), "f4")],
        [
            lambda v: fo.quantize(W, out=v),
            lambda v: Q.to_dense(v),
            lambda v: Q.dequantize(v),
            lambda v: S.to_dense(v),
            lambda v: fo.linear(X, Q, out=v),
            lambda v: fo.linear(X, S, out=v),
            lambda v: fo.linear(X, W, out=v),
            lambda v: fo.embedding(Q, [1, 2], v),
        ],
    ),
    "w": (
        [*NO_ARRAYS, Q, S],
        [
            lambda v: fo.quantize(v),
            lambda v: fo.prune(v, sparsity=0.5),
            lambda v: fo.SparseTensor.from_dense(v),
            lambda v: Q.error(v),
            lambda v: S.error(v),
        ],
    ),
    "w ": ([None, "abc", b"abc", 3j, Odd(), object, [1.0], X.astype("i4")], [lambda v: fo.linear(X, v)]),
    "w  ": (
        ["abc", b"abc", None, object, [None], ["a"], {"a": None}, np.array([None])],
        [lambda v: sparse.sparsity(v)],
    ),
    "x": (
        [*NO_ARRAYS, np.ones(()), np.ones((2, 47)), np.full(48, 1e39)],
        [lambda v: fo.linear(v, Q), lambda v: fo.linear(v, S), lambda v: fo.linear(v, W)],
    ),
    "bias": (
        [*NO_ARRAYS[1:], np.ones(()), np.ones(5), np.ones((6, 1)), np.full(6, 1e39), fo.quantize(W[0, :5])],
        [
            lambda v: fo.linear(X, Q, v),
            lambda v: fo.linear(X, S, v),
            lambda v: fo.linear(X, W, v),
            lambda v: fo.linear(X, Q, v, precision="blas"),
        ],
    ),
    "precision": ([None, "", "f4", 3, [], Odd()], [lambda v: fo.linear(X, Q, precision=v)]),
    "q": ([None, W, S, "abc", fo.quantize(W[0])], [lambda v: fo.embedding(v, [0])]),
    "ids": ([None, 1.5, "a", [None], [1.0], [6], [-1], [[1], [1, 2]], Odd()], [lambda v: fo.embedding(Q, v)]),
    "threshold": (
        [*NO_NUMBERS[1:], -1, float("nan")],
        [lambda v: fo.prune(W, threshold=v), lambda v: fo.prune_(W.copy(), threshold=v)],
    ),
    "sparsity": (
        [*NO_NUMBERS[1:], -0.1, 1.1, float("nan")],
        [
            lambda v: fo.prune(W, sparsity=v),
            lambda v: fo.prune_(W.copy(), sparsity=v),
            lambda v: fo.prune(W, sparsity=v, pattern="1x16"),
        ],
    ),
    "pattern": (["2:2", "abc", "", 3, [], Odd(), "2:4:8"], [lambda v: fo.prune(W, pattern=v)]),
    "scope": ([None, "all", 3, [], Odd()], [lambda v: fo.prune(W, sparsity=0.5, scope=v)]),
    "layout": (
        [None, "abc", "", 3, [], Odd(), "3:2", b"mask"],
        [
            lambda v: fo.SparseTensor.from_dense(W, layout=v),
            lambda v: S.to_layout(v),
            lambda v: fo.SparseTensor(v, S.positions, S.row_offsets, S.values, S.shape),
        ],
    ),
    "importance": (
        [*NO_ARRAYS[1:], {}, [W, W], {"a": W}, W[:5]],
        [
            lambda v: fo.prune(W, sparsity=0.5, importance=v),
            lambda v: fo.prune_(W.copy(), sparsity=0.5, importance=v),
        ],
    ),
    "codes": (
        [*NO_PARTS, np.zeros((6, 24), "i1"), np.zeros((6, 23), "u1")],
        [lambda v: fo.QuantizedTensor(v, Q.scale, Q.minimum, 4, 32, (6, 48), np.dtype("f4"))],
    ),
    "codes ": ([None, "abc", [1, 2], np.zeros(2, "i1"), Odd(), np.full(2, 16, "u1")], [lambda v: fo.pack_bits(v, 4)]),
    "packed": ([None, "abc", [1, 2], np.zeros(2, "i1"), Odd()], [lambda v: fo.unpack_bits(v, 4, 4)]),
    "count": ([*NO_NUMBERS, *FLOATS_TOO, -1, 7, 10**30], [lambda v: fo.unpack_bits(np.zeros(2, "u1"), 4, v)]),
    "scale": (
        [*NO_PARTS, np.zeros((6, 2), "f8"), np.zeros((6, 1), "f2")],
        [lambda v: fo.QuantizedTensor(Q.codes, v, Q.minimum, 4, 32, (6, 48), np.dtype("f4"))],
    ),
    "minimum": (NO_PARTS, [lambda v: fo.QuantizedTensor(Q.codes, Q.scale, v, 4, 32, (6, 48), np.dtype("f4"))]),
    "dtype": (
        [None, "abc", "i4", 3, Odd(), np.complex64],
        [lambda v: fo.QuantizedTensor(Q.codes, Q.scale, Q.minimum, 4, 32, (6, 48), v)],
    ),
    "outlier": (
        [(None, None), (np.zeros(1, "u4"), [1.0]), (np.zeros(1, "i4"), np.ones(1, "f4")), (1,), "ab", W],
        [lambda v: fo.QuantizedTensor(Q.codes, Q.scale, Q.minimum, 4, 32, (6, 48), np.dtype("f4"), v)],
    ),
    "shape": (
        [None, 6, [6, 48], (6, 48.0), ("6", 48), (6, None), (-6, -48), (True, 288), (6, 10**30), Odd()],
        [
            lambda v: fo.QuantizedTensor(Q.codes, Q.scale, Q.minimum, 4, 32, v, np.dtype("f4")),
            lambda v: fo.SparseTensor(S.layout, S.positions, S.row_offsets, S.values, v),
        ],
    ),
    "rows": (["a", 1.5, [0.5], np.ones((2, 2), int), 6, -7], [lambda v: Q[v], lambda v: S[v]]),
    "n": ([*NO_NUMBERS, *FLOATS_TOO, 0, -1, 4097, 10**30], [fo.set_num_threads]),
    "matrix": ([None, W, "abc"], [fo.SparseTensor.from_scipy]),
    "tensor": ([None, W, "abc"], [fo.SparseTensor.from_torch]),
}


@pytest.mark.parametrize(
    ("name", "bad", "call"),
    [
        pytest.param(name.strip(), bad, call, id=f"{name.strip()}-{i}-{j}")
        for name, (values, calls) in CASES.items()
        for j, call in enumerate(calls)
        for i, bad in enumerate(values)
    ],
)
def test_the_error_names_the_argument(name, bad, call):
    with pytest.raises((TypeError, ValueError, IndexError)) as error:
        call(bad)
    text = str(error.value)
    assert text.startswith(name) or f", {name}: " in text, text
    assert len(text) < 400


def test_integers_and_numbers_of_numpy_are_taken():
    for bits in (np.int8(4), np.uint64(4), np.array(4)):
        for group_size in (np.int8(32), np.array(32)):
            assert fo.quantize(W, bits, group_size=group_size) == Q
        assert fo.QuantizedTensor(Q.codes, Q.scale, Q.minimum, bits, np.int8(32), (np.int64(6), 48), "f4") == Q
    for share in (np.float16(0.5), np.float64(0.5)):
        assert fo.prune(W, sparsity=share) == S
        assert fo.quantize(W, outliers=share) == fo.quantize(W, outliers=0.5)
    assert fo.unpack_bits(np.zeros(2, "u1"), np.int8(4), np.int8(4)).size == 4


@pytest.mark.parametrize(
    "empty", [np.empty(0, "f4"), np.empty((0, 5), "f4"), np.empty((5, 0), "f4"), np.empty((2, 0, 3))]
)
def test_empty_weights(empty):
    for packed in (fo.quantize(empty), fo.quantize(empty, outliers=0.5), fo.prune(empty, sparsity=0.5)):
        assert packed.to_dense().shape == empty.shape
        assert packed.error(empty).rmse == 0
    if empty.ndim == 2:
        x = np.ones((3, empty.shape[1]), "f4")
        assert (fo.linear(x, fo.quantize(empty)) == 0).all()
        assert (fo.linear(x, fo.prune(empty, sparsity=0.5)) == 0).all()
    assert sparse.sparsity(empty) == 0
    assert sparse.sparsity([]) == sparse.sparsity({}) == 0


def test_sparsity_of_every_kind_of_weight():
    w = np.where(W > 0, W, np.float32(0))
    share = float((w == 0).mean())
    for kind in (w, w.tolist(), [w, w], (row for row in w), {"a": w, "b": {"c": w}}, fo.prune(w, threshold=0)):
        assert sparse.sparsity(kind) == share
    q = fo.quantize(w)
    assert sparse.sparsity(q) == float((q.to_dense() == 0).mean())
    assert sparse.sparsity({"a": w}.values()) == share
    assert sparse.sparsity(0.0) == 1
