"""The kinds of input that are fuzzed: where each starts from, what is done with it, and which errors are its own.

Tests run them without the fuzzer, so nothing here imports it.
"""

import contextlib
import copy
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutate

import fastopt as fo

LARGEST = 1 << 16  # elements of a tensor that is computed with


@dataclass(frozen=True)
class Target:
    """One kind of input.

    `run` gets a file with the input. It catches the errors that are documented; any other is a find. `seeds` makes
    inputs, by name, that `run` accepts. `extra` is a package that it needs.
    """

    file: str
    run: Callable[[Path], Any]
    seeds: Callable[[], dict[str, bytes]]
    mutate: mutate.Mutate
    extra: str | None = None


# ---- files of packed models --------------------------------------------------------------------------------------


def load_and_use(path: Path) -> bool:
    """Load a file and compute with what is in it; return whether it was sound. Nothing but ValueError may be raised."""
    with contextlib.suppress(ValueError):
        fo.load_checkpoint(path)
    try:
        model = fo.load(path)
    except ValueError:
        return False
    use(model)
    return True


def use(model: fo.PackedModel) -> None:
    """Do with a model whatever reads its bytes; it must not crash, whatever they are."""
    for tensor in model.values():
        use_tensor(tensor)
    report = model.report()
    assert report.nbytes == model.nbytes


def use_tensor(tensor: Any) -> None:
    if np.prod(tensor.shape, dtype=object) > LARGEST:  # a sparse tensor of a few bytes may be that large
        return
    with np.errstate(all="ignore"):
        if isinstance(tensor, fo.QuantizedTensor):
            assert tensor.dequantize().shape == tensor.shape
            if len(tensor.shape) > 1 and len(tensor):
                fo.embedding(tensor, [0, len(tensor) - 1])
        elif isinstance(tensor, fo.SparseTensor):
            assert tensor.to_dense().shape == tensor.shape
            assert tensor.to_layout("mask").shape == tensor.shape
            if len(tensor.shape) > 1 and tensor.shape[0]:
                assert tensor[[-1, 0]].shape == (2, *tensor.shape[1:])
        if len(tensor.shape) == 2 and (isinstance(tensor, fo.QuantizedTensor) or tensor.dtype == np.float32):
            x = np.ones((130, tensor.shape[1]), np.float32)
            for batch in (1, 5, 130):
                assert fo.linear(x[:batch], tensor).shape == (batch, tensor.shape[0])


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dense = {"w": rng.standard_normal((6, 40)).astype("f4"), "b": rng.standard_normal(6).astype("f4")}
    return {**dense, "half": rng.standard_normal((4, 16)).astype("f2"), "ids": np.arange(5)}


def model_seeds() -> dict[str, bytes]:
    w = weights()
    made = {
        "quantized": fo.pack(w, bits=4, min_size=1),
        "three": fo.pack(w, bits=3, min_size=1),
        "two levels": fo.PackedModel({"w": fo.quantize(w["w"], 4, group_size=8, param_bits=6, param_group=256)}),
        "sparse": fo.pack(w, sparsity=0.5, min_size=1),
        "pattern": fo.pack({"w": w["w"]}, pattern="2:4", bits=8, min_size=1),
    }
    return {name: written("m.safetensors", model.save) for name, model in made.items()}


# ---- other files of weights --------------------------------------------------------------------------------------


def open_and_read(path: Path) -> None:
    """Read each array of a file, and pack it."""
    try:
        opened = fo.open_weights(path)
        for name in opened:
            shape, dtype = opened.spec(name)
            if np.prod(shape, dtype=object) <= LARGEST:
                array = opened[name]
                assert (array.shape, array.dtype) == (shape, dtype)
            opened.release(name)
    except ValueError:
        return
    with contextlib.suppress(ValueError), np.errstate(all="ignore"):
        fo.pack(path, bits=8, min_size=1)


def read_index(path: Path) -> None:
    """Read an index beside two shards, which are sound."""
    for shard, names in (("a.safetensors", ("w", "b")), ("b.safetensors", ("half", "ids"))):
        if not path.with_name(shard).exists():
            fo.pack({name: weights()[name] for name in names}, bits=4, min_size=1).save(path.with_name(shard))
    for read in (fo.load, fo.open_weights):
        with contextlib.suppress(ValueError, OSError):
            dict(read(path))


