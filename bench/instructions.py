"""Count the instructions of a dozen kernels, and compare the counts with those of `instructions.json`.

A clock is too noisy on a shared machine to guard against a slower kernel; a count is not. Valgrind executes AVX2 and no
AVX-512, so the counts are those of x86-64-v3 on one thread. Only instructions of the extension count, since those of
Python and NumPy change with their versions. `--update` keeps the new counts.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastopt as fo
from fastopt import _core

KEPT = Path(__file__).with_suffix(".json")
TOLERANCE = 0.03
NOISE = 500  # a call sorts the addresses of its arrays, which differ from run to run
OUT, IN = 64, 1024

# Valgrind sees these requests as instructions that do nothing elsewhere.
MARKS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def step(name: str, size: int = 100_000, **options: Any) -> Callable[[], object]:
    optimizer = getattr(fo, name)([np.ones(size, np.float32)], lr=1e-3, **options)
    grads = [np.random.default_rng(0).standard_normal(size, dtype=np.float32)]
    return lambda: optimizer.step(grads)


def weight() -> Any:
    return np.random.default_rng(0).standard_normal((OUT, IN), dtype=np.float32)


def rows(count: int) -> Any:
    return np.random.default_rng(1).standard_normal((count, IN), dtype=np.float32)


def quantize(bits: int, **options: Any) -> Callable[[], object]:
    w = weight()
    return lambda: fo.quantize(w, bits, **options)


def dequantize(bits: int, group_size: int) -> Callable[[], object]:
    q, out = fo.quantize(weight(), bits, group_size=group_size), weight()
    return lambda: q.dequantize(out=out)


def linear(bits: int, count: int, precision: Any = "exact", group_size: int = 32) -> Callable[[], object]:
    q, x = fo.quantize(weight(), bits, group_size=group_size), rows(count)
    return lambda: fo.linear(x, q, precision=precision)


def sparse(sparsity: float, count: int, bits: int | None = None) -> Callable[[], object]:
    w = weight()
    fo.prune_(w, sparsity=sparsity)
    s, x = fo.SparseTensor.from_dense(w), rows(count)
    s = s if bits is None else s.quantize(bits=bits)
    return lambda: fo.linear(x, s)


def prune() -> Callable[[], object]:
    w = weight()
    return lambda: fo.prune_(w, sparsity=0.8)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "step SGD": lambda: step("SGD"),
    "step RMSprop": lambda: step("RMSprop"),
    "step AdamW": lambda: step("AdamW"),
    "step AdamW, 1,000 elements": lambda: step("AdamW", 1_000),
    "step AdamW, clipping": lambda: step("AdamW", max_norm=1.0),
    "step AdamW, bfloat16 states": lambda: step("AdamW", state_dtype="bfloat16"),
    "step AdamW, 8-bit states": lambda: step("AdamW", state_dtype="uint8"),
    "step Lion": lambda: step("Lion"),
    "quantize 8 bits by row": lambda: quantize(8, group_size=-1),
    "quantize 4 bits": lambda: quantize(4, group_size=32),
    "quantize 4 bits, lsq": lambda: quantize(4, group_size=32, fit="lsq"),
    "quantize 2 bits": lambda: quantize(2, group_size=16, fit="minmax"),
    "quantize 3 bits": lambda: quantize(3, group_size=32, fit="minmax"),
    "dequantize 8 bits": lambda: dequantize(8, 128),
    "dequantize 4 bits": lambda: dequantize(4, 32),
    "dequantize 2 bits": lambda: dequantize(2, 16),
    "dequantize 3 bits": lambda: dequantize(3, 32),
    "linear 8 bits, 1 row": lambda: linear(8, 1, group_size=-1),
    "linear 4 bits, 1 row": lambda: linear(4, 1),
    "linear 4 bits, 1 row, int8": lambda: linear(4, 1, "int8"),
    "linear 4 bits, 4 rows": lambda: linear(4, 4),
    "linear 4 bits, 32 rows": lambda: linear(4, 32),
    "linear 4 bits, 32 rows, int8": lambda: linear(4, 32, "int8"),
    "linear 2 bits, 1 row": lambda: linear(2, 1),
    "linear 3 bits, 1 row": lambda: linear(3, 1),
    "linear 3 bits, 32 rows": lambda: linear(3, 32),
    "linear 6 bits, 1 row": lambda: linear(6, 1),
    "sparse 80 %, 1 row": lambda: sparse(0.8, 1),
    "sparse 80 %, 4 rows": lambda: sparse(0.8, 4),
    "sparse 90 %, 8 bits, 1 row": lambda: sparse(0.9, 1, 8),
    "prune 80 %": prune,
}


def execute(marks: str) -> None:
    """Call each case once between two marks; the calls before it fill caches and choose the kernels."""
    library = ctypes.CDLL(marks)
    for name, make in CASES.items():
        call = make()
        call()
        call()
        library.start()
        call()
        library.stop(name.encode())


def count(dump: str) -> int:
    """Sum the instructions of the extension in one dump of callgrind (see "Callgrind Format" in Valgrind's manual)."""
    objects: dict[str, str] = {}
    total, inside, called = 0, False, False
    for line in dump.splitlines():
        if entry := re.match(r"(c?)ob=(\(\d+\))(?: (.*))?", line):
            objects.setdefault(entry[2], entry[3])
            if not entry[1]:
                inside = "/fastopt/_core." in objects[entry[2]]
        elif line.startswith("calls="):
            called = True  # the next line is the cost of the callee, which has lines of its own
        elif re.match(r"[-+*\d]", line):
            total += int(line.split()[1]) if inside and not called else 0
            called = False
    return total


def measure() -> dict[str, int]:
    """Return the counts by case."""
    with tempfile.TemporaryDirectory() as folder:
        source, marks, out = (Path(folder, name) for name in ("marks.c", "marks.so", "out"))
        source.write_text(MARKS)
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", marks], check=True)
        valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        environment = os.environ | {"FASTOPT_ISA": "v3", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run([*valgrind, sys.executable, __file__, "--execute", marks], check=True, env=environment)
        dumps = [path.read_text() for path in Path(folder).glob("out.*")]
    found = {}
    for dump in dumps:
        if trigger := re.search(r"^desc: Trigger: Client Request: (.*)$", dump, re.MULTILINE):
            found[trigger[1]] = count(dump)
    return {name: found[name] for name in CASES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="keep the new counts")
    parser.add_argument("--execute", metavar="MARKS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.execute:
        execute(options.execute)
        return 0
    counts = measure()
    if options.update:
        KEPT.write_text(json.dumps({"compiler": _core.compiler, "counts": counts}, indent=1) + "\n")
    kept = json.loads(KEPT.read_text())
    changed = 0
    print(f"{'instructions':32}{'kept':>12}{'now':>12}{'change':>9}")
    for name, now in counts.items():
        before = kept["counts"].get(name, 0)
        change = now / before - 1 if before else float("inf")
        differs = abs(now - before) > max(TOLERANCE * before, NOISE)
        changed += differs
        print(f"{name:32}{before:12,}{now:12,}{change:+9.1%}{'  <--' if differs else ''}")
    if kept["compiler"] != _core.compiler:
        print(f"The kept counts are of GCC {kept['compiler']}, and these of {_core.compiler}: they say nothing.")
        return 0
    if changed:
        print(f"{changed} counts changed by more than {TOLERANCE:.0%}. If that is meant: --update, and say why.")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
