"""The base class of packed tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt._checks import as_float_array, as_matrix, matrix_of_out
from fastopt._text import html_table, shape_text, shown, size_text, storage_text
from fastopt._types import Array
from fastopt.tensors.error import Error, ErrorSums

if TYPE_CHECKING:
    from typing_extensions import Self

Precision: TypeAlias = Literal["exact", "int8", "blas"]
Storage: TypeAlias = Literal["dense", "quantized", "sparse", "sparse+quantized"]


class PackedTensor(ABC):
    """A weight in packed storage, the base class of `QuantizedTensor` and `SparseTensor`.

    Attributes
    ----------
    shape : tuple of int
        The shape of the weight, (out, in, ...). The weight is seen as a matrix: the first axis by all others, or one
        row if there is only one axis.
    dtype : numpy.dtype
        The dtype of `to_dense`.
    bits : int or None
        The bits of a quantized value; None if the values are not quantized.
    group_size : int or None
        The number of values that share a scale and minimum; -1 for a row; None for the whole tensor, or if the
        values are not quantized.

    Notes
    -----
    A weight is [out, in], as in torch. Pack the transpose of a weight that is [in, out], as in Keras, scikit-learn and
    GPT-2's Conv1D: ``quantize(kernel.T)``.

    ``w @ x`` and ``x @ w.T`` multiply, as `linear` does. ``w[rows]`` with a number, a slice, a mask or an array of
    numbers returns these rows, packed; of a weight with more than two axes, a single row is refused, because it
    would start in the middle of a byte. ``np.asarray(w)`` decodes.

    Two packed tensors are equal if they are of the same class, shape and dtype and store the same, bit for bit.
    The same weights in two storages are not equal; compare their `to_dense`.
    """

    __array_ufunc__ = None  # NumPy leaves the operators to this class
    __hash__ = None  # type: ignore[assignment]  # the arrays may change

    if TYPE_CHECKING:  # fields of one class, properties of another

        @property
        def shape(self) -> tuple[int, ...]: ...  # noqa: D102
        @property
        def dtype(self) -> np.dtype[Any]: ...  # noqa: D102
        @property
        def bits(self) -> int | None: ...  # noqa: D102
        @property
        def group_size(self) -> int | None: ...  # noqa: D102

    @property
    @abstractmethod
    def storage(self) -> Storage:
        """The kind of storage: "quantized", "sparse" or "sparse+quantized"."""

    @abstractmethod
    def to_dense(self, out: Array | None = None) -> Array:
        """Return the weight as an array.

        Parameters
        ----------
        out : array of the weight's shape, of float32 or of `dtype`, optional
            The array to write and return; C-contiguous.

        Returns
        -------
        array
            `out`, or a new array of `dtype`.

        Raises
        ------
        TypeError
            If `out` is of another dtype, or no array.
        ValueError
            If `out` is of another shape, read-only, not contiguous, or shares memory with what is stored.
        """

    @abstractmethod
    def _arrays(self) -> tuple[Array, ...]:
        """Return all arrays that are stored."""

    @abstractmethod
    def _take(self, key: slice | NDArray[np.int64], rows: NDArray[np.int64], shape: tuple[int, ...]) -> Self:
        """Return some rows as a weight of `shape`; `key` is a slice without a step, or the same as `rows`."""

    @abstractmethod
    def _linear(self, x: ArrayLike, bias: ArrayLike | None, out: Array | None, precision: Precision) -> Array:
        """Return ``x @ self.T + bias``; the kernels check x, bias and out."""

    def _repr_html_(self) -> str:
        dense = self.size * self.dtype.itemsize
        rows = [
            ["shape", shape_text(self.shape)],
            ["stored", storage_text(self.storage, self.bits, self.group_size, getattr(self, "param_bits", None))],
            ["weights stored", f"{self.density:.1%}"],
            ["bits per weight", f"{self.bits_per_weight:.2f}"],
            ["size", f"{size_text(self.nbytes)}, as {self.dtype}: {size_text(dense)}"],
        ]
        return html_table(type(self).__name__, [], rows)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows of the matrix that the weight is seen as."""
        return as_matrix(self.shape)[0]

    @property
    def size(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, zeros, positions and parameters included."""
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def density(self) -> float:
        """Fraction of the weights that is stored."""
        return 1.0

    @property
    def T(self) -> Transposed:  # noqa: N802 - NumPy's name
        """The transpose, for ``x @ w.T``."""
        return Transposed(self)

    def _check_out(self, out: Array) -> None:
        """Raise if `to_dense` cannot write to `out`."""
        matrix_of_out(out, self.shape)
        if out.dtype != np.float32 and out.dtype != self.dtype:
            other = "" if self.dtype == np.float32 else f" or {self.dtype}"
            swapped = "" if out.dtype.isnative else " in the other byte order"
            raise TypeError(f"out: expected float32{other}, got {out.dtype.name}{swapped}")
        if any(np.may_share_memory(out, array) for array in self._arrays()):
            raise ValueError("out: shares memory with what is stored")

    def error(self, w: ArrayLike) -> Error:
        """Return the error against the original weight.

        Parameters
        ----------
        w : array_like of a float type
            The weight that was packed.

        Returns
        -------
        Error
            Root mean square error, the same relative to `w`, largest error, signal to noise ratio and cosine.

        Raises
        ------
        TypeError, ValueError
            If `w` is not of a float type or of this shape.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> w = np.linspace(-1, 1, 64, dtype=np.float32)
        >>> round(fo.quantize(w, bits=4).error(w).max, 3)
        0.032
        """
        return self.error_sums(w).error()

    def error_sums(self, w: ArrayLike) -> ErrorSums:
        """Return the sums that `error` is computed from; sums of several weights can be added."""
        theirs = self._original(w).reshape(-1)
        ours, sums, step = self.to_dense().reshape(-1), ErrorSums(), 1 << 20
        for at in range(0, theirs.size, step):
            sums.add(ours[at : at + step], theirs[at : at + step])
        return sums

    def _original(self, w: ArrayLike) -> Array:
        array = dense_array(w, "w")
        if array.shape != self.shape:
            raise ValueError(f"w: expected shape {self.shape}, got {array.shape}")
        return array

    def copy(self) -> Self:
        """Return a copy whose arrays are its own and in memory.

        Returns
        -------
        QuantizedTensor or SparseTensor

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> q = fo.quantize(np.eye(3, dtype=np.float32))
        >>> q.copy() == q
        True
        """
        return type(self)(*map(_copied, self._fields()))

    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]  # a dataclass

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(f"a {type(self).__name__} cannot become an array without a copy")
        dense = self.to_dense()
        return dense if dtype is None else dense.astype(dtype, copy=False)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[Self]:
        return (self[row] for row in range(len(self)))  # without it, an IndexError would end an iteration in silence

    def __getitem__(self, rows: Any) -> Self:
        if self.ndim < 2:
            raise IndexError(f"rows: expected a weight of two or more axes, got shape {self.shape}")
        try:
            numbers = np.arange(self.shape[0])[rows]
        except (IndexError, TypeError, ValueError) as error:
            raise IndexError(f"rows: {error}") from error
        if numbers.ndim > 1 or (numbers.ndim == 0 and self.ndim > 2):
            raise IndexError(f"rows: expected a slice or numbers along one axis, got {shown(rows)}")
        flat = numbers.reshape(-1)
        # A range of rows is a view; other rows are copied.
        key = rows if isinstance(rows, slice) and rows.step in (None, 1) else flat
        return self._take(key, flat, (*numbers.shape, *self.shape[1:]))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(map(_same, self._fields(), other._fields()))

    def __matmul__(self, x: ArrayLike) -> Array:
        """Return the product with a vector [in], a matrix [in, batch] or a stack of matrices."""
        x = np.asarray(x)
        if x.ndim < 2:
            return self._linear(x, None, None, "exact")
        return self._linear(x.swapaxes(-1, -2), None, None, "exact").swapaxes(-1, -2)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        raise TypeError("x @ w: a packed weight is [out, in]: use x @ w.T; pack the transpose of an [in, out] weight")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._fields()  # so that unpickled arrays are checked


Weight: TypeAlias = "Array | PackedTensor"


@dataclass(frozen=True, eq=False)
class Transposed:
    """The transpose of a packed tensor: the right-hand side of ``x @ w.T``.

    Attributes
    ----------
    T : PackedTensor
    """

    T: PackedTensor

    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        rows, cols = as_matrix(self.T.shape)
        return cols, rows

    def __rmatmul__(self, x: ArrayLike) -> Array:
        return self.T._linear(x, None, None, "exact")


def dense_array(w: ArrayLike, name: str) -> Array:
    """Return `w` as an array of a float type, or raise; a packed tensor is not decoded unless the caller asks."""
    if isinstance(w, PackedTensor):
        raise TypeError(f"{name}: expected an array, got a {type(w).__name__}; to_dense() decodes it")
    return as_float_array(w, name)


def storage_of(tensor: Weight) -> tuple[Storage, int | None, int | None]:
    """Return the storage, bits and group size of a weight."""
    if isinstance(tensor, PackedTensor):
        return tensor.storage, tensor.bits, tensor.group_size
    return "dense", None, None


def unpacked(tensor: Weight) -> Array:
    """Return any weight as an array."""
    return tensor.to_dense() if isinstance(tensor, PackedTensor) else tensor


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.array(value)
    return value.copy() if hasattr(value, "copy") else value
