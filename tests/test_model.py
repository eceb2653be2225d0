import json
import mmap
import os
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastopt as fo
from fastopt.model import FORMAT_VERSION


@pytest.fixture
def weights(rng):
    return {
        "embed": rng.standard_normal((50, 24)).astype("f4"),
        "conv": rng.standard_normal((8, 4, 3, 3)).astype("f2"),
        "fc.weight": rng.standard_normal((20, 30)).astype(ml_dtypes.bfloat16),
        "fc.bias": rng.standard_normal(20).astype("f4"),
        "double": rng.standard_normal((3, 5)),
        "ids": np.arange(6),
        "scalar": np.array(1.5, "f4"),
        "empty": np.zeros((0, 4), "f4"),
    }


def models(weights):
    small = {"min_size": 1}
    yield fo.pack(weights)
    yield fo.pack(weights, bits=4, **small)
    yield fo.pack(weights, bits=8, group_size=None, param_dtype="float32", **small)
    yield fo.pack(weights, sparsity=0.5, **small)
    yield fo.pack(weights, bits=4, sparsity=0.5, **small)
    yield fo.pack(weights, bits=2, exclude=["*bias"], overrides={"embed": {"bits": 8}, "conv": {"sparsity": 0.9}})


def contents(tensor):
    """Every array and number of a tensor."""
    if isinstance(tensor, fo.QuantizedTensor):
        return [tensor.codes, tensor.scale, tensor.minimum, tensor.bits, tensor.group_size, tensor.shape, tensor.dtype]
    if isinstance(tensor, fo.SparseTensor):
        return [tensor.positions, tensor.row_offsets, *contents(tensor.values), tensor.shape]
    return [tensor]


def equal(a, b):
    pairs = list(zip(contents(a), contents(b), strict=True))
    return type(a) is type(b) and all(
        same_bits(x, y) if isinstance(x, np.ndarray) and x.dtype.kind != "i" else np.array_equal(x, y) for x, y in pairs
    )


def test_save_and_load(weights, tmp_path):
    for model in models(weights):
        model.save(tmp_path / "m.safetensors")
        loaded = fo.load(tmp_path / "m.safetensors")
        assert list(loaded) == list(weights)
        assert all(equal(loaded[name], model[name]) for name in weights)
        for name, array in loaded.unpack().items():
            assert array.shape == weights[name].shape
            assert array.dtype == weights[name].dtype
            assert same_bits(array, model.unpack()[name]) or array.dtype.kind == "i"


def test_what_is_packed(weights):
    model = fo.pack(weights, bits=4, min_size=16, exclude=["*bias"], overrides={"em*": {"bits": 8}, "*": {"bits": 2}})
    assert {name: getattr(t, "bits", None) for name, t in model.items()} == {
        "embed": 8,
        "conv": 2,
        "fc.weight": 2,
        "fc.bias": None,
        "double": None,
        "ids": None,
        "scalar": None,
        "empty": None,
    }
    assert model["ids"] is weights["ids"]
    only = fo.pack(weights, bits=4, min_size=1, include=["fc.*"])
    assert [n for n, t in only.items() if isinstance(t, fo.QuantizedTensor)] == ["fc.weight", "fc.bias"]
    sparse = fo.pack({"w": np.where(np.arange(5000) % 4 == 0, np.float32(1), np.float32(0))}, sparsity=0.75)
    assert sparse["w"].nnz == 1250


def test_loading_maps_and_copies_nothing(weights, tmp_path):
    path = tmp_path / "m.safetensors"
    fo.pack(weights, bits=4, sparsity=0.5, min_size=1).save(path)
    model = fo.load(path)
    parts = [part for t in model.values() for part in contents(t) if isinstance(part, np.ndarray) and part.size]
    for part in parts:
        assert not part.flags.writeable
        assert part.flags.aligned
        base = part
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base.base.obj, mmap.mmap)
    x = np.ones((1, 24), "f4")
    assert fo.linear(x, model["embed"]).shape == (1, 50)


