"""Exports, read back by the runtimes that they are for."""

import inspect
import json

import ml_dtypes
import numpy as np
import pytest
from helpers import same_bits
from test_cli import run

import fastopt as fo
from fastopt.formats import FORMATS


def test_npz(rng, tmp_path):
    weights = {
        "float": rng.standard_normal((3, 5)).astype("f4"),
        "bfloat16": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(6),
        "odd": fo.quantize(rng.standard_normal((3, 7, 3)).astype("f4"), bits=2, outliers=0.1),
        "row": fo.quantize(rng.standard_normal(9).astype("f4"), bits=4),
        "sparse": fo.prune(rng.standard_normal((8, 32)).astype("f4"), sparsity=0.5),
        "small": fo.prune(rng.standard_normal((8, 32)).astype("f4"), sparsity=0.5).quantize(bits=4),
    }
    told = []
    fo.export(weights, tmp_path / "m.npz", to="npz", notify=lambda *now: told.append(now))
    assert [name for *_, name in told] == [*weights, ""]
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == fo.PackedModel(weights).nbytes
    with np.load(tmp_path / "m.npz") as file:
        arrays = dict(file)
    for name, w in fo.PackedModel(weights).unpack().items():
        assert same_bits(arrays[name], w.astype("f4") if name == "bfloat16" else w) or name == "ids"
    scale, minimum = (arrays[f"odd.{part}"].astype("f4").repeat(16, 1)[:, :21] for part in ("scale", "minimum"))
    decoded = minimum + scale * arrays["odd.codes"].reshape(3, 21)
    decoded.flat[arrays["odd.outlier_index"]] += arrays["odd.outlier_value"]
    assert same_bits(decoded.reshape(3, 7, 3), arrays["odd"])
    assert arrays["row.codes"].shape == (9,)
    assert same_bits(arrays["sparse.values"], weights["sparse"].values)
    assert same_bits(arrays["small.values"], weights["small"].values.dequantize())
    assert arrays["small.values.codes"].max() == 15
    assert np.array_equal(arrays["small.row_offsets"], weights["small"].row_offsets)


def test_nothing_is_left_behind(tmp_path):
    model = {"w": fo.quantize(np.eye(8, dtype="f4")), "w.codes": np.zeros(1)}
    with pytest.raises(ValueError, match=r"'w.codes': two arrays"):
        fo.export(model, tmp_path / "m.npz", to="npz")
    with pytest.raises(ValueError, match="to: expected one of"):
        fo.export(model, tmp_path / "m.npz", to="tflite")
    with pytest.raises(TypeError, match="options: npz has no 'nonsense'; it has none"):
        fo.export(model, tmp_path / "m.npz", to="npz", nonsense=1)
    assert list(tmp_path.iterdir()) == []


def test_command(rng, tmp_path):
    """Each format from the command line is that from Python."""
    pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("gguf", reason="the extra `export` is not installed")
    weights = {"fc1.weight": (96, 64), "fc1.bias": (96,), "fc2.weight": (10, 96)}
    weights = {name: rng.standard_normal(shape).astype("f4") for name, shape in weights.items()}
    model = fo.pack(weights, bits=4, min_size=500)
    small = tmp_path / "small.safetensors"
    model.save(small)
    graph = [fo.Layer("fc1", activation="relu"), fo.Layer("fc2")]
    layers = ["--layer", "fc1:relu", "--layer", "fc2"]
    for to, flags, options in (
        ("npz", [], {}),
        ("gguf", ["--requantize", "--architecture", "digits"], {"requantize": True, "architecture": "digits"}),
        ("mlx", ["--param-dtype", "float16"], {"param_dtype": "float16"}),
        ("onnx", [], {}),
        ("onnx", [*layers, "--fast", "--accuracy-level", 4], {"graph": graph, "fast": True, "accuracy_level": 4}),
    ):
        paths = [tmp_path / folder / "model" for folder in ("python", "command")]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
        fo.export(model, paths[0], to=to, **options)
        result = run("export", small, "--to", to, "-o", paths[1], *flags, "--json")
        assert result.stderr == ""
        size = paths[0].stat().st_size
        assert json.loads(result.stdout) == {
            "source": str(small), "target": str(paths[1]), "to": to, "file_bytes": size
        }  # fmt: skip
        if to in ("gguf", "onnx"):  # npz tells the time, and safetensors has metadata in any order
            assert paths[1].read_bytes() == paths[0].read_bytes()
    assert f"{paths[1]}: " in run("export", small, "--to", "npz", "-o", paths[1]).stdout


def test_declarations():
    """The options that a format declares are those of its `write`, and the command line has all."""
    text = run("export", "--help").stdout
    for name, module in FORMATS.items():
        parameters = inspect.signature(module.write).parameters.values()
        assert list(module.OPTIONS) == [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert module.SUFFIX.startswith(".")
        for keyword, option in module.OPTIONS.items():
            assert (option.flag or "--" + keyword.replace("_", "-")) in text, name


def test_command_called_wrongly(tmp_path):
    small, out = tmp_path / "small.safetensors", tmp_path / "out"
    fo.pack({"w": np.eye(64, dtype="f4")}, bits=8, min_size=1).save(small)
    assert "expected one of c, gguf" in run("export", small, "--to", "tflite", "-o", out, code=2).stderr
    assert run("export", small, "-o", out, code=2).stdout == ""
    line = run("export", small, "--to", "npz", "-o", out, "--fast", code=1).stderr
    assert line == "fastopt: options: npz has no 'fast'; it has none\n"
    line = run("export", tmp_path / "none", "--to", "npz", "-o", out, code=1).stderr
    assert line == f"fastopt: {tmp_path / 'none'}: No such file or directory\n"
    assert not out.exists()
