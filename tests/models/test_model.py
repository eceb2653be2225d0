import json
import mmap
import os
import stat
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from helpers import same_bits
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastopt as fo
from fastopt.files.container import FORMAT_VERSION

pytestmark = pytest.mark.kernel


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
    yield fo.PackedModel(weights)
    yield fo.pack(weights, bits=4, **small)
    yield fo.pack(weights, bits=8, group_size=None, param_dtype="float32", **small)
    yield fo.pack(weights, sparsity=0.5, **small)
    yield fo.pack(weights, bits=4, sparsity=0.5, **small)
    yield fo.pack(
        weights, bits=2, exclude=["*bias"], overrides={"embed": {"bits": 8}, "conv": {"sparsity": 0.9}}, **small
    )


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
    model = fo.pack(weights, bits=4, min_size=1)
    model.save(path)
    path.chmod(0o640)
    before = path.read_bytes()
    for step in ("fsync", "replace"):

        def fail(*args, **kwargs):
            raise OSError("no space left")

        with monkeypatch.context() as patched:
            patched.setattr(os if step == "fsync" else Path, step, fail)
            with pytest.raises(OSError, match="no space left"):
                fo.pack(weights, bits=8, min_size=1).save(path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    fo.load(path)  # a model that is mapped from the file may be saved over it
    loaded = fo.load(path)
    loaded.save(path)
    assert path.read_bytes() == before
    assert same_bits(loaded.unpack()["embed"], model.unpack()["embed"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_where_it_cannot_be_saved(weights, tmp_path):
    model = fo.PackedModel(weights)
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
        ({"bits": 7}, ValueError, "bits: expected 8, 6, 5, 4, 3 or 2, got 7"),
        ({"bits": 4, "overrides": {"*": {"speed": 1}}}, ValueError, r"overrides: '\*' has unknown options \['speed'\]"),
        ({"sparsity": 2}, ValueError, "sparsity: expected a fraction from 0 to 1, got 2"),
        ({"bits": 4, "group_size": 0}, ValueError, "group_size: expected"),
    ]:
        with pytest.raises(error, match=message):
            fo.pack(weights, min_size=1, **options)
    with pytest.raises(TypeError, match="weights: 'w' is a list, expected a NumPy array"):
        fo.pack({"w": [1.0]})
    bad = {"w": np.array([1, np.nan], "f4")}
    with pytest.raises(ValueError, match=r"'w': w: expected finite float32 values, got nan at \(1,\)"):
        fo.pack(bad, bits=4, min_size=1)


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
    ("options", "message"),
    [
        (
            {},
            "no tensor is packed: nothing is asked for; give bits, sparsity, threshold, pattern, overrides or a target",
        ),
        ({"bits": 4}, "no tensor is packed: 7 x fewer than min_size 4096"),
        ({"bits": 4, "min_size": 1, "include": "no*"}, "no tensor is packed: 8 x not included"),
        ({"bits": 4, "min_size": 1, "exclude": "*"}, r"no tensor is packed: 8 x excluded by '\*'"),
    ],
)
def test_what_packs_nothing_says_so(options, message, weights, tmp_path):
    fo.PackedModel(weights).save(tmp_path / "m.safetensors")
    for call in (
        lambda: fo.pack(weights, **options),
        lambda: fo.pack(tmp_path / "m.safetensors", **options),
        lambda: fo.pack_file(tmp_path / "m.safetensors", tmp_path / "o.safetensors", **options),
        lambda: fo.pack_file(tmp_path / "m.safetensors", dry_run=True, **options),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        assert caught[0].filename == __file__
    assert len(fo.pack({}, bits=4)) == 0
    fo.pack(weights, bits=4, include=[])  # nothing is what was asked for


def test_overrides_that_match_nothing_are_told(weights, tmp_path):
    fo.PackedModel(weights).save(tmp_path / "m.safetensors")
    recipe = fo.Recipe(bits=4, min_size=1, overrides={"*.nothing": {"bits": 8}, "[nothing": {"bits": 2}})
    for call in (
        lambda: fo.pack(weights, recipe),
        lambda: fo.pack_file(tmp_path / "m.safetensors", tmp_path / "o.safetensors", recipe),
    ):
        with pytest.warns(UserWarning, match="^overrides: no tensor matches ") as caught:
            call()
        texts = [str(warning.message).partition(" matches ")[2] for warning in caught]
        assert [text.partition(";")[0] for text in texts] == ["'*.nothing'", "'[nothing'"]
        assert caught[0].filename == __file__
    fo.pack(weights, bits=4, min_size=1, overrides={next(iter(weights)): {"bits": 8}})


@pytest.mark.parametrize("weights", [[np.ones((64, 64))], None, object()])
def test_what_is_no_mapping_is_named(weights):
    with pytest.raises(TypeError, match=f"weights: expected a mapping .* got {type(weights).__name__}"):
        fo.pack(weights, bits=4)


def test_a_report_is_read_in_python(rng, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    w = {"a.weight": rng.standard_normal((64, 128)).astype("f4"), "b\x1b": np.ones(3, "f4")}
    report = fo.pack(w, bits=4).report(w)
    assert repr(report).startswith("Report(2 tensors, 1 packed, 32,780 -> 5,132 bytes, 5.01 bits per weight, relative")
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["tensor", "a.weight", "b\\x1b"]
    assert lines[3] == repr(report)
    assert "64x128" in lines[1]
    assert report.recipe.bits == 4

    long = fo.pack({f"encoder.layers.{i}.attention.self.query.weight": w["a.weight"] for i in range(2)}, bits=4)
    for columns in (80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(long.report()).splitlines()
        assert max(map(len, lines)) <= columns
        assert [line.split()[0][-17:] for line in lines[1:3]] == ["self.query.weight"] * 2
        assert "4 bits, g32" in lines[1]


def test_a_narrow_table_has_a_line_for_each_reason(rng, monkeypatch):
    weights = {"w": rng.standard_normal((64, 128), np.float32), "a": np.ones(3, np.float32), "b": np.ones(2)}
    report = fo.pack(weights, bits=4).report(weights)
    monkeypatch.setenv("COLUMNS", "80")
    assert "kept as they are: 2 tensors, 28 B (fewer than min_size 4096)" in str(report).splitlines()
    monkeypatch.setenv("COLUMNS", "120")
    assert "kept as they are" not in str(report)


def test_notebooks_show_tables_with_escaped_names(rng):
    w = {"<script>a</script>.weight": rng.standard_normal((64, 128)).astype("f4"), "b\x1b": np.ones(3, "f4")}
    model = fo.pack(w, bits=4)
    for shown in (model, model.report(w)):
        root = ElementTree.fromstring(shown._repr_html_())
        cells = [[cell.text for cell in row] for row in root.iter("tr")]
        assert [row[0] for row in cells] == ["tensor", "<script>a</script>.weight", "b\\x1b"]
        assert cells[1][1:4] == ["64x128", "4 bits, g32", "5.00"]
    pruned = fo.prune(w["<script>a</script>.weight"], sparsity=0.75)
    for packed, stored in ((model["<script>a</script>.weight"], "100.0%"), (pruned, "25.0%")):
        root = ElementTree.fromstring(packed._repr_html_())
        cells = dict([cell.text for cell in row] for row in root.iter("tr"))
        assert cells["shape"] == "64x128"
        assert cells["weights stored"] == stored


def test_the_model_of_a_folder(weights, tmp_path):
    model = fo.pack(weights, bits=4, min_size=1)
    model.save(tmp_path / "model.safetensors")
    assert list(fo.load(tmp_path)) == list(model)
    np.save(tmp_path / "extra.npy", np.ones(3))
    for call in (fo.load, fo.inspect, fo.open_weights, lambda path: fo.pack(path, bits=4)):  # one rule for all
        with pytest.raises(ValueError, match="name the file"):
            call(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors file; open_weights reads other formats"):
        fo.load(tmp_path)
    assert list(fo.open_weights(tmp_path)) == ["extra"]


def test_a_target_of_another_format_is_refused(weights, tmp_path):
    fo.PackedModel(weights).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"a\.onnx would be a safetensors file; fastopt\.pack_onnx writes"):
        fo.pack_file(tmp_path / "m.safetensors", tmp_path / "a.onnx", bits=4)


@pytest.mark.parametrize("overrides", [{}, {"a*": {"bits": 2}}])
def test_names_are_texts(overrides):
    with pytest.raises(TypeError, match=r"^weights: expected texts as names, got 1$"):
        fo.pack({1: np.zeros((64, 64), "f4")}, bits=4, overrides=overrides)


def test_a_choice_of_bits_wants_a_recipe():
    with pytest.raises(TypeError, match=r"^recipe: expected a Recipe, got int"):
        fo.choose_bits({"a": np.zeros((64, 64), "f4")}, 4, target_bits=4)
