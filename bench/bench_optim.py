"""Optimizer steps: one tensor from cache to memory, many small tensors, and states that have become subnormal."""

import argparse
import importlib
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import harness
import ml_dtypes
import numpy as np
from rivals import OPTIMIZERS, optimizer_case

import fastopt as fo
from fastopt._types import Array
from fastopt.cli.bench import Step, normal, numpy_adam
from fastopt.cli.timing import FASTOPT, NUMPY, Call, Case, limit

TORCH = "torch fused"


def parameter(torch: Any, w: Array, g: Array) -> Any:
    """Return a parameter of torch on the memory of w, with g as its gradient."""
    result = torch.nn.Parameter(torch.from_numpy(w))
    result.grad = torch.from_numpy(g)
    return result


def torch_steps(torch: Any) -> dict[str, Step]:
    """Torch's fused optimizers, by the names of `OPTIMIZERS`, on the same memory."""

    def step(make: Any, w: Array, g: Array) -> Call:
        return make([parameter(torch, w, g)], lr=1e-3, fused=True).step

    makers = {
        "SGD": torch.optim.SGD,
        "Adagrad": partial(torch.optim.Adagrad, eps=1e-10),
        "SGD momentum": partial(torch.optim.SGD, momentum=0.9),
        "Adam": torch.optim.Adam,
        "AdamW": partial(torch.optim.AdamW, weight_decay=0.01),
    }
    return {name: partial(step, make) for name, make in makers.items()}


def numba_adam(numba: Any) -> Step:
    """Adam as a loop that numba compiles."""

    @numba.njit(parallel=True, fastmath=True)
    def update(w: Array, g: Array, m: Array, v: Array, step_size: Any, root_scale: Any) -> None:
        b1, b2, one, eps = w.dtype.type(0.9), w.dtype.type(0.999), w.dtype.type(1), w.dtype.type(1e-8)
        for i in numba.prange(w.size):
            m[i] += (one - b1) * (g[i] - m[i])
            v[i] = b2 * v[i] + (one - b2) * g[i] * g[i]
            w[i] -= step_size * m[i] / (np.sqrt(v[i]) * root_scale + eps)

    def step(w: Array, g: Array) -> Call:
        m, v, count, real = np.zeros_like(w), np.zeros_like(w), 0, w.dtype.type

        def call() -> None:
            nonlocal count
            count += 1
            update(w, g, m, v, real(1e-3 / (1 - 0.9**count)), real(1 / np.sqrt(1 - 0.999**count)))

        return call

    return step


def optax_adam(optax: Any) -> Step:
    """Adam of optax, compiled, on buffers of its own that it may overwrite."""
    jax = importlib.import_module("jax")
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(w: Any, state: Any, g: Any) -> Any:
        updates, state = optimizer.update(g, state, w)
        return optax.apply_updates(w, updates), state

    def step(w: Array, g: Array) -> Call:
        current = [jax.numpy.array(w), optimizer.init(jax.numpy.array(w))]
        gradient = jax.numpy.array(g)

        def call() -> None:
            current[:] = update(*current, gradient)
            current[0].block_until_ready()

        return call

    return step


def bitsandbytes_adam(bitsandbytes: Any) -> Step:
    """Adam of bitsandbytes, with states of 8 bits."""
    torch = importlib.import_module("torch")

    def step(w: Array, g: Array) -> Call:
        return bitsandbytes.optim.Adam8bit([parameter(torch, w, g)], lr=1e-3).step

    return step


def deepspeed_adam(deepspeed: Any) -> Any:
    """Adam of DeepSpeed, which compiles it for this machine when it is first used: that takes two minutes."""
    module = importlib.import_module(f"{deepspeed.__name__}.ops.adam")
    return partial(module.DeepSpeedCPUAdam, lr=1e-3, adamw_mode=False)


