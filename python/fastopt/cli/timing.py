"""Time calls side by side, and print the results as a table.

Contenders run interleaved, A B A B, in one process, next to loops that only move the same bytes: the memory limit of
this minute. Trust ratios of neighbours alone, since the speed of a machine drifts.
"""

import contextlib
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat, TypeAlias

import numpy as np

import fastopt as fo
from fastopt import _core

Call: TypeAlias = Callable[[], object]

LIMIT, FASTOPT, NUMPY = "memory limit", "fastopt", "numpy"
ROUNDS = 9
# Threads of BLAS spin for up to about 30 ms after a call, which takes a core from the next contender.
PAUSE = 0.04  # seconds


@dataclass
class Case:
    """Calls to compare.

    Attributes
    ----------
    name : str
    size : int
        Number of elements.
    nbytes : int
        Bytes that must be read and written, each counted once.
    contenders : dict of str to collection of callables
        Several callables do the same work on different copies; calls cycle through them, so that operands come
        from memory instead of cache.
    limit : collection of callables
        Move `nbytes` and do nothing else.
    errors : dict of str to callable
        Return the error to print for a contender.
    reset : callable, optional
        Called before each timed call, untimed.
    """

    name: str
    size: int
    nbytes: int
    contenders: dict[str, Collection[Call]]
    limit: Collection[Call]
    errors: dict[str, Callable[[], SupportsFloat]] = field(default_factory=dict)
    reset: Call | None = None


@dataclass
class Result:
    """The medians of all rounds of one contender of a case.

    Attributes
    ----------
    case, contender : str
    seconds : float
        Time of a call.
    spread : float
        The interquartile range of `seconds`, relative to the median.
    ns_per_element, gb_per_second : float
    of_limit : float
        Time of the memory limit divided by its own: 1 is as fast as memory allows.
    vs_numpy : float or None
        Time of NumPy divided by its own.
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
    """Measure one case for about `seconds`, and return the results, the memory limit first."""
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
        burst(name, len(those))  # touches all pages
        counts[name] = max(1, int(seconds / ROUNDS / len(calls) / burst(name, 3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, count in counts.items():
            if fo.get_num_threads() > 1:
                time.sleep(PAUSE)
            burst(name, 1)  # wakes the threads and fills the cache
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
    """Measure each case for about `seconds`; print progress to stderr if that is a terminal."""
    results = []
    for case in cases:
        if sys.stderr.isatty():
            print(f"\r\033[K{case.name} ...", end="", file=sys.stderr, flush=True)
        results += measure(case, seconds)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return results


def cache_sizes() -> dict[str, int]:
    """Return the sizes of the data caches in KiB, if the system reports them."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.removesuffix("K"))
    return sizes


def machine() -> dict[str, Any]:
    """Return the facts that figures depend on: CPU, caches, threads, versions."""
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


def _cache_text(kib: int) -> str:
    return f"{kib} KiB" if kib < 1024 else f"{kib / 1024:.4g} MiB"


def header(facts: dict[str, Any]) -> str:
    """Format the facts of `machine` in two lines."""
    caches = ", ".join(f"{level} {_cache_text(size)}" for level, size in facts["caches"].items())
    return (
        f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}, {caches}\n"
        f"fastopt {facts['fastopt']} ({facts['isa']}, compiler {facts['compiler']}), numpy {facts['numpy']}"
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    """Format a duration with three digits."""
    for unit, scale in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        value = seconds * scale
        if value < 999.5:
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{seconds:.2f} s"


def ratio_text(ratio: float | None) -> str:
    """Format how many times faster something is."""
    return "" if ratio is None else f"{ratio:.{2 if ratio < 0.995 else 1 if ratio < 99.5 else 0}f}x"


def _error_text(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}" if error else "0"


class _Row(NamedTuple):
    label: str
    cells: Sequence[str] = ()  # none for the name of a case, which may be as wide as the terminal
    style: str = ""


