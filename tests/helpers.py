"""What several test files need: sizes and dtypes, comparison of bits, guarded arrays, other processes."""

import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np

# Every remainder that a vector loop of 4, 8, 16 or 64 lanes can leave, and more than one chunk.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 100003]
FLOATS = ["float32", "float64", "float16", "bfloat16"]
BITS = [8, 6, 5, 4, 3, 2]


def dtype_of(name):
    """Return the dtype of a name, which may be one of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, name))


GUARD = 64


class Guarded:
    """An array at an unaligned offset, between bytes that must not change."""

    def __init__(self, values, offset=0):
        values = np.ascontiguousarray(values)
        itemsize = values.dtype.itemsize
        start = GUARD + offset * itemsize
        self.memory = np.full(start + values.nbytes + GUARD, 0xA5, np.uint8)
        self.slice = slice(start, start + values.nbytes)
        self.array = self.memory[self.slice].view(values.dtype).reshape(values.shape)
        self.array[...] = values

    def intact(self):
        outside = np.concatenate([self.memory[: self.slice.start], self.memory[self.slice.stop :]])
        return bool((outside == 0xA5).all())


def same_bits(a, b):
    """Return whether two arrays are equal bit for bit; every NaN equals every other."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    unsigned = f"u{a.dtype.itemsize}"
    with np.errstate(invalid="ignore"):
        both_nan = (a != a) & (b != b)
    return bool(((np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)) | both_nan).all())


def start(*command, **options):
    """Run a command in a process of its own, and return how it ended and what it printed."""
    options = {"capture_output": True, "text": True, "check": False, **options}
    return subprocess.run([str(part) for part in command], **options)


def run(*command, **options):
    """Run a command that must succeed, and return its standard output."""
    done = start(*command, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# For code that `run_python` runs: the most memory that the process has had, in MB. On Linux ru_maxrss would not do: it
# counts what the parent process had when it started this one.
PEAK_MB = """
def peak_mb():
    import resource, sys
    if sys.platform == "linux":
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
"""


def run_python(code, *args, **options):
    """Run Python code in a process of its own, and return how it ended and what it printed."""
    return start(sys.executable, "-c", textwrap.dedent(code), *args, **options)
