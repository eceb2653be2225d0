"""Statistics of tensors, and differences between two models."""

import math

import ml_dtypes
import numpy as np
import pytest
from helpers import BITS

import fastopt as fo
from fastopt.files.weights import Source, Weights
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
        good = [b for b in sorted(BITS) if fo.quantize(cases[name], b).error(cases[name]).relative <= 0.12]
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


@pytest.mark.parametrize(
    ("first", "second", "different", "largest"),
    [
        (np.array([1 + 2j, 3 + 4j]), np.array([1 + 9j, 3 - 4j]), 2, 8),
        (np.array([1 + 2j], "c8"), np.array([1 + 3j], "c16"), 1, 1),
        (np.array([1 + 2j], "c8"), np.array([1], "f4"), 1, 2),
        (np.array([complex(math.nan, 1)]), np.array([complex(math.nan, 2)]), 1, 1),
        (np.array([2**60]), np.array([2**60 + 1]), 1, 1),
        (np.array([-(2**63)]), np.array([-(2**63) + 1]), 1, 1),
        (np.array([2**63 + 1], "u8"), np.array([2**63 + 2], "u8"), 1, 1),
        (np.array([2**63 - 1], "i8"), np.array([2**63], "u8"), 1, 1),
        (np.array([-1], "i8"), np.array([2**64 - 1], "u8"), 1, 2.0**64),
        (np.array([2**60 + 1], "i8"), np.array([2.0**60]), 1, 1),
        (np.array([-1], "i8"), np.array([-1 - 2.0**-52]), 1, 2.0**-52),
        (np.array([True, False]), np.array([True, True]), 1, 1),
        (np.array([1, 2], ml_dtypes.float8_e4m3fn), np.array([1, 4], ml_dtypes.float8_e4m3fn), 1, 2),
        (np.array([1, math.nan], ml_dtypes.float8_e5m2), np.array([1, 2], ml_dtypes.float8_e5m2), 1, math.inf),
        (np.array([1e300, 1]), np.array([1.5e300, 1]), 1, 0.5e300),
        (np.array([1e-300]), np.array([1.5e-300]), 1, 0.5e-300),
        (np.array([0, 5e-324]), np.array([0, 0.0]), 1, 5e-324),
    ],
)
def test_values_are_compared_in_their_own_dtype(first, second, different, largest):
    for one, other in ((first, second), (second, first)):
        [t] = fo.diff({"w": one}, {"w": other}).tensors
        assert (t.different, t.dtypes) == (different, (one.dtype.name, other.dtype.name))
        assert t.max == pytest.approx(largest, rel=1e-12)
        assert t.rmse > 0
        assert t.relative > 0
    for same in (first, second):
        [t] = fo.diff({"w": same}, {"w": same.copy()}).tensors
        assert (t.different, t.rmse, t.relative, t.max, t.snr) == (0, 0, 0, 0, math.inf)


def test_what_counts_as_equal():
    for one, other in [
        (np.array([0.0, math.nan, math.inf]), np.array([-0.0, -math.nan, math.inf])),
        (np.array([2**60]), np.array([2.0**60])),
        (np.array([1, 2], np.uint64), np.array([1, 2], np.int8)),
        (np.array([1 + 0j, 2]), np.array([1, 2], np.float16)),
        (np.array([True, False]), np.array([1, 0])),
        (np.array(["a", "b"]), np.array(["a", "b"])),
    ]:
        assert fo.diff({"w": one}, {"w": other}).tensors[0].different == 0
    for one, other in [(np.array(["a", "b"]), np.array(["a", "c"])), (np.array(["1"]), np.array([1]))]:
        [t] = fo.diff({"w": one}, {"w": other}).tensors
        assert t.different == 1
        assert math.isnan(t.relative)


def test_the_error_of_all_with_squares_that_do_not_fit():
    weights = {"huge": np.array([3e300, 4e300]), "ones": np.ones(4), "tiny": np.array([1e-300])}
    found = fo.diff(weights, {"huge": np.array([3e300, 4.5e300]), "ones": np.ones(4), "tiny": np.array([2e-300])})
    assert found.total.relative == pytest.approx(0.1, rel=1e-12)
    assert found.total.max == pytest.approx(0.5e300, rel=1e-12)
    assert [t.relative for t in found.tensors] == pytest.approx([0.1, 0, 1], rel=1e-12)
    assert fo.diff({"w": weights["tiny"]}, {"w": weights["tiny"]}).total.rmse == 0


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        (np.array([1 + 2j, 3 + 4j, math.nan]), (None, None, None, math.sqrt(2), 0, 1)),
        (np.array([2**60 + 1, 0]), (0, 2**60 + 1, (2**60 + 1) / 2, 2.0**59, 1, 0)),
        (np.array([2**64 - 1], "u8"), (2**64 - 1, 2**64 - 1, 2.0**64, 0, 0, 0)),
        (np.array([1, 2, math.nan], ml_dtypes.float8_e4m3fn), (1, 2, 1.5, 0.5, 0, 1)),
        (np.array([1e300, -1e300, math.inf]), (-1e300, 1e300, 0, 1e300, 0, 1)),
        (np.array([1e-300, 3e-300]), (1e-300, 3e-300, 2e-300, 1e-300, 0, 0)),
        (np.array(["a"]), (None, None, None, None, 0, 0)),
    ],
)
def test_facts_of_unusual_numbers(values, facts):
    [t] = fo.inspect({"w": values})
    assert (t.minimum, t.maximum, t.zeros, t.non_finite) == (facts[0], facts[1], facts[4], facts[5])
    assert t.mean == (None if facts[2] is None else pytest.approx(facts[2], rel=1e-12))
    assert t.std == (None if facts[3] is None else pytest.approx(facts[3], rel=1e-12))


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


def test_diff_reads_each_tensor_once():
    read = []

    def source(name):
        return Source((2,), np.dtype("f4"), lambda: read.append(name) or np.ones(2, "f4"))

    first, second = (Weights({name: source(name) for name in names}) for names in ("ab", "bc"))
    assert fo.diff(first, second).missing == ("a",)
    assert read == ["b", "b"]


def test_a_difference_is_a_table(monkeypatch, rng):
    first = {"a.weight": rng.standard_normal((64, 64), np.float32), "b": np.ones(3), "c": np.ones(2), "<d>": np.ones(2)}
    second = {**fo.pack(first, bits=4, min_size=4096), "c": np.ones(3), "e": np.ones(1)}
    del second["<d>"]
    found = fo.diff(first, second)
    monkeypatch.setenv("COLUMNS", "80")
    head, weight, b, *rest = str(found).splitlines()
    assert head.split() == ["tensor", "shape", "error", "largest", "SNR", "dB"]
    assert weight.split()[:2] == ["a.weight", "64x64"]
    assert b.split() == ["b", "3", "0", "exact"]
    assert rest[0].startswith("1 of 2 tensors are equal; relative error of all ")
    assert rest[1:] == ["only in the first: <d>", "only in the second: e", "of other shapes: c"]
    monkeypatch.setenv("COLUMNS", "30")
    assert str(found).splitlines()[0].split() == ["tensor", "error", "SNR", "dB"]
    assert "&lt;d&gt;" in found._repr_html_()
