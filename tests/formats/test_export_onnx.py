"""ONNX models, run by ONNX Runtime."""

import ml_dtypes
import numpy as np
import pytest
from helpers import BITS, same_bits

import fastopt as fo
from fastopt.formats import onnx_file
from fastopt.formats.onnx import Builder, opset_of_bits, quantized_nbytes

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*the model has no input")


def run(path, feeds=None):
    """Check a model with onnx, and return its outputs in ONNX Runtime."""
    onnx.checker.check_model(path, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds or {}), strict=True))


def random(rng, *shape):
    return rng.standard_normal(shape).astype("f4")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_decoded_tensors_are_the_same(bits, dtype, rng, tmp_path):
    """Groups of any size, rows that end inside a byte or a group, outliers, any shape and dtype."""
    model = {
        f"{cols}.{group_size}": fo.quantize(random(rng, 6, cols), bits, group_size=group_size, param_dtype=dtype)
        for cols in (96, 7, 33)
        for group_size in (1, 5, 16, 32, -1, None)
    }
    model |= {
        "conv": fo.quantize(random(rng, 8, 4, 3, 3), bits, param_dtype=dtype),
        "vector": fo.quantize(random(rng, 19), bits, param_dtype=dtype),
        "scalar": fo.quantize(np.array(1.5, "f4"), bits),
        "empty": fo.quantize(np.zeros((0, 5), "f4"), bits),
        "outliers": fo.quantize(random(rng, 5, 21), bits, outliers=0.2, param_dtype=dtype),
        "half": fo.quantize(random(rng, 6, 32).astype("f2"), bits),
        "double": fo.quantize(random(rng, 6, 32).astype("f8"), bits),
        "96.5.codes": np.arange(3),  # a name that another tensor would like
    }
    fo.export(model, tmp_path / "m.onnx", to="onnx")
    got = run(tmp_path / "m.onnx")
    assert list(got) == list(model)
    for name, w in fo.PackedModel(model).unpack().items():
        assert got[name].dtype == w.dtype
        assert got[name].shape == w.shape
        assert got[name].tobytes() == w.tobytes(), name


def test_plain_and_sparse_tensors(rng, tmp_path):
    model = {
        "float": random(rng, 3, 5),
        "ids": np.arange(6),
        "bytes": np.arange(6, dtype="u1"),
        "mask": np.array([True, False]),
        "half": fo.prune(random(rng, 8, 4, 3).astype("f2"), sparsity=0.5),
        "zeros": fo.prune(np.zeros((4, 4), "f4"), threshold=0),
        "empty": fo.prune(np.zeros((0, 4), "f4"), threshold=0),
    }
    for layout in ("mask", "index16", "index8", "2:4", "1x16"):
        pruned = random(rng, 8, 320)
        fo.prune_(pruned, **({"pattern": layout} if ":" in layout else {"sparsity": 0.9}))
        model[layout] = fo.SparseTensor.from_dense(pruned, layout=layout)
        for bits in BITS:
            model[f"{layout}.{bits}"] = model[layout].quantize(bits)
    fo.export(model, tmp_path / "m.onnx", to="onnx")
    got = run(tmp_path / "m.onnx")
    for name, w in fo.PackedModel(model).unpack().items():
        assert got[name].dtype == w.dtype
        assert got[name].tobytes() == w.tobytes(), name
    brain = random(rng, 3).astype(ml_dtypes.bfloat16)
    fo.export({"w": brain}, tmp_path / "m.onnx", to="onnx")
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer[0]
    assert same_bits(onnx.numpy_helper.to_array(stored).astype("f4"), brain.astype("f4"))


def test_codes_are_stored_as_they_are(rng, tmp_path):
    q = fo.quantize(random(rng, 64, 128), bits=4)
    fo.export({"w": q}, tmp_path / "m.onnx", to="onnx")
    model = onnx.load(tmp_path / "m.onnx")
    (codes,) = (c for c in model.graph.initializer if c.name == "w.codes")
    assert codes.data_type == onnx.TensorProto.UINT4
    assert codes.raw_data == q.codes.tobytes()
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert (tmp_path / "m.onnx").stat().st_size < q.nbytes + 1024
    fo.export({"w": fo.quantize(random(rng, 64, 128), bits=2)}, tmp_path / "m.onnx", to="onnx")
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 25


ACTIVATIONS = ["relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", None]


