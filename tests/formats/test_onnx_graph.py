"""Names, weights and local functions of ONNX models, judged by ONNX Runtime."""

import contextlib

import numpy as np
import pytest
from test_export_onnx import distance, random

import fastopt as fo

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

node, tensor = helper.make_node, numpy_helper.from_array
EIGHT = fo.Recipe(bits=8, min_size=1)


def info(name, *shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def save(path, nodes, inputs, outputs, constants=(), opset=21, **options):
    imports = [helper.make_opsetid("", opset), *options.pop("imports", ())]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [tensor(w, name) for name, w in dict(constants).items()])
    model = helper.make_model(graph, opset_imports=imports, ir_version=options.pop("ir_version", 10), **options)
    onnx.save(model, path)
    return path


def run(path, **feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in feeds.items()})[0]


# ---- names --------------------------------------------------------------------------------------------------------


def branch(name, nodes, **constants):
    return helper.make_graph(nodes, name, [], [info("y", 4, 32)], [tensor(w, key) for key, w in constants.items()])


def save_branches(path, then, other, opset=21, **constants):
    choice = node("If", ["c"], ["Y"], name="if", then_branch=then, else_branch=other)
    inputs = [info("c", kind=TensorProto.BOOL), info("x", 4, 64)]
    return save(path, [choice], inputs, [info("Y", 4, 32)], constants, opset)


def assert_close_in_both(source, target, rng, bound):
    x = random(rng, 4, 64)
    for c in (True, False):
        assert distance(run(target, c=c, x=x), run(source, c=c, x=x)) <= bound


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("fast", [False, True])
def test_branches_with_one_name(fast, opset, rng, tmp_path):
    """Each branch keeps its own weight, and the report tells of both."""
    product = [node("MatMul", ["x", "W"], ["y"])]
    then, other = (branch(name, product, W=random(rng, 64, 32)) for name in ("then", "other"))
    source = save_branches(tmp_path / "m.onnx", then, other, opset)
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT, fast=fast)
    assert {t.name: t.bits for t in report.tensors} == {"if.then_branch/W": 8, "if.else_branch/W": 8}
    assert_close_in_both(source, tmp_path / "p.onnx", rng, 0.02)
    fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT.replace(exclude=["if.then*"]), fast=fast)
    assert_close_in_both(source, tmp_path / "p.onnx", rng, 0.02)


@pytest.mark.parametrize("fast", [False, True])
def test_branch_that_computes_a_weight_of_the_same_name(fast, rng, tmp_path):
    then = branch("t", [node("MatMul", ["x", "W"], ["y"])], W=random(rng, 64, 32))
    nodes = [node("Add", ["P", "Q"], ["W"]), node("MatMul", ["x", "W"], ["y"])]
    other = branch("e", nodes, P=random(rng, 64, 32), Q=random(rng, 64, 32))
    source = save_branches(tmp_path / "m.onnx", then, other)
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT, fast=fast)
    assert {t.name: t.kind for t in report.tensors} == {"W": "quantized", "P": "dense", "Q": "dense"}
    assert_close_in_both(source, tmp_path / "p.onnx", rng, 0.02)


@pytest.mark.parametrize("min_size", [1, 10**9])
@pytest.mark.parametrize("fast", [False, True])
def test_alias_in_one_branch(fast, min_size, rng, tmp_path):
    then = branch("t", [node("Identity", ["A"], ["v"]), node("MatMul", ["x", "v"], ["y"])])
    nodes = [node("Add", ["P", "Q"], ["v"]), node("MatMul", ["x", "v"], ["y"])]
    other = branch("e", nodes, P=random(rng, 64, 32), Q=random(rng, 64, 32))
    source = save_branches(tmp_path / "m.onnx", then, other, A=random(rng, 64, 32))
    warns = contextlib.nullcontext() if min_size == 1 else pytest.warns(UserWarning, match="no tensor is packed")
    with warns:
        fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT.replace(min_size=min_size), fast=fast)
    assert_close_in_both(source, tmp_path / "p.onnx", rng, 0.02 if min_size == 1 else 0)


