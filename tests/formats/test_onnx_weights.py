"""The weights of ONNX models, plain, packed or quantized by others, as arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import same_bits
from test_cli import run as command
from test_export_onnx import random
from test_onnx_graph import CASES, branch, info, node, run, save, save_branches
from test_onnx_pack import RECIPES, TRANSPOSED, save_model

import fastopt as fo
from fastopt.files.weights import Weights

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")

from fastopt.formats.onnx_weights import onnx_sources  # noqa: E402


def opened(path):
    return Weights(onnx_sources(Path(path)))


@pytest.fixture
def weights(rng):
    shapes = [(8, 3, 3, 3), (8, 1, 3, 3), (128, 128), (128, 48), (48, 40), (24, 40), *[(24, 24)] * 4]
    return {name: random(rng, *shape) / np.float32(8) for name, shape in zip(TRANSPOSED, shapes, strict=True)}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_weights_are_those_of_pack(recipe, fast, opset, weights, tmp_path):
    """As [out, in, ...], under the names that they had, decoded bit for bit; parts of them are not told."""
    source = save_model(tmp_path / "m.onnx", weights, opset)
    plain = opened(source)
    seen = {name: w.T.copy() if TRANSPOSED[name] else w for name, w in weights.items()}
    for name, w in seen.items():
        assert same_bits(plain[name], w)
        assert plain.spec(name) == (w.shape, w.dtype)
    recipe = RECIPES[recipe]
    fo.pack_onnx(source, tmp_path / "p.onnx", recipe, fast=fast)
    packed = opened(tmp_path / "p.onnx")
    expected = fo.pack(seen, recipe=recipe).unpack()
    assert seen.keys() <= packed.keys()
    for name, w in expected.items():
        assert packed.spec(name) == (w.shape, w.dtype)
        assert np.array_equal(packed[name], w), name
    big = {name for name in packed if packed[name].size >= 24}
    assert big - plain.keys() == set()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_operator(case, fast, rng, tmp_path):
    nodes, constants, shape, _ = CASES[case]
    arrays = {name: of if isinstance(of, np.ndarray) else random(rng, *((64, 24) if of == "half" else of))
              for name, of in constants.items()}  # fmt: skip
    source = save(tmp_path / "m.onnx", nodes, [info("x", *shape)], [onnx.ValueInfoProto(name="Y")], arrays)
    fo.pack_onnx(source, tmp_path / "p.onnx", bits=8, min_size=1, fast=fast)
    plain, packed = opened(source), opened(tmp_path / "p.onnx")
    assert plain.keys() <= packed.keys()
    for name in plain:
        assert packed.spec(name) == plain.spec(name)
        assert packed[name].shape == plain.spec(name)[0]
        if plain[name].dtype.kind == "f":
            assert np.linalg.norm(packed[name] - plain[name]) <= 0.02 * np.linalg.norm(plain[name])


@pytest.mark.parametrize("fast", [False, True])
def test_names_that_are_taken(fast, rng, tmp_path):
    """Where the model has a W.codes and a W.minimum already, those of the packed W get other names."""
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Add", ["h", "W.codes"], ["W.scale"])]
    nodes += [node("Add", ["W.scale", "W.minimum"], ["y"])]
    constants = {"W": random(rng, 64, 32), "W.codes": random(rng, 4, 32), "W.minimum": random(rng, 32)}
    source = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], [info("y", 4, 32)], constants)
    fo.pack_onnx(source, tmp_path / "p.onnx", bits=4, outliers=0.01, min_size=100, fast=fast)
    packed = opened(tmp_path / "p.onnx")
    assert np.array_equal(packed["W"], fo.quantize(constants["W"].T.copy(), 4, outliers=0.01).dequantize())
    assert same_bits(packed["W.codes"], constants["W.codes"])


def test_branches(rng, tmp_path):
    product = [node("MatMul", ["x", "W"], ["y"])]
    then, other = (branch(name, product, W=random(rng, 64, 32)) for name in ("then", "other"))
    source = save_branches(tmp_path / "m.onnx", then, other)
    fo.pack_onnx(source, tmp_path / "p.onnx", bits=8, min_size=1)
    plain, packed = opened(source), opened(tmp_path / "p.onnx")
    assert {"if.then_branch/W", "if.else_branch/W"} == plain.keys()
    assert plain.keys() <= packed.keys()
    for name, w in plain.items():
        assert 0 < abs(packed[name] - w).max() < 0.03


def test_quantized_by_others(rng, tmp_path):
    w = random(rng, 64, 32)
    scale = (abs(w).max(0) / 127).astype("f4")
    codes = np.round(w / scale).astype("i1")
    nodes = [node("DequantizeLinear", ["q", "s"], ["W"], axis=1), node("MatMul", ["x", "W"], ["y"])]
    path = save(tmp_path / "q.onnx", nodes, [info("x", 4, 64)], [info("y", 4, 32)], {"q": codes, "s": scale})
    found = opened(path)
    assert list(found) == ["W"]
    assert np.array_equal(found["W"], (codes * scale).T)


@pytest.mark.parametrize("zero", [None, np.uint8, np.float32])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_products_of_others(bits, zero, rng, tmp_path):
    """ONNX Runtime's product with the unit matrix is the weight."""
    if bits == 8 and zero is np.float32:
        pytest.skip("ONNX Runtime has no such product")
    rows, cols, groups = 24, 80, 3
    constants = {"b": rng.integers(0, 256, (rows, groups, 32 * bits // 8), np.uint8)}
    constants["s"] = rng.random((rows, groups)).astype("f4")
    if zero is np.uint8:
        constants["z"] = rng.integers(0, 256, (rows, -(-groups * bits // 8)), np.uint8)
    elif zero is np.float32:
        constants["z"] = rng.random((rows, groups)).astype("f4") * 3
    multiply = node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=cols, N=rows, bits=bits, block_size=32
    )
    imports = [onnx.helper.make_opsetid("com.microsoft", 1)]
    path = save(
        tmp_path / "m.onnx", [multiply], [info("x", cols, cols)], [info("y", cols, rows)], constants, imports=imports
    )
    found = opened(path)
    assert found.spec("b") == ((rows, cols), np.float32)
    expected = run(path, x=np.eye(cols, dtype="f4")).T
    assert np.allclose(found["b"], expected, rtol=1e-5, atol=1e-5)


def test_commands(weights, tmp_path):
    """inspect, diff, prune, unpack, pack, export and --html take ONNX models like others."""
    source, packed = save_model(tmp_path / "m.onnx", weights), tmp_path / "p.onnx"
    command("pack", source, "-o", packed, "--bits", 8, "--min-size", 500, "--fast", "--html", tmp_path / "p.html")
    assert "shared" in (tmp_path / "p.html").read_text()
    facts = {t["name"]: t for t in json.loads(command("inspect", packed, "--json").stdout)["tensors"]}
    assert facts["gemm"]["shape"] == [40, 48]
    told = json.loads(command("diff", source, packed, "--json", "--max-error", 0.01).stdout)
    assert told["missing"] == []
    assert told["extra"] == []
    assert told["reshaped"] == []
    assert 0 < told["total"]["relative"] < 0.01
    command("unpack", packed, "-o", tmp_path / "u.safetensors")
    unpacked = fo.load(tmp_path / "u.safetensors")
    assert same_bits(unpacked["gemm"], opened(packed)["gemm"])
    command("pack", source, "-o", tmp_path / "s.safetensors", "--bits", 8, "--min-size", 500)
    assert np.array_equal(fo.load(tmp_path / "s.safetensors")["gemm"].dequantize(), unpacked["gemm"])
    command("prune", source, "-o", tmp_path / "pruned.onnx", "--sparsity", 0.5, "--min-size", 500)
    assert np.mean(opened(tmp_path / "pruned.onnx")["gemm"] == 0) == 0.5
    command("prune", source, "-o", tmp_path / "pruned.safetensors", "--sparsity", 0.5, "--min-size", 500)
    assert fo.load(tmp_path / "pruned.safetensors")["gemm"].density == 0.5
    command("export", source, "--to", "npz", "-o", tmp_path / "e.npz")
    assert same_bits(fo.open_weights(tmp_path / "e.npz")["gemm"], fo.open_weights(source)["gemm"])
    assert "key: expected a checkpoint of torch" in command("inspect", source, "--key", "model", code=1).stderr
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07")
    assert command("inspect", tmp_path / "bad.onnx", code=1).stderr.startswith(
        f"fastopt: {tmp_path}/bad.onnx: not an ONNX"
    )


def test_names_of_an_exported_model(rng, tmp_path):
    """Weights have the names that they were exported under, also after packing."""
    weights = {"fc.weight": random(rng, 64, 48), "fc.bias": random(rng, 64)}
    fo.export(weights, tmp_path / "m.onnx", to="onnx", graph=[fo.Layer("fc")])
    assert all(same_bits(fo.open_weights(tmp_path / "m.onnx")[name], w) for name, w in weights.items())
    for fast in (False, True):
        fo.pack_onnx(tmp_path / "m.onnx", tmp_path / "p.onnx", bits=4, min_size=1000, fast=fast, outliers=0.01)
        difference = fo.diff(weights, tmp_path / "p.onnx")
        assert (difference.missing, difference.extra, difference.reshaped) == ((), (), ())