def chain(rng, width=48):
    """A residual network with every activation, and its weights."""
    graph, weights = [], {}
    for i, activation in enumerate(ACTIVATIONS):
        graph.append(fo.Layer(f"fc{i}", norm=f"norm{i}" if i % 3 == 0 else None, activation=activation))
        weights[f"fc{i}.weight"] = random(rng, width, width) / np.float32(4)
        weights[f"fc{i}.bias"] = random(rng, width)
        if i % 3 == 0:
            weights[f"norm{i}.weight"], weights[f"norm{i}.bias"] = random(rng, 2, width)
            weights[f"norm{i}.running_mean"] = random(rng, width)
            weights[f"norm{i}.running_var"] = abs(random(rng, width)) + np.float32(0.5)
    graph.append(fo.Add("sum", ["fc7", "fc3"], activation="relu"))
    graph.append(fo.Concat("both", ["sum", "fc1"]))
    graph.append(fo.Layer("head"))
    graph.append(fo.Layer("probe", input=""))
    weights["head.weight"] = random(rng, 10, 2 * width)
    weights["probe.weight"] = random(rng, 3, width).astype("f2")
    return graph, weights


def compute(model, graph, x):
    """The graph in float64."""
    from fastopt.models.shrinking import _activate

    values, last = {}, x.astype("f8")
    w = {name: array.astype("f8") for name, array in fo.PackedModel(model).unpack().items()}
    for node in graph:
        if isinstance(node, fo.Layer):
            y = (x if node.input == "" else last) @ w[f"{node.name}.weight"].T + w.get(f"{node.name}.bias", 0)
            if node.norm is not None:
                mean, var = w[f"{node.norm}.running_mean"], w[f"{node.norm}.running_var"]
                y = (y - mean) / np.sqrt(var + node.eps) * w[f"{node.norm}.weight"] + w[f"{node.norm}.bias"]
            y = _activate(node.activation, y)
        elif isinstance(node, fo.Add):
            y = _activate(node.activation, sum(values[name] for name in node.inputs))
        else:
            y = np.concatenate([values[name] for name in node.inputs], axis=-1)
        values[node.name] = last = y
    return values


def distance(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8},
        {"bits": 4},
        {"bits": 2},
        {"bits": 8, "group_size": None},
        {"sparsity": 0.5},
        {"bits": 4, "sparsity": 0.8},
    ],
    ids=str,
)
def test_chain_runs(options, fast, rng, tmp_path):
    graph, weights = chain(rng)
    model = fo.pack(weights, **options, min_size=1000) if options else fo.PackedModel(weights)
    fo.export(model, tmp_path / "m.onnx", to="onnx", graph=graph, fast=fast)
    x = random(rng, 5, 48)
    got = run(tmp_path / "m.onnx", {"x": x})
    assert list(got) == ["head", "probe"]
    expected = compute(model, graph, x)
    for name, y in got.items():
        assert distance(y, expected[name]) < 1e-5
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    by_codes = fast and "bits" in options and "sparsity" not in options
    assert ("MatMulNBits" in kinds) == by_codes
    assert ("DequantizeLinear" in kinds) == ("bits" in options and not by_codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [16, 40, 256, 300])
@pytest.mark.parametrize("group_size", [16, 48, 64, 512, -1, None])
def test_fast_product(cols, group_size, bits, rng, tmp_path):
    outliers = 0.05 if cols == 40 else None
    q = fo.quantize(random(rng, 24, cols), bits, group_size=group_size, outliers=outliers)
    model, graph = {"fc.weight": q, "fc.bias": random(rng, 24)}, [fo.Layer("fc")]
    fo.export(model, tmp_path / "m.onnx", to="onnx", graph=graph, fast=True)
    x = random(rng, 3, cols)
    expected = x.astype("f8") @ q.dequantize().T.astype("f8") + model["fc.bias"]
    assert distance(run(tmp_path / "m.onnx", {"x": x})["fc"], expected) < 1e-6
    assert distance(fo.linear(x, q, model["fc.bias"]), expected) < 1e-6
    fo.export(model, tmp_path / "m.onnx", to="onnx", graph=graph, fast=True, accuracy_level=4)
    assert 0 < distance(run(tmp_path / "m.onnx", {"x": x})["fc"], expected) < 0.01


