"""Threads that fastopt and torch share."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from fastopt import _core


def share_threads() -> None:
    """Let the kernels run on the threads of torch's OpenMP runtime, if torch brings GNU's.

    After each parallel operation the idle threads of torch spin for milliseconds. They hold the cores that threads of
    fastopt would need; as workers of fastopt they start at once instead.
    """
    if sys.platform != "linux":
        return
    for path in Path(torch.__file__).with_name("lib").glob("libgomp*.so*"):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:  # not the one that torch has loaded
            continue
        functions = (library.GOMP_parallel, library.omp_get_max_threads, library.omp_get_thread_num)
        _core.use_openmp(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