def npy_seeds() -> dict[str, bytes]:
    arrays = {**weights(), "fortran": np.asfortranarray(np.ones((3, 5))), "one": np.float32(1), "none": np.ones((0, 3))}
    return {name: written("a.npy", lambda path, array=array: np.save(path, array)) for name, array in arrays.items()}


def npz_seeds() -> dict[str, bytes]:
    return {
        "stored": written("a.npz", lambda path: np.savez(path, **weights())),
        "deflated": written("a.npz", lambda path: np.savez_compressed(path, **weights())),
    }


def index_seeds() -> dict[str, bytes]:
    placed = {"w": "a.safetensors", "b": "a.safetensors", "half": "b.safetensors", "ids": "b.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    return {"index": json.dumps(index).encode()}


def gguf_seeds() -> dict[str, bytes]:
    w = weights()
    w["blocks"] = np.ones((4, 64), "f4")
    values = {
        "general.architecture": ["STRING", "fuzz"],
        "general.alignment": ["UINT32", 32],
        "fuzz.tokens": ["ARRAY", "STRING", ["a", "", "bc"]],
        "fuzz.scores": ["ARRAY", "FLOAT32", [1.0, -1.0]],
        "fuzz.yes": ["BOOL", True],
        "fuzz.long": ["UINT64", 1 << 60],
    }
    model = fo.pack(w, bits=4, include=["blocks"], min_size=1)
    model = fo.PackedModel(dict(model), metadata={"gguf": json.dumps(values)})
    eight = fo.PackedModel({"w": fo.quantize(w["blocks"], 8)}, metadata=model.metadata)
    return {
        "four": written("m.gguf", lambda path: fo.export(model, path, to="gguf")),
        "eight": written("m.gguf", lambda path: fo.export(eight, path, to="gguf", requantize=True)),
    }


def torch_seeds() -> dict[str, bytes]:
    import torch

    state = {name: torch.from_numpy(array) for name, array in weights().items()}
    state["turned"], state["bfloat16"] = state["w"].T, state["w"].bfloat16()
    return {
        "plain": written("m.pt", lambda path: torch.save(state, path)),
        "nested": written("m.pt", lambda path: torch.save({"state_dict": state, "epoch": 3}, path)),
        "old": written("m.pt", lambda path: torch.save(state, path, _use_new_zipfile_serialization=False)),
    }


# ---- checkpoints and states of optimizers ------------------------------------------------------------------------

OPTIMIZERS = {
    "Adam": lambda params: fo.Adam(params, lr=fo.schedules.cosine(1e-3, steps=10), amsgrad=True),
    "AdamW": lambda params: fo.AdamW([{"params": {"w": params["w"]}}, {"params": {"b": params["b"]}, "lr": 0.1}]),
    "SGD": lambda params: fo.SGD(params, lr=0.1, momentum=0.9, state_dtype="bfloat16"),
    "RMSprop": lambda params: fo.RMSprop(params, centered=True, max_norm=1.0),
    "Lion": lambda params: fo.Lion(params, state_dtype="uint8"),
}


def optimizer(name: str) -> Any:
    return OPTIMIZERS[name]({name: weights()[name].copy() for name in ("w", "b")})


def stepped(name: str) -> Any:
    opt = optimizer(name)
    for _ in range(2):
        opt.step(grads(name))
    return opt


def grads(name: str) -> Any:
    given = {name: np.ones_like(array) for name, array in weights().items() if name in ("w", "b")}
    return [{"w": given["w"]}, {"b": given["b"]}] if name == "AdamW" else given


def load_tree(path: Path) -> None:
    """Read a checkpoint, and continue from the state of an optimizer that is in it."""
    try:
        tree = fo.load_checkpoint(path)
    except ValueError:
        return
    if isinstance(tree, dict):
        for name in OPTIMIZERS:
            if name in tree:
                continue_from(name, tree[name])


def load_state(path: Path) -> None:
    """Continue from a state of an optimizer, which stands in JSON as ``[name, state]``."""
    given = described(path)
    if isinstance(given, list) and len(given) == 2 and isinstance(given[0], str) and given[0] in OPTIMIZERS:
        continue_from(*given)


def continue_from(name: str, state: Any) -> None:
    opt = stepped(name)
    before = copy.deepcopy(opt.state_dict())
    try:
        opt.load_state_dict(state)
    except (TypeError, ValueError):
        assert same(opt.state_dict(), before), "a state dict that was refused has changed the optimizer"
        return
    with np.errstate(all="ignore"):
        opt.step(grads(name))
    again = optimizer(name)
    again.load_state_dict(opt.state_dict())
    assert same(again.state_dict(), opt.state_dict())


def same(a: Any, b: Any) -> bool:
    return pickle.dumps(to_json(a)) == pickle.dumps(to_json(b))


def checkpoint_seeds() -> dict[str, bytes]:
    def save(tree: Any) -> bytes:
        return written("c.safetensors", lambda path: fo.save_checkpoint(tree, path))

    tree = {"epoch": 7, "losses": [0.5, None, True, "x"], "deep": {"a": [{"b": np.arange(3)}]}}
    return {"tree": save(tree), **{name: save({name: stepped(name).state_dict()}) for name in OPTIMIZERS}}


def state_seeds() -> dict[str, bytes]:
    return {name: json.dumps([name, to_json(stepped(name).state_dict())]).encode() for name in OPTIMIZERS}


# ---- options and arguments ---------------------------------------------------------------------------------------


def read_recipe(path: Path) -> None:
    """Read a recipe, and pack by it."""
    try:
        recipe = fo.Recipe.from_toml(path)
    except (TypeError, ValueError):
        return
    assert fo.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).to_dict() == recipe.to_dict()
    with contextlib.suppress(ValueError):
        fo.pack(weights(), recipe).report()


