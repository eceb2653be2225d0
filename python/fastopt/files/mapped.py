"""Files whose content is mapped into memory."""

import math
import mmap
import os
from typing import IO, Any, Literal

import numpy as np

from fastopt._types import Array


class Map:
    """The bytes of an open file, mapped read-only; the file itself may be closed or replaced.

    Parameters
    ----------
    file : binary file
        A regular file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        size = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self._content = np.frombuffer(self._map, np.uint8)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int, order: Literal["C", "F"] = "C") -> Array:
        """Return an array that starts at a byte as a read-only view."""
        end = start + math.prod(shape) * dtype.itemsize
        array: Array = self._content[start:end].view(dtype).reshape(shape, order=order)
        # Files may place an array on an address that its dtype does not allow.
        return array if array.flags.aligned else array.copy(order)

    def release(self, start: int, end: int) -> None:
        """Tell the system that the memory of some bytes is not needed for now; it is read again if it is."""
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            assert isinstance(self._map, mmap.mmap)
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
