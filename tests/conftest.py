import numpy as np
import pytest
from hypothesis import settings

import fastopt as fo
from fastopt import _core

settings.register_profile("default", deadline=None)  # machines are shared: nothing here is timed
settings.load_profile("default")

# Every tail that a vector loop of 4, 8, 16 or 64 lanes can leave, and more than one chunk.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 100003]
FLOATS = ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture(params=_core.available_isas())
def isa(request):
    """Each table of kernels that this CPU runs, in one process."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


@pytest.fixture(params=[1, 2, 7])
def threads(request):
    before = fo.get_num_threads()
    fo.set_num_threads(request.param)
    yield request.param
    fo.set_num_threads(before)


@pytest.fixture
def rng():
    return np.random.default_rng(20261122)


GUARD = 64


class Guarded:
    """An array at an unaligned offset, with bytes before and behind that must not change."""

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
    """Equal bit for bit, with any NaN equal to any other."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    unsigned = f"u{a.dtype.itemsize}"
    with np.errstate(invalid="ignore"):
        both_nan = (a != a) & (b != b)
    return bool(((np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)) | both_nan).all())
