"""MLX decodes and multiplies with what we wrote."""

import json

import numpy as np
import pytest
from helpers import BITS, same_bits
from safetensors import safe_open

import fastopt as fo

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")


@pytest.fixture
def model(rng):
    def w(*shape):
        return rng.standard_normal(shape).astype("f4")

    model = {
        f"{bits}.{group_size}.{dtype}.weight": fo.quantize(w(8, 256), bits, group_size=group_size, param_dtype=dtype)
        for bits in BITS
        for group_size in (32, 64, 128, 256, -1, None)
        for dtype in ("float16", "float32")
    }
    return model | {
        "experts.weight": fo.quantize(w(3, 5, 64), bits=4),
        "short.weight": fo.quantize(w(8, 192), bits=4, group_size=128),
        "embed": fo.quantize(w(7, 96), bits=2, group_size=96),
        "8.32.float16.bias": w(8),
        "norm": w(5).astype("f2"),
        "scalar": np.array(1.5, "f4"),
    }


def test_mlx_computes_the_same(model, rng, tmp_path):
    path = tmp_path / "m.safetensors"
    fo.export(model, path, to="mlx")
    with mx.stream(mx.cpu):
        arrays = mx.load(str(path))
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["quantization"])
        for name, tensor in model.items():
            if isinstance(tensor, np.ndarray):
                assert same_bits(np.array(arrays[name]), tensor)
                continue
            layer = name.removesuffix(".weight")
            parts = (arrays[name], arrays[f"{layer}.scales"], arrays[f"{layer}.biases"])
            ours = tensor.dequantize()
            assert same_bits(np.array(mx.dequantize(*parts, **about[layer])), ours), name
            x = rng.standard_normal((*tensor.shape[:-2], 4, tensor.shape[-1])).astype("f4")
            y = np.array(mx.quantized_matmul(mx.array(x), *parts, transpose=True, **about[layer]))
            expected = x.astype("f8") @ ours.astype("f8").swapaxes(-1, -2)
            assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)
        assert about["8.-1.float16"] == {"bits": 8, "group_size": 128}
        assert about["short"] == {"bits": 4, "group_size": 64}
        assert about["embed"] == {"bits": 2, "group_size": 32}


def test_float16_parameters(rng, tmp_path):
    q = fo.quantize(rng.standard_normal((8, 64)).astype("f4"), bits=4)
    fo.export({"w": q}, tmp_path / "m.safetensors", to="mlx", param_dtype="float16")
    arrays = mx.load(str(tmp_path / "m.safetensors"))
    assert same_bits(np.array(arrays["w.scales"]), q.scale)
    assert same_bits(np.array(arrays["w.biases"]), q.minimum)
    wide = fo.quantize(rng.standard_normal((8, 64)).astype("f4"), bits=4, param_dtype="float32")
    with pytest.raises(ValueError, match=r"^'w': has float32 parameters, which float16 cannot hold; take float32"):
        fo.export({"w": wide}, tmp_path / "n.safetensors", to="mlx", param_dtype="float16")
    with pytest.raises(ValueError, match="param_dtype: expected float32 or float16, got int8"):
        fo.export({"w": q}, tmp_path / "n.safetensors", to="mlx", param_dtype="i1")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: fo.quantize(w, bits=2, group_size=16), "group_size 16; pack it in groups of 32"),
        (lambda w: fo.quantize(w[:, :40].copy(), bits=4), r"got shape \(8, 40\)"),
        (lambda w: fo.quantize(w[0], bits=4), "two or more axes"),
        (lambda w: fo.quantize(w.reshape(8, 32, 3), bits=4), r"got shape \(8, 32, 3\)"),
        (lambda w: fo.quantize(w, bits=4, outliers=0.01), "no outliers"),
        (lambda w: fo.prune(w, sparsity=0.5).quantize(), "no sparse weights"),
    ],
)
def test_refused(make, message, rng, tmp_path):
    model = {"w.weight": make(rng.standard_normal((8, 96)).astype("f4"))}
    with pytest.raises(ValueError, match=f"^'w.weight': MLX has .*{message}"):
        fo.export(model, tmp_path / "m.safetensors", to="mlx")
    with pytest.raises(ValueError, match=r"'w.scales': two arrays"):
        fo.export({"w": fo.quantize(np.eye(32, dtype="f4")), "w.scales": np.ones(1)}, tmp_path / "m", to="mlx")
    assert not list(tmp_path.iterdir())


def test_layers_of_mlx_load_it(rng, tmp_path):
    from mlx import nn

    shapes = {"layers.0.weight": (96, 64), "layers.0.bias": (96,), "layers.2.weight": (10, 96), "layers.2.bias": (10,)}
    model = fo.pack(
        {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}, bits=4, min_size=99
    )
    fo.export(model, tmp_path / "m.safetensors", to="mlx")
    x = rng.standard_normal((5, 64)).astype("f4")
    with mx.stream(mx.cpu):
        network = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
        nn.quantize(network, group_size=32, bits=4)
        network.load_weights(str(tmp_path / "m.safetensors"))
        got = np.array(network(mx.array(x)))
    hidden = np.maximum(fo.linear(x, model["layers.0.weight"], model["layers.0.bias"]), 0)
    expected = fo.linear(hidden, model["layers.2.weight"], model["layers.2.bias"])
    assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)