@pytest.mark.parametrize("fast", [False, True])
def test_weight_of_an_outer_graph(fast, rng, tmp_path):
    """It is stored once, and an inner weight of the same name hides it."""
    then = branch("t", [node("MatMul", ["x", "W"], ["y"])])
    other = branch("e", [node("MatMul", ["x", "W"], ["z"]), node("Add", ["z", "z"], ["y"])])
    source = save_branches(tmp_path / "m.onnx", then, other, W=random(rng, 64, 32))
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT, fast=fast)
    assert_close_in_both(source, tmp_path / "p.onnx", rng, 0.02)
    assert (tmp_path / "p.onnx").stat().st_size < report.nbytes + 2500
    model = onnx.load(source)
    model.graph.node[0].attribute[0].g.initializer.append(tensor(random(rng, 64, 32), "W"))
    onnx.save(model, source)
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT, fast=fast)
    assert [t.name for t in report.tensors if t.kind == "quantized"] == ["W", "if.else_branch/W"]


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("fast", [False, True])
def test_loop_and_scan(fast, opset, rng, tmp_path):
    """Bodies with a weight of their own, and one from around, under the names that the others have."""
    w = {name: random(rng, 64, 64) / 8 for name in ("W", "A", "B")}
    loop = helper.make_graph(
        [node("MatMul", ["s", "W"], ["t"]), node("MatMul", ["t", "V"], ["u"]), node("Identity", ["go"], ["on"])],
        "body", [info("i", kind=7), info("go", kind=9), info("s", 4, 64)], [info("on", kind=9), info("u", 4, 64)],
        [tensor(w["A"], "V")],
    )  # fmt: skip
    scan = helper.make_graph(
        [node("MatMul", ["s", "V"], ["t"]), node("Add", ["t", "r"], ["u"]), node("MatMul", ["r", "W"], ["o"])],
        "body", [info("s", 4, 64), info("r", 4, 64)], [info("u", 4, 64), info("o", 4, 64)], [tensor(w["B"], "V")],
    )  # fmt: skip
    nodes = [
        node("Loop", ["n", "", "x"], ["l"], body=loop, name="loop"),
        node("Scan", ["l", "many"], ["Y", "Z"], body=scan, num_scan_inputs=1, name="scan"),
    ]
    constants = {"W": w["W"], "n": np.array(3), "many": random(rng, 3, 4, 64)}
    outputs = [info("Y", 4, 64), info("Z", 3, 4, 64)]
    source = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], outputs, constants, opset)
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT, fast=fast)
    packed = {t.name for t in report.tensors if t.kind == "quantized"}
    assert packed == {"W", "loop.body/V", "scan.body/V"}
    x = random(rng, 4, 64)
    assert 0 < distance(run(tmp_path / "p.onnx", x=x), run(source, x=x)) < 0.03


# ---- local functions and operator sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("own", [17, 18, 21])
@pytest.mark.parametrize("opset", [17, 18, 21])
def test_local_functions(opset, own, fast, rng, tmp_path):
    """A weight that goes through a function, one that stands in it, and a function that calls another."""
    imports = [helper.make_opsetid("", own), helper.make_opsetid("local", 1)]
    constant = node("Constant", [], ["K"], value=tensor(random(rng, 64, 64) / 8, "K"))
    body = [node("MatMul", ["a", "w"], ["t"]), constant, node("MatMul", ["t", "K"], ["o"])]
    functions = [
        helper.make_function("local", "Inner", ["a", "w"], ["o"], body, imports),
        helper.make_function("local", "Outer", ["a", "w"], ["o"], [
            node("Inner", ["a", "w"], ["s"], domain="local"), node("Relu", ["s"], ["o"]),
        ], imports),
    ]  # fmt: skip
    nodes = [node("Outer", ["x", "W"], ["h"], domain="local"), node("Inner", ["h", "W"], ["Y"], domain="local")]
    model = {"W": random(rng, 64, 64) / 8}
    options = {"functions": functions, "imports": [helper.make_opsetid("local", 1)]}
    source = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], [info("Y", 4, 64)], model, opset, **options)
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT, fast=fast)
    assert {t.kind for t in report.tensors} == {"quantized"}
    assert "W" in [t.name for t in report.tensors]
    x = random(rng, 4, 64)
    full = run(source, x=x) if own == opset else None
    got = run(tmp_path / "p.onnx", x=x)
    assert full is None or 0 < distance(got, full) < 0.03