def test_block_sums_are_shared(rng, tmp_path):
    weights = {f"{name}.weight": fo.quantize(random(rng, 8, 64)) for name in "qkv"}
    graph = [fo.Layer(name, input="") for name in "qkv"]
    fo.export(weights, tmp_path / "m.onnx", to="onnx", graph=graph, fast=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("ReduceSum") == 1
    assert len(run(tmp_path / "m.onnx", {"x": random(rng, 2, 64)})) == 3


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        ([fo.Layer("conv", kind="conv")], {}, "model: the graph needs 'conv.weight', which is missing"),
        ([fo.Layer("none")], {}, "model: the graph needs 'none.weight', which is missing"),
        ([fo.Layer("w"), fo.Layer("w")], {}, "'w' names two nodes"),
        ([fo.Layer("w", input="later")], {}, "'w' reads 'later', which does not come before it"),
        ([fo.Layer("w"), fo.Layer("wide")], {}, "'wide.weight' of 8 columns, got 40"),
        ([fo.Layer("w"), fo.Layer("wide", input="")], {}, "'wide.weight' of 64 columns, got 40"),
        ([fo.Layer("w", activation="mish")], {}, "activation: expected one of .*silu.* for 'w', got 'mish'"),
        ([fo.Layer("w", activation=np.tanh)], {}, "activation: expected one of .* for 'w'"),
        ([fo.Layer("w", norm="gone")], {}, "model: the graph needs 'gone.weight', which is missing"),
        ([fo.Layer("biased")], {}, r"'biased.bias' of shape \(8,\), got \(7,\)"),
        ([fo.Layer("ids")], {}, "'ids.weight' to be of floats and two or more axes"),
        ([], {}, "graph: expected one or more layers, got none"),
        ([fo.Add("sum", [])], {}, "'sum' reads nothing"),
        ([fo.Layer("w"), fo.Layer("v", input=""), fo.Add("s", ["w", "v"])], {}, "'s' adds nodes of 8 and 6 columns"),
        ([fo.Layer("small")], {"fast": True}, "'small.weight': MatMulNBits has blocks of .* got groups of 8"),
        ([fo.Layer("w")], {"accuracy_level": 5}, "accuracy_level: expected 0 to 4, got 5"),
    ],
)
def test_refused(graph, options, message, rng, tmp_path):
    model = {
        "w.weight": random(rng, 8, 64),
        "v.weight": random(rng, 6, 64),
        "wide.weight": random(rng, 8, 40),
        "biased.weight": random(rng, 8, 64),
        "biased.bias": random(rng, 7),
        "ids.weight": np.zeros((8, 64), "i4"),
        "small.weight": fo.quantize(random(rng, 8, 64), group_size=8),
    }
    with pytest.raises(ValueError, match=message):
        fo.export(model, tmp_path / "m.onnx", to="onnx", graph=graph, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fast", [False, True])
def test_more_than_a_file_holds(fast, rng, tmp_path, monkeypatch):
    graph, weights = chain(rng, 96)
    model, x = fo.pack(weights, bits=4, min_size=1000), random(rng, 5, 96)
    fo.export(model, tmp_path / "one.onnx", to="onnx", graph=graph, fast=fast)
    monkeypatch.setattr(onnx_file, "_LIMIT", 40_000)
    fo.export(model, tmp_path / "two.onnx", to="onnx", graph=graph, fast=fast)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "two.onnx", "two.onnx.data"]
    assert (tmp_path / "two.onnx").stat().st_size < 40_000
    assert same_bits(run(tmp_path / "two.onnx", {"x": x})["head"], run(tmp_path / "one.onnx", {"x": x})["head"])
    monkeypatch.setattr(onnx_file, "_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"an ONNX file has up to 2 GiB, three.onnx would have [0-9,]+ bytes"):
        fo.export(model, tmp_path / "three.onnx", to="onnx", graph=graph, fast=fast)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("bits", BITS)
def test_bytes_follow_from_the_shape(bits, rng):
    """Widths that ONNX does not have are stored in the next wider one."""
    stored = {3: 4, 5: 8, 6: 8}.get(bits, bits)
    for fast in (False, True):
        builder = Builder(fast, 0, set())
        builder.product("x", "w", fo.quantize(random(rng, 5, 48), bits, group_size=16))
        constants = {constant.name: constant for constant in builder.constants}
        assert all(constant.nbytes == constant.content().nbytes for constant in builder.constants)
        assert constants["w.codes"].nbytes == 5 * 48 * stored // 8
        parts = [
            constants[name].nbytes for name in ("w.codes", "w.scale", "w.minimum", "w.zero_point") if name in constants
        ]
        assert len(parts) == 3 + (fast and stored != bits)
        assert quantized_nbytes((5, 48), bits, 16, "float16", None, fast) == sum(parts)
    assert opset_of_bits(bits) == (25 if bits == 2 else 21)
