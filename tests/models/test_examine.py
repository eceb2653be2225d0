"""What tensors are like, and how far two models are apart."""

import math

import ml_dtypes
import numpy as np
import pytest

import fastopt as fo
from fastopt.models import examine


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_])
def test_facts_of_every_dtype(dtype, monkeypatch):
    monkeypatch.setattr(examine, "_PIECE", 100)  # several pieces
    w = (3 * normal(37, 23)).astype(dtype)
    [facts] = fo.inspect({"w": w})
    wide = w.astype(np.float64)
    assert (facts.minimum, facts.maximum) == (wide.min(), wide.max())
    assert facts.mean == pytest.approx(wide.mean(), rel=1e-12, abs=1e-12)
    assert facts.std == pytest.approx(wide.std(), rel=1e-12)
    assert (facts.zeros, facts.dtype, facts.nbytes) == ((wide == 0).sum(), np.dtype(dtype).name, w.nbytes)


def test_outliers_and_what_is_not_finite():
    w = normal(100, 100)
    w[0, :3] = 7.5, -30, 30
    w[1, :3] = np.nan, np.inf, -np.inf
    [facts] = fo.inspect({"w": w})
    finite = w[np.isfinite(w)].astype(np.float64)
    assert facts.outliers == (abs(finite - finite.mean()) > 6 * finite.std()).sum() == 3
    assert (facts.non_finite, facts.maximum, facts.suggested_bits) == (3, 30, None)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_facts_of_little(shape):
    [facts] = fo.inspect({"w": np.zeros(shape, np.float32)})
    assert facts.size == math.prod(shape)
    assert facts.minimum == (None if facts.size == 0 else 0)


def test_suggested_bits():
    far = normal(64, 128)
    far[:, ::16] *= 1000  # in every group of the 2 and 4 bits
    cases = {
        "two": np.repeat(np.arange(4, dtype=np.float32), 2048).reshape(64, 128),
        "four": normal(64, 128),
        "far": far,
    }
    found = {facts.name: facts.suggested_bits for facts in fo.inspect(cases)}
    for name, bits in found.items():
        good = [b for b in (2, 4, 8) if fo.quantize(cases[name], b).error(cases[name]).relative <= 0.12]
        assert bits == good[0]
    assert (found["two"], found["four"]) == (2, 4)
    kept = {"small": normal(4095), "whole": np.arange(9000), "packed": fo.quantize(far, 8)}
    assert [facts.suggested_bits for facts in fo.inspect(kept)] == [None, None, None]


def test_a_sample_of_many_rows(monkeypatch):
    monkeypatch.setattr(examine, "_PIECE", 5000)
    assert fo.inspect({"w": normal(1000, 64)})[0].suggested_bits == 4


@pytest.mark.parametrize("pieces", [1 << 20, 77])
def test_difference_is_the_error(pieces, monkeypatch):
    monkeypatch.setattr(examine, "_PIECE", pieces)
    weights = {"a": normal(40, 50), "b": normal(30, 20, seed=1), "c": np.arange(6)}
    packed = fo.pack(weights, bits=4, min_size=1, overrides={"b": {"sparsity": 0.5}})
    found = fo.diff(weights, packed)
    assert [t.name for t in found.tensors] == ["a", "b", "c"]
    for t in found.tensors:
        w = weights[t.name].astype(np.float64)
        made = packed.unpack()[t.name].astype(np.float64)
        assert t.rmse == pytest.approx(np.sqrt(np.mean((w - made) ** 2)), rel=1e-12)
        assert t.max == abs(w - made).max()
        assert t.nbytes == (weights[t.name].nbytes, packed[t.name].nbytes)
    noise = sum(t.rmse**2 * t.size for t in found.tensors)
    signal = sum(float(np.square(weights[name].astype(np.float64)).sum()) for name in ("a", "b"))
    assert found.total.relative == pytest.approx(math.sqrt(noise / signal), rel=1e-12)


def test_difference_of_what_is_not_finite():
    one = np.array([np.nan, np.inf, 1, 2], np.float32)
    assert fo.diff({"w": one}, {"w": one.copy()}).total.rmse == 0
    for place, value in ((0, 1), (1, -np.inf), (2, np.nan)):
        other = one.copy()
        other[place] = value
        assert fo.diff({"w": one}, {"w": other}).tensors[0].relative == math.inf
        assert fo.diff({"w": one}, {"w": other}).tensors[0].max == math.inf


def test_difference_of_names_and_shapes():
    found = fo.diff(
        {"a": normal(2, 3), "b": normal(3), "c": normal(1)}, {"c": normal(1), "a": normal(3, 2), "d": normal(2)}
    )
    assert (found.missing, found.extra, found.reshaped) == (("b",), ("d",), (("a", (2, 3), (3, 2)),))
    assert [t.name for t in found.tensors] == ["c"]
    assert fo.diff({}, {}).total.rmse == 0


def test_whole_numbers_do_not_hide_the_error_of_weights(rng):
    weights = {"w": rng.standard_normal((64, 64)).astype("f4"), "ids": np.arange(100_000)}
    result = fo.diff(weights, fo.pack(weights, bits=4))
    assert result.total.relative == result.tensors[0].relative > 0.05
    assert len(result.tensors) == 2