def test_function_that_cannot_be_inlined(rng, tmp_path):
    imports = [helper.make_opsetid("", 11), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Act", ["a"], ["o"], [node("Softmax", ["a"], ["o"])], imports)
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Act", ["h"], ["Y"], domain="local")]
    options = {"functions": [function], "imports": [helper.make_opsetid("local", 1)]}
    arguments = ([info("x", 4, 64)], [info("Y", 4, 64)], {"W": random(rng, 64, 64)})
    source = save(tmp_path / "m.onnx", nodes, *arguments, 18, **options)
    try:
        fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT)
    except ValueError as error:
        assert "local function" in str(error)  # noqa: PT017 - of the version of onnx it depends
        assert not (tmp_path / "p.onnx").exists()
    else:
        x = random(rng, 4, 64)
        assert run(tmp_path / "p.onnx", x=x).shape == (4, 64)


def test_what_a_conversion_keeps(rng, tmp_path):
    nodes = [node("MatMul", ["x", "W"], ["h"], name="mm", doc_string="d"), node("Relu", ["h"], ["Y"])]
    source = save(
        tmp_path / "m.onnx", nodes, [info("x", "n", 64)], [info("Y", "n", 64)], {"W": random(rng, 64, 64)}, 13
    )
    model = onnx.load(source)
    model.graph.node[1].metadata_props.add(key="layer", value="1")
    model.graph.metadata_props.add(key="graph", value="2")
    model.metadata_props.add(key="licence", value="MIT")
    model.graph.quantization_annotation.add(tensor_name="Y")
    model.doc_string = "about"
    onnx.save(model, source)
    fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT)
    packed = onnx.load(tmp_path / "p.onnx")
    assert packed.graph.quantization_annotation == model.graph.quantization_annotation
    assert packed.graph.metadata_props == model.graph.metadata_props
    assert packed.metadata_props == model.metadata_props
    assert packed.doc_string == "about"
    assert packed.graph.input == model.graph.input
    assert packed.graph.node[-1].metadata_props == model.graph.node[1].metadata_props


def test_nothing_else_changes(rng, tmp_path):
    """Without a weight to pack a model is what it was."""
    nodes = [node("Identity", ["W"], ["v"]), node("MatMul", ["x", "v"], ["Y"])]
    source = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], [info("Y", 4, 64)], {"W": random(rng, 64, 64)}, 13)
    with pytest.warns(UserWarning, match="no tensor is packed: 1 x fewer than min_size 1000000"):
        fo.pack_onnx(source, tmp_path / "p.onnx", bits=8, min_size=10**6)
    assert onnx.load(tmp_path / "p.onnx") == onnx.load(source)


@pytest.mark.parametrize("length", [60, 20_000])
@pytest.mark.parametrize("last", ["Concat", "DequantizeLinear"])
def test_long_chains_of_constants(last, length, rng, tmp_path):
    """Each node reads the one before twice: neither time nor depth of calls may grow with the paths."""
    nodes = [node("Identity", ["W"], ["v0"])]
    nodes += [node("Add", [f"v{i}", f"v{i}"], [f"v{i + 1}"]) for i in range(length)]
    nodes += [node(last, ["W", f"v{length}"], ["w"], axis=0), node("MatMul", ["x", "w"], ["Y"])]
    source = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], [info("Y", 4, 64)], {"W": random(rng, 32, 64)}, 21)
    assert len(fo.open_weights(source)) == 1
    assert [t.name for t in fo.pack_onnx(source, tmp_path / "p.onnx", bits=8, min_size=1, dry_run=True).tensors] == [
        "W"
    ]


# ---- weights ------------------------------------------------------------------------------------------------------

W64 = ("W", (64, 64))


def lstm(kind, gates, directions=1):
    way = "bidirectional" if directions == 2 else "forward"
    nodes = [
        node(kind, ["x", "W", "R", "B"], ["", "h"], hidden_size=16, direction=way),
        node("Reshape", ["h", "flat"], ["Y"]),
    ]
    shapes = {"W": (directions, gates * 16, 64), "R": (directions, gates * 16, 16), "B": (directions, 2 * gates * 16)}
    return nodes, {**shapes, "flat": np.array([-1])}, [5, 2, 64], {"W", "R"}


