"""A short benchmark against NumPy, and the harness that the scripts in ``bench/`` of the repository share.

What is compared runs interleaved, A B A B, in one process, next to loops that do nothing but move the same bytes:
the memory limit of this minute. Only ratios of neighbours are to be trusted; a machine drifts.
"""

import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias

import numpy as np

import fastopt as fo
from fastopt import _core
from fastopt._types import Array

Call: TypeAlias = Callable[[], object]
Step: TypeAlias = Callable[[Array, Array], Call]  # from weights and gradients to what takes one step

LIMIT, FASTOPT, NUMPY = "memory limit", "fastopt", "numpy"
ROUNDS = 9
# Threads of BLAS and OpenMP spin for up to some 30 ms after a call: that would take a core from who comes next.
PAUSE = 0.04  # seconds


# ---- harness -------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One comparison.

    Attributes
    ----------
    name : str
    size : int
        Number of elements.
    nbytes : int
        Bytes that must be read and written, each counted once.
    contenders : dict of str to list of callables
        Where there are several, they do the same to different copies, and calls cycle through them: so operands
        come from memory instead of cache.
    limit : list of callables
        Moves `nbytes`, and nothing else.
    errors : dict of str to callable
        What to print as error, by contender.
    reset : callable, optional
        Called before each timed call, untimed.
    """

    name: str
    size: int
    nbytes: int
    contenders: dict[str, list[Call]]
    limit: list[Call]
    errors: dict[str, Callable[[], SupportsFloat]] = field(default_factory=dict)
    reset: Call | None = None


@dataclass
class Result:
    """What one contender of a case did; medians of all rounds.

    Attributes
    ----------
    case, contender : str
    seconds : float
        Of a call.
    spread : float
        The distance of the quartiles of `seconds`, relative to it: how far to believe.
    ns_per_element, gb_per_second : float
    of_limit : float
        Time of the memory limit over its own: 1 is as fast as memory allows.
    vs_numpy : float or None
        Time of NumPy over its own.
    error : float or None
    """

    case: str
    contender: str
    seconds: float
    spread: float
    ns_per_element: float
    gb_per_second: float
    of_limit: float
    vs_numpy: float | None
    error: float | None


def measure(case: Case, seconds: float = 1.0) -> list[Result]:
    """Return the results of one case, the memory limit first, after about so many seconds."""
    calls = {LIMIT: case.limit, **case.contenders}
    cycles = {name: itertools.cycle(those) for name, those in calls.items()}

    def burst(name: str, count: int) -> float:
        """Return the mean time of `count` calls."""
        todo = list(itertools.islice(cycles[name], count))
        total = 0.0
        if case.reset is None:
            start = time.perf_counter()
            for call in todo:
                call()
            total = time.perf_counter() - start
        else:
            for call in todo:
                case.reset()
                start = time.perf_counter()
                call()
                total += time.perf_counter() - start
        return total / count

    counts = {}
    for name, those in calls.items():
        burst(name, len(those))  # touch all pages
        counts[name] = max(1, int(seconds / ROUNDS / len(calls) / burst(name, 3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, count in counts.items():
            if fo.get_num_threads() > 1:
                time.sleep(PAUSE)
            burst(name, 1)  # wake the threads, and fill the cache
            times[name].append(burst(name, count))

    def ratio(name: str, to: str) -> float:
        return statistics.median(b / a for a, b in zip(times[name], times[to], strict=True))

    results = []
    for name in calls:
        low, median, high = statistics.quantiles(times[name], n=4)
        results.append(
            Result(
                case=case.name,
                contender=name,
                seconds=median,
                spread=(high - low) / median,
                ns_per_element=1e9 * median / case.size,
                gb_per_second=case.nbytes / median / 1e9,
                of_limit=ratio(name, LIMIT),
                vs_numpy=ratio(name, NUMPY) if NUMPY in calls else None,
                error=float(case.errors[name]()) if name in case.errors else None,
            )
        )
    return results


def measure_all(cases: Iterable[Case], seconds: float = 1.0) -> list[Result]:
    """Return the results of all cases, so many seconds each; progress goes to stderr if that is a terminal."""
    results = []
    for case in cases:
        if sys.stderr.isatty():
            print(f"\r\033[K{case.name} ...", end="", file=sys.stderr, flush=True)
        results += measure(case, seconds)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return results


def cache_sizes() -> dict[str, int]:
    """Return the sizes of the data caches in KiB, as far as the system tells."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K"))
    return sizes