def construct(path: Path) -> None:
    """Make a packed tensor of the arguments that stand in JSON as ``[class, arguments]``, and compute with it."""
    classes = {"quantized": fo.QuantizedTensor, "sparse": fo.SparseTensor}
    given = described(path)
    if not isinstance(given, list) or [type(part) for part in given] != [str, dict] or given[0] not in classes:
        return
    kind, arguments = given
    try:
        if isinstance(arguments.get("values"), dict):
            arguments["values"] = fo.QuantizedTensor(**arguments["values"])
        tensor = classes[kind](**arguments)
    except (TypeError, ValueError):
        return
    use_tensor(tensor)
    assert repr(tensor)
    assert pickle.loads(pickle.dumps(tensor)) == tensor == tensor.copy()
    fo.PackedModel({"t": tensor}).report()


def recipe_seeds() -> dict[str, bytes]:
    return {
        "plain": b'bits = 4\nexclude = ["*norm*"]\nmin_size = 1\n',
        "overrides": b'bits = 8\nmin_size = 1\n[overrides]\n"b*" = {bits = "none"}\n"w" = {bits = 4, group_size = 8}\n',
        "pruning": b'pattern = "2:4"\nbits = 2\ngroup_size = "auto"\nparam_dtype = "float32"\nfit = "lsq"\n',
    }


def construct_seeds() -> dict[str, bytes]:
    w = weights()["w"]
    q, pattern = fo.quantize(w, 4, group_size=8, outliers=0.05), fo.prune(w, pattern="2:4").quantize(8)
    made = {"quantized": q, "pattern": pattern, "whole": fo.quantize(w, 2, group_size=None)}
    made["two levels"] = fo.quantize(w, 4, param_bits=4)
    made |= {layout: fo.SparseTensor.from_dense(w, layout=layout) for layout in ("mask", "index16", "index8", "1x16")}
    kinds = {fo.QuantizedTensor: "quantized", fo.SparseTensor: "sparse"}
    return {
        name: json.dumps([kinds[type(tensor)], to_json(fields_of(tensor))]).encode() for name, tensor in made.items()
    }


def fields_of(tensor: Any) -> dict[str, Any]:
    return {name: getattr(tensor, name) for name in tensor.__dataclass_fields__}


# ---- models of ONNX ----------------------------------------------------------------------------------------------


def pack_graph(path: Path) -> None:
    """Pack the weights of a graph."""
    for options in ({"bits": 4}, {"bits": 8, "fast": True}, {"sparsity": 0.5}):
        with contextlib.suppress(ValueError, TypeError, OSError), np.errstate(all="ignore"):
            fo.pack_onnx(path, path.with_name("packed.onnx"), min_size=1, **options)


