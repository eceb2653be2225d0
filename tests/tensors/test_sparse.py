import contextlib
import copy
import pickle

import numpy as np
import pytest
import reference
from helpers import BITS, FLOATS, Guarded, dtype_of, same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastopt as fo
from fastopt import _core
from fastopt.tensors import sparse

pytestmark = pytest.mark.kernel


def weights(rng, rows, cols, dtype="float32"):
    w = rng.standard_normal((rows, cols))
    w[rng.random((rows, cols)) < 0.6] = 0
    w[rng.random((rows, cols)) < 0.1] = -0.0
    w[rng.random((rows, cols)) < 0.02] = np.nan
    w[rng.random((rows, cols)) < 0.02] = 1e-42
    return w.astype(dtype_of(dtype))


LAYOUTS = ["mask", "index16", "index8", "1x16", "4:8"]


def stored_in(s):
    rows, cols = s.shape
    return reference.stored(s.layout, s.positions, s.row_offsets, rows, cols)


def fit(w, layout):
    """The part of `w` that the layout can hold."""
    if layout != "4:8":
        return w
    w = w.copy()
    w[:, 1::2] = 0
    return w


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_from_and_to_dense_equal_reference(isa, dtype, layout, rng):
    for cols in [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000]:
        w = fit(weights(rng, 5, cols, dtype), layout)
        s = fo.SparseTensor.from_dense(w, layout=layout)
        clean = np.where(w == 0, w.dtype.type(0), w)
        assert s.layout == layout
        stored = stored_in(s)
        assert np.array_equal(stored[:, :cols] & (w != 0), w != 0)
        assert same_bits(s.values, np.pad(clean, ((0, 0), (0, stored.shape[1] - cols)))[stored])
        if layout == "mask":
            mask, row_offsets, values = reference.compress(w)
            assert np.array_equal(s.positions, mask)
            assert np.array_equal(s.row_offsets, row_offsets)
            assert same_bits(s.values, values)
        out = Guarded(np.full_like(w, 7), 3)
        s.to_dense(out=out.array)
        assert same_bits(out.array, clean)
        assert same_bits(out.array, reference.expand(stored, s.values, cols))
        assert out.intact()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads(isa, threads, layout, rng):
    w = fit(weights(rng, 301, 700), layout)
    s = fo.SparseTensor.from_dense(w, layout=layout)
    assert same_bits(s.to_dense(), np.where(w == 0, np.float32(0), w))


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)),
    st.sampled_from(["auto", "mask", "index16", "index8", "1x16"]),
)
def test_round_trip_of_any_shape(w, layout):
    s = fo.SparseTensor.from_dense(w, layout=layout)
    assert same_bits(s.to_dense(), np.where(w == 0, np.float32(0), w))
    assert sparse.sparsity(s) == sparse.sparsity(w)
    if layout not in ("1x16", "auto"):
        assert s.nnz == np.count_nonzero(w)


def test_all_zero_and_all_dense():
    for layout in ("mask", "index16", "index8", "1x16"):
        assert fo.SparseTensor.from_dense(np.zeros((3, 9), "f4"), layout=layout).nnz == 0
        full = np.ones((3, 9), "f4")
        assert same_bits(fo.SparseTensor.from_dense(full, layout=layout).to_dense(), full)


def test_layout_is_chosen_by_density_and_columns(rng):
    w = rng.standard_normal((8, 4000)).astype("f4")
    assert fo.prune(w, sparsity=0.5).layout == "mask"
    assert fo.prune(w, sparsity=0.9).layout == "index16"
    assert fo.prune(w, sparsity=0.999).layout == "index16"
    wide = np.zeros((1, 65537), "f4")
    wide[0, ::300] = 1
    assert fo.SparseTensor.from_dense(wide).layout == "mask"
    assert fo.SparseTensor.from_dense(wide[:, :-1]).layout == "index16"
    for layout in ("index16", "index8"):
        assert same_bits(fo.SparseTensor.from_dense(wide[:, :-1], layout=layout).to_dense(), wide[:, :-1])
        with pytest.raises(ValueError, match=f"layout: '{layout}' has up to 65536 columns, got 65537"):
            fo.SparseTensor.from_dense(wide, layout=layout)
    with pytest.raises(ValueError, match="layout: expected 'mask', 'index16', 'index8', '1x16', or 'N:M'"):
        fo.SparseTensor.from_dense(w, layout="csr")


