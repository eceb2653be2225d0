"""``fastopt bench``: optimizer steps, quantization, products and pruning beside NumPy and the memory limit."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from itertools import groupby
from json import dumps, loads
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, TypeAlias

import numpy as np

import fastopt as fo
from fastopt._svg import Bar, Panel, chart
from fastopt._types import Array
from fastopt.cli.timing import (
    FASTOPT,
    LIMIT,
    NUMPY,
    Call,
    Case,
    Disturbance,
    Result,
    copies,
    doubts,
    header,
    is_busy,
    limit,
    machine,
    measure_all,
    show_cases,
    time_text,
)
from fastopt.files.atomic import write_text

Step: TypeAlias = Callable[[Array, Array], Call]  # from weights and gradients to a call that takes one step


def normal(*shape: int, seed: int = 0) -> Array:
    """Return normally distributed float32 values."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def relative_error(got: Array, exact: Array) -> float:
    """Return the relative error in the L2 norm."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


# ---- optimizers -----------------------------------------------------------------------------------------------


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


def fastopt_step(make: Callable[[Array], fo.Optimizer]) -> Step:
    """Return what takes a step of an optimizer of fastopt."""
    return lambda w, g: partial(make(w).step, g)


ADAM: tuple[int, dict[str, Step]] = (4, {FASTOPT: fastopt_step(fo.Adam), NUMPY: numpy_adam})
SGD_MOMENTUM: tuple[int, dict[str, Step]] = (
    3,
    {FASTOPT: fastopt_step(partial(fo.SGD, momentum=0.9)), NUMPY: partial(numpy_sgd, momentum=0.9)},
)


def optimizer_error(make: Step, exact: Step) -> float:
    """Return the error of ten steps against float64, relative to the change of the weights."""
    start, g = normal(10_000), normal(10_000, seed=1)
    w, w64 = start.copy(), start.astype(np.float64)
    step, step64 = make(w, g), exact(w64, g.astype(np.float64))
    for _ in range(10):
        step()
        step64()
    return relative_error(w - start, w64 - start)


def optimizer_case(name: str, size: int, streams: int, steps: dict[str, Step], gradient: Array | None = None) -> Case:
    """Return one optimizer on one tensor, a step of which reads `streams` arrays and writes all but the gradient."""
    g = normal(size, seed=1) if gradient is None else gradient
    return Case(
        name=f"{name}, {size:,}",
        size=size,
        nbytes=4 * size * (2 * streams - 1),
        contenders={who: [step(normal(size), g)] for who, step in steps.items()},
        limit=limit(update=4 * size, streams=streams),
        errors={who: partial(optimizer_error, step, steps[NUMPY]) for who, step in steps.items()},
    )


# ---- quantization ---------------------------------------------------------------------------------------------


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
        """Quantize the weights and pack the codes."""
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
        """Unpack and decode the codes, into an array that every call returns."""
        if self.bits < 8:
            unpack_into(self.packed, self.bits, self.codes)
        np.multiply(self.codes, self.scale, out=self.t)
        np.add(self.t, self.minimum, out=self.t)
        return self.t.reshape(self.t.shape[0], -1)


def quantize_cases(rows: int, cols: int, bits: int, group_size: int) -> Iterator[Case]:
    """Yield a case for quantize and one for dequantize."""
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
            FASTOPT: [lambda: fo.quantize(w, bits, group_size=group_size, fit="minmax", out=q)],
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


# ---- products -------------------------------------------------------------------------------------------------


def linear_case(name: str, pack: Callable[[], Any], w: Array, batch: int, cold: bool = True) -> Case:
    """Return ``x @ w.T`` with packed weights, beside NumPy with the same weights in float32."""
    rows, cols = w.shape
    x, y = normal(batch, cols, seed=2), np.empty((batch, rows), np.float32)
    first = pack()
    nbytes = first.nbytes
    exact = x.astype(np.float64) @ w.astype(np.float64).T

    def ours() -> Call:
        packed = deepcopy(first)  # which takes less time than packing
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


# ---- pruning --------------------------------------------------------------------------------------------------


def prune_case(rows: int, cols: int, sparsity: float) -> Case:
    """Return pruning in place to an exact sparsity; the error counts weights too many or too few."""
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


# ---- the command ----------------------------------------------------------------------------------------------


def short_cases() -> Iterator[Case]:
    """Yield one or two cases for each topic."""
    yield optimizer_case("Adam", 10_000, *ADAM)
    yield optimizer_case("Adam", 1_000_000, *ADAM)
    yield optimizer_case("SGD momentum", 1_000_000, *SGD_MOMENTUM)
    yield from quantize_cases(2048, 2048, 4, 32)
    w = normal(2048, 2048)
    for bits in (8, 4):
        q = fo.quantize(w, bits)
        yield linear_case(f"{bits} bits", partial(fo.quantize, w, bits), q.dequantize(), batch=1)
    yield prune_case(2048, 2048, 0.9)
    s = fo.prune(w, sparsity=0.9)
    yield linear_case("90 % sparse", lambda: fo.SparseTensor.from_dense(s.to_dense()), s.to_dense(), batch=1)


LEGEND = (
    "faster: the time of NumPy divided by that of fastopt; below 1, NumPy is faster.",
    "of limit: the time of plain loops that read and write the same bytes, divided by that of fastopt. 1 is the speed "
    "of memory; more is possible, as fastopt prefetches, and data may still be in a cache.",
    "\u00b1: half the distance between the quartiles of equal calls.",
)


def run(
    json: bool = False,
    only: Sequence[str] = (),
    seconds: float = 0.35,
    threads: int | None = None,
    svg: Path | None = None,
) -> None:
    """Measure a few kernels against NumPy and the memory limit, and print a table.

    Parameters
    ----------
    json : bool
        Print one JSON object instead.
    only : sequence of str
        Measure the cases whose names contain one of these; all of them by default.
    seconds : float
        The time to spend on each case.
    threads : int, optional
        How many threads fastopt and NumPy use; by default as many as they would, or one on a busy machine.
    svg : Path, optional
        Where a chart goes.

    Raises
    ------
    ValueError
        If no case has such a name.
    OSError
        If the chart cannot be written.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ and is_busy():
        threads = 1  # threads that wait for each other on busy cores say nothing, and take minutes
    answer = measured(only, seconds) if threads is None else measured_by_child(only, seconds, threads)
    facts, results = answer["machine"], [Result(**result) for result in answer["results"]]
    if svg is not None:
        write_text(svg, picture(facts, results, answer["warning"]))
    if json:
        print(dumps(answer))
        return
    show_cases(results, header(facts))
    notes = [*LEGEND, *([f"warning: {answer['warning']}"] if answer["warning"] else [])]
    for note in notes:
        print("", *wrap(note, min(100, get_terminal_size().columns)), sep="\n")