def machine() -> dict[str, Any]:
    """Return what figures depend on: CPU, caches, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "isa": _core.isa(),
        "threads": fo.get_num_threads(),
        "caches": cache_sizes(),
        "fastopt": fo.__version__,
        "numpy": np.__version__,
        "compiler": _core.compiler,
    }


def header(facts: dict[str, Any]) -> str:
    """Return `machine`'s facts in two lines."""
    caches = ", ".join(f"{level} {size} KiB" for level, size in facts["caches"].items())
    return (
        f"{facts['cpu']}, {facts['threads']} thread(s), {caches}\n"
        f"fastopt {facts['fastopt']} ({facts['isa']}, compiler {facts['compiler']}), numpy {facts['numpy']}"
    )


def show(results: list[Result], title: str) -> None:
    """Print results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="")
    for column in ("case", "who"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "+-", "ns/element", "GB/s", "of limit", "vs NumPy", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, group in itertools.groupby(results, lambda result: result.case):
        for i, r in enumerate(group):
            table.add_row(
                case if i == 0 else "",
                r.contender,
                f"{1e3 * r.seconds:.3f} ms" if r.seconds >= 1e-3 else f"{1e6 * r.seconds:.2f} us",
                f"{50 * r.spread:.0f} %",
                f"{r.ns_per_element:.3f}",
                f"{r.gb_per_second:.1f}",
                f"{r.of_limit:.2f}",
                "" if r.vs_numpy is None or r.contender == LIMIT else f"{r.vs_numpy:.1f}x",
                "" if r.error is None else f"{r.error:.1e}" if r.error else "0",
                style="dim" if r.contender == LIMIT else "bold" if r.contender == FASTOPT else "",
            )
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)


# ---- parts of cases ------------------------------------------------------------------------------------------


def copies(make: Callable[[], Call], nbytes: int, cold: bool = False) -> list[Call]:
    """Return one callable; if `cold` so many, each with operands of its own, that they do not fit into the cache."""
    cache = 1024 * max(cache_sizes().values(), default=2**15)
    return [make() for _ in range(math.ceil(4 * cache / nbytes) if cold else 1)]


def limit(*, read: int = 0, update: int = 0, streams: int = 1, write: int = 0, cold: bool = False) -> list[Call]:
    """Return what reads, updates in place and writes so many bytes, one after the other."""

    def make() -> Call:
        steps: list[Call] = []
        if read:
            steps.append(partial(_core.limit_read, np.ones(read // 4, np.float32)))
        if update:
            arrays = [np.ones(update // 4, np.float32) for _ in range(streams)]
            steps.append(partial(_core.limit_update, arrays, max(1, streams - 1)))
        if write:
            steps.append(partial(_core.limit_write, np.ones(write // 4, np.float32)))
        return steps[0] if len(steps) == 1 else lambda: [step() for step in steps]

    return copies(make, read + update * streams + write, cold)


def normal(*shape: int, seed: int = 0) -> Array:
    """Return normally distributed float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def relative_error(got: Array, exact: Array) -> float:
    """Return the relative error in the L2 norm."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


# ---- optimizers ----------------------------------------------------------------------------------------------


def numpy_sgd(w: Array, g: Array, lr: float = 1e-3, momentum: float = 0.0) -> Call:
    """Return SGD's step in NumPy, without temporaries."""
    b, t = np.zeros_like(w), np.empty_like(w)

    def step() -> None:
        velocity = g
        if momentum:
            np.multiply(b, momentum, out=b)
            np.add(b, g, out=b)
            velocity = b
        np.multiply(velocity, lr, out=t)
        np.subtract(w, t, out=w)

    return step


