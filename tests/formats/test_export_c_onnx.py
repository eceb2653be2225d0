"""ONNX models become C that computes what ONNX Runtime computes, or are refused by node and operator."""

import json

import numpy as np
import pytest
from test_export_c_net import run_of, session_of

import fastopt as fo

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto


def saved(path, nodes, constants, input_shape=(1, 4, 9, 8), output="y"):
    """A model of nodes: operator, inputs, outputs and attributes; "-" is an output that is left out."""
    made = []
    for i, (operator, inputs, outputs, *attributes) in enumerate(nodes):
        names = [name.strip("-") for name in outputs.split()]
        made.append(helper.make_node(operator, inputs.split(), names, f"n{i}", **(attributes[0] if attributes else {})))
    graph = helper.make_graph(
        made, "test", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(input_shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in output.split()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def floats(rng, **shapes):
    return {name: (0.4 * rng.standard_normal(shape)).astype("f4") for name, shape in shapes.items()}


def ints(**values):
    return {name: np.array(value, np.int64) for name, value in values.items()}


def image(rng):
    """A network of an image, whose shapes are computed from the shape of the input."""
    nodes = [
        ("Conv", "x w1 b1", "a", {"strides": [2, 1], "auto_pad": "SAME_LOWER"}),
        ("Clip", "a zero six", "b"), ("Sub", "b three", "c"), ("Div", "c scale", "d"),
        ("Sigmoid", "d", "e"), ("Mul", "d e", "f"), ("Conv", "f w2", "g", {"group": 2, "pads": [0, 1, 1, 0]}),
        ("BatchNormalization", "g gain shift mean var", "h"), ("Mul", "h h", "h2"), ("Sum", "h h2 h", "i"),
        ("MaxPool", "i", "j", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool", "i", "k", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Concat", "j k", "l", {"axis": 1}), ("GlobalMaxPool", "l", "m"),
        ("ReduceMean", "l", "o", {"axes": [2, 3]}), ("Add", "m o", "p"),
        ("Shape", "p", "s"), ("Gather", "s first", "s0"), ("Concat", "s0 minus", "s1", {"axis": 0}),
        ("Reshape", "p s1", "q"), ("Gemm", "q w3 b3", "r"),
        ("Div", "r root", "t"), ("Erf", "t", "u"), ("Add", "u one", "v"), ("Mul", "r v", "w"), ("Mul", "w half", "z"),
        ("MatMul", "z w4t", "z4"), ("Add", "b4 z4", "z5"), ("Softmax", "z5", "y"),
    ]  # fmt: skip
    constants = floats(
        rng, w1=(6, 4, 3, 3), b1=(6,), w2=(8, 3, 2, 2), gain=(8,), shift=(8,), mean=(8,), w3=(16, 12), b3=(12,),
        w4t=(12, 5), b4=(5,), three=(6, 1, 1),
    )  # fmt: skip
    constants |= {"var": rng.uniform(1, 2, 8).astype("f4"), "scale": np.float32(0.7), "root": np.float32(2**0.5)}
    constants |= {"zero": np.float32(0), "six": np.float32(6), "one": np.float32(1), "half": np.float32(0.5)}
    return nodes, constants | ints(first=[0], minus=[-1])


def sequence(rng):
    """Recurrent layers in all directions, between convolutions of signals."""
    nodes = [
        ("Transpose", "x", "a", {"perm": [0, 2, 1]}), ("Conv", "a w1 b1", "b", {"pads": [1, 1]}),
        ("Transpose", "b", "c", {"perm": [2, 0, 1]}),
        ("LSTM", "c wl rl bl", "d dh", {"hidden_size": 5, "direction": "bidirectional"}),
        ("Transpose", "d", "e", {"perm": [0, 2, 1, 3]}), ("Reshape", "e wide", "f"),
        ("GRU", "f wg rg bg", "g", {"hidden_size": 6, "direction": "reverse"}), ("Squeeze", "g axis1", "h"),
        ("GRU", "h wh rh", "- ih", {"hidden_size": 4, "linear_before_reset": 1}),
        ("Squeeze", "ih axis0", "j"), ("Slice", "h begin end axis0", "k"), ("Squeeze", "k axis0", "k2"),
        ("Gather", "h two", "l", {"axis": 0}), ("Gather", "dh zero", "m", {"axis": 0}), ("Squeeze", "m axis0", "m1"),
        ("Unsqueeze", "m1 axis0", "m2"), ("Concat", "j k2 l m2", "o", {"axis": -1}),
        ("LayerNormalization", "o gain shift", "y"),
    ]  # fmt: skip
    constants = floats(
        rng, w1=(7, 6, 3), b1=(7,), wl=(2, 20, 7), rl=(2, 20, 5), bl=(2, 40), wg=(1, 18, 10), rg=(1, 18, 6),
        bg=(1, 36), wh=(1, 12, 6), rh=(1, 12, 4), gain=(21,), shift=(21,),
    )  # fmt: skip
    return nodes, constants | ints(wide=[0, 0, -1], axis0=[0], axis1=[1], begin=[-1], end=[2**62], two=2, zero=0)


@pytest.mark.parametrize(("network", "shape"), [(image, (1, 4, 9, 8)), (sequence, (1, 7, 6))])
def test_same_as_onnxruntime(network, shape, rng, tmp_path):
    path = saved(tmp_path / "net.onnx", *network(rng), input_shape=("batch", *shape[1:]))
    x = rng.standard_normal(shape).astype("f4")
    (expected,) = session_of(path).run(None, {"x": x})
    fo.export(path, tmp_path / "net.c", to="c")
    y = run_of(tmp_path, "run", ["net"], {"net": (x, expected.size, "net_run")})["net"].reshape(expected.shape)
    assert np.linalg.norm(y - expected) <= 3e-6 * np.linalg.norm(expected)


def test_packed_weights_of_an_onnx_model(rng, tmp_path):
    """Weights that were packed from an ONNX model run in its graph; `dry_run` tells the smaller size."""
    path = saved(tmp_path / "net.onnx", *image(rng))
    fo.pack_file(path, tmp_path / "net.safetensors", bits=8, min_size=30)
    told = fo.export(path, tmp_path / "net.c", to="c")
    small = fo.export(tmp_path / "net.safetensors", tmp_path / "small.c", to="c", onnx=path)
    assert small.flash < 0.75 * told.flash
    assert (small.scratch, small.macs) == (told.scratch, told.macs)
    assert "w3: QuantizedTensor(shape=(12, 16), bits=8" in (tmp_path / "small.h").read_text()
    x = rng.standard_normal((1, 4, 9, 8)).astype("f4")
    fo.pack_onnx(path, tmp_path / "packed.onnx", bits=8, min_size=30)  # the same codes
    with pytest.warns(UserWarning, match="packed.onnx: nodes decode weights, as 'w1', and C gets"):
        fo.export(tmp_path / "packed.onnx", tmp_path / "decoded.c", to="c")
    (expected,) = session_of(tmp_path / "packed.onnx").run(None, {"x": x})
    found = run_of(tmp_path, "run", ["small", "decoded"], {n: (x, 5, f"{n}_run") for n in ("small", "decoded")})
    for y in found.values():
        assert np.linalg.norm(y - expected) <= 3e-6 * np.linalg.norm(expected)


REFUSED = [
    ([("Sin", "x", "y")], {}, "the node 'n0', a Sin, cannot be computed in C: no function of fastopt_nn.h comp"),
    ([("MatMul", "x x", "y")], {}, "'n0', a MatMul, .*: expected a product with a weight, got one of two values"),
    ([("Clip", "x low", "y")], {"low": np.float32(1)}, "'n0', a Clip, .* expected limits of 0 and 6, .* got 1 and inf"),
    ([("Add", "x c", "y")], {"c": np.ones((9, 8), "f4")}, "'n0', a Add, .*: expected a constant along one axis"),
    ([("Relu", "x", "y"), ("Relu", "x", "z")], {}, "expected one input and one output, got x and y, z"),
    ([("Identity", "c", "y")], {"c": np.ones(3, "f4")}, "the output 'y' does not depend on the input"),
    (
        [("Softmax", "x", "y", {"axis": 2})],
        {},
        "Softmax 'n0': softmax: expected the last axis or the channels, got axi",
    ),
    ([("Conv", "x w", "y")], {"w": np.ones((2, 3, 1, 1), "f4")}, "Conv 'n0': 'w' of shape .2, 3, 1, 1. with 1 groups"),
    ([("MaxPool", "x", "y i", {"kernel_shape": [2, 2]}), ("Cast", "i", "z", {"to": 1})], {}, "expected one input and"),
    ([("Reshape", "x s", "y")], {"s": np.array([5, -1])}, "Reshape 'n0': cannot give a value of shape"),
    ([("Relu", "x", "a"), ("Conv", "a", "y")], {}, "the node 'n1', a Conv, is not valid: "),
    ([("ConstantOfShape", "s", "a"), ("Add", "x a", "y")], {"s": np.array([2**40])}, "a Add, needs more"),
    (
        [("Shape", "x", "s"), ("ConstantOfShape", "s", "a"), ("Tile", "a s", "b"), ("Add", "x b", "y")],
        {},
        "a Tile, can",
    ),
    ([("Gemm", "x w", "y", {"alpha": 0.5})], {"w": np.ones((8, 2), "f4")}, "a Gemm, .*expected alpha and beta of 1"),
]


@pytest.mark.parametrize(("nodes", "constants", "message"), REFUSED)
def test_refused(nodes, constants, message, tmp_path):
    outputs = "y z" if nodes[-1][2] == "z" else "y"
    path = saved(tmp_path / "net.onnx", nodes, constants, output=outputs)
    with pytest.raises(ValueError, match=message):
        fo.export(path, tmp_path / "net.c", to="c")
    assert not (tmp_path / "net.c").exists()
    fo.export(path, tmp_path / "net.c", to="c", arrays=True)
    assert "_run(" not in (tmp_path / "net.h").read_text()


def test_open_shapes_are_asked_for(tmp_path):
    path = saved(tmp_path / "net.onnx", [("Relu", "x", "y")], {}, input_shape=("batch", 3, "height", "width"))
    with pytest.raises(ValueError, match=r"input_shape: 'x' has the shape \(batch, 3, height, width\) in .*net.onnx;"):
        fo.export(path, tmp_path / "net.c", to="c")
    with pytest.raises(ValueError, match=r"input_shape: 'x' has the shape .*, got \(4, 2, 2\)"):
        fo.export(path, tmp_path / "net.c", to="c", input_shape=(4, 2, 2))
    assert fo.export(path, tmp_path / "net.c", to="c", input_shape=(3, 2, 2)).output_bytes == 48
    path = saved(tmp_path / "net.onnx", [("Relu", "x", "y")], {}, input_shape=(2, 3))
    with pytest.raises(ValueError, match=r"has the shape \(2, 3\); expected a batch of 1"):
        fo.export(path, tmp_path / "net.c", to="c")
    with pytest.raises(ValueError, match="graph, onnx: expected one of them"):
        fo.export({}, tmp_path / "net.c", to="c", onnx=path, graph=[fo.Layer("fc")])


def test_command_line(rng, tmp_path):
    from typer.testing import CliRunner

    from fastopt.cli.show_commands import app

    def cli(*args):
        result = CliRunner().invoke(app, ["export", *map(str, args)])
        assert result.exit_code == 0, result.output
        return result.stdout

    path = saved(tmp_path / "net.onnx", *image(rng))
    lines = cli(path, "--to", "c", "-o", tmp_path / "net.c", "--dry-run").splitlines()
    assert lines[0].split() == ["node", "function", "output", "flash", "bytes", "multiply-adds"]
    assert lines[-1].startswith("RAM: scratch ")
    assert not (tmp_path / "net.c").exists()
    told = json.loads(cli(path, "--to", "c", "-o", tmp_path / "net.c", "--json"))
    assert told["cost"]["macs"] == sum(step["macs"] for step in told["cost"]["steps"])
    assert f"{told['cost']['macs']:,}" in lines[-2]
    assert (tmp_path / "net.c").exists()
    fo.PackedModel({"fc.weight": np.ones((4, 6), "f4")}).save(tmp_path / "m.safetensors")
    cli(tmp_path / "m.safetensors", "--to", "c", "-o", tmp_path / "m.c", "--layer", "fc:relu", "--input-shape", "3,6",
        "--int8")  # fmt: skip
    assert "int m_run_int8(" in (tmp_path / "m.h").read_text()
