"""Outputs of two ONNX models, compared."""

import json

import numpy as np
import pytest
from test_cli import run as command
from test_export_onnx import random
from test_onnx_graph import info, node, save

import fastopt as fo

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from fastopt.formats.onnx_check import check_onnx  # noqa: E402


@pytest.fixture
def model(rng, tmp_path):
    """Save a model that reads numbers of words, an image and a flag, and returns floats and integers."""

    def branch(kind):
        return onnx.helper.make_graph([node(kind, ["scores"], ["s"])], kind, [], [info("s", "batch", 16)])

    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("ReduceMean", ["e"], ["m"], axes=[1], keepdims=0),
        node("MatMul", ["x", "W"], ["h"]),
        node("Add", ["m", "h"], ["scores"]),
        node("ArgMax", ["scores"], ["label"], axis=-1, keepdims=0),
        node("If", ["flag"], ["same"], then_branch=branch("Identity"), else_branch=branch("Neg")),
    ]
    inputs = [info("ids", "batch", "length", kind=7), info("x", "batch", 64), info("flag", kind=9)]
    outputs = [info("scores", "batch", 16), info("label", "batch", kind=7), info("same", "batch", 16)]
    constants = {"table": random(rng, 300, 16), "W": random(rng, 64, 16)}
    return save(tmp_path / "m.onnx", nodes, inputs, outputs, constants, 17)


def test_check(model, rng, tmp_path):
    packed = tmp_path / "p.onnx"
    errors = []
    for bits in (8, 4, 2):
        fo.pack_onnx(model, packed, bits=bits, min_size=1)
        scores, label, same = check_onnx(model, packed)
        assert (scores.name, scores.shape) == ("scores", (1, 16))
        assert (label.name, label.shape, label.same_top) == ("label", (1,), None)
        assert scores.error == same.error
        assert 0 <= scores.same_top <= 1
        errors.append(scores.error.relative)
    assert 0 < errors[0] < 0.02 < errors[1] < errors[2] < 1
    assert all(output.error.max == 0 for output in check_onnx(model, model))
    assert check_onnx(model, packed, seed=1) != check_onnx(model, packed) == check_onnx(model, packed, seed=0)


def test_given_inputs(model, rng, tmp_path):
    packed = tmp_path / "p.onnx"
    fo.pack_onnx(model, packed, bits=4, min_size=1)
    feed = {"ids": np.array([[0, 299], [3, 4]]), "x": random(rng, 2, 64), "flag": np.array(True)}
    one = check_onnx(model, packed, feed)
    assert one[0].shape == (2, 16)
    assert check_onnx(model, packed, [feed, feed])[0].error.relative == pytest.approx(one[0].error.relative)
    np.savez(tmp_path / "inputs.npz", **feed)
    assert check_onnx(model, packed, tmp_path / "inputs.npz") == one
    with pytest.raises(ValueError, match=r"m.onnx: ONNX Runtime cannot run it on these inputs: .*x"):
        check_onnx(model, packed, {**feed, "x": random(rng, 2, 63)})
    with pytest.raises(ValueError, match="inputs: expected one or more mappings"):
        check_onnx(model, packed, [])


def test_command(model, tmp_path):
    packed = tmp_path / "p.onnx"
    options = ("--bits", 4, "--min-size", 1, "--check")
    told = json.loads(command("pack", model, "-o", packed, *options, "--json").stdout)
    outputs = check_onnx(model, packed)
    assert [(o["name"], o["error"]["relative"]) for o in told["outputs"]] == [
        (o.name, o.error.relative) for o in outputs
    ]
    text = command("pack", model, "-o", packed, *options).stdout
    assert text.index("outputs, of both models") < text.index("scores")
    line = command("pack", model, "-o", model, *options, code=2).stderr
    assert "--check: compares two files" in line
    assert (
        "together with --check"
        in command("pack", model, "-o", packed, "--bits", 4, "--check-inputs", model, code=2).stderr
    )


def test_refused(model, rng, tmp_path):
    other = save(tmp_path / "o.onnx", [node("Relu", ["x"], ["y"])], [info("x", 4, 4)], [info("y", 4, 4)])
    with pytest.raises(ValueError, match=r"o.onnx: ONNX Runtime cannot run it on these inputs"):
        check_onnx(model, other)
    third = save(tmp_path / "t.onnx", [node("Relu", ["x"], ["z"])], [info("x", 4, 4)], [info("z", 4, 4)])
    with pytest.raises(ValueError, match=r"t.onnx: expected the outputs \['y'\], got \['z'\]"):
        check_onnx(other, third)
    with pytest.raises(FileNotFoundError):
        check_onnx(tmp_path / "none.onnx", other)
    open_ = save(tmp_path / "s.onnx", [node("Relu", ["x"], ["y"])], [onnx.ValueInfoProto(name="x")], [info("y", 4, 4)])
    with pytest.raises(ValueError, match=r"s.onnx: input 'x' is no tensor; give inputs"):
        check_onnx(open_, other)