def numpy_adam(w: Array, g: Array, lr: float = 1e-3, weight_decay: float = 0.0, block: int = 0) -> Call:
    """Return Adam's step in NumPy, without temporaries; AdamW's with `weight_decay`."""
    size = block or w.size
    m, v, t = np.zeros_like(w), np.zeros_like(w), np.empty(min(size, w.size), w.dtype)
    blocks = [
        (w[i : i + size], g[i : i + size], m[i : i + size], v[i : i + size], t[: len(w[i : i + size])])
        for i in range(0, w.size, size)
    ]
    beta1, beta2, eps, count = 0.9, 0.999, 1e-8, 0

    def step() -> None:
        nonlocal count
        count += 1
        step_size, root_scale = lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        for w, g, m, v, t in blocks:
            np.subtract(g, m, out=t)
            np.multiply(t, 1 - beta1, out=t)
            np.add(m, t, out=m)
            np.multiply(v, beta2, out=v)
            np.multiply(g, g, out=t)
            np.multiply(t, 1 - beta2, out=t)
            np.add(v, t, out=v)
            np.sqrt(v, out=t)
            np.multiply(t, root_scale, out=t)
            np.add(t, eps, out=t)
            np.divide(m, t, out=t)
            np.multiply(t, step_size, out=t)
            if weight_decay:
                np.multiply(w, 1 - lr * weight_decay, out=w)
            np.subtract(w, t, out=w)

    return step


def _fastopt_step(make: Callable[[Array], fo.Optimizer]) -> Step:
    return lambda w, g: partial(make(w).step, g)


def numpy_accumulated(
    w: Array, g: Array, decay: float = 1.0, blend: float = 1.0, lr: float = 1e-3, eps: float = 1e-8
) -> Call:
    """Adagrad, and RMSprop with `decay` and `blend`."""
    squares, scratch, root = np.zeros_like(w), np.empty_like(w), np.empty_like(w)

    def step() -> None:
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, blend, out=scratch)
        np.multiply(squares, decay, out=squares)
        np.add(squares, scratch, out=squares)
        np.sqrt(squares, out=root)
        np.add(root, eps, out=root)
        np.divide(g, root, out=scratch)
        np.multiply(scratch, lr, out=scratch)
        np.subtract(w, scratch, out=w)

    return step