def test_any_reader_of_safetensors_opens_it(weights, tmp_path):
    path = tmp_path / "m.safetensors"
    q = fo.quantize(weights["embed"])
    fo.PackedModel({"w": q, "b": weights["fc.bias"]}).save(path)
    arrays = load_file(path)
    assert sorted(arrays) == ["b", "fastopt.pad.0", "fastopt.pad.1", "fastopt.pad.2", "w.codes", "w.minimum", "w.scale"]
    assert np.array_equal(arrays["w.codes"], q.codes)
    with safe_open(path, "numpy") as file:
        described = json.loads(file.metadata()["fastopt"])
    assert described == {
        "version": FORMAT_VERSION,
        "order": ["w", "b"],
        "tensors": {"w": {"kind": "quantized", "bits": 4, "group_size": 32, "dtype": "float32", "shape": [50, 24]}},
    }


def test_a_foreign_file_loads_as_plain_arrays(weights, tmp_path):
    plain = {name: weights[name] for name in ("embed", "conv", "ids")}
    save_file(plain, tmp_path / "m.safetensors", metadata={"format": "pt"})
    loaded = fo.load(tmp_path / "m.safetensors")
    assert all(np.array_equal(loaded[name], plain[name]) for name in plain)


def test_same_input_same_bytes(weights, tmp_path, threads):
    for i in range(2):
        fo.pack(weights, bits=4, min_size=1).save(tmp_path / f"{i}.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_saving_replaces_whole_or_not_at_all(weights, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    model = fo.pack(weights, bits=4)
    model.save(path)
    path.chmod(0o640)
    before = path.read_bytes()
    for step in ("fsync", "replace"):

        def fail(*args, **kwargs):
            raise OSError("no space left")

        with monkeypatch.context() as patched:
            patched.setattr(os if step == "fsync" else Path, step, fail)
            with pytest.raises(OSError, match="no space left"):
                fo.pack(weights, bits=8).save(path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    fo.load(path)  # a model that is mapped from the file may be saved over it
    loaded = fo.load(path)
    loaded.save(path)
    assert path.read_bytes() == before
    assert same_bits(loaded.unpack()["embed"], model.unpack()["embed"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_where_it_cannot_be_saved(weights, tmp_path):
    model = fo.pack(weights)
    with pytest.raises(FileNotFoundError):
        model.save(tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(IsADirectoryError):
        model.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        fo.load(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"tensors: two would be stored as 'w.codes'"):
        fo.PackedModel({"w": fo.quantize(np.ones(3)), "w.codes": np.ones(3)}).save(tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="tensors: 'w' has dtype complex128, which the file cannot hold"):
        fo.PackedModel({"w": np.ones(3, complex)}).save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_arguments_of_pack(weights):
    for options, error, message in [
        ({"bits": 5}, ValueError, "bits: expected 8, 4 or 2, got 5"),
        ({"bits": 4, "overrides": {"*": {"speed": 1}}}, ValueError, r"overrides: '\*' has unknown options \['speed'\]"),
        ({"sparsity": 2}, ValueError, "sparsity: expected a share from 0 to 1, got 2"),
        ({"bits": 4, "group_size": 0}, ValueError, "group_size: expected"),
    ]:
        with pytest.raises(error, match=message):
            fo.pack(weights, min_size=1, **options)
    with pytest.raises(TypeError, match="weights: 'w' is a list, expected a NumPy array"):
        fo.pack({"w": [1.0]})
    bad = {"w": np.array([1, np.nan], "f4")}
    with pytest.raises(ValueError, match=r"'w': w: expected finite float32 values, got nan at \(1,\)"):
        fo.pack(bad, bits=4, min_size=1)


# ---- hostile files -----------------------------------------------------------------------------------------------


def good_file(path):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((6, 40)).astype("f4")
    tensors = {
        "q": fo.quantize(w),
        "s": fo.prune(w, sparsity=0.5),
        "sq": fo.prune(w, sparsity=0.5).quantize(4),
        "plain": w,
    }
    fo.PackedModel(tensors).save(path)
    return path.read_bytes()


def write(path, arrays, described):
    text = described if isinstance(described, str) else json.dumps(described)
    save_file(arrays, path, metadata={"fastopt": text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x00" * 8, "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"PK\x03\x04 a zip, really" * 10, "not a safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", None),
    ],
)
def test_not_a_safetensors_file(content, message, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    if message is None:
        assert len(fo.load(path)) == 0
        return
    with pytest.raises(ValueError, match=message):
        fo.load(path)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "m.safetensors"
    whole = good_file(path)
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="not a safetensors file"):
            fo.load(path)


def test_descriptions_that_lie(tmp_path):
    path = tmp_path / "m.safetensors"
    q = fo.quantize(np.ones((2, 8), "f4"))
    s = fo.prune(np.ones((2, 8), "f4"), sparsity=0.5)
    arrays = {
        "q.codes": q.codes,
        "q.scale": q.scale,
        "q.minimum": q.minimum,
        "s.positions": s.positions,
        "s.row_offsets": s.row_offsets,
        "s.values": s.values,
    }
    quantized = {"kind": "quantized", "bits": 4, "group_size": 32, "dtype": "float32", "shape": [2, 8]}
    sparse = {"kind": "sparse", "layout": "mask", "shape": [2, 8]}
    good = {"version": 1, "order": ["q", "s"], "tensors": {"q": quantized, "s": sparse}}
    write(path, arrays, good)
    assert list(fo.load(path)) == ["q", "s"]

    def changed(**parts):
        return {**good, "tensors": {"q": {**quantized, **parts}, "s": sparse}}

    for described, message in [
        ("[" * 100000, "metadata"),
        ("{", "metadata|Expecting"),
        ([], "metadata: expected a JSON object"),
        ({**good, "version": 3}, "metadata: expected format version 1 to 2, got 3"),
        ({**good, "version": True}, "version: expected int"),
        ({**good, "order": ["q"]}, "order does not name the tensors"),
        ({**good, "order": ["q", "q"]}, "order does not name the tensors"),
        ({**good, "order": [[], {}]}, "order does not name the tensors"),
        ({**good, "tensors": {"q": quantized}}, "order does not name"),
        ({**good, "tensors": {"q": 1, "s": sparse}}, "'q': entry: expected a JSON object"),
        (changed(kind="zip"), "'q': kind: expected one of"),
        (changed(kind=[]), "'q': kind: expected str"),
        (changed(bits=3), "'q': bits: expected 8, 4 or 2"),
        (changed(bits=8), r"'q': codes: expected shape \(2, 8\)"),
        (changed(group_size=-7), "'q': group_size: expected"),
        (changed(group_size="auto"), "'q': group_size: expected int or NoneType"),
        (changed(dtype="complex64"), "'q': dtype: expected one of"),
        (changed(shape=[2, 9]), "'q': codes: expected shape"),
        (changed(shape=[2, -8]), "'q': shape: expected the sizes"),
        (changed(shape=[True, 8]), "'q': shape: expected the sizes"),
        (changed(shape=[1 << 40, 1 << 40]), "'q': shape: expected the sizes"),
        (changed(shape=[1] * 1000), "'q': shape: expected the sizes"),
        ({**good, "tensors": {"q": quantized, "s": {**sparse, "layout": "csr"}}}, "'s': layout: expected 'mask'"),
        (
            {**good, "tensors": {"q": quantized, "s": {**sparse, "shape": [1, 8]}}},
            "'s': row_offsets: expected 2 elements",
        ),
        ({**good, "tensors": {"q": quantized, "s": {**sparse, "values": quantized}}}, "'s.values.codes' is missing"),
    ]:
        write(path, arrays, described)
        with pytest.raises(ValueError, match=message):
            fo.load(path)

    for name, array, message in [
        ("s.row_offsets", np.array([0, 1 << 60, 8], "i8"), "row_offsets: must rise"),
        ("s.row_offsets", np.array([0, 9, 8], "i8"), "row_offsets: must rise"),
        ("s.row_offsets", np.array([-4, 4, 8], "i8"), "row_offsets: must rise"),
        ("s.row_offsets", s.row_offsets.astype("i4"), "row_offsets: expected int64"),
        ("s.positions", s.positions ^ np.array([[1], [0]], "u1"), "positions: row 0 has"),
        ("s.values", s.values.astype("i4"), "values: expected float32"),
        ("q.scale", q.scale.astype("f8"), "scale, minimum: expected float16 or float32"),
        ("q.codes", q.codes.astype("i1"), "codes: expected uint8"),
    ]:
        write(path, {**arrays, name: array}, good)
        with pytest.raises(ValueError, match=message):
            fo.load(path)
    write(path, {name: a for name, a in arrays.items() if name != "q.codes"}, good)
    with pytest.raises(ValueError, match=r"'q': 'q\.codes' is missing"):
        fo.load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return good_file(tmp_path_factory.mktemp("good") / "m.safetensors")


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.sampled_from([0, 0, 0, -1, -20, 1, 100]),
    in_header=st.booleans(),
)
def test_mutated_files_load_or_raise(whole, tmp_path, changes, length, in_header):
    """Whatever the bytes: a ValueError, or a model that can be used without a crash."""
    content = bytearray(whole)
    end = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    for place, byte in changes:
        content[min(int(place * end), end - 1)] = byte
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[:length] if length < 0 else content + bytes(length))
    try:
        model = fo.load(path)
    except ValueError:
        return
    for name, tensor in model.items():
        with np.errstate(all="ignore"):
            dense = fo.PackedModel({name: tensor}).unpack()[name]
            assert dense.shape == tensor.shape
            if dense.ndim == 2 and dense.dtype == np.float32:
                fo.linear(np.ones((1, dense.shape[1]), "f4"), tensor)


def test_outliers_are_saved(tmp_path, rng):
    w = rng.standard_normal((20, 300)).astype("f4")
    q = fo.quantize(w, 2, fit="lsq", outliers=0.01)
    path = tmp_path / "model.safetensors"
    fo.PackedModel({"w": q, "b": w[0]}).save(path)
    loaded = fo.load(path)
    assert loaded["w"] == q
    assert not loaded["w"].outliers.values.flags.writeable
    x = rng.standard_normal(300).astype("f4")
    assert np.array_equal(fo.linear(x, loaded["w"]), fo.linear(x, q))
    assert sorted(name for name in load_file(path) if not name.startswith("fastopt.pad.")) == [
        "b",
        *(f"w.{x}" for x in ("codes", "minimum", "outlier_index", "outlier_value", "scale")),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, entry: entry.update(outliers=59), "outliers: expected 59, got shape"),
        (lambda arrays, entry: entry.update(outliers="60"), "outliers: expected int"),
        (lambda arrays, entry: arrays.pop("w.outlier_index"), "'w.outlier_index' is missing"),
        (lambda arrays, entry: arrays["w.outlier_index"].__setitem__(-1, 6000), "outlier_index: expected rising"),
        (lambda arrays, entry: arrays.update({"w.outlier_value": arrays["w.outlier_value"][1:]}), "of equal length"),
    ],
)
def test_wrong_outliers_are_refused(change, message, tmp_path, rng):
    q = fo.quantize(rng.standard_normal((20, 300)).astype("f4"), 2, outliers=0.01)
    path = tmp_path / "model.safetensors"
    fo.PackedModel({"w": q}).save(path)
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["fastopt"])
    arrays = load_file(path)
    change(arrays, about["tensors"]["w"])
    save_file(arrays, path, metadata={"fastopt": json.dumps(about)})
    with pytest.raises(ValueError, match=message):
        fo.load(path)