def test_distances_above_a_byte():
    w = np.zeros((3, 2000), "f4")
    w[0, [0, 256, 513]] = 1
    w[1, [255, 1999]] = 2
    w[2, 256] = 3
    s = fo.SparseTensor.from_dense(w, layout="index8")
    assert s.positions.tolist() == [0, 255, 255, 0, 255, *[255] * 6, 207, 255, 0]
    assert same_bits(s.to_dense(), w)
    assert s != fo.SparseTensor.from_dense(w, layout="mask")
    assert sparse.sparsity(s) == sparse.sparsity(w)
    assert s.quantize(8).layout == "index16"  # else the zeros in between would not stay zero
    assert np.array_equal(s.quantize(8).to_dense() != 0, w != 0)


def test_groups_that_hold_too_much_are_refused(rng):
    w = rng.standard_normal((4, 16)).astype("f4")
    with pytest.raises(ValueError, match="w: row 0 has more non-zeros than 2:4; prune it with pattern='2:4' first"):
        fo.SparseTensor.from_dense(w, layout="2:4")
    w[:, ::2] = 0
    s = fo.SparseTensor.from_dense(w[:, :15], layout="2:4")
    assert s.nnz == 4 * 8
    eye = fo.SparseTensor.from_dense(np.eye(4, 16, dtype="f4"), layout="mask")
    with pytest.raises(ValueError, match="positions: expected 2:4 of each"):
        fo.SparseTensor("2:4", eye.positions, eye.row_offsets, eye.values, (4, 16))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-4, 4, width=32)),
    st.sampled_from(BITS),
    st.sampled_from(["auto", 1, 5, -1, None]),
    st.sampled_from(["mask", "index16", "index8"]),
)
def test_quantized_values(w, bits, group_size, layout):
    s = fo.SparseTensor.from_dense(w, layout=layout).quantize(bits, group_size=group_size)
    values = fo.quantize(
        w[w != 0], bits, group_size={8: 128, 6: 64, 2: 16}.get(bits, 32) if group_size == "auto" else group_size
    )
    assert same_bits(s.to_dense(), reference.expand(w != 0, values.dequantize(), w.shape[1]))


def test_layouts_of_the_input(rng):
    w = weights(rng, 8, 40)
    want = fo.SparseTensor.from_dense(w)
    for other in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], w.astype(">f4"), w.tolist()):
        s = fo.SparseTensor.from_dense(other)
        assert np.array_equal(s.mask, want.mask)
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


def test_a_mask_checks_its_arrays(rng):
    s = fo.SparseTensor.from_dense(weights(rng, 4, 13), layout="mask")
    flipped, behind, swapped = s.positions.copy(), s.positions.copy(), s.row_offsets.copy()
    flipped[2, 0] ^= 1
    behind[1, 1] |= 0x80
    behind[1, 0] &= behind[1, 0] - 1  # as many bits as before
    swapped[[1, 2]] = swapped[[2, 1]] + np.array([1, 0])
    for change, error, message in [
        ({"positions": flipped}, ValueError, "positions: row 2 has"),
        ({"positions": behind}, ValueError, "positions: row 1 has bits set behind its last column"),
        ({"positions": s.positions[:, :1].copy()}, ValueError, r"positions: expected shape \(4, 2\)"),
        ({"positions": s.positions.astype("i1")}, TypeError, "positions: expected uint8"),
        ({"row_offsets": s.row_offsets[1:]}, ValueError, "row_offsets: expected 5 elements"),
        ({"row_offsets": swapped}, ValueError, "row_offsets: must rise from 0 to the number of entries"),
        ({"row_offsets": s.row_offsets.astype("i4")}, TypeError, "row_offsets: expected int64, got int32"),
        ({"values": s.values[:-1]}, ValueError, "row_offsets: must rise from 0 to the number of entries"),
        ({"values": s.values[None]}, ValueError, "values: expected one dimension"),
        ({"values": s.values.astype(int)}, TypeError, "values: expected float32"),
        ({"layout": "csc"}, ValueError, "layout: expected 'mask'"),
    ]:
        with pytest.raises(error, match=message):
            fo.SparseTensor(**{**vars(s), **change})
    with pytest.raises(ValueError, match="read-only"):
        s.positions[0, 0] = 0
    fo.SparseTensor(**{**vars(s), "positions": (own := s.positions.copy())})
    assert own.flags.writeable