def numpy_lion(w: Array, g: Array, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> Call:
    """Lion."""
    mean, scratch, blend = np.zeros_like(w), np.empty_like(w), np.empty_like(w)

    def step() -> None:
        np.multiply(mean, betas[0], out=blend)
        np.multiply(g, 1 - betas[0], out=scratch)
        np.add(blend, scratch, out=blend)
        np.sign(blend, out=blend)
        np.multiply(blend, lr, out=blend)
        np.subtract(w, blend, out=w)
        np.multiply(mean, betas[1], out=mean)
        np.multiply(g, 1 - betas[1], out=scratch)
        np.add(mean, scratch, out=mean)

    return step


# By name: how many arrays a step reads, of which it writes all but the gradient; and who takes it.
OPTIMIZERS: dict[str, tuple[int, dict[str, Step]]] = {
    "SGD": (2, {FASTOPT: _fastopt_step(fo.SGD), NUMPY: numpy_sgd}),
    "SGD momentum": (
        3,
        {FASTOPT: _fastopt_step(partial(fo.SGD, momentum=0.9)), NUMPY: partial(numpy_sgd, momentum=0.9)},
    ),
    "Adagrad": (
        3,
        {FASTOPT: _fastopt_step(partial(fo.Adagrad, lr=1e-3)), NUMPY: partial(numpy_accumulated, eps=1e-10)},
    ),
    "RMSprop": (
        3,
        {
            FASTOPT: _fastopt_step(partial(fo.RMSprop, lr=1e-3)),
            NUMPY: partial(numpy_accumulated, decay=0.99, blend=0.01),
        },
    ),
    "Lion": (3, {FASTOPT: _fastopt_step(partial(fo.Lion, lr=1e-3)), NUMPY: numpy_lion}),
    "Adam": (4, {FASTOPT: _fastopt_step(fo.Adam), NUMPY: numpy_adam}),
    "AdamW": (
        4,
        {FASTOPT: _fastopt_step(partial(fo.AdamW, weight_decay=0.01)), NUMPY: partial(numpy_adam, weight_decay=0.01)},
    ),
}


def optimizer_error(make: Step, exact: Step) -> float:
    """Return the error of ten steps against float64, relative to the way that the weights went."""
    start, g = normal(10_000), normal(10_000, seed=1)
    w, w64 = start.copy(), start.astype(np.float64)
    step, step64 = make(w, g), exact(w64, g.astype(np.float64))
    for _ in range(10):
        step()
        step64()
    return relative_error(w - start, w64 - start)


def optimizer_case(name: str, size: int, peers: dict[str, Step] | None = None, gradient: Array | None = None) -> Case:
    """Return one optimizer on one tensor."""
    streams, steps = OPTIMIZERS[name]
    steps = {**steps, **(peers or {})}
    g = normal(size, seed=1) if gradient is None else gradient
    return Case(
        name=f"{name}, {size:,}",
        size=size,
        nbytes=4 * size * (2 * streams - 1),
        contenders={who: [step(normal(size), g)] for who, step in steps.items()},
        limit=limit(update=4 * size, streams=streams),
        errors={who: partial(optimizer_error, step, steps[NUMPY]) for who, step in steps.items()},
    )


# ---- quantization --------------------------------------------------------------------------------------------


def pack_into(codes: Array, bits: int, packed: Array) -> None:
    """Pack codes in NumPy, lowest bits first, without temporaries."""
    if bits == 4:
        np.left_shift(codes[..., 1::2], 4, out=packed)
        np.bitwise_or(packed, codes[..., 0::2], out=packed)
    else:
        np.left_shift(codes[..., 3::4], 2, out=packed)
        for j in (2, 1, 0):
            np.bitwise_or(packed, codes[..., j::4], out=packed)
            if j:
                np.left_shift(packed, 2, out=packed)


def unpack_into(packed: Array, bits: int, codes: Array) -> None:
    """Unpack codes in NumPy, without temporaries."""
    per_byte = 8 // bits
    for j in range(per_byte):
        np.right_shift(packed, bits * j, out=codes[..., j::per_byte])
    np.bitwise_and(codes, (1 << bits) - 1, out=codes)


class NumpyQuantizer:
    """Min-max quantization in NumPy, without temporaries."""

    def __init__(self, w: Array, bits: int, group: int) -> None:
        rows, cols = w.shape
        self.bits = bits
        self.x = w.reshape(rows, cols // group, group)
        self.minimum = np.empty((rows, cols // group, 1), np.float32)
        self.scale = np.empty_like(self.minimum)
        self.t = np.empty_like(self.x)
        self.codes = np.empty(self.x.shape, np.uint8)
        self.packed = np.empty((*self.x.shape[:2], group * bits // 8), np.uint8) if bits < 8 else self.codes

    def quantize(self) -> None:
        """From weights to packed codes."""
        top, t = (1 << self.bits) - 1, self.t
        np.min(self.x, axis=-1, keepdims=True, out=self.minimum)
        np.max(self.x, axis=-1, keepdims=True, out=self.scale)
        np.subtract(self.scale, self.minimum, out=self.scale)
        np.subtract(self.x, self.minimum, out=t)
        np.divide(self.scale, top, out=self.scale)
        np.divide(t, self.scale, out=t)
        np.rint(t, out=t)
        np.copyto(self.codes, t, casting="unsafe")
        if self.bits < 8:
            pack_into(self.codes, self.bits, self.packed)

    def dequantize(self) -> Array:
        """From packed codes to what is returned, always the same array."""
        if self.bits < 8:
            unpack_into(self.packed, self.bits, self.codes)
        np.multiply(self.codes, self.scale, out=self.t)
        np.add(self.t, self.minimum, out=self.t)
        return self.t.reshape(self.t.shape[0], -1)


def quantize_cases(rows: int, cols: int, bits: int, group_size: int) -> Iterator[Case]:
    """Yield quantize and dequantize."""
    w = normal(rows, cols)
    rival = NumpyQuantizer(w, bits, cols if group_size == -1 else group_size)
    q = fo.quantize(w, bits, group_size=group_size)
    out = np.empty_like(w)
    what = f"{bits} bits, {'row' if group_size == -1 else f'g{group_size}'}, {rows}x{cols}"
    yield Case(
        name=f"quantize {what}",
        size=w.size,
        nbytes=w.nbytes + q.nbytes,
        contenders={
            FASTOPT: [lambda: fo.quantize(w, bits, group_size=group_size, out=q)],
            NUMPY: [rival.quantize],
        },
        limit=limit(read=w.nbytes, write=q.nbytes),
        errors={
            FASTOPT: lambda: relative_error(q.dequantize(), w),
            NUMPY: lambda: relative_error(rival.dequantize(), w),
        },
    )
    rival.quantize()
    exact = q.minimum.astype(np.float64).repeat(q.codes.shape[1] * 8 // bits // q.minimum.shape[1], axis=1)
    exact += q.scale.astype(np.float64).repeat(exact.shape[1] // q.scale.shape[1], axis=1) * fo.unpack_bits(
        q.codes, bits, w.size
    ).reshape(w.shape)
    yield Case(
        name=f"dequantize {what}",
        size=w.size,
        nbytes=w.nbytes + q.nbytes,
        contenders={FASTOPT: [partial(q.dequantize, out=out)], NUMPY: [rival.dequantize]},
        limit=limit(read=q.nbytes, write=w.nbytes),
        errors={FASTOPT: lambda: relative_error(q.dequantize(), exact)},
    )


# ---- products ------------------------------------------------------------------------------------------------


def linear_case(name: str, pack: Callable[[], Any], w: Array, batch: int, cold: bool = True) -> Case:
    """Return ``x @ w.T`` from packed weights, against NumPy with the same weights in float32."""
    rows, cols = w.shape
    x, y = normal(batch, cols, seed=2), np.empty((batch, rows), np.float32)
    nbytes = pack().nbytes
    exact = x.astype(np.float64) @ w.astype(np.float64).T

    def ours() -> Call:
        packed = pack()
        return lambda: fo.linear(x, packed, out=y)

    def numpys() -> Call:
        dense = w.copy()
        return lambda: np.matmul(x, dense.T, out=y)

    def error(call: Call) -> float:
        call()
        return relative_error(y, exact)

    return Case(
        name=f"linear {name}, {rows}x{cols}, batch {batch}{'' if cold else ', cached'}",
        size=batch * rows * cols,
        nbytes=nbytes + x.nbytes + y.nbytes,
        contenders={FASTOPT: copies(ours, nbytes, cold), NUMPY: copies(numpys, w.nbytes, cold)},
        limit=limit(read=nbytes, cold=cold),
        errors={FASTOPT: lambda: error(ours()), NUMPY: lambda: error(numpys())},
    )


# ---- pruning -------------------------------------------------------------------------------------------------


def prune_case(rows: int, cols: int, sparsity: float) -> Case:
    """Return pruning in place to an exact sparsity; the error is how many weights too many or too few went."""
    start = normal(rows, cols)
    w, t, u, mask = start.copy(), np.empty_like(start), np.empty_like(start), np.empty(start.shape, np.bool_)
    count = round(sparsity * w.size)

    def numpys() -> None:
        np.abs(w, out=t)
        np.copyto(u, t)
        flat = u.reshape(-1)
        flat.partition(count - 1)
        np.greater(t, flat[count - 1], out=mask)
        np.multiply(w, mask, out=w)

    def ours() -> None:
        fo.prune_(w, sparsity=sparsity)

    def error(call: Call) -> float:
        np.copyto(w, start)
        call()
        return float(abs(w.size - np.count_nonzero(w) - count))

    return Case(
        name=f"prune_ sparsity {sparsity:g}, {rows}x{cols}",
        size=w.size,
        nbytes=3 * w.nbytes + mask.nbytes,
        contenders={FASTOPT: [ours], NUMPY: [numpys]},
        limit=limit(read=w.nbytes, update=w.nbytes, write=mask.nbytes),
        errors={FASTOPT: lambda: error(ours), NUMPY: lambda: error(numpys)},
        reset=lambda: np.copyto(w, start),
    )


# ---- the short version ---------------------------------------------------------------------------------------


def short_cases() -> Iterator[Case]:
    """Yield one case or two of each topic."""
    yield optimizer_case("Adam", 10_000)
    yield optimizer_case("Adam", 1_000_000)
    yield optimizer_case("SGD momentum", 1_000_000)
    yield from quantize_cases(2048, 2048, 4, 32)
    w = normal(2048, 2048)
    for bits in (8, 4):
        q = fo.quantize(w, bits)
        yield linear_case(f"{bits} bits", partial(fo.quantize, w, bits), q.dequantize(), batch=1)
    yield prune_case(2048, 2048, 0.9)
    s = fo.prune(w, sparsity=0.9)
    yield linear_case("90 % sparse", lambda: fo.SparseTensor.from_dense(s.to_dense()), s.to_dense(), batch=1)


def run(json: bool = False) -> None:
    """Measure a few kernels against NumPy and the memory limit, and print a table.

    Parameters
    ----------
    json : bool
        Print one JSON object instead.
    """
    facts = machine()
    results = measure_all(short_cases(), seconds=0.7)
    if json:
        print(dumps({"machine": facts, "results": [asdict(result) for result in results]}))
    else:
        show(results, header(facts))