def measured(only: Sequence[str], seconds: float) -> dict[str, Any]:
    """Return the facts of the machine, the results, and a warning if they cannot be believed, as JSON holds them."""
    facts, disturbance, names = machine(), Disturbance(), []

    def chosen() -> Iterator[Case]:
        for case in short_cases():  # one after the other, so that the arrays of only one are in memory at a time
            names.append(case.name)
            if not only or any(part in case.name for part in only):
                yield case

    results = measure_all(chosen(), seconds=seconds)
    if not results:
        raise ValueError(f"--only: no case has {' or '.join(map(repr, only))} in its name: {'; '.join(names)}")
    others = disturbance.cores()
    warning = doubts(results, others, facts["threads"])
    return {"machine": facts, "results": [asdict(result) for result in results], "warning": warning}


def measured_by_child(only: Sequence[str], seconds: float, threads: int) -> dict[str, Any]:
    """Return the same from a process whose BLAS starts so many threads: it reads its environment when it is loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    options = [f"--only={part}" for part in only]
    done = subprocess.run(
        [sys.executable, "-m", "fastopt", "bench", "--json", f"--seconds={seconds}", *options],
        env={**os.environ, **dict.fromkeys(names, str(threads))},
        stdout=subprocess.PIPE,
        stderr=None if sys.stderr.isatty() else subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise ValueError((done.stderr or "the measurement failed").strip().removeprefix("fastopt: "))
    answer: dict[str, Any] = loads(done.stdout)
    return answer


def picture(facts: dict[str, Any], results: Sequence[Result], warning: str | None) -> str:
    """Return a chart of times, a panel for each case; the dashed lines are the memory limits."""
    panels = []
    for case, group in groupby(results, lambda result: result.case):
        by = {r.contender: r for r in group}
        ours, theirs, bound = by[FASTOPT], by[NUMPY], by[LIMIT]
        lost = ours.seconds > theirs.seconds
        text = f"{time_text(ours.seconds)}{', slower' * lost}"
        bars = [Bar("NumPy", theirs.seconds, time_text(theirs.seconds))]
        bars.append(Bar("fastopt", ours.seconds, text, "loss" if lost else "ours"))
        panels.append(Panel(case.removesuffix(", batch 1"), bars, bound.seconds))
    notes = [
        "Shorter is faster. Dashed: the memory limit, loops that only move the same bytes.",
        *header(facts).split("\n"),
    ]
    return chart("fastopt beside NumPy and the memory limit", panels, [*notes, *([warning] if warning else [])])
