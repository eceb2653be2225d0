"""Optimizer steps: one tensor from cache to memory, many small tensors, and states that have become subnormal."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import common
import ml_dtypes
import numpy as np

import fastopt as fo
from fastopt.bench import FASTOPT, NUMPY, OPTIMIZERS, Array, Call, Case, Step, limit, normal, numpy_adam, optimizer_case

TORCH = "torch fused"


def torch_steps(torch: Any) -> dict[str, Step]:
    """Torch's fused optimizers, by the names of `OPTIMIZERS`, on the same memory."""

    def step(make: Any, w: Array, g: Array) -> Call:
        parameter = torch.nn.Parameter(torch.from_numpy(w))
        parameter.grad = torch.from_numpy(g)
        return make([parameter], lr=1e-3, fused=True).step

    makers = {
        "SGD": torch.optim.SGD,
        "Adagrad": partial(torch.optim.Adagrad, eps=1e-10),
        "SGD momentum": partial(torch.optim.SGD, momentum=0.9),
        "Adam": torch.optim.Adam,
        "AdamW": partial(torch.optim.AdamW, weight_decay=0.01),
    }
    return {name: partial(step, make) for name, make in makers.items()}


def variants() -> dict[str, Step]:
    """Adam with narrower states and parameters, and with all options at once; the limit is that of plain Adam."""

    def step(w: Array, g: Array, dtype: Any = None, **options: Any) -> Call:
        scale = options.pop("grad_scale", None)
        if dtype is not None:
            w, g = w.astype(dtype), g.astype(dtype)
        return partial(fo.Adam(w, **options).step, g, **({} if scale is None else {"grad_scale": scale}))

    everything = {"l1": 1e-6, "keep_zeros": True, "maximize": True, "weight_decay": 1e-4}
    return {
        "bfloat16 states": partial(step, state_dtype="bfloat16"),
        "uint8 states": partial(step, state_dtype="uint8"),
        "uint8, bf16 w and g": partial(step, dtype=ml_dtypes.bfloat16, state_dtype="uint8", stochastic_rounding=True),
        "L1, L2, keep_zeros": partial(step, **everything),
        "... and clipping": partial(step, **everything, max_norm=1.0),
    }


def many_small(torch: Any) -> Case:
    """Adam on 200 tensors of 1000 to 20,000 elements; the limit has them in one."""
    sizes = np.linspace(1000, 20_000, 200, dtype=int)
    size = int(sizes.sum())
    grads = [normal(n, seed=1) for n in sizes]
    rivals = [numpy_adam(normal(n), g) for n, g in zip(sizes, grads, strict=True)]
    contenders: dict[str, list[Call]] = {
        FASTOPT: [partial(fo.Adam([normal(n) for n in sizes]).step, grads)],
        NUMPY: [lambda: [step() for step in rivals]],
    }
    if torch:
        parameters = [torch.nn.Parameter(torch.from_numpy(normal(n))) for n in sizes]
        for parameter, g in zip(parameters, grads, strict=True):
            parameter.grad = torch.from_numpy(g)
        contenders[TORCH] = [torch.optim.Adam(parameters, fused=True).step]
    return Case("Adam, 200 small tensors", size, 28 * size, contenders, limit(update=4 * size, streams=4))


def subnormal(size: int, peers: dict[str, Step]) -> Case:
    """Adam with gradients so small that one state or the other is subnormal."""
    gradient = np.where(np.arange(size) % 2, np.float32(1e-20), np.float32(1e-39))
    case = optimizer_case("Adam", size, peers, gradient)
    case.name += ", subnormal"
    return case


def cases(options: argparse.Namespace) -> Iterator[Case]:
    torch = common.peer("torch")
    peers = torch_steps(torch) if torch else {}
    sizes = [10_000, 1_000_000] if options.quick else [10_000, 1_000_000, 20_000_000]
    if options.full:
        sizes.append(100_000_000)
    for name in OPTIMIZERS:
        for size in sizes:
            others = {TORCH: peers[name]} if name in peers else {}
            if name == "Adam" and size > 10_000:
                others["numpy blocked"] = partial(numpy_adam, block=16_384)
            yield optimizer_case(name, size, others)
    for size in sizes[1:]:
        case = optimizer_case("Adam", size, variants())
        case.name += ", variants"
        case.errors = {}  # narrow states are judged by training: bench_parity.py
        yield case
    yield many_small(torch)
    yield subnormal(1_000_000, {TORCH: peers["Adam"]} if torch else {})


if __name__ == "__main__":
    common.main(cases)
