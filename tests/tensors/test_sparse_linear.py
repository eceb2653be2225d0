import ml_dtypes
import numpy as np
import pytest
import reference
from helpers import Guarded, same_bits

import fastopt as fo

pytestmark = pytest.mark.kernel

LAYOUTS = ["mask", "index16", "index8", "1x16", "2:4"]


def tensors(w):
    """The weight in every layout and type of value."""
    for layout in LAYOUTS:
        kept = w if layout != "2:4" else np.where(np.arange(w.shape[1]) % 2, w, 0).astype("f4")
        s = fo.SparseTensor.from_dense(kept, layout=layout)
        yield s
        yield fo.SparseTensor.from_dense(kept.astype("f2"), layout=layout)
        yield s.quantize(8)
        yield s.quantize(4, group_size=3)
        yield s.quantize(3, group_size=5)


def expected(x, s, bias=None):
    rows, cols = s.shape
    stored = reference.stored(s.layout, s.positions, s.row_offsets, rows, cols)
    by_column = not s.layout.startswith("index")
    return reference.linear_sparse(x, s.to_dense().astype("f4"), stored, by_column, bias)


def sparse(rng, rows, cols):
    w = rng.standard_normal((rows, cols)).astype("f4")
    w[rng.random(w.shape) < rng.choice([0.4, 0.9, 0.999])] = 0
    return w


@pytest.mark.parametrize("batch", [1, 3, 4, 17, 35, 99])
def test_linear_equals_reference(isa, batch, rng):
    for rows, cols in [(1, 1), (3, 7), (5, 16), (4, 33), (2, 1025 if batch < 9 else 513), (7, 0), (0, 7)]:
        w = sparse(rng, rows, cols)
        x = Guarded(rng.standard_normal((batch, cols)).astype("f4"), 1)
        bias = rng.standard_normal(rows).astype("f4")
        for s in tensors(w):
            out = Guarded(np.zeros((batch, rows), "f4"), 3)
            assert fo.linear(x.array, s, bias, out=out.array) is out.array
            assert same_bits(out.array, expected(x.array, s, bias)), s
            assert x.intact()
            assert out.intact()


def test_bfloat16_values(isa, rng):
    w = sparse(rng, 5, 70).astype(ml_dtypes.bfloat16)
    for layout in LAYOUTS[:-1]:
        s = fo.SparseTensor.from_dense(w, layout=layout)
        for batch in (1, 5):
            x = rng.standard_normal((batch, 70)).astype("f4")
            assert same_bits(fo.linear(x, s), expected(x, s))


def test_any_number_of_threads_and_skewed_rows(isa, threads, rng):
    w = rng.standard_normal((300, 700)).astype("f4")
    w[rng.random(w.shape) < np.linspace(0, 1.2, 300)[:, None] ** 4] = 0  # full rows first, empty ones last
    for s in tensors(w):
        for batch in (1, 20):
            x = rng.standard_normal((batch, 700)).astype("f4")
            some = [0, 1, 150, 299]
            fo.set_num_threads(threads)
            y = fo.linear(x, s)
            assert same_bits(y[:, some], expected(x, s[some]))
            fo.set_num_threads(1)
            assert same_bits(y, fo.linear(x, s))


def test_close_to_float64(rng):
    w = rng.standard_normal((64, 4096)).astype("f4")
    for batch in (2, 16, 64):
        x = rng.standard_normal((batch, 4096)).astype("f4")
        for s in tensors(w):
            want = x.astype("f8") @ s.to_dense().astype("f8").T
            assert np.linalg.norm(fo.linear(x, s) - want) <= 5e-7 * np.linalg.norm(want)


def test_products_as_operators(rng):
    s = fo.prune(rng.standard_normal((6, 2, 5)).astype("f4"), sparsity=0.6)
    x = rng.standard_normal((2, 3, 10)).astype("f4")
    assert same_bits(x @ s.T, fo.linear(x, s))
    assert same_bits(x[0, 0] @ s.T, fo.linear(x[0, 0], s))
    assert same_bits(s @ x[0].T, fo.linear(x[0], s).T)
    assert same_bits(s @ x[0, 0], fo.linear(x[0, 0], s))
    assert s.T.shape == (10, 6)
    assert s.T.T is s
    with pytest.raises(TypeError):
        x + s
    with pytest.raises(TypeError):
        x @ s


def test_weights_from_a_file(tmp_path, rng):
    w = sparse(rng, 40, 200)
    x = rng.standard_normal((3, 200)).astype("f4")
    model = fo.PackedModel({f"{i}.weight": s for i, s in enumerate(tensors(w))})
    model.save(tmp_path / "model.safetensors")
    loaded = fo.load(tmp_path / "model.safetensors")
    for name, s in model.items():
        assert loaded[name] == s
        assert loaded[name].layout == s.layout
        assert same_bits(fo.linear(x, loaded[name]), fo.linear(x, s))
