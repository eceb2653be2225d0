"""Write models for other runtimes, against the disk, and multiply in ONNX Runtime by what was written.

The limit of a file is to write as many bytes and wait until they are on the disk.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np

import fastopt as fo
from fastopt.cli.bench import linear_case, normal
from fastopt.cli.timing import FASTOPT, Call, Case

FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (("gguf", {}), ("mlx", {}), ("onnx", {}), ("onnx", {"fast": True}))
GROUPS = {8: -1, 4: 32, 2: 32}  # for 2 bits in groups of 16 ONNX Runtime has no fast kernel


def write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_case(folder: Path, model: dict[str, Any], to: str, options: dict[str, Any]) -> Case:
    path = folder / to
    if to == "onnx":
        options = {**options, "graph": [fo.Layer(name.removesuffix(".weight"), input="") for name in model]}
    fo.export(model, path, to=to, **options)
    size = path.stat().st_size
    return Case(
        name=f"export to {to}{', fast' if 'fast' in options else ''}, {size / 1e6:.0f} MB",
        size=sum(w.size for w in model.values()),
        nbytes=size,
        contenders={FASTOPT: [partial(fo.export, model, path, to=to, **options)]},
        limit=[partial(write_durably, folder / "limit", bytes(size))],
    )


def product_case(folder: Path, side: int, bits: int, batch: int) -> Case:
    """ONNX Runtime with what was exported; the matrix in float32 as it takes it by itself."""
    runtime = harness.peer("onnxruntime")
    w = normal(side, side)
    q = fo.quantize(w, bits, group_size=GROUPS[bits])
    wide = q.dequantize()
    case = linear_case(f"{bits} bits, ONNX", lambda: q, wide, batch, cold=False)
    if runtime is None:
        return case
    x, exact = normal(batch, side, seed=2), normal(batch, side, seed=2).astype("f8") @ wide.T.astype("f8")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])

    def session(weight: Any, **options: Any) -> Call:
        path = folder / "product.onnx"
        fo.export({"fc.weight": weight}, path, to="onnx", graph=[fo.Layer("fc")], **options)
        made = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        return lambda: made.run(None, {"x": x})

    def error(call: Callable[[], Any]) -> float:
        (y,) = call()
        return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))

    for name, call in {
        "ORT float32": session(wide),
        "ORT decodes": session(q),
        "ORT fast": session(q, fast=True),
        "ORT fast, level 4": session(q, fast=True, accuracy_level=4),
    }.items():
        case.contenders[name] = [call]
        case.errors[name] = partial(error, call)
    return case


def cases(options: argparse.Namespace) -> Iterator[Case]:
    side = 1024 if options.quick else 4096
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {f"{i}.weight": fo.quantize(normal(side, side, seed=i), bits=4) for i in range(4)}
        for to, settings in FORMATS:
            yield write_case(folder, weights, to, settings)
        for bits in (8, 4, 2):
            for batch in (1, 16):
                yield product_case(folder, side, bits, batch)


if __name__ == "__main__":
    harness.main(cases)
