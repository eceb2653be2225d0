"""ONNX models, packed and run by ONNX Runtime."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import PEAK_MB, run_python
from test_cli import run as command
from test_export_onnx import distance, random, run

import fastopt as fo
from fastopt.formats import onnx_file
from fastopt.formats.onnx_weights import onnx_sources

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

# Whether the model below holds a weight as [in, out].
TRANSPOSED = {
    "conv": False,
    "depthwise": False,
    "shared": True,
    "constant": True,
    "gemm": True,
    "turned": False,
    "scaled": True,
    "inner": True,
    "outer": True,
    "tied": True,
}


@pytest.fixture
def weights(rng):
    shapes = [(8, 3, 3, 3), (8, 1, 3, 3), (128, 128), (128, 48), (48, 40), (24, 40), *[(24, 24)] * 4]
    return {name: random(rng, *shape) / np.float32(8) for name, shape in zip(TRANSPOSED, shapes, strict=True)}


def save_model(path, weights, opset=17, listed=False):
    """A model with weights of Conv, MatMul, Gemm; constants; in branches. `tied` is read by a Gather too."""
    node, rng = helper.make_node, np.random.default_rng(0)
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 24]) for name in ("then", "else", "y")]
    then = [node("MatMul", ["s", "inner"], ["i"]), node("MatMul", ["i", "outer"], ["then"])]
    inner = numpy_helper.from_array(weights["inner"], "inner")
    nodes = [
        node("Constant", [], ["constant"], value=numpy_helper.from_array(weights["constant"], "value")),
        node("Conv", ["x", "conv"], ["c"], pads=[1, 1, 1, 1]),
        node("Conv", ["c", "depthwise"], ["d"], group=8, pads=[1, 1, 1, 1]),
        node("Reshape", ["d", "to_rows"], ["r"]),
        node("MatMul", ["r", "shared"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Identity", ["shared"], ["again"]),
        node("MatMul", ["b", "again"], ["e"]),
        node("MatMul", ["e", "constant"], ["f"]),
        node("Reshape", ["f", "to_matrix"], ["g"]),
        node("Gemm", ["g", "gemm", "bias"], ["h"]),
        node("Gemm", ["h", "turned"], ["k"], transB=1),
        node("Gemm", ["k", "scaled"], ["s"], alpha=0.5),
        node(
            "If",
            ["yes"],
            ["t"],
            then_branch=helper.make_graph(then, "then", [], rows[:1], [inner]),
            else_branch=helper.make_graph([node("MatMul", ["s", "outer"], ["else"])], "else", [], rows[1:2]),
        ),
        node("MatMul", ["t", "tied"], ["u"]),
        node("Gather", ["tied", "row"], ["v"]),
        node("Add", ["u", "v"], ["w"]),
        node("Add", ["w", "summand"], ["y"]),
    ]
    arrays = {name: w for name, w in weights.items() if name not in ("constant", "inner")}
    arrays |= {"bias": random(rng, 40), "summand": random(rng, 1, 24), "row": np.array(3)}
    arrays |= {"to_rows": np.array([2, -1, 128]), "to_matrix": np.array([-1, 48])}
    constants = [numpy_helper.from_array(w, name) for name, w in arrays.items()]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16]),
        helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
    ]
    if listed:
        inputs += [helper.make_tensor_value_info(c.name, c.data_type, c.dims) for c in constants]
    graph = helper.make_graph(nodes, "g", inputs, rows[2:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.fixture
def source(weights, tmp_path):
    return save_model(tmp_path / "model.onnx", weights)


def packed_weights(weights, recipe):
    """Return the weights, packed by `fo.pack` as [out, in, ...] and decoded, as the model holds them."""
    seen = {name: w.T.copy() if TRANSPOSED[name] else w for name, w in weights.items()}
    decoded = fo.pack(seen, recipe=recipe).unpack()
    return {name: w.T.copy() if TRANSPOSED[name] else w for name, w in decoded.items()}


RECIPES = {
    "eight": fo.Recipe(bits=8, min_size=1),
    "four": fo.Recipe(bits=4, fit="lsq", min_size=1),
    "two": fo.Recipe(bits=2, group_size=32, min_size=1),
    "outliers": fo.Recipe(bits=4, outliers=0.02, min_size=1),
    "two levels": fo.Recipe(bits=4, group_size=16, param_bits=6, min_size=1),
    "sparse": fo.Recipe(sparsity=0.5, min_size=1),
    "both": fo.Recipe(bits=8, sparsity=0.5, min_size=1),
    "mixed": fo.Recipe(bits=4, exclude=["gemm"], overrides={"conv": {"bits": 2}, "shared": {"bits": 8}}, min_size=500),
    "nothing": fo.Recipe(bits=4, include=[]),
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_model_computes_with_packed_weights(recipe, fast, weights, source, rng, tmp_path):
    recipe = RECIPES[recipe]
    target = tmp_path / "small.onnx"
    report = fo.pack_onnx(source, target, recipe, fast=fast)
    expected = save_model(tmp_path / "expected.onnx", packed_weights(weights, recipe))
    for yes in (True, False):
        feeds = {"x": random(rng, 2, 3, 16, 16), "yes": np.array(yes)}
        assert distance(run(target, feeds)["y"], run(expected, feeds)["y"]) < 1e-5
    kinds = {t.name: t.kind for t in report.tensors if not t.reason.startswith("read by ")}
    assert set(kinds) == set(TRANSPOSED)
    operators = [node.op_type for node in onnx.load(target).graph.node]
    products = ("shared", "shared", "constant", "gemm", "turned")
    assert operators.count("MatMulNBits") == (sum(kinds[name] == "quantized" for name in products) if fast else 0)
    if recipe.bits is not None and recipe.include:
        assert target.stat().st_size < source.stat().st_size


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_older_models(opset, weights, rng, tmp_path):
    """They have no low-bit types, and initializers that are inputs too; each is packed over itself."""
    path = save_model(tmp_path / "model.onnx", weights, opset, listed=True)
    feeds = {"x": random(rng, 2, 3, 16, 16), "yes": np.array(True)}
    full = run(path, feeds)["y"]
    fo.pack_onnx(path, path, fo.Recipe(bits=8, min_size=1), fast=True)
    assert 0 < distance(run(path, feeds)["y"], full) < 0.03
    names = [value.name for value in onnx.load(path).graph.input]
    assert "summand" in names
    assert "shared" not in names
    assert len(list(tmp_path.iterdir())) == 1


def test_decoded_once(source, tmp_path):
    """ONNX Runtime decodes weights when it loads them, if it is told to."""
    fo.pack_onnx(source, tmp_path / "p.onnx", fo.Recipe(bits=4, min_size=1))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    ort.InferenceSession(tmp_path / "p.onnx", options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "DequantizeLinear" not in operators
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "p.onnx").graph.node}


def test_half_precision(rng, tmp_path):
    w = random(rng, 64, 32).astype("f2")
    kinds = [helper.make_tensor_value_info(*item) for item in (("x", 10, ["n", 64]), ("y", 10, ["n", 32]))]
    constant = numpy_helper.from_array(w, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", kinds[:1], kinds[1:], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    fo.pack_onnx(tmp_path / "m.onnx", tmp_path / "p.onnx", fo.Recipe(bits=4, min_size=1), fast=True)
    x = random(rng, 3, 64).astype("f2")
    expected = x.astype("f8") @ fo.quantize(w.T.copy(), bits=4).dequantize().T.astype("f8")
    assert distance(run(tmp_path / "p.onnx", {"x": x})["y"], expected) < 2e-3


def test_dry_run_and_targets(source, tmp_path):
    told = []
    recipe = fo.Recipe(min_size=500)
    report = fo.pack_onnx(
        source, tmp_path / "p.onnx", recipe, target_bits=5, dry_run=True, notify=lambda *now: told.append(now)
    )
    assert not (tmp_path / "p.onnx").exists()
    assert {t.bits for t in report.tensors if t.kind == "quantized"} > {4}
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    assert told[-1][2] == ""


def layers(rng, tmp_path, shapes):
    w = {f"layer{i}.weight": random(rng, *shape) for i, shape in enumerate(shapes)}
    fo.export(w, tmp_path / "m.onnx", to="onnx", graph=[fo.Layer(f"layer{i}") for i in range(len(shapes))])
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("param_group", [-1, 256])
def test_parameters_in_two_levels_decode_to_the_same_bits(param_group, fast, rng, tmp_path):
    options = {"bits": 5, "group_size": 16, "param_bits": 6, "param_group": param_group}
    source = layers(rng, tmp_path, [(9, 100), (64, 9)])  # 7 groups a row, and 1
    report = fo.pack_onnx(source, tmp_path / "p.onnx", **options, min_size=1, fast=fast)
    found = onnx_sources(tmp_path / "p.onnx")
    for name, w in onnx_sources(source).items():
        assert np.array_equal(found[name].read(), fo.quantize(w.read(), **options).dequantize())
    assert [t.param_bits for t in report.tensors] == [6, 6]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4},
        {"bits": 2},
        {"bits": 4, "outliers": 0.01},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "param_bits": 4},
        {"bits": 4, "param_bits": 6, "group_size": 32},
        {"bits": 4, "param_bits": 4, "param_group": 256},
        {"preset": "balanced"},
        {"sparsity": 0.5},
        {"sparsity": 0.99},
        {"sparsity": 0.01},
        {"bits": 8, "sparsity": 0.5},
        {"bits": 2, "pattern": "2:4"},
    ],
    ids=str,
)
def test_sizes_are_those_of_the_file(options, fast, rng, tmp_path):
    source = layers(rng, tmp_path, [(96, 100), (64, 96)])
    report = fo.pack_onnx(source, tmp_path / "p.onnx", **options, fast=fast)
    assert fo.pack_onnx(source, tmp_path / "dry.onnx", **options, fast=fast, dry_run=True) == report
    model = onnx.load(tmp_path / "p.onnx")
    stored = {c.name: len(c.raw_data) for c in model.graph.initializer}
    for t in report.tensors:
        own = {name: n for name, n in stored.items() if name.startswith(t.name)}
        assert t.nbytes == sum(own.values()), own
    assert report.nbytes <= sum(stored.values()) < report.nbytes + 200  # the nodes have a few constants of their own
    for c in model.graph.initializer:
        c.ClearField("raw_data")
    x = random(rng, 3, 100)
    assert run(tmp_path / "p.onnx", {"x": x})["layer1"].shape == (3, 64)
    rest = (tmp_path / "p.onnx").stat().st_size - sum(stored.values()) - model.ByteSize()
    assert 0 <= rest < 8 * len(stored)  # tags and lengths


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5}, {"group_size": 48}], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (96, 100)])
def test_target_size_is_kept(shape, options, fast, rng, tmp_path):
    source = layers(rng, tmp_path, [shape, *[(shape[0], shape[0])] * 7])
    if fast and "group_size" in options:
        options = {"group_size": 64}
    full = source.stat().st_size
    for share in (0.27, 0.29):  # at 0.3 some have 8 bits everywhere, and room is left
        report = fo.pack_onnx(source, tmp_path / "p.onnx", **options, fast=fast, target_size=int(share * full))
        assert 0.75 * share * full < (tmp_path / "p.onnx").stat().st_size <= share * full
    assert all(t.bits for t in report.tensors)
    with pytest.raises(ValueError, match="target_size: expected at least"):
        fo.pack_onnx(source, tmp_path / "none.onnx", **options, fast=fast, target_size=5000)
    assert not (tmp_path / "none.onnx").exists()


def test_refused(source, weights, tmp_path):
    recipe = fo.Recipe(bits=4, min_size=1)
    out = tmp_path / "out.onnx"
    with pytest.raises(FileNotFoundError):
        fo.pack_onnx(tmp_path / "none.onnx", out, recipe)
    (tmp_path / "text.onnx").write_text("not a model")
    for content in (b"not a model", b"", b"\x08\x07"):
        (tmp_path / "text.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"text.onnx: not an ONNX file"):
            fo.pack_onnx(tmp_path / "text.onnx", out, recipe)
    weights["gemm"][3, 5] = np.nan
    with pytest.raises(ValueError, match=r"'gemm': w: expected finite .* got nan at \(5, 3\)"):
        fo.pack_onnx(save_model(tmp_path / "nan.onnx", weights), out, recipe)
    with pytest.raises(ValueError, match=r"'.*': MatMulNBits has blocks .* got groups of 8"):
        fo.pack_onnx(source, out, recipe.replace(group_size=8), fast=True)
    model = onnx.load(source)
    model.graph.initializer[0].raw_data = b"short"
    onnx.save(model, tmp_path / "short.onnx")
    with pytest.raises(ValueError, match=r"short.onnx: 'conv': not a sound tensor: .*"):
        fo.pack_onnx(tmp_path / "short.onnx", out, recipe)
    model = onnx.load(source)
    model.graph.node.append(helper.make_node("Experiment", ["x"], ["z"]))
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ValueError, match=r"is of operator set 17, .* cannot be brought to 21"):
        fo.pack_onnx(tmp_path / "old.onnx", out, recipe)
    assert not out.exists()


def external(tmp_path, **changed):
    """A model whose weight is in another file, and what is said of that changed."""
    w = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [w("x", 1, [4, 64])],
        [w("y", 1, [4, 64])],
        [numpy_helper.from_array(np.eye(64, dtype="f4"), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry.value for entry in model.graph.initializer[0].external_data} | changed
    del model.graph.initializer[0].external_data[:]
    for key, value in entries.items():
        if value is not None:
            model.graph.initializer[0].external_data.add(key=key, value=value)
    onnx.save(model, path)
    return path


def test_data_in_another_file(tmp_path):
    path = external(tmp_path)
    report = fo.pack_onnx(path, tmp_path / "p.onnx", bits=8)
    assert [t.kind for t in report.tensors] == ["quantized"]
    x = np.ones((4, 64), "f4")
    assert distance(run(tmp_path / "p.onnx", {"x": x})["y"], x) < 0.01
    (tmp_path / "model" / "m.data").rename(tmp_path / "blob")  # a link, but within what the model's own link leads to
    path.rename(tmp_path / "blob2")
    path.symlink_to("../blob2")
    (tmp_path / "model" / "m.data").symlink_to("../blob")
    assert fo.pack_onnx(path, tmp_path / "q.onnx", bits=8) == report


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"location": "../secret"}, "expected its data in the folder of the model, got the location '../secret'"),
        ({"location": "/etc/passwd"}, "expected its data in the folder of the model, got the location '/etc/passwd'"),
        ({"location": "link"}, "expected its data in the folder of the model, got the location 'link'"),
        ({"location": None}, "expected its data in the folder of the model, got the location ''"),
        ({"location": "gone"}, "which is missing or no regular file"),
        ({"location": "."}, "which is missing or no regular file"),
        ({"location": "pipe"}, "which is missing or no regular file"),
        ({"offset": "1"}, "bytes 1 to 16385 of .*, which has 16384"),
        ({"offset": "-1"}, "bytes -1 to"),
        ({"length": "-1"}, "bytes 0 to -1"),
        ({"length": "many"}, "its place in .* is not sound"),
        ({"length": "16380"}, "not a sound tensor"),
    ],
)
def test_data_that_are_not_there(changed, message, tmp_path):
    path = external(tmp_path, **changed)
    (tmp_path / "secret").write_bytes(bytes(20000))
    (tmp_path / "model" / "link").symlink_to("../secret")
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(ValueError, match=f"m.onnx: 'W': .*{message}"):
        fo.pack_onnx(path, tmp_path / "p.onnx", bits=8)
    line = command("pack", path, "-o", tmp_path / "p.onnx", "--bits", 8, code=1).stderr
    assert line.startswith("fastopt: ")
    assert line.count("\n") == 1
    assert not (tmp_path / "p.onnx").exists()


def test_nodes_that_lack_something(rng, tmp_path):
    """Whatever onnx itself would refuse later, no error is of another kind."""
    node = helper.make_node
    many = [
        [node("Identity", [], ["i"])],
        [node("Identity", ["W"], [])],
        [node("Transpose", ["W"], ["t"], perm=[0, 0])],
        [node("Transpose", ["W"], ["t"], perm=1)],
        [node("Cast", ["W"], ["t"], to="float")],
        [node("Cast", ["W"], ["t"])],
        [node("Einsum", ["x", "W"], ["t"], equation=1)],
        [node("Einsum", ["x", "W"], ["t"], equation="ab")],
        [node("Einsum", ["x", "W"], ["t"], equation="a,b,c->")],
        [node("Gather", ["W"], ["t"], axis=7)],
        [node("Constant", [], [])],
        [node("Constant", [], ["k"], value=1)],
        [node("MatMul", ["", "W"], [])],
        [node("If", ["W"], [])],
        [node("", ["W"], ["t"])],
    ]
    for nodes in many:
        ends = [helper.make_tensor_value_info(name, 1, [64, 64]) for name in "xy"]
        graph = helper.make_graph(
            [*nodes, node("MatMul", ["x", "W"], ["y"])], "g", ends[:1], ends[1:],
            [numpy_helper.from_array(random(rng, 64, 64), "W")],
        )  # fmt: skip
        for opset in (13, 21):
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
            onnx.save(model, tmp_path / "m.onnx")
            for fast in (False, True):
                try:
                    fo.pack_onnx(tmp_path / "m.onnx", tmp_path / "p.onnx", bits=8, fast=fast)
                except ValueError as error:
                    assert str(error)  # noqa: PT017


def test_more_than_a_file_holds(weights, rng, tmp_path, monkeypatch):
    """Above 2 GiB tensors are in a file beside it: initializers, Constant nodes, those of branches."""
    source = save_model(tmp_path / "m.onnx", weights)
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    recipe = fo.Recipe(bits=8, min_size=1, exclude=["constant", "inner", "conv"])
    fo.pack_onnx(source, one, recipe)
    monkeypatch.setattr(onnx_file, "_LIMIT", 30_000)
    fo.pack_onnx(source, two, recipe)
    assert two.stat().st_size < 30_000
    feeds = {"x": random(rng, 2, 3, 16, 16), "yes": np.array(True)}
    assert np.array_equal(run(two, feeds)["y"], run(one, feeds)["y"])
    with pytest.warns(UserWarning, match="no tensor is packed"):  # the weights that are left are excluded
        again = fo.pack_onnx(two, tmp_path / "three.onnx", recipe)
    assert again.nbytes_before > 0
    assert np.array_equal(run(tmp_path / "three.onnx", feeds)["y"], run(one, feeds)["y"])


@pytest.mark.parametrize("opset", [17, 21])
def test_one_tensor_is_in_memory(opset, tmp_path):
    """The model has 64 MB in 16 weights; it may have to be brought to another operator set."""
    code = f"""{PEAK_MB}
