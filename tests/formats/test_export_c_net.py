"""Networks in C compute what ONNX Runtime computes from the same graph, under the sanitizers."""

import functools
import math
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import run

import fastopt as fo

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
if not shutil.which("gcc"):
    pytest.skip("no gcc", allow_module_level=True)

EDGE = Path(__file__).parents[2] / "cpp" / "edge"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
L = fo.Layer


def layers_of(rng, *shapes, norms=(), biases=True):
    """Random weights of layers, scaled so that activations keep their size."""
    weights = {}
    for name, shape in shapes:
        fan_in = np.prod(shape[1:])
        weights[f"{name}.weight"] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype("f4")
        if biases:
            weights[f"{name}.bias"] = rng.standard_normal(shape[0]).astype("f4")
    for name, size in norms:
        for part in ("weight", "bias", "running_mean"):
            weights[f"{name}.{part}"] = rng.standard_normal(size).astype("f4")
        weights[f"{name}.running_var"] = rng.uniform(0.5, 2, size).astype("f4")
    return weights


def recurrent(rng, gates, inputs, units):
    shapes = {"weight_ih_l0": (gates * units, inputs), "weight_hh_l0": (gates * units, units)}
    shapes |= {"bias_ih_l0": (gates * units,), "bias_hh_l0": (gates * units,)}
    return {f"rnn.{part}": (0.5 * rng.standard_normal(shape)).astype("f4") for part, shape in shapes.items()}


def cases():
    """Weights, graph, input_shape and options of pack by name; no pack if they are None."""
    rng, result = np.random.default_rng(20261129), {}
    for i, activation in enumerate(("relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")):
        weights = layers_of(rng, ("fc1", (37, 20)), ("fc2", (5, 37)))
        graph = [L("fc1", activation=activation), L("fc2", activation="softmax")]
        result[activation] = weights, graph, None, {"bits": (4, 8, 3, 2)[i % 4]} if i % 3 else None
    weights = layers_of(rng, ("a", (16, 24)), ("b", (16, 16)), ("c", (24, 16)), ("d", (3, 40)), norms=[("n", 16)])
    graph = [L("a", norm="n", activation="relu"), L("b"), fo.Add("sum", ["a", "b"], activation="tanh")]
    graph += [L("c"), fo.Add("x2", ["c", "x"]), fo.Concat("both", ["x2", "sum"]), L("d")]
    result["residual"] = weights, graph, None, {"bits": 8, "group_size": 8}
    weights = layers_of(rng, ("c1", (6, 2, 3, 3)), ("c2", (10, 6, 2, 3)), ("fc", (4, 60)), norms=[("n1", 6)])
    graph = [L("c1", "conv", norm="n1", activation="relu", stride=2, padding=1), L("c2", "conv", dilation=(1, 2))]
    graph += [L("p", "max_pool", size=2), L("fc", flatten=True, activation="softmax")]
    result["conv"] = weights, graph, (2, 13, 17), {"bits": 8}
    weights = layers_of(rng, ("stem", (8, 3, 3, 3)), ("dw", (8, 1, 3, 3)), ("pw", (12, 8, 1, 1)), ("fc", (7, 12)),
                        norms=[("stem_n", 8), ("dw_n", 8), ("pw_n", 12)], biases=False)  # fmt: skip
    graph = [L("stem", "conv", norm="stem_n", activation="relu6", stride=2, padding="same")]
    graph += [L("dw", "depthwise", norm="dw_n", activation="relu6", padding="same"), L("pw", "conv", norm="pw_n")]
    graph += [L("pool", "global_pool"), L("fc", activation="softmax")]
    result["depthwise"] = weights, graph, (3, 15, 12), {"bits": 4, "group_size": 8}
    weights = layers_of(rng, ("c1", (8, 4, 3, 3)), ("c2", (8, 8, 3, 3)), ("c3", (6, 4, 3, 1)), ("c4", (3, 14, 1, 1)))
    graph = [L("c1", "conv", padding=1, activation="relu"), L("c2", "conv", padding=1)]
    graph += [fo.Add("sum", ["c1", "c2"], activation="relu"), L("c3", "conv", groups=2, padding=(1, 0))]
    graph += [fo.Concat("both", ["sum", "c3"]), L("c4", "conv", activation="softmax")]
    graph += [L("p", "average_pool", size=(3, 2), stride=(2, 1), padding=(1, 1))]
    result["groups"] = weights, graph, (4, 6, 5), None
    result["skip"] = (
        layers_of(rng, ("c1", (4, 4, 3, 3))),
        [L("c1", "conv", padding=1), fo.Add("sum", ["c1", "x"], activation="silu"), L("all", "flatten")],
        (4, 5, 3),
        None,
    )
    weights = layers_of(rng, ("c1", (8, 5, 5)), ("dw", (8, 1, 3)), ("c2", (6, 8, 1)), ("fc", (3, 24)))
    graph = [L("c1", "conv", stride=2, padding="same", activation="gelu")]
    graph += [L("dw", "depthwise", dilation=2, padding=2, activation="silu"), L("c2", "conv")]
    graph += [L("p", "max_pool", size=3, stride=2, padding=1), L("flat", "flatten"), L("fc")]
    result["signal"] = weights, graph, (5, 15), {"bits": 8, "group_size": -1}
    result["pools"] = (
        {"none.weight": np.ones((1, 1), "f4")},
        [L("p", "max_pool", size=(2, 3), padding=(1, 1), stride=1), L("q", "average_pool", size=2, activation="relu"),
         L("g", "global_pool")],
        (3, 6, 7),
        None,
    )  # fmt: skip
    for kind, gates in (("lstm", 4), ("gru", 3)):
        for last in (True, False):
            weights = recurrent(rng, gates, 6, 9) | layers_of(rng, ("fc", (4, 9)))
            graph = [L("rnn", kind, last=last), L("fc", activation="softmax")]
            result[f"{kind}, {'last' if last else 'all'}"] = weights, graph, (7, 6), {"bits": 8} if last else None
    weights = layers_of(rng, ("table", (30, 12)), ("fc1", (24, 12)), ("fc2", (12, 24)), biases=False)
    weights |= {"ln.weight": rng.standard_normal(12).astype("f4"), "ln.bias": rng.standard_normal(12).astype("f4")}
    graph = [L("table", "embedding"), L("ln", "layer_norm"), L("fc1", activation="gelu"), L("fc2")]
    graph += [fo.Add("sum", ["fc2", "table"]), L("plain", "layer_norm"), fo.Concat("both", ["plain", "sum"])]
    result["embedding"] = weights, graph, (5,), {"bits": 4}
    pruned = fo.prune(rng.standard_normal((30, 40)).astype("f4"), sparsity=0.8)
    result["sparse"] = {"fc.weight": pruned}, [L("fc", activation="tanh")], None, None
    return result


