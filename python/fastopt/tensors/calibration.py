"""Sums over the inputs of a layer, from which the error of its outputs follows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt._checks import as_float_array, as_index
from fastopt._types import Array

_ROWS = 256  # rows that are converted to float64 at a time
# The share of the mean of E[x^2] that is added to each column: inputs that calibration did not see may come.
DAMPING = 0.01


class InputSums:
    """Sums over the inputs x of a layer: enough to know the mean squared error of its outputs.

    All sums are float64. Rows are added one after the other, so `sum` and `sum_squares` have the same bits however the
    rows are split into updates. `products` comes from BLAS: its last bits depend on the machine.

    Parameters
    ----------
    columns : int
        The number of inputs: the product of all axes of the weight but the first.
    products : bool
        Sum the products of columns too, as ``fit="gptq"`` needs them: `columns` squared numbers.

    Attributes
    ----------
    rows : int
        How many rows were added.
    sum, sum_squares : float64 arrays, shape (columns,)
        The sums of x and of x squared.
    products : float64 array, shape (columns, columns), or None
        The sum of ``x.T @ x``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> calib = fo.Calibration()
    >>> calib.update("fc.weight", np.array([[1, 2], [3, 0]], dtype=np.float32))
    >>> calib["fc.weight"]
    InputSums(rows=2, columns=2)
    >>> calib["fc.weight"].mean
    array([2., 1.])
    """

    def __init__(self, columns: int, *, products: bool = False) -> None:
        columns = as_index(columns, "columns")
        if columns < 0:
            raise ValueError(f"columns: expected 0 or more, got {columns}")
        self.rows = 0
        self.sum: NDArray[np.float64] = np.zeros(columns)
        self.sum_squares: NDArray[np.float64] = np.zeros(columns)
        self.products: NDArray[np.float64] | None = np.zeros((columns, columns)) if products else None

    @property
    def columns(self) -> int:
        """The number of inputs."""
        return int(self.sum.size)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each column; 0 if there are no rows."""
        return self.sum / max(self.rows, 1)

    @property
    def mean_squares(self) -> NDArray[np.float64]:
        """The mean of the squares of each column; 0 if there are no rows."""
        return self.sum_squares / max(self.rows, 1)

    def update(self, x: ArrayLike) -> None:
        """Add rows.

        Parameters
        ----------
        x : array_like of a float type, shape (..., columns)

        Raises
        ------
        TypeError
            If `x` is not of a float type.
        ValueError
            If it has another number of columns, or NaN or infinity. The sums then stay as they were.
        """
        array = as_float_array(x, "x")
        if array.ndim == 0 or array.shape[-1] != self.columns:
            raise ValueError(f"x: expected {self.columns} columns, got shape {array.shape}")
        flat = array.reshape(math.prod(array.shape[:-1]), self.columns)
        total, squares = self.sum, self.sum_squares
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, len(flat), _ROWS):
                part = flat[at : at + _ROWS].astype(np.float64)
                total, squares = _add_rows(total, part), _add_rows(squares, np.square(part))
        if not np.isfinite(squares).all():
            column = int(np.argmin(np.isfinite(squares)))
            row = int(np.argmax(np.abs(flat[:, column])))  # of NaN, if there is one
            raise ValueError(f"x: expected finite values, got {flat[row, column]} in column {column}")
        self.rows += len(flat)
        self.sum, self.sum_squares = total, squares
        if self.products is not None:
            for at in range(0, len(flat), _ROWS):
                part = flat[at : at + _ROWS].astype(np.float64)
                self.products += part.T @ part

    def __add__(self, other: InputSums) -> InputSums:
        """Return the sums over the rows of both; `products` only if both have it."""
        if not isinstance(other, InputSums):
            return NotImplemented
        if other.columns != self.columns:
            raise ValueError(f"expected sums of {self.columns} columns, got {other.columns}")
        result = InputSums(self.columns)
        result.rows = self.rows + other.rows
        result.sum, result.sum_squares = self.sum + other.sum, self.sum_squares + other.sum_squares
        if self.products is not None and other.products is not None:
            result.products = self.products + other.products
        return result

    def __eq__(self, other: object) -> bool:
        """Return whether two have the same rows and the same sums, bit for bit."""
        if not isinstance(other, InputSums):
            return NotImplemented
        return self.rows == other.rows and all(
            (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))
            for a, b in ((self.sum, other.sum), (self.sum_squares, other.sum_squares), (self.products, other.products))
        )

    __hash__ = None  # type: ignore[assignment]  # update changes it

    def __repr__(self) -> str:
        products = "" if self.products is None else ", products"
        return f"InputSums(rows={self.rows}, columns={self.columns}{products})"

    def importance(self) -> NDArray[np.float32]:
        """Return the importance of each column, for `quantize`: E[x^2], and 1 % of its mean.

        Returns
        -------
        float32 array, shape (columns,)
            In units of its largest number. All ones if no input differs from 0.
        """
        squares = self.mean_squares
        largest = squares.max(initial=0.0)
        if not largest > 0:
            return np.ones(self.columns, np.float32)
        squares = squares / largest
        result: NDArray[np.float32] = (squares + DAMPING * math.fsum(squares) / squares.size).astype(np.float32)
        return result

    def output_error(self, w: Array, q: Array) -> tuple[float, float]:
        """Return the mean squared error of the outputs, and the mean square of the outputs.

        Both are summed over the outputs: ``E[|x (W - Q)^T|^2]`` and ``E[|x W^T|^2]``. Without `products`, columns count
        as if they were uncorrelated.

        Parameters
        ----------
        w, q : arrays, shape (rows, columns)
            Some rows of the weight, as it was and as it is.
        """
        w64 = w.astype(np.float64).reshape(-1, self.columns)
        e64 = w64 - q.astype(np.float64).reshape(-1, self.columns)
        count = max(self.rows, 1)
        if self.products is None:
            of = (float((np.square(e) @ self.sum_squares).sum()) / count for e in (e64, w64))
        else:
            of = (max(float(((e @ self.products) * e).sum()), 0.0) / count for e in (e64, w64))
        noise, signal = of
        return noise, signal


def _add_rows(total: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a sum with rows added to it, one after the other."""
    result: NDArray[np.float64] = np.add.reduce(np.concatenate([total[None], rows]), axis=0)
    return result
