"""Calibration of ONNX models."""

import numpy as np
import pytest
from test_cli import answer
from test_cli import run as command
from test_export_onnx import distance, random

import fastopt as fo

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def save_model(path, nodes, weights, inputs, outputs):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def outputs_of(path, feeds):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.fixture
def mlp(rng, tmp_path):
    """MatMul, Gemm with transposed weight, a weight that is the first factor, a tied one, and one in a Gather."""
    weights = {
        "first": random(rng, 48, 64),
        "turned": random(rng, 32, 64),
        "left": random(rng, 16, 10),
        "table": random(rng, 100, 48),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "turned"], ["c"], transB=1),
        helper.make_node("MatMul", ["left", "c"], ["d"]),
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["e"]),
    ]
    save_model(tmp_path / "m.onnx", nodes, weights, {"x": [10, 48]}, ["d", "e"])
    return tmp_path / "m.onnx", weights


def test_products(mlp, rng):
    path, weights = mlp
    batches = [np.abs(random(rng, 10, 48)) for _ in range(3)]
    calib = fo.calibrate_onnx(path, [{"x": x} for x in batches], products=True)
    expected = fo.Calibration(products=True)
    for x in batches:
        b = np.maximum(x @ weights["first"], 0)
        expected.update("first", x)
        expected.update("turned", b)
        expected.update("left", (b @ weights["turned"].T).T)
    assert calib.rows == {"first": 30, "turned": 30, "left": 96}
    for name, sums in expected.items():
        np.testing.assert_allclose(calib[name].products, sums.products, rtol=1e-4, atol=1e-4)
    assert calib["first"] == expected["first"]


