"""Every storage of a weight behaves the same."""

import copy
import pickle

import numpy as np
import pytest
from helpers import BITS, FLOATS, dtype_of, same_bits

import fastopt as fo
from fastopt.tensors.packed import storage_of, unpacked

STORAGES = {
    **{f"{bits} bits": (lambda w, bits=bits: fo.quantize(w, bits)) for bits in BITS},
    "whole tensor": lambda w: fo.quantize(w, 4, group_size=None, param_dtype="float32"),
    "outliers": lambda w: fo.quantize(w, 2, outliers=0.05),
    **{
        layout: (lambda w, layout=layout: fo.SparseTensor.from_dense(w, layout=layout))
        for layout in ("mask", "index16", "index8", "1x16", "2:4")
    },
    **{
        f"{layout}, 4 bits": (lambda w, layout=layout: fo.SparseTensor.from_dense(w, layout=layout).quantize(4))
        for layout in ("mask", "index16", "index8", "1x16", "2:4")
    },
}


@pytest.fixture
def w(rng):
    return np.asarray(fo.prune(rng.standard_normal((9, 64)).astype("f4"), pattern="2:4"))


@pytest.fixture(params=STORAGES)
def store(request):
    return STORAGES[request.param]


def test_facts(store, w):
    t = store(w)
    assert isinstance(t, fo.PackedTensor)
    assert (t.shape, t.ndim, t.rows, t.size, len(t), t.dtype) == ((9, 64), 2, 9, 576, 9, np.float32)
    assert t.bits_per_weight == 8 * t.nbytes / 576
    assert t.T.shape == (64, 9)
    assert t.T.T is t
    assert storage_of(t) == (t.storage, t.bits, t.group_size)
    assert t.storage == "+".join(["sparse"] * isinstance(t, fo.SparseTensor) + ["quantized"] * (t.bits is not None))


def test_decoding(store, w):
    t = store(w)
    dense, out = t.to_dense(), np.empty((9, 64), "f4")
    assert t.to_dense(out=out) is out
    for other in (out, unpacked(t), np.asarray(t), np.array(t), np.stack([t, t])[1]):
        assert same_bits(other, dense)
    assert np.asarray(t, "f8").dtype == np.float64
    for call, error in [
        (lambda: np.array(t, copy=False) if np.__version__ >= "2" else t.__array__(copy=False), ValueError),
        (lambda: t.to_dense(out=np.empty((9, 65), "f4")), ValueError),
        (lambda: t.to_dense(out=np.empty((9, 64))), TypeError),
        (lambda: fo.quantize(t), TypeError),
        (lambda: fo.prune(t, sparsity=0.5), TypeError),
        (lambda: fo.SparseTensor.from_dense(t), TypeError),
    ]:
        with pytest.raises(error):
            call()


def test_rows(store, w):
    t = store(w)
    dense = t.to_dense()
    for rows in (2, -1, slice(1, 4), slice(5, 2), [3, 0, 3], np.array([], int), slice(None, None, -2), w[:, 0] != 0):
        part = t[rows]
        assert type(part) is type(t)
        assert same_bits(part.to_dense(), dense[rows])
    assert [same_bits(row.to_dense(), dense[i]) for i, row in enumerate(t)] == [True] * 9
    for wrong in (9, [[1, 2]], (0, 1)):
        with pytest.raises(IndexError):
            t[wrong]
    assert same_bits(store(w.reshape(9, 8, 8))[2:4].to_dense(), store(w.reshape(9, 8, 8)).to_dense()[2:4])
    for shape in ((576,), (9, 8, 8)):
        with pytest.raises(IndexError, match="rows: "):
            list(store(w.reshape(shape)))


def test_equal_if_the_same_is_stored(store, w):
    t = store(w)
    for other in (store(w), t.copy(), copy.copy(t), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert other == t
    assert (t[:] == t) == (t.storage != "sparse+quantized")  # rows of a sparse weight have values that are decoded
    changed = w.copy()
    changed[w != 0] *= 2
    assert t != store(changed)
    assert t != store(w[:-1])
    assert t != w.tolist()
    assert [other(w) == t for other in STORAGES.values()].count(True) == 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(t)
    own = t.copy()
    assert not any(np.shares_memory(a, b) for a in own._arrays() for b in t._arrays())


def test_products(store, w, rng):
    t, x = store(w), rng.standard_normal((3, 64)).astype("f4")
    y = fo.linear(x, t)
    assert same_bits(x @ t.T, y)
    assert same_bits(t @ x.T, y.T)
    assert same_bits(t @ x[0], fo.linear(x[0], t))
    stack = np.stack([x, 2 * x])
    assert same_bits(t @ stack.swapaxes(1, 2), fo.linear(stack, t).swapaxes(1, 2))
    want = x.astype("f8") @ t.to_dense().astype("f8").T
    assert np.linalg.norm(y - want) <= 1e-6 * np.linalg.norm(want)


def test_error(store, w):
    t = store(w)
    assert t.error(t.to_dense()).max == 0
    assert t.error(w).max == np.abs(t.to_dense().astype("f8") - w).max()
    with pytest.raises(ValueError, match="w: expected shape"):
        t.error(w[0])


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_to_dense_writes_float32_or_the_own_dtype(dtype, out_dtype, rng):
    w = rng.standard_normal((6, 48)).astype(dtype_of(dtype))
    for t in (
        fo.quantize(w, outliers=0.02),
        fo.quantize(w, 8),
        *(fo.prune(w, sparsity=0.5, layout=layout) for layout in ("mask", "index16", "index8", "1x16")),
        fo.prune(w, sparsity=0.5).quantize(4),
    ):
        out = np.full((6, 48), 7, dtype_of(out_dtype))
        if out_dtype not in ("float32", dtype):
            with pytest.raises(TypeError, match=f"^out: expected float32.*, got {out_dtype}$"):
                t.to_dense(out)
            assert (out == 7).all()
            continue
        assert t.to_dense(out) is out
        narrower = np.dtype("f4") if dtype == "float64" else w.dtype
        assert same_bits(out.astype(narrower), t.to_dense().astype(narrower))
        if out_dtype == dtype:
            assert same_bits(out, t.to_dense())


def test_to_dense_names_what_is_wrong_with_out(rng):
    w = rng.standard_normal((6, 48)).astype("f4")
    locked = np.empty((6, 48), "f4")
    locked.flags.writeable = False
    memory = np.zeros(6 * 48, "f4")
    sparse = fo.SparseTensor("mask", np.full((6, 6), 255, "u1"), np.arange(0, 289, 48), memory, (6, 48))
    plain = fo.quantize(w, 8)
    shared = fo.QuantizedTensor(memory.view("u1")[:288].reshape(6, 48), *plain._fields()[1:])
    for t in (plain, fo.quantize(w, outliers=0.1), fo.prune(w, sparsity=0.5), sparse, shared):
        for bad, error, message in [
            ([1.0], TypeError, "expected a NumPy array, got list"),
            (np.empty((6, 47), "f4"), ValueError, "expected shape"),
            (np.empty((48, 6), "f4").T, ValueError, "must be C-contiguous"),
            (locked, ValueError, "is read-only"),
            (np.empty((6, 48), ">f4"), TypeError, "expected float32"),
        ]:
            with pytest.raises(error, match=f"^out: {message}"):
                t.to_dense(bad)
    for t in (sparse, shared):
        with pytest.raises(ValueError, match="shares memory"):
            t.to_dense(memory.reshape(6, 48))
