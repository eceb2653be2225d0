"""Gradients that are summed over all ranks of a distributed run, in one flat buffer with all that ranks must know."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt._checks import require
from fastopt._text import shown
from fastopt._types import Array

# Sums a float32 buffer in place over all ranks.
Reduce: TypeAlias = Callable[[NDArray[np.float32]], Any]

_BITS = 32


class Reduction:
    """A buffer for the gradients of some parameters.

    Numbers of their own follow the gradients: 1, whose sum is the number of ranks; 1 on a rank that failed; for each
    parameter 1 if it has no gradient; and the bits of a digest in which all ranks must agree. So all of them see the
    same sums, and come to the same verdict, without a second message.

    Parameters
    ----------
    names : sequence of str
    shapes : sequence of tuples of int
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        self.names, self.shapes = list(names), list(shapes)
        sizes = [math.prod(shape) for shape in shapes]
        gradients = sum(sizes)
        self.buffer = np.zeros(gradients + 2 + len(sizes) + _BITS, np.float32)
        self._notes = self.buffer[gradients:]
        self._missing, self._digest = self._notes[2:-_BITS], self._notes[-_BITS:]
        starts = [0, *itertools.accumulate(sizes)]
        self._views = [
            self.buffer[start : start + size].reshape(shape)
            for start, size, shape in zip(starts, sizes, shapes, strict=False)
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduction, (self.names, self.shapes)  # views would be copied apart from their buffer

    def fill(self, grads: Sequence[Array | None], about: object) -> None:
        """Write the gradients of this rank, and a digest of all that must be the same on every rank."""
        self._notes[:] = 0
        self._notes[0] = 1
        for i, (view, grad) in enumerate(zip(self._views, grads, strict=True)):
            if grad is None:
                view[...] = 0
                self._missing[i] = 1
                continue
            name = f"gradient of {self.names[i]!r}"
            if grad.dtype.name not in ("float32", "float16", "bfloat16"):
                raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {grad.dtype}")
            require(grad.shape == view.shape, name, f"shape {view.shape}", grad.shape)
            with np.errstate(invalid="ignore"):
                view[...] = grad
        digest = zlib.crc32(repr((self.names, self.shapes, about)).encode())
        self._digest[:] = np.unpackbits(np.frombuffer(digest.to_bytes(_BITS // 8, "big"), np.uint8))

    def fail(self) -> None:
        """Tell the other ranks that this one cannot step."""
        self.buffer[:] = 0
        self._notes[:2] = 1

    def sum(self, reduce: Reduce) -> None:
        """Sum over all ranks, or raise if `reduce` does not do so in place."""
        returned = reduce(self.buffer)
        if returned is not None and returned is not self.buffer:
            raise TypeError(f"reduce: expected a function that sums in place and returns None, got {shown(returned)}")

    def gradients(self) -> tuple[list[NDArray[np.float32] | None], float]:
        """Return the sums of the gradients, None where no rank has one, and the number of ranks.

        Raises
        ------
        RuntimeError
            If another rank failed.
        ValueError
            If the ranks differ in what they step, or only some have a gradient of a parameter.
        """
        ranks, failed = float(self._notes[0]), float(self._notes[1])
        require(ranks >= 1 and ranks.is_integer(), "reduce", "the sum of the buffer over all ranks", ranks)
        if failed:
            raise RuntimeError("reduce: another rank failed, and no rank has stepped")
        if ((self._digest != 0) & (self._digest != ranks)).any():
            raise ValueError("reduce: the ranks differ in parameters, options or number of steps; no rank has stepped")
        some = np.flatnonzero((self._missing != 0) & (self._missing != ranks))
        if some.size:
            raise ValueError(f"gradient of {self.names[some[0]]!r}: only some ranks have one; no rank has stepped")
        return [None if missing else view for view, missing in zip(self._views, self._missing, strict=True)], ranks