def test_an_index_checks_its_arrays():
    offsets, values = np.array([0, 2, 4]), np.ones(4, "f4")
    for layout, positions, message in [
        ("index16", [3, 1, 0, 4], "positions: row 0: columns must rise, got 1 after 3"),
        ("index16", [1, 1, 0, 4], "positions: row 0: columns must rise, got 1 after 1"),
        ("index16", [0, 1, 0, 5], "positions: row 1: expected columns below 5, got 5"),
        ("index8", [0, 0, 2, 2], "positions: row 1: expected columns below 5, got 5"),
        ("index16", [0, 1, 0], "positions: expected 4 elements, got 3"),
    ]:
        positions = np.array(positions, "u2" if layout == "index16" else "u1")
        with pytest.raises(ValueError, match=message):
            fo.SparseTensor(layout, positions, offsets, values, (2, 5))
    with pytest.raises(TypeError, match="positions: expected uint16, got uint8"):
        fo.SparseTensor("index16", np.array([0, 1, 0, 4], "u1"), offsets, values, (2, 5))
    with pytest.raises(ValueError, match="values: expected a multiple of 16, got 4"):
        fo.SparseTensor("1x16", np.ones((2, 1), "u1"), offsets, values, (2, 5))


def test_compress_refuses_offsets_that_lie(rng):
    w = weights(rng, 3, 20)
    mask, row_offsets, values = reference.compress(w)
    row_offsets[1] += 1
    with pytest.raises(ValueError, match="positions: row 0 has"):
        _core.compress(w, mask, row_offsets, values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_tensor_is_a_value(layout, rng):
    w = fit(weights(rng, 6, 40), layout)
    s = fo.SparseTensor.from_dense(w, layout=layout)
    assert pickle.loads(pickle.dumps(s)) == s == s.to_layout(layout)
    for other in ("mask", "index16"):
        assert same_bits(s.to_layout(other).to_dense(), s.to_dense())
    other = w.copy()
    other[0, 0] = 5
    assert s != fo.SparseTensor.from_dense(other)
    assert s != fo.SparseTensor.from_dense(w.astype("f8"))
    assert s != w.tolist()
    assert s.nbytes == s.positions.nbytes + 7 * 8 + s.values.nbytes
    assert s.dtype == np.float32
    assert 0 < s.density < 1.3
    assert repr(s).startswith(f"SparseTensor(shape=(6, 40), layout={layout}, density=")
    dense = s.to_dense()
    for rows in (2, -1, slice(1, 4), [3, 0, 3], np.array([], int), slice(None, None, -2)):
        assert same_bits(s[rows].to_dense(), dense[rows])
    with pytest.raises(IndexError):
        s[6]
    with pytest.raises(IndexError, match="rows: expected a weight of two or more axes"):
        fo.SparseTensor.from_dense(w[0])[0]
    assert all(same_bits(row.to_dense(), dense[i]) for i, row in enumerate(s))
    with pytest.raises(IndexError, match="rows: expected a weight of two or more axes"):
        list(fo.SparseTensor.from_dense(w[0]))


def test_stored_bytes(rng):
    """Shares of float32: what the formats promise, with row offsets and parameters of 8- and 4-bit groups."""
    w = rng.standard_normal((256, 4096)).astype("f4")
    for sparsity, limits in ((0.5, {None: 0.533, 8: 0.163, 4: 0.11}), (0.9, {None: 0.127, 8: 0.052, 4: 0.042})):
        s = fo.prune(w, sparsity=sparsity, layout="mask" if sparsity == 0.5 else "index8")
        for bits, limit in limits.items():
            assert (s if bits is None else s.quantize(bits)).nbytes / w.nbytes < limit


def test_scipy(rng):
    sparse = pytest.importorskip("scipy.sparse")
    w = np.where(rng.random((7, 50)) < 0.2, rng.standard_normal((7, 50)), 0).astype("f4")
    for layout in ("mask", "index16", "index8", "1x16"):
        s = fo.SparseTensor.from_dense(w, layout=layout)
        csr = s.to_scipy()
        csr.check_format()
        assert same_bits(csr.toarray(), w)
        for other in (csr, csr.tocsc(), csr.tocoo()):
            back = fo.SparseTensor.from_scipy(other, layout=layout)
            assert back.layout == layout
            assert back == s
    assert fo.SparseTensor.from_dense(w.astype("f2")).to_scipy().dtype == np.float32
    doubled = sparse.coo_array(([1.0, 2.0, 0.0], ([0, 0, 1], [1, 1, 1])), shape=(2, 3))
    assert fo.SparseTensor.from_scipy(doubled).to_dense().tolist() == [[0, 3, 0], [0, 0, 0]]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls its CSR a beta
def test_torch(rng):
    torch = pytest.importorskip("torch")
    w = np.where(rng.random((7, 50)) < 0.2, rng.standard_normal((7, 50)), 0).astype("f4")
    s = fo.SparseTensor.from_dense(w)
    csr = s.to_torch()
    assert same_bits(csr.to_dense().numpy(), w)
    assert fo.SparseTensor.from_torch(csr) == s
    assert fo.SparseTensor.from_torch(torch.from_numpy(w).to_sparse_csr()) == s


def _made_of(layout, how):
    """A sparse tensor, and the arrays that it was made of, given in some way."""
    w = pruned_weight((6, 48), 0.1 if layout != "2:4" else 0)
    s = fo.prune(w, pattern="2:4") if layout == "2:4" else fo.SparseTensor.from_dense(w, layout=layout)
    arrays = [np.array(s.positions), np.array(s.row_offsets)]
    given = {
        "array": lambda a: a,
        "view": lambda a: a[:],
        "read-only view": _read_only_view,
        "read-only owner": _read_only,
        "bytearray": lambda a: _of_buffer(bytearray(a.tobytes()), a),
        "read-only memoryview": lambda a: _of_buffer(memoryview(bytearray(a.tobytes())).toreadonly(), a),
    }[how]
    parts = [given(a) for a in arrays]
    return fo.SparseTensor(layout, *parts, np.array(s.values), s.shape), parts, arrays


def pruned_weight(shape, density):
    rng = np.random.default_rng(1)
    w = rng.standard_normal(shape).astype("f4")
    return w if density == 0 else np.where(rng.random(shape) < density, w, np.float32(0))


def _read_only(array):
    array.flags.writeable = False
    return array


def _read_only_view(array):
    return _read_only(array[:])


def _of_buffer(buffer, like):
    return np.frombuffer(buffer, like.dtype).reshape(like.shape)


def _spoil(array):
    """Overwrite an array and all that lies below it, as far as NumPy lets anyone."""
    while array is not None:
        if isinstance(array, memoryview):
            array = array.obj
        if isinstance(array, bytearray):
            array[:] = b"\xff" * len(array)
        if not isinstance(array, np.ndarray):
            return
        with contextlib.suppress(ValueError):
            array.flags.writeable = True
            array[...] = np.iinfo(array.dtype).max
        array = array.base


@pytest.mark.parametrize(
    "how", ["array", "view", "read-only view", "read-only owner", "bytearray", "read-only memoryview"]
)
@pytest.mark.parametrize("layout", ["mask", "index16", "index8", "1x16", "2:4"])
def test_what_a_tensor_was_made_of_may_change_afterwards(layout, how):
    """The kernels trust the positions: once changed they would write out of bounds."""
    s, parts, arrays = _made_of(layout, how)
    want, x = s.to_dense(), np.ones((7, 48), "f4")
    products = [fo.linear(x[:n], s) for n in (1, 7)]
    for array in (*parts, *arrays, s.positions, s.row_offsets, s.mask):
        _spoil(array)
    assert same_bits(s.to_dense(), want)
    for n, product in zip((1, 7), products, strict=True):
        assert same_bits(fo.linear(x[:n], s), product)


@pytest.mark.parametrize("layout", ["mask", "index16", "index8", "1x16", "2:4"])
@pytest.mark.parametrize(
    "copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy, lambda s: s.copy(), lambda s: s[1:4]]
)
def test_copies_cannot_be_changed_either(layout, copied):
    twin = copied(_made_of(layout, "array")[0])
    want = twin.to_dense()
    for array in (twin.positions, twin.row_offsets):
        _spoil(array)
    assert same_bits(twin.to_dense(), want)


def test_positions_of_a_mapped_file_are_not_copied(tmp_path):
    s, _, _ = _made_of("index16", "array")
    np.asarray(s.positions).tofile(tmp_path / "positions")
    mapped = np.memmap(tmp_path / "positions", np.uint16, mode="r")
    t = fo.SparseTensor("index16", mapped, s.row_offsets, s.values, s.shape)
    assert np.shares_memory(t.positions, mapped)
    writable = np.memmap(tmp_path / "positions", np.uint16, mode="r+")
    kept = writable[0]
    writable[0] = 65535
    with pytest.raises(ValueError, match=r"^positions: row 0: "):
        t.to_dense()  # would write out of bounds
    writable[0] = kept
    assert same_bits(t.to_dense(), s.to_dense())
    t = fo.SparseTensor("index16", writable, s.row_offsets, s.values, s.shape)
    assert not np.shares_memory(t.positions, writable)


@pytest.mark.parametrize(
    ("field", "bad", "error"),
    [
        ("layout", None, ValueError),
        ("layout", 3, ValueError),
        ("positions", None, TypeError),
        ("positions", [1, 2], TypeError),
        ("positions", np.zeros(3, object), TypeError),
        ("positions", np.zeros((1, 3), "u2"), ValueError),
        ("row_offsets", None, TypeError),
        ("row_offsets", [0, 3], TypeError),
        ("row_offsets", np.array([0.0, 3.0]), TypeError),
        ("row_offsets", np.array([0, 3], object), TypeError),
        ("values", None, TypeError),
        ("values", [1.0, 2.0, 3.0], TypeError),
        ("values", np.ones(3, "i4"), TypeError),
        ("values", np.ones((1, 3), "f4"), ValueError),
        ("values", np.float32(1), TypeError),
        ("shape", None, TypeError),
        ("shape", [1, 8], TypeError),
        ("shape", (1, "8"), TypeError),
        ("shape", (1, 8.0), TypeError),
        ("shape", (True, 8), TypeError),
        ("shape", (-1, 8), ValueError),
        ("shape", (1, -8), ValueError),
        ("shape", (1, 1 << 63), ValueError),
        ("shape", (1, 10**30), ValueError),
        ("shape", (0, 1 << 40, 1 << 40), ValueError),
    ],
)
def test_hostile_parts_are_refused_by_name(field, bad, error):
    good = {
        "layout": "index16",
        "positions": np.array([0, 3, 7], "u2"),
        "row_offsets": np.array([0, 3]),
        "values": np.ones(3, "f4"),
        "shape": (1, 8),
    }
    fo.SparseTensor(**good)
    with pytest.raises(error, match=f"^{field}: "):
        fo.SparseTensor(**{**good, field: bad})


def test_values_in_the_other_byte_order_or_with_gaps():
    positions, offsets = np.array([0, 3, 7], "u2"), np.array([0, 3])
    for values in (np.arange(1, 4, dtype=">f4"), np.repeat(np.arange(1, 4, dtype="f4"), 2)[::2]):
        s = fo.SparseTensor("index16", positions, offsets, values, (1, 8))
        assert s.dtype == np.dtype("f4")
        assert s.to_dense().tolist() == [[1, 0, 0, 2, 0, 0, 0, 3]]
        assert fo.linear(np.ones(8, "f4"), s).tolist() == [6]
