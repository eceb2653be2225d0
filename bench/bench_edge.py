"""Time cpp/edge/fastopt.h beside Python's kernels on one thread, in microseconds of CPU time: the shortest of many."""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np

import fastopt as fo

SOURCE = Path(__file__).parent / "edge_speed.c"


def python(q: fo.QuantizedTensor, x: np.ndarray, precision: Literal["exact", "int8"], seconds: float) -> float:
    shortest, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.thread_time_ns()
        fo.linear(x, q, precision=precision)
        shortest = min(shortest, (time.thread_time_ns() - start) / 1e3)
    return shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", default="-march=native,-march=x86-64-v3,-msse4.1,", help="of compilers, by commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()
    fo.set_num_threads(1)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((options.side, options.side)).astype("f4")
    x = rng.standard_normal((options.batch, options.side)).astype("f4")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for option in options.options.split(","):
            flags = ["-O2", *option.split()]
            loop = ["cc", "-O3", "-ffast-math", *option.split(), "-DNAIVE", "-c", str(SOURCE), "-o", f"{name}/loop.o"]
            subprocess.run(loop, check=True)
            subprocess.run(["cc", *flags, str(SOURCE), f"{name}/loop.o", "-o", f"{name}/speed"], check=True)
            print(f"\n{' '.join(flags)}\nbits  fo_linear (Python)  fo_linear_int8 (Python)  loop over floats")
            for bits in (8, 6, 5, 4, 3, 2):
                q = fo.quantize(w, bits)
                fo.PackedModel({"w": q}).save(folder / "w.safetensors")
                command = [f"{name}/speed", f"{name}/w.safetensors", str(options.batch), str(options.seconds)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                floats, int8, naive = map(float, done.stdout.split())
                exact, whole = python(q, x, "exact", options.seconds), python(q, x, "int8", options.seconds)
                print(f"{bits:4} {floats:9.1f} ({exact:6.1f}) {int8:14.1f} ({whole:6.1f}) {naive:15.1f}")


if __name__ == "__main__":
    main()