def _print(heads: Sequence[str], rows: Sequence[_Row]) -> None:
    """Print a table with as many of the columns as the terminal has room for, the first before the last."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    first = max(len(row.label) for row in rows if row.cells)
    widths = [max(len(head), *(len(r.cells[i]) for r in rows if r.cells)) for i, head in enumerate(heads)]
    ends = itertools.accumulate(2 + width for width in widths)
    count = max(1, sum(first + end <= console.width for end in ends))
    for row in [_Row("", heads, "dim"), *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row.cells[:count], widths, strict=False)]
        line = "  ".join([row.label.ljust(first) if cells else row.label, *cells]).rstrip()
        console.print(Text(line, row.style), soft_wrap=True)


def show(results: list[Result], title: str) -> None:
    """Print a table with a row for each contender, under the name of its case."""
    columns: dict[str, Callable[[Result], str]] = {
        "time": lambda r: time_text(r.seconds),
        "vs NumPy": lambda r: "" if r.contender == LIMIT else ratio_text(r.vs_numpy),
        "of limit": lambda r: f"{r.of_limit:.2f}",
        "\u00b1": lambda r: f"{50 * r.spread:.0f} %",
        "error": lambda r: _error_text(r.error),
        "GB/s": lambda r: f"{r.gb_per_second:.1f}",
        "ns/element": lambda r: f"{r.ns_per_element:.3f}",
    }
    styles = {LIMIT: "dim", FASTOPT: "bold"}
    rows = []
    for case, group in itertools.groupby(results, lambda result: result.case):
        rows.append(_Row(case))
        for r in group:
            rows.append(_Row(f"  {r.contender}", [text(r) for text in columns.values()], styles.get(r.contender, "")))
    print(title)
    _print(list(columns), rows)


def show_cases(results: list[Result], title: str) -> None:
    """Print a table with a row for each case: fastopt, NumPy and the memory limit."""
    rows = []
    for case, group in itertools.groupby(results, lambda result: result.case):
        by = {r.contender: r for r in group}
        ours = by[FASTOPT]
        cells = [
            time_text(ours.seconds),
            time_text(by[NUMPY].seconds),
            ratio_text(ours.vs_numpy),
            f"{ours.of_limit:.2f}",
            f"{50 * ours.spread:.0f} %",
            time_text(by[LIMIT].seconds),
            _error_text(ours.error),
        ]
        lost = ours.vs_numpy is not None and ours.vs_numpy < 1
        rows.append(_Row(case.removesuffix(", batch 1"), cells, "red" if lost else ""))
    print(f"{title}\n")
    _print(["fastopt", "NumPy", "faster", "of limit", "\u00b1", "limit", "error"], rows)


# ---- how far a machine can be believed ---------------------------------------------------------------------------


class Disturbance:
    """Counts the cores that other programs, or other guests of the host, keep busy from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def cores(self) -> float | None:
        """Return that number; None if the system does not tell."""
        now = self._now()
        if self._start is None or now is None or now[0] == self._start[0]:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / wall)


def is_busy() -> bool:
    """Return whether other programs keep half of the cores busy, or more."""
    others = Disturbance()
    time.sleep(0.2)
    found = others.cores()
    return found is not None and found >= (os.cpu_count() or 1) / 2


@contextlib.contextmanager
def calm() -> Iterator[bool]:
    """Let fastopt and NumPy use one thread meanwhile if other programs keep half of the cores busy; yield whether so.

    On busy cores the threads of a BLAS wait for each other, so that its calls take a hundred times as long.
    """
    if not is_busy():
        yield False
        return
    before = fo.get_num_threads()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # scikit-learn brings it
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(1))
        fo.set_num_threads(1)
        try:
            yield True
        finally:
            fo.set_num_threads(before)


def doubts(results: Sequence[Result], others: float | None, threads: int) -> str | None:
    """Return why the results should not be believed, or None.

    Parameters
    ----------
    results : sequence of Result
    others : float or None
        Cores that others kept busy meanwhile.
    threads : int
    """
    cores, reasons = os.cpu_count() or 1, []
    if others is not None and others + threads > cores + 0.25:
        reasons.append(f"other programs kept {others:.1f} of {cores} cores busy")
    spread = statistics.median(r.spread / 2 for r in results) if results else 0.0
    if spread > 0.1:
        reasons.append(f"equal calls differ by \u00b1{100 * spread:.0f} %")
    if not reasons:
        return None
    return f"noise: {', and '.join(reasons)}. Differences of that size mean nothing; repeat on an idle machine."


class Copies(Collection[Call]):
    """Calls that do the same work, each with operands of its own.

    They are made when they are first needed: a case that is not chosen takes no memory.
    """

    def __init__(self, make: Callable[[], Call], count: int) -> None:
        self._make, self._count = make, count

    @cached_property
    def _calls(self) -> list[Call]:
        return [self._make() for _ in range(self._count)]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def __contains__(self, call: object) -> bool:
        return call in self._calls


def copies(make: Callable[[], Call], nbytes: int, cold: bool = False) -> Copies:
    """Return one callable, or if `cold`, enough with operands of their own to exceed the cache twice."""
    cache = 1024 * max(cache_sizes().values(), default=2**15)
    return Copies(make, math.ceil(2 * cache / nbytes) if cold else 1)


def limit(*, read: int = 0, update: int = 0, streams: int = 1, write: int = 0, cold: bool = False) -> Copies:
    """Return calls that read, update in place and write that many bytes, one after the other."""

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