CASES = {
    "matmul": ([node("MatMul", ["x", "W"], ["Y"])], {"W": (64, 24)}, [4, 64], {"W"}),
    "first": ([node("MatMul", ["W", "x"], ["Y"])], {"W": (24, 64)}, [64, 4], {"W"}),
    "both": ([node("MatMul", ["x", "W"], ["h"]), node("MatMul", ["W", "h"], ["Y"])], {"W": (64, 64)}, [64, 64], {"W"}),
    "batches": ([node("MatMul", ["x", "W"], ["Y"])], {"W": (3, 64, 24)}, [3, 4, 64], {"W"}),
    "four axes": ([node("MatMul", ["x", "W"], ["Y"])], {"W": (2, 3, 64, 24)}, [2, 3, 4, 64], {"W"}),
    "batches first": ([node("MatMul", ["W", "x"], ["Y"])], {"W": (3, 24, 64)}, [3, 64, 4], {"W"}),
    "gemm first": ([node("Gemm", ["W", "x"], ["Y"], transA=1)], {"W": (64, 24)}, [64, 4], {"W"}),
    "turned": (
        [node("Transpose", ["W"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["Y"])],
        {"W": (24, 64)}, [4, 64], {"W"},
    ),
    "turned twice": (
        [node("Transpose", ["W"], ["t"]), node("Identity", ["t"], ["u"]), node("Transpose", ["u"], ["v"]),
         node("MatMul", ["x", "v"], ["Y"])], {"W": (64, 24)}, [4, 64], {"W"},
    ),
    "turned batches": (
        [node("Transpose", ["W"], ["t"], perm=[2, 0, 1]), node("MatMul", ["x", "t"], ["Y"])],
        {"W": (64, 24, 3)}, [3, 4, 64], {"W"},
    ),
    "cast": (
        [node("Cast", ["W"], ["t"], to=1), node("MatMul", ["x", "t"], ["Y"])], {"W": "half"}, [4, 64], {"W"}
    ),
    "cast and turned": (
        [node("Cast", ["W"], ["t"], to=1), node("Transpose", ["t"], ["u"]), node("MatMul", ["x", "u"], ["Y"])],
        {"W": "half"}, [4, 64], {"W"},
    ),
    "tied": (
        [node("Gather", ["W", "ids"], ["e"]), node("Add", ["e", "x"], ["h"]),
         node("Transpose", ["W"], ["t"], perm=[1, 0]), node("MatMul", ["h", "t"], ["Y"])],
        {"W": (100, 64), "ids": np.array([3, 99, 0, 3])}, [4, 64], {"W"},
    ),
    "tied gemm": (
        [node("Gather", ["W", "ids"], ["e"]), node("Add", ["e", "x"], ["h"]),
         node("Gemm", ["h", "W"], ["Y"], transB=1)],
        {"W": (100, 64), "ids": np.array([3, 99, 0, 3])}, [4, 64], {"W"},
    ),
    "gather axis": (
        [node("Gather", ["W", "ids"], ["e"], axis=-1), node("Add", ["e", "x"], ["Y"])],
        {"W": (64, 100), "ids": np.array([3, 99, 0, 3])}, [64, 4], {"W"},
    ),
    "measured": (
        [node("Shape", ["W"], ["s"]), node("MatMul", ["x", "W"], ["h"]), node("Reshape", ["h", "s"], ["Y"])],
        {"W": (64, 64)}, [64, 64], {"W"},
    ),
    "conv": ([node("Conv", ["x", "W"], ["Y"], group=2)], {"W": (8, 4, 3, 3)}, [2, 8, 6, 6], {"W"}),
    "conv transposed": ([node("ConvTranspose", ["x", "W"], ["Y"])], {"W": (8, 4, 3, 3)}, [2, 8, 6, 6], {"W"}),
    "grouped": ([node("ConvTranspose", ["x", "W"], ["Y"], group=2)], {"W": (8, 4, 3)}, [2, 8, 6], {"W"}),
    "einsum": ([node("Einsum", ["x", "W"], ["Y"], equation="bi,oi->bo")], {"W": (24, 64)}, [4, 64], {"W"}),
    "einsum heads": (
        [node("Einsum", ["x", "W"], ["Y"], equation="bi,hid->bhd")], {"W": (3, 64, 8)}, [4, 64], {"W"}
    ),
    "lstm": lstm("LSTM", 4),
    "lstm both ways": lstm("LSTM", 4, 2),
    "gru": lstm("GRU", 3),
    "rnn": lstm("RNN", 1),
    "gates": (  # as exporters of torch reorder those of an LSTM
        [node("Slice", ["W0", "k0", "k1", "k0"], ["a"]), node("Slice", ["W0", "k1", "k2", "k0"], ["b"]),
         node("Concat", ["b", "a"], ["c"], axis=0), node("Unsqueeze", ["c", "k0"], ["W"]),
         node("Unsqueeze", ["R0", "k0"], ["R"]),
         node("LSTM", ["x", "W", "R"], ["", "h"], hidden_size=16), node("Reshape", ["h", "flat"], ["Y"])],
        {"W0": (64, 64), "R0": (64, 16), "k0": np.array([0]), "k1": np.array([32]), "k2": np.array([64]),
         "flat": np.array([-1])}, [5, 2, 64], {"W0", "R0"},
    ),
    "squeezed": (
        [node("Squeeze", ["W", "k"], ["w"]), node("MatMul", ["x", "w"], ["Y"])],
        {"W": (1, 64, 24), "k": np.array([-3])}, [4, 64], {"W"},
    ),
    # Kept, and told.
    "joined with x": (
        [node("Concat", ["W", "x"], ["j"], axis=0), node("MatMul", ["j", "x"], ["Y"])], {"W": (4, 64)}, [64, 64], set()
    ),
    "summand": ([node("Add", ["x", "W"], ["Y"])], {"W": (4, 64)}, [4, 64], set()),
    "also a summand": (
        [node("MatMul", ["x", "W"], ["h"]), node("Add", ["h", "W"], ["Y"])], {"W": (64, 64)}, [64, 64], set()
    ),
    "cast to integers": (
        [node("Cast", ["W"], ["i"], to=7), node("Cast", ["i"], ["f"], to=1), node("MatMul", ["x", "f"], ["Y"])],
        {"W": (64, 24)}, [4, 64], set(),
    ),
    "diagonal": ([node("Einsum", ["x", "W"], ["Y"], equation="bi,ii->bi")], {"W": (64, 64)}, [4, 64], set()),
}  # fmt: skip


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weights(case, fast, opset, rng, tmp_path):
    nodes, constants, shape, packed = CASES[case]
    arrays = {}
    for name, of in constants.items():
        if isinstance(of, np.ndarray):
            arrays[name] = of
        else:
            turned = (24, 64) if "turned" in case else (64, 24)
            arrays[name] = random(rng, *turned).astype("f2") if of == "half" else random(rng, *of) / np.float32(8)
            arrays[name] *= 100 if "integers" in case else 1
    arguments = ([info("x", *shape)], [onnx.ValueInfoProto(name="Y")], arrays)
    model = save(tmp_path / "m.onnx", nodes, *arguments, opset)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(model))
    found = {value.name: value.type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    kind = found["Y"] if found["Y"].WhichOneof("value") else info("Y").type
    whole = onnx.load(model)
    whole.graph.output[0].type.tensor_type.elem_type = kind.tensor_type.elem_type or TensorProto.FLOAT
    onnx.save(whole, model)
    report = fo.pack_onnx(model, tmp_path / "p.onnx", EIGHT, fast=fast)
    kinds = {t.name: t.kind for t in report.tensors}
    assert {name for name, kind in kinds.items() if kind == "quantized"} == packed
    x = random(rng, *shape)
    got, full = run(tmp_path / "p.onnx", x=x), run(model, x=x)
    assert distance(got, full) < 0.02
    assert (distance(got, full) > 0) == bool(packed)


def test_reasons(rng, tmp_path):
    nodes = [node("Add", ["x", "S"], ["h"]), node("MatMul", ["h", "O"], ["Y"]), node("Identity", ["O"], ["Z"])]
    constants = {"S": random(rng, 4, 64), "O": random(rng, 64, 64), "N": random(rng, 64, 64)}
    source = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], [info("Y", 4, 64), info("Z", 64, 64)], constants)
    report = fo.pack_onnx(source, tmp_path / "p.onnx", EIGHT)
    assert {t.name: t.reason for t in report.tensors} == {
        "S": "read by Add, not as a weight",
        "O": "an output of the model, or of a branch",
        "N": "no node reads it",
    }