def onnx_seeds() -> dict[str, bytes]:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    node = helper.make_node

    def array(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name)

    def info(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    then = helper.make_graph([node("MatMul", ["h", "v"], ["t"])], "then", [], [info("t", "n", 4)], [array("v", 8, 4)])
    other = helper.make_graph([node("Gemm", ["h", "u"], ["e"], transB=1)], "else", [], [info("e", "n", 4)])
    nodes = [
        node("Identity", ["w"], ["again"]),
        node("MatMul", ["x", "again"], ["g"]),
        node("Gemm", ["g", "square", "b"], ["h"]),
        node("Constant", [], ["u"], value=array("value", 4, 8)),
        node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    yes = numpy_helper.from_array(np.array(True), "yes")
    branches = helper.make_graph(
        nodes,
        "g",
        [info("x", "n", 32)],
        [info("y", "n", 4)],
        [array("w", 32, 8), array("square", 8, 8), array("b", 8), yes],
    )
    image, filters = info("x", 1, 3, 8, 8), array("f", 4, 3, 3, 3)
    conv = helper.make_graph([node("Conv", ["x", "f"], ["y"])], "g", [image], [info("y", 1, 4, 6, 6)], [filters])
    made = {"conv": (conv, 13), "branches": (branches, 21), "old": (branches, 17)}
    return {
        name: helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8).SerializeToString()
        for name, (graph, opset) in made.items()
    }


# ---- arrays in JSON ----------------------------------------------------------------------------------------------


def to_json(node: Any) -> Any:
    """Return a tree in which arrays and tuples are described, as `from_json` reads them."""
    if isinstance(node, fo.QuantizedTensor):
        return to_json(fields_of(node))
    if isinstance(node, np.ndarray):
        return {"array": node.dtype.name, "shape": list(node.shape), "bytes": node.tobytes().hex()}
    if isinstance(node, np.dtype):
        return {"dtype": node.name}
    if isinstance(node, dict):
        return {key: to_json(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return {"tuple": [to_json(value) for value in node]}
    if isinstance(node, list):
        return [to_json(value) for value in node]
    return node if node is None or isinstance(node, str | bool | int | float) else repr(node)


def described(path: Path) -> Any:
    """Return the tree that a file describes, None if it does not."""
    try:
        return from_json(json.loads(path.read_bytes()))
    except Exception:  # whatever comes of a description that was changed
        return None


def from_json(node: Any) -> Any:
    """Return the tree that is described: arrays of any dtype and shape, their bytes repeated or cut as needed."""
    if isinstance(node, list):
        return [from_json(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "array" in node:
        shape, dtype = node["shape"], np.dtype(node["array"])
        if np.prod(shape, dtype=object) > LARGEST or dtype.hasobject:
            raise ValueError("too large, or Python objects")
        array = np.resize(np.frombuffer(bytes.fromhex(node["bytes"]), np.uint8), (*shape, dtype.itemsize))
        array = np.ascontiguousarray(array).view(dtype).reshape(shape)
        return {"F": np.asfortranarray, "-": lambda a: a[::-1], "ro": frozen}.get(node.get("order"), np.array)(array)
    if "dtype" in node and len(node) == 1:
        return np.dtype(node["dtype"])
    if "tuple" in node:
        return tuple(from_json(value) for value in node["tuple"])
    return {key: from_json(value) for key, value in node.items()}


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def written(name: str, write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


TARGETS = {
    "model": Target("m.safetensors", load_and_use, model_seeds, mutate.safetensors),
    "npy": Target("a.npy", open_and_read, npy_seeds, mutate.npy),
    "npz": Target("a.npz", open_and_read, npz_seeds, mutate.archive),
    "index": Target("m.safetensors.index.json", read_index, index_seeds, mutate.json_text),
    "gguf": Target("m.gguf", open_and_read, gguf_seeds, mutate.integers, "gguf"),
    "torch": Target("m.pt", open_and_read, torch_seeds, mutate.archive, "torch"),
    "checkpoint": Target("c.safetensors", load_tree, checkpoint_seeds, mutate.safetensors),
    "state": Target("state.json", load_state, state_seeds, mutate.json_text),
    "recipe": Target("recipe.toml", read_recipe, recipe_seeds, mutate.lines),
    "tensor": Target("tensor.json", construct, construct_seeds, mutate.json_text),
    "onnx": Target("m.onnx", pack_graph, onnx_seeds, mutate.onnx_model, "onnx"),
}