CASES = cases()


def packed(weights, options):
    return weights if options is None else fo.pack(weights, min_size=40, **options)


@functools.cache
def implementation():
    """Compile the headers' functions, once, since with sanitizers that takes long."""
    folder = tempfile.TemporaryDirectory()
    source = Path(folder.name) / "edge.c"
    source.write_text('#define FASTOPT_IMPLEMENTATION\n#include "fastopt.h"\n#include "fastopt_nn.h"\n')
    run("gcc", *STRICT, "-O1", f"-I{EDGE}", "-c", source, "-o", source.with_suffix(".o"))
    return folder, source.with_suffix(".o")


def run_of(folder, name, nets, tmp_inputs):
    """Compile networks into one program, and return y of each for its x."""
    lines = [*(f'#include "{net}.c"' for net in nets), "#include <stdio.h>"]
    lines.append("#include <stdlib.h>\nint main(void) {")
    for net, (x, size, function) in tmp_inputs.items():
        lines.append(
            f"  {{ void *x = malloc({x.nbytes}), *scratch = malloc({net.upper()}_SCRATCH_BYTES);\n"
            f"    float *y = (float *)malloc({4 * size});\n"
            f"    if (fread(x, 1, {x.nbytes}, stdin) != {x.nbytes} || {function}(x, y, scratch)) return 1;\n"
            f"    fwrite(y, 4, {size}, stdout); free(x); free(scratch); free(y); }}"
        )
    (folder / f"{name}.c").write_text("\n".join([*lines, "  return 0;\n}\n"]))
    edge = implementation()[1]
    run("gcc", *STRICT, "-O1", "-g", f"-I{folder}", folder / f"{name}.c", edge, "-o", folder / name)
    given = b"".join(x.tobytes() for x, _, _ in tmp_inputs.values())
    answer = subprocess.run([folder / name], input=given, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    outputs, at = {}, 0
    for net, (_, size, _) in tmp_inputs.items():
        outputs[net] = np.frombuffer(answer, "f4", size, at)
        at += 4 * size
    assert at == len(answer)
    return outputs


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What C and ONNX Runtime compute, by the name of the case; and the cost."""
    rng, folder = np.random.default_rng(20261129), tmp_path_factory.mktemp("nets")
    inputs, expected, costs = {}, {}, {}
    for i, (name, (weights, graph, shape, options)) in enumerate(CASES.items()):
        model, net = packed(weights, options), f"net{i}"
        fo.export(model, folder / f"{net}.onnx", to="onnx", graph=graph, input_shape=shape)
        costs[name] = fo.export(model, folder / f"{net}.c", to="c", graph=graph, input_shape=shape)
        given = {"input_shape": shape} if shape else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # packed weights come out decoded
            fo.export(folder / f"{net}.onnx", folder / f"{net}_from_onnx.c", to="c", **given)
        session = session_of(folder / f"{net}.onnx")
        (about,) = session.get_inputs()
        shape = (1, *(shape or about.shape[1:]))
        ids = about.type == "tensor(int64)"
        x = rng.integers(0, 30, shape) if ids else rng.standard_normal(shape).astype("f4")
        (y,) = session.run(None, {"x": x})
        told = session.get_outputs()[0].shape
        assert [n if isinstance(n, int) else m for n, m in zip(told, y.shape, strict=True)] == [*y.shape]
        expected[name] = y
        for source in (net, f"{net}_from_onnx"):
            inputs[source] = (x.astype(np.uint32) if ids else x, y.size, f"{source}_run")
    found = run_of(folder, "all", list(inputs), inputs)
    outputs = {}
    for i, (name, y) in enumerate(expected.items()):
        outputs[name] = [found[net].reshape(y.shape) for net in (f"net{i}", f"net{i}_from_onnx")], y
    return outputs, costs


@pytest.mark.parametrize("name", CASES)
def test_same_as_onnxruntime(computed, name):
    """From the layers, and from the ONNX model that was made of them."""
    outputs, expected = computed[0][name]
    assert np.linalg.norm(expected) > 1e-3
    for y in outputs:
        assert np.linalg.norm(y - expected) <= 3e-6 * np.linalg.norm(expected)


def test_whole_numbers(rng, tmp_path):
    """BASE_run_int8 is as near as its rounding lets it be."""
    weights = layers_of(rng, ("c1", (8, 3, 3, 3)), ("dw", (8, 1, 3, 3)), ("fc1", (40, 72)), ("fc2", (10, 40)))
    graph = [L("c1", "conv", stride=2, activation="relu"), L("dw", "depthwise"), L("fc1", flatten=True), L("fc2")]
    fo.export(packed(weights, {"bits": 8}), tmp_path / "net.c", to="c", graph=graph, input_shape=(3, 11, 11), int8=True)
    x = rng.standard_normal((3, 11, 11)).astype("f4")
    outputs = [run_of(tmp_path, f, ["net"], {"net": (x, 10, f)})["net"] for f in ("net_run", "net_run_int8")]
    assert 1e-5 < np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[0]) < 0.03
    one = {"fc.weight": weights["fc2.weight"]}
    fo.export(one, tmp_path / "one.c", to="c", graph=[L("fc")], int8=True)  # one of two functions needs no scratch
    x = rng.standard_normal(40).astype("f4")
    y = run_of(tmp_path, "one_run", ["one"], {"one": (x, 10, "one_run")})["one"]
    assert np.allclose(y, one["fc.weight"] @ x, rtol=1e-4, atol=1e-5)


def test_scratch_is_shared(computed):
    """A chain needs the two buffers that are in use at a time, not all of them."""
    cost = computed[1]["relu"]
    assert cost.scratch == 4 * 37
    assert cost.macs == 37 * 20 + 5 * 37
    assert (cost.input_bytes, cost.output_bytes) == (80, 20)
    rng = np.random.default_rng(0)
    weights = layers_of(rng, *((f"fc{i}", (50, 50)) for i in range(9)))
    graph = [L(f"fc{i}", activation="relu") for i in range(9)]
    assert fo.export(weights, "net.c", to="c", graph=graph, dry_run=True).scratch == 4 * 2 * 50


def test_dry_run_tells_the_size_of_the_object(rng, tmp_path):
    """The constants of an object file for a Cortex-M4 take the bytes that were told before."""
    if not shutil.which("arm-none-eabi-gcc"):
        pytest.skip("no arm-none-eabi-gcc")
    pruned = fo.prune(rng.standard_normal((24, 60)).astype("f4"), sparsity=0.8).quantize(4)
    rnn = layers_of(rng, ("fc", (5, 9))) | recurrent(rng, 4, 6, 9)
    sparse = {"fc1.weight": pruned, "fc2.weight": fo.quantize(rng.standard_normal((7, 24)).astype("f4"), 3)}
    some = {
        "conv": CASES["conv"], "depthwise": CASES["depthwise"], "embedding": CASES["embedding"],
        "rnn": (rnn, [L("rnn", "lstm"), L("fc")], (4, 6), {"bits": 4}),
        "sparse": (sparse, [L("fc1"), L("fc2", activation="relu")], None, None),
    }  # fmt: skip
    for i, (name, (weights, graph, shape, options)) in enumerate(some.items()):
        path = tmp_path / f"n{i}.c"
        chosen = {"to": "c", "graph": graph, "input_shape": shape}
        told = fo.export(packed(weights, options), path, dry_run=True, **chosen)
        assert not path.exists()
        assert fo.export(packed(weights, options), path, **chosen) == told
        run("arm-none-eabi-gcc", "-std=c99", "-O1", "-mcpu=cortex-m4", "-mthumb", "-c", path, "-o", tmp_path / "n.o")
        table = run("arm-none-eabi-size", "-A", tmp_path / "n.o")
        sections = re.findall(r"^\.(?:rodata|data)\S*\s+(\d+)", table, re.MULTILINE)
        assert sum(map(int, sections)) == told.flash == sum(step.flash for step in told.steps), name
        assert f"_SCRATCH_BYTES {told.scratch}\n" in path.with_suffix(".h").read_text()


REFUSED = [
    ([], {}, "graph: expected one or more layers, got none"),
    ([L("fc", input="y")], {}, "graph: 'fc' reads 'y', which does not come before it"),
    ([L("none")], {}, "model: 'none' needs 'none.weight', which is missing"),
    ([L("fc"), L("fc")], {}, "graph: 'fc' names two nodes, or the input"),
    (
        [L("fc"), L("wide")],
        {},
        "'wide': 'wide.weight' has 40 columns, but reads a value of shape .8,. of 8",
    ),
    ([L("fc", activation="swish")], {}, "'fc': expected an activation of gelu, .*, got 'swish'"),
    ([L("fc", activation=np.tanh)], {}, "activation of 'fc' is a function; C needs the name of one"),
    ([L("fc"), L("fc2", input="")], {}, "graph: expected one output, got fc, fc2, which no node reads"),
    ([L("fc", norm="gone")], {}, "model: the graph needs 'gone.weight', which is missing"),
    ([L("fc", "linear")], {"input_shape": (20,)}, "'fc': expected a kind of dense, .*, got 'linear'"),
    ([L("conv", "conv")], {}, "input_shape: 'conv' is no dense layer; expected the shape of x without the batch"),
    (
        [L("conv", "conv")],
        {"input_shape": (2, 9, 9)},
        "does not fit a value of shape .2, 9, 9.; expected 2 axes",
    ),
    (
        [L("conv", "conv")],
        {"input_shape": (3, 2, 9)},
        "'conv': the window covers 3 of an axis that has 2 and 0",
    ),
    ([L("conv", "conv", stride=0)], {"input_shape": (3, 9, 9)}, "'conv': stride: expected numbers of 1 or more, got 0"),
    ([L("conv", "conv", stride=(1, 2, 3))], {"input_shape": (3, 9, 9)}, "stride: expected 1 or 2 numbers, got"),
    (
        [L("conv", "conv", padding="valid")],
        {"input_shape": (3, 9, 9)},
        "padding: expected numbers or 'same', got 'v",
    ),
    (
        [L("conv", "conv"), L("fc")],
        {"input_shape": (3, 9, 9)},
        "'fc' reads a feature map of shape .8, 7, 7.; fl",
    ),
    ([L("p", "max_pool")], {"input_shape": (3, 9, 9)}, "'p': size: expected numbers of 1 or more"),
    ([L("p", "max_pool", size=2)], {"input_shape": (3,)}, "expected a signal .*got a value of shape .3,. and a window"),
    ([L("biased")], {}, "'biased': expected 'biased.bias' of shape .8,., got .7,."),
    ([L("e", "embedding"), L("fc")], {}, "input_shape: 'e' is no dense layer"),
    ([L("fc"), L("e", "embedding")], {}, "'e': an embedding must read the input, which are its indices"),
    ([L("rnn", "lstm")], {"input_shape": (5, 6)}, "model: 'rnn' needs 'rnn.weight_ih_l0', which is missing"),
    ([L("ints")], {}, "'ints': expected 'ints.weight' to be of floats and 2 or 3 or 4 or 5 axes, got int32"),
    ([L("double")], {}, "'double.weight': float64 is not known to fastopt.h; convert it to float32"),
    ([L("fc")], {"input_shape": (0,)}, "input_shape: expected numbers of 1 or more, got .0,."),
    ([L("fc"), fo.Add("sum", ["fc", "x"])], {}, "'sum': expected two values of one shape, got .1, 8. and .1, 20."),
]


@pytest.mark.parametrize(("graph", "options", "message"), REFUSED)
def test_refused(graph, options, message, tmp_path):
    model = {
        "fc.weight": np.ones((8, 20), "f4"), "fc2.weight": np.ones((8, 20), "f4"),
        "wide.weight": np.ones((8, 40), "f4"),
        "conv.weight": np.ones((8, 3, 3, 3), "f4"), "biased.weight": np.ones((8, 20), "f4"), "biased.bias": np.ones(7),
        "e.weight": np.ones((9, 8), "f4"), "ints.weight": np.ones((8, 20), "i4"), "double.weight": np.ones((8, 20)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fo.export(model, tmp_path / "net.c", to="c", graph=graph, **options)
    assert list(tmp_path.iterdir()) == []


def test_options_need_a_graph(tmp_path):
    for option in ({"int8": True}, {"dry_run": True}, {"input_shape": (1,)}):
        with pytest.raises(ValueError, match=r"needs a graph \(--layer\) or an ONNX model"):
            fo.export({"w": np.ones((2, 2), "f4")}, tmp_path / "m.c", to="c", **option)


def test_shrunk_networks_compute_the_same(rng, tmp_path):
    """The graph of a network with pools and softmax is cut, and then runs in C."""
    weights = layers_of(rng, ("c1", (8, 2, 3, 3)), ("c2", (8, 8, 3, 3)), ("fc1", (12, 8 * 4)), ("fc2", (3, 12)))
    graph = [L("c1", "conv", activation="relu"), L("p", "max_pool", size=2), L("c2", "conv", activation="relu")]
    graph += [L("all", "flatten"), L("fc1", activation="softmax"), L("fc2")]
    for name in ("c1", "c2"):  # channels that are always 0
        weights[f"{name}.weight"][5:], weights[f"{name}.bias"][5:] = 0, -1
    small = fo.shrink(weights, graph, threshold=1e-9, criterion="l2")
    assert small.weights["c2.weight"].shape == (5, 5, 3, 3)
    assert small.weights["fc1.weight"].shape == (12, 5 * 4)
    x, outputs = rng.standard_normal((2, 10, 10)).astype("f4"), []
    for i, model in enumerate((weights, small.weights)):
        fo.export(model, tmp_path / f"net{i}.c", to="c", graph=graph, input_shape=(2, 10, 10))
        outputs.append(run_of(tmp_path, f"run{i}", [f"net{i}"], {f"net{i}": (x, 3, f"net{i}_run")})[f"net{i}"])
    assert np.linalg.norm(outputs[0] - outputs[1]) <= 1e-6 * np.linalg.norm(outputs[0])


def erfc(x):
    return np.array([math.erfc(float(v)) for v in x])


FLOAT64 = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * erfc(-x / math.sqrt(2)) / 2,
    "softmax": lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum(),
}


def test_activations_are_within_2e_7(rng, tmp_path):
    x = np.concatenate([rng.standard_normal(20000) * 5, [0, -0.0, 1e-30, 88, -88, 105, -105, 1e4, -1e4, 3e38, -3e38]])
    x, inputs = x.astype("f4"), {}
    for name in FLOAT64:
        graph = [L("a", "activation", activation=name)]
        fo.export({}, tmp_path / f"{name}.c", to="c", graph=graph, input_shape=x.shape)
        inputs[name] = (x, x.size, f"{name}_run")
    found = run_of(tmp_path, "all", list(inputs), inputs)
    for name, function in FLOAT64.items():
        with np.errstate(over="ignore"):
            expected = function(x.astype("f8"))
        bound = 2e-7 * np.maximum(1, abs(x) if name in ("silu", "gelu") else 1)
        assert (abs(found[name] - expected) <= bound).all(), name
