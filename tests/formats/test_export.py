"""Exports, read back by the runtimes that they are for."""

import inspect
import json
import re
import shutil
import subprocess

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
        "odd": fo.quantize(rng.standard_normal((3, 7, 3)).astype("f4"), bits=2, group_size=16, outliers=0.1),
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


@pytest.mark.filterwarnings("always:.*has no input")
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
        runs_nowhere = to == "onnx" and not options
        assert ("has no input" in result.stderr) is bool(result.stderr) is runs_nowhere
        size = paths[0].stat().st_size
        assert json.loads(result.stdout) == {
            "source": str(small), "target": str(paths[1]), "to": to, "file_bytes": size
        }  # fmt: skip
        if to in ("gguf", "onnx"):  # npz tells the time, and safetensors has metadata in any order
            assert paths[1].read_bytes() == paths[0].read_bytes()
    assert f"{paths[1]}: " in run("export", small, "--to", "npz", "-o", paths[1]).stdout
    flags = ("export", small, "--to", "onnx", "-o", paths[1])
    assert "the model has no input" in run(*flags).stderr
    assert run(*flags, *layers).stderr == ""


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("fastopt.c", "w", "its header would be that of the library"),
        ("FastOpt.c", "w", "its header would be that of the library"),
        ("fo.c", "linear", "'linear': would be fo_linear in C, which is a name of fastopt.h"),
        ("fo_linear.c", "int8", "would be fo_linear_int8 in C"),
        ("FO.c", "DENSE", "would be FO_DENSE in C"),
        ("size.c", "t", "would be size_t in C"),
        ("uint8.c", "t", "would be uint8_t in C"),
        ("INT8.c", "MAX", "would be INT8_MAX in C"),
        ("static.c", "assert", "would be static_assert in C"),
        ('a"quote.c', "w", "that an #include can hold"),
        ("back\\slash.c", "w", "that an #include can hold"),
        ("new\nline.c", "w", "that an #include can hold"),
        ("1st.c", "w", "starts with a letter"),
        ("m.txt", "w", "ends in .c"),
    ],
)
def test_names_that_c_does_not_have(file, name, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        fo.export({name: np.ones((4, 8), "f4")}, tmp_path / file, to="c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("file", ["M.c", "m-1 a.c", "fo_x.c", "model_H.c", "F.c"])
def test_names_that_meet_those_of_parts(file, rng, tmp_path):
    q = fo.quantize(rng.standard_normal((8, 64)).astype("f4"), 4, outliers=0.1)
    names = (
        "w",
        "w.values",
        "w.values_",
        "w_scale",
        "w.outlier index",
        "H",
        "h",
        "h_h",
        "ENTRY",
        "\u00e9",
        "*/ w",
        "0",
    )
    model = {name: q if name == "w" else np.ones((2, 8), "f4") for name in names}
    fo.export(model, tmp_path / file, to="c")
    for compiler in (["cc", "-std=c99", "-pedantic"], ["c++", "-x", "c++", "-std=c++17"]):
        command = [*compiler, "-Wall", "-Werror", "-c", file, "-o", "m.o"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_left_out(rng, tmp_path):
    model = {"w": rng.standard_normal((4, 8)).astype("f4"), "b.mask": np.ones(3, bool), "c.mask": np.ones(3, bool)}
    fo.export(model, tmp_path / "m.npz", to="npz", exclude=["*.mask"])
    assert list(np.load(tmp_path / "m.npz")) == ["w"]
    fo.export(model, tmp_path / "m.npz", to="npz", exclude="c*")
    assert list(np.load(tmp_path / "m.npz")) == ["w", "b.mask"]
    with pytest.raises(ValueError, match=r"exclude: no tensor matches 'd\*'"):
        fo.export(model, tmp_path / "m.npz", to="npz", exclude=["d*"])
    np.savez(tmp_path / "s.npz", **model)
    run("export", tmp_path / "s.npz", "--to", "npz", "-o", tmp_path / "t.npz", "--exclude", "b*", "--exclude", "c*")
    assert list(np.load(tmp_path / "t.npz")) == ["w"]


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