def test_packed_models_are_nearer(mlp, rng, tmp_path):
    path, _ = mlp
    scale = np.where(np.arange(48) % 8 == 0, 20, 0.1).astype("f4")
    batches = [{"x": np.abs(random(rng, 10, 48)) * scale} for _ in range(40)]
    calib = fo.calibrate_onnx(path, batches[:-1], products=True)
    (expected, _), errors = outputs_of(path, batches[-1]), []
    for options in ({"fit": "lsq"}, {"calibration": calib}, {"calibration": calib, "fit": "gptq"}):
        report = fo.pack_onnx(path, tmp_path / "s.onnx", bits=2, min_size=1, **options)
        errors.append(distance(outputs_of(tmp_path / "s.onnx", batches[-1])[0], expected))
    assert errors[2] < errors[1] < errors[0]
    reasons = {t.name: t.reason for t in report.tensors}
    assert reasons["table"] == "for all; no calibration"
    assert {t.name for t in report.tensors if t.output_error is not None} == set(calib)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": [2, 3]},
        {"pads": [1, 0, 2, 1]},
        {"dilations": [2, 1], "pads": [1, 1, 1, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"auto_pad": "VALID"},
        {"group": 2},
        {"group": 6, "channels": 1},
    ],
    ids=str,
)
def test_convolutions_take_patches(options, rng, tmp_path):
    """Y, as ONNX Runtime computes it, is the patches times the weight: its mean square follows from their products."""
    options = dict(options)
    group, channels = options.get("group", 1), options.pop("channels", 6 // options.get("group", 1))
    w, x = random(rng, 12, channels, 3, 2), random(rng, 3, 6, 9, 11)
    save_model(
        tmp_path / "c.onnx", [helper.make_node("Conv", ["x", "w"], ["y"], **options)], {"w": w}, {"x": x.shape}, ["y"]
    )
    sums = fo.calibrate_onnx(tmp_path / "c.onnx", {"x": x}, products=True)["w"]
    (y,) = outputs_of(tmp_path / "c.onnx", {"x": x})
    assert sums.rows == y[:, 0].size * group
    flat = w.reshape(12, -1).astype("f8")
    if group == 1:
        ours = np.einsum("ri,ij,rj->r", flat, sums.products, flat)
        np.testing.assert_allclose(ours, np.square(y.astype("f8")).sum(axis=(0, 2, 3)), rtol=1e-4)
    else:  # the patches of all groups are summed: with the same weight in each, so are the outputs
        same = np.tile(w[: 12 // group], (group, 1, 1, 1))
        save_model(
            tmp_path / "c.onnx",
            [helper.make_node("Conv", ["x", "w"], ["y"], **options)],
            {"w": same},
            {"x": x.shape},
            ["y"],
        )
        (y,) = outputs_of(tmp_path / "c.onnx", {"x": x})
        ours = np.einsum("ri,ij,rj->r", flat[: 12 // group], sums.products, flat[: 12 // group])
        per_row = np.square(y.astype("f8")).sum(axis=(0, 2, 3)).reshape(group, -1).sum(axis=0)
        np.testing.assert_allclose(ours, per_row, rtol=1e-4)


def test_one_dimension_and_many_patches(rng, tmp_path):
    w, x = random(rng, 4, 3, 5), random(rng, 2, 3, 20000)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    save_model(tmp_path / "c.onnx", [node], {"w": w}, {"x": [2, 3, "length"]}, ["y"])
    sums = fo.calibrate_onnx(tmp_path / "c.onnx", {"x": x}, products=True)["w"]
    assert 2048 < sums.rows <= 4096
    expected = fo.calibrate_onnx(tmp_path / "c.onnx", {"x": x[:, :, :1000]})["w"]
    np.testing.assert_allclose(sums.mean_squares, expected.mean_squares, rtol=0.2)


def test_recurrent_layers(rng, tmp_path):
    weights = {"W": random(rng, 1, 32, 6), "R": random(rng, 1, 32, 8)}
    node = helper.make_node("LSTM", ["x", "W", "R"], ["y"], hidden_size=8)
    save_model(tmp_path / "r.onnx", [node], weights, {"x": [5, 2, 6]}, ["y"])
    x = random(rng, 5, 2, 6)
    calib = fo.calibrate_onnx(tmp_path / "r.onnx", {"x": x})
    assert calib.rows == {"W": 10}
    expected = fo.Calibration()
    expected.update("W", x)
    assert calib == expected


def test_command_line(mlp, rng, tmp_path):
    path, _ = mlp
    x = np.abs(random(rng, 50, 48))
    np.savez(tmp_path / "inputs.npz", x=x)
    told = answer("calibrate", path, "--data", tmp_path / "inputs.npz", "-o", tmp_path / "c.safetensors", "--products")
    assert told["weights"]["first"] == {"rows": 50, "columns": 48}
    calib = fo.Calibration.load(tmp_path / "c.safetensors")
    assert calib == fo.calibrate_onnx(path, [{"x": x[at : at + 10]} for at in range(0, 50, 10)], products=True)
    told = answer(
        *("pack", path, "-o", tmp_path / "s.onnx", "--bits", 4, "--min-size", 1),
        *("--fit", "gptq", "--calibration", tmp_path / "c.safetensors"),
    )
    errors = {t["name"]: t["output_error"] for t in told["tensors"]}
    assert errors["first"] > 0
    assert errors["table"] is None
    ours = fo.pack_onnx(path, tmp_path / "t.onnx", bits=4, min_size=1, fit="gptq", calibration=calib)
    assert {t.name: t.output_error for t in ours.tensors} == errors
    shown = command(
        *("pack", path, "-o", tmp_path / "s.onnx", "--bits", 4, "--min-size", 1),
        *("--calibration", tmp_path / "c.safetensors"),
    )
    assert "output error" in shown.stdout
    command("pack", path, "-o", tmp_path / "s.onnx", "--bits", 4, "--calibration", path, code=2)


def test_refused(mlp, rng, tmp_path):
    path, weights = mlp
    with pytest.raises(ValueError, match=r"m.onnx: ONNX Runtime cannot run it on these inputs: "):
        fo.calibrate_onnx(path, {"x": random(rng, 3, 3)})
    with pytest.raises(ValueError, match="batches: expected one or more, got none"):
        fo.calibrate_onnx(path, [])
    with pytest.raises(TypeError, match="batches: expected mappings from name to array"):
        fo.calibrate_onnx(path, [np.zeros(3)])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    save_model(tmp_path / "p.onnx", [node], {"w": weights["first"]}, {"x": [1, 48]}, ["y"])
    x = np.zeros((1, 48), "f4")
    x[0, 3] = np.nan
    with pytest.raises(ValueError, match=r"'w': x: expected finite values, got nan in column 3"):
        fo.calibrate_onnx(tmp_path / "p.onnx", {"x": x})
    node = helper.make_node("Gather", ["table", "i"], ["e"])
    cast = helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64)
    save_model(tmp_path / "g.onnx", [cast, node], {"table": weights["table"]}, {"x": [3]}, ["e"])
    with pytest.raises(ValueError, match=r"g.onnx: has no weights whose inputs can be seen"):
        fo.calibrate_onnx(tmp_path / "g.onnx", {"x": np.zeros(3, "f4")})
