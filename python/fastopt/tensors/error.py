"""The error of packed weights: their distance from the original ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastopt._types import Array


class Error(NamedTuple):
    """The distance of a packed weight from the original.

    Attributes
    ----------
    rmse : float
        Root mean square error.
    relative : float
        `rmse` divided by the root mean square of the weight.
    max : float
        Largest absolute error.
    snr : float
        Signal-to-noise ratio in decibels; infinite if there is no error.
    cosine : float
        Cosine of the angle between the two weights as vectors; 1 if both are zero.

    Notes
    -----
    All are NaN if a weight is NaN. The packed weight counts as `to_dense` returns it, in its own dtype.
    """

    rmse: float
    relative: float
    max: float
    snr: float
    cosine: float


class ErrorSums:
    """Sums from which an `Error` follows, added up in float64 over pieces of one weight or of many.

    Parameters
    ----------
    unit : float
        The unit of the weights in the sums, as `unit_of` returns it; `largest` is not in units.
    """

    def __init__(self, unit: float = 1.0) -> None:
        self.size, self.unit = 0, unit
        self.total = self.noise = self.signal = self.dot = self.largest = 0.0

    def add(self, ours: Array, theirs: Array) -> None:
        """Add a piece of a weight, as it is now and as it was."""
        ours, theirs = ours.reshape(-1), theirs.reshape(-1)
        self.size += theirs.size
        for at in range(0, theirs.size, 1 << 14):  # stays in cache; and no BLAS, whose sums depend on the machine
            a, b = (x[at : at + (1 << 14)].astype(np.float64) for x in (ours, theirs))
            with np.errstate(over="ignore", invalid="ignore"):
                self.total += float(np.square(a).sum())
                self.signal += float(np.square(b).sum())
                self.dot += float((a * b).sum())
                a -= b
                self.noise += float(np.square(a).sum())
            self.largest = float(np.maximum(self.largest, np.abs(a, out=a).max()))  # NaN if one is

    def __iadd__(self, other: ErrorSums) -> ErrorSums:
        unit = max((sums.unit for sums in (self, other) if sums.size), default=self.unit)
        for name in ("noise", "signal", "total", "dot"):
            parts = [getattr(sums, name) * (sums.unit / unit) ** 2 for sums in (self, other) if sums.size]
            setattr(self, name, sum(parts))
        self.size, self.unit = self.size + other.size, unit
        self.largest = float(np.maximum(self.largest, other.largest))
        return self

    def error(self) -> Error:
        """Return the error of all that was added."""
        if math.isnan(self.noise):
            return Error(*(math.nan,) * 5)
        rmse = math.sqrt(self.noise / max(self.size, 1)) * self.unit
        relative = math.sqrt(self.noise / self.signal) if self.signal > 0 else (0.0 if self.noise == 0 else math.inf)
        snr = -20 * math.log10(relative) if 0 < relative < math.inf else (math.inf if relative == 0 else -math.inf)
        lengths = math.sqrt(self.total) * math.sqrt(self.signal)
        cosine = max(min(self.dot / lengths, 1.0), -1.0) if lengths > 0 else float(self.total == self.signal)
        return Error(rmse, relative, self.largest, snr, cosine)


def unit_of(largest: float) -> float:
    """Return a power of 2 in which the squares of weights of this largest magnitude fit into float64."""
    if largest == 0 or 2.0**-400 <= largest <= 2.0**400:
        return 1.0
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 1, -1022))
