"""Loads the extension so that its threads go to sleep soon after their work.

libgomp lets idle threads spin for milliseconds. In a training loop they would keep those of NumPy's BLAS from the
cores, which makes a step of both together many times slower than either. How long they spin is read from the
environment when the library is loaded, and there alone; what the user has set there counts.
"""

import importlib
import os

_SPINS = "GOMP_SPINCOUNT"

if _SPINS in os.environ or "OMP_WAIT_POLICY" in os.environ:
    importlib.import_module("fastopt._core")
else:
    os.environ[_SPINS] = "1000"  # some 10 us
    try:
        importlib.import_module("fastopt._core")
    finally:
        del os.environ[_SPINS]