import sys
import numpy as np, onnx
from onnx import helper as h
import fastopt as fo

def save(count, size, path):
    w = np.random.default_rng(0).standard_normal((size, size)).astype("f4")
    info = [h.make_tensor_value_info(name, 1, [1, size]) for name in ("h0", f"h{{count}}")]
    nodes = [h.make_node("MatMul", [f"h{{i}}", f"w{{i}}"], [f"h{{i + 1}}"]) for i in range(count)]
    constants = [onnx.numpy_helper.from_array(w, f"w{{i}}") for i in range(count)]
    graph = h.make_graph(nodes, "g", info[:1], info[1:], constants)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", {opset})], ir_version=8), path)

if len(sys.argv) > 1:
    save(16, 1024, "big.onnx")
else:
    save(1, 64, "small.onnx")
    fo.pack_onnx("small.onnx", "small.onnx", bits=4)
    before = peak_mb()
    fo.pack_onnx("big.onnx", "packed.onnx", bits=4)
    print(peak_mb() - before)
"""
    assert run_python(code, "make", cwd=tmp_path).returncode == 0
    assert float(run_python(code, cwd=tmp_path).stdout) < 32


def test_command(source, tmp_path):
    model, out = tmp_path / "command.onnx", tmp_path / "python.onnx"
    fo.pack_onnx(source, out, fo.Recipe(bits=4, exclude=["conv"], min_size=1), fast=True, accuracy_level=4)
    options = ("--bits", 4, "--exclude", "conv", "--min-size", 1, "--fast", "--accuracy-level", 4)
    result = command("pack", source, "-o", model, *options, "--json")
    assert model.read_bytes() == out.read_bytes()
    told = json.loads(result.stdout)
    assert told["file_bytes"] == out.stat().st_size
    assert {t["name"]: t["bits"] for t in told["tensors"]}["turned"] == 4
    model.unlink()
    assert "gemm" in command("pack", source, "-o", model, "--target-bits", 6, "--min-size", 500, "--dry-run").stdout
    fo.PackedModel({"w": np.eye(64, dtype="f4")}).save(tmp_path / "w.safetensors")
    paths = (tmp_path / "w.safetensors", "-o", tmp_path / "p.safetensors")
    wrong = command("pack", paths[0], "-o", model, "--bits", 4, code=2).stderr
    assert "an ONNX model is made of an ONNX model" in wrong
    assert "use --exclude" in command("pack", source, "-o", model, "--bits", 4, "--skip", "conv", code=2).stderr
    assert "for an ONNX model only" in command("pack", *paths, "--bits", 4, "--fast", code=2).stderr
    assert not model.exists()


@pytest.mark.parametrize(("bits", "fast"), [(8, False), (4, True)])
def test_magika_tells_the_same_types(bits, fast, tmp_path):
    """A model that its package carries, and runs."""
    magika = pytest.importorskip("magika", reason="magika, whose wheel carries a model, is not installed")
    (folder,) = Path(magika.__file__).parent.glob("models/standard_*")
    shutil.copytree(folder, tmp_path / "model")
    model = tmp_path / "model" / "model.onnx"
    before = model.stat().st_size
    fo.pack_onnx(model, model, fo.Recipe(bits=bits), fast=fast)
    assert model.stat().st_size < before / (3.5 if bits == 8 else 5)
    here, package = Path(__file__).parents[2], Path(magika.__file__).parent
    folders = (here.glob("*.*"), here.glob("cpp/**/*"), here.glob("tests/*"), package.rglob("*"))
    files = {path.suffix: path for folder in folders for path in sorted(folder) if path.is_file()}
    full, small = magika.Magika(), magika.Magika(model_dir=tmp_path / "model")
    results = [m.identify_paths(list(files.values())) for m in (full, small)]
    labels = [[result.output.label for result in found] for found in results]
    assert len(set(labels[0])) >= 8
    same = [a == b for a, b in zip(*labels, strict=True)]
    assert np.mean(same) >= (1 if bits == 8 else 0.9)
    scores = np.array([[result.score for result in found] for found in results])
    assert np.median(abs(scores[0] - scores[1])) < (0.01 if bits == 8 else 0.05)