def variants() -> dict[str, Step]:
    """Adam with narrower states and parameters, and with all options at once; the limit is that of plain Adam."""

    def step(w: Array, g: Array, dtype: Any = None, **options: Any) -> Call:
        if dtype is not None:
            w, g = w.astype(dtype), g.astype(dtype)
        return partial(fo.Adam(w, **options).step, g)

    everything: dict[str, Any] = {"l1": 1e-6, "keep_zeros": True, "maximize": True, "weight_decay": 1e-4}
    return {
        "bfloat16 states": partial(step, state_dtype="bfloat16"),
        "uint8 states": partial(step, state_dtype="uint8"),
        "uint8, bf16 w and g": partial(step, dtype=ml_dtypes.bfloat16, state_dtype="uint8", stochastic_rounding=True),
        "L1, L2, keep_zeros": partial(step, **everything),
        "... and clipping": partial(step, **everything, max_norm=1.0),
    }


def many_small(torch: Any, makers: dict[str, Any], numba: Step | None) -> Case:
    """Adam on 200 tensors of 1000 to 20,000 elements; the limit has them in one.

    `makers` take a list of parameters of torch; numba's loop takes one array at a time.
    """
    sizes = np.linspace(1000, 20_000, 200, dtype=int)
    size = int(sizes.sum())
    grads = [normal(n, seed=1) for n in sizes]
    rivals = [numpy_adam(normal(n), g) for n, g in zip(sizes, grads, strict=True)]
    contenders: dict[str, Collection[Call]] = {
        FASTOPT: [partial(fo.Adam([normal(n) for n in sizes]).step, grads)],
        NUMPY: [lambda: [step() for step in rivals]],
    }
    if numba:
        steps = [numba(normal(n), g) for n, g in zip(sizes, grads, strict=True)]
        contenders["numba"] = [lambda: [step() for step in steps]]
    for name, make in makers.items():
        contenders[name] = [make([parameter(torch, normal(n), g) for n, g in zip(sizes, grads, strict=True)]).step]
    return Case("Adam, 200 small tensors", size, 28 * size, contenders, limit(update=4 * size, streams=4))


def subnormal(size: int, peers: dict[str, Step]) -> Case:
    """Adam with gradients so small that one state or the other is subnormal."""
    gradient = np.where(np.arange(size) % 2, np.float32(1e-20), np.float32(1e-39))
    case = optimizer_case("Adam", size, peers, gradient)
    case.name += ", subnormal"
    return case


def cases(options: argparse.Namespace) -> Iterator[Case]:
    torch = harness.peer("torch")
    fused = torch_steps(torch) if torch else {}
    makers = {"numba": numba_adam, "optax": optax_adam, "bitsandbytes": bitsandbytes_adam}
    peers = {name: make(module) for name, make in makers.items() if (module := harness.peer(name))}
    eight_bits = {"bitsandbytes uint8": peers.pop("bitsandbytes")} if "bitsandbytes" in peers else {}
    lists = {TORCH: partial(torch.optim.Adam, fused=True)} if torch else {}
    if torch and (deepspeed := harness.peer("deepspeed")):
        make = lists["deepspeed"] = deepspeed_adam(deepspeed)
        peers["deepspeed"] = lambda w, g: make([parameter(torch, w, g)]).step
    sizes = [10_000, 1_000_000] if options.quick else [10_000, 1_000_000, 20_000_000]
    if options.full:
        sizes.append(100_000_000)
    yield optimizer_case("SGD", 1_000, {TORCH: fused["SGD"]} if fused else {})  # the call takes most of it
    for name in OPTIMIZERS:
        for size in sizes:
            others = {TORCH: fused[name]} if name in fused else {}
            if name == "Adam":
                others |= peers
                if size > 10_000:
                    others["numpy blocked"] = partial(numpy_adam, block=16_384)
            case = optimizer_case(name, size, others)
            case.errors.pop("optax", None)  # it has weights of its own
            yield case
    for size in sizes[1:]:
        # bitsandbytes takes most of a second for the large ones
        case = optimizer_case("Adam", size, {**variants(), **(eight_bits if size <= 1_000_000 else {})})
        case.name += ", variants"
        case.errors = {}  # narrow states are judged by training: bench_parity.py
        yield case
    yield many_small(torch, lists, peers.get("numba"))
    yield subnormal(1_000_000, {TORCH: fused["Adam"]} if torch else {})


if __name__ == "__main__":
    harness.main(cases)
