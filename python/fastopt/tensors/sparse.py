"""Sparse storage of pruned weights."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastopt import _core
from fastopt._checks import (
    as_float32,
    as_float_array,
    as_matrix,
    require_array,
    require_bits,
    require_shape,
)
from fastopt._types import SPARSE_GROUP_SIZE, Array, Fit, GroupSize
from fastopt.tensors.packed import PackedTensor, Precision, Storage, dense_array
from fastopt.tensors.quantization import quantize
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse_layout import (
    _INDEX_COLUMNS,
    _INDEX_DENSITY,
    BLOCK,
    _blocks,
    _expand_blocks,
    _fill_groups,
    require_layout,
)


@dataclass(frozen=True, eq=False, repr=False)
class SparseTensor(PackedTensor):
    """A pruned weight: its non-zero elements and their positions.

    `SparseTensor.from_dense` and `prune` make one. The tensor owns `positions` and `row_offsets`, because the kernels
    trust them: they are copied, unless they are `bytes` or a file that is mapped read-only. A mapped file must not be
    changed in place while the tensor is used: `to_dense` checks it again, products do not. Replace it by a new file,
    as `PackedModel.save` does.

    Attributes
    ----------
    layout : str
        How positions are stored.

        - "mask": a bit for each element.
        - "index16": the column of each entry, in 16 bits.
        - "index8": the distance of each entry from the one before, in 8 bits.
        - "1x16": a bit for each block of 16 columns.
        - "N:M", for example "2:4": a mask with exactly N bits set in each M columns.
    positions : array
        A mask is uint8, shape (rows, bytes per row), lowest bit first. Each row starts on a byte, and bits behind the
        last column are 0. "index16" has uint16, shape (entries,), rising within a row. "index8" has uint8, shape
        (entries,): the column of an entry is the column of the entry before, or -1 at the start of a row, plus 1, plus
        this number.
    row_offsets : int64 array, shape (rows + 1,)
        Row r has the entries ``row_offsets[r]`` up to ``row_offsets[r + 1]``.
    values : array or QuantizedTensor, one axis
        The values of the entries in order, in a float type or quantized. An entry has one value, with "1x16" 16.
    shape : tuple of int
        The shape of the weight, which is seen as a matrix: the first axis by all others, or one row if there is only
        one axis.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit each other, the layout or the shape.

    Notes
    -----
    Every element that is not zero is stored. -0 counts as zero and comes back as +0; NaN and infinity are kept.
    "1x16", "N:M" and "index8" also store the zeros that fill up a block, a group or a distance above 255.

    In a product, x should be finite: whether NaN or infinity in x meets a pruned weight depends on the layout.
    """

    layout: str
    positions: Array
    row_offsets: NDArray[np.int64]
    values: Array | QuantizedTensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        require_layout(self.layout)
        shape = require_shape(self.shape)
        values = self.values
        if isinstance(values, QuantizedTensor):
            if values.outliers is not None:
                raise ValueError("values: expected none with outliers, which products with sparse weights do not add")
        else:
            dtype = as_float_array(require_array(values, "values"), "values").dtype
            values = np.require(values, dtype.newbyteorder("="), ["C", "A"])
        if len(values.shape) != 1:
            raise ValueError(f"values: expected one dimension, got shape {values.shape}")
        # The kernels trust positions and offsets, which are checked once.
        positions = _unchangeable(require_array(self.positions, "positions"))
        row_offsets = _unchangeable(require_array(self.row_offsets, "row_offsets"))
        if self.layout.startswith("index") and positions.ndim != 1:
            raise ValueError(f"positions: expected one dimension, got shape {positions.shape}")
        rows, cols = as_matrix(shape)
        if row_offsets.shape != (rows + 1,):
            raise ValueError(f"row_offsets: expected {rows + 1} elements, got {row_offsets.shape}")
        if self.layout == "1x16" and values.shape[0] % BLOCK:
            raise ValueError(f"values: expected a multiple of {BLOCK}, got {values.shape[0]}")
        for field, value in (
            ("positions", positions),
            ("row_offsets", row_offsets),
            ("values", values),
            ("shape", shape),
        ):
            object.__setattr__(self, field, value)
        _core.check_sparse(self._kernel_layout, positions, row_offsets, cols, self._entries)
        if ":" in self.layout and not np.array_equal(self._filled(positions), positions):
            raise ValueError(f"positions: expected {self.layout} of each columns")

    @property
    def _entries(self) -> int:
        return self.nnz // (BLOCK if self.layout == "1x16" else 1)

    @property
    def _kernel_layout(self) -> str:
        return {"1x16": "block", "index16": "index16", "index8": "index8"}.get(self.layout, "mask")

    def _filled(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _fill_groups(mask, as_matrix(self.shape)[1], self.layout)

    @classmethod
    def from_dense(cls, w: ArrayLike, *, layout: str = "auto") -> SparseTensor:
        """Return the non-zero elements of `w` in sparse storage.

        Parameters
        ----------
        w : array_like of float32, float64, float16 or bfloat16, any shape
        layout : str
            A layout of the class, or "auto" for the one that multiplies fastest: "index16" if at most 18 % of the
            elements are left, else "mask". "index8" is the smallest if less than an eighth is left, and somewhat
            slower.

        Returns
        -------
        SparseTensor

        Raises
        ------
        TypeError
            If `w` is not of a float type.
        ValueError
            If `layout` is unknown, cannot hold as many columns as `w` has, or is N:M and `w` has more non-zeros than
            that. Prune it with that pattern first.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.SparseTensor.from_dense(np.eye(4, dtype=np.float32), layout="mask")
        SparseTensor(shape=(4, 4), layout=mask, density=0.250, float32 values, 30.00 bits per weight)
        """
        if layout != "auto":
            require_layout(layout)
        array = dense_array(w, "w")
        rows, cols = as_matrix(array.shape)
        x = np.require(array, array.dtype.newbyteorder("="), ["C", "A"]).reshape(rows, cols)
        if layout == "1x16":
            return cls(layout, *_blocks(x), array.shape)
        mask = np.empty((rows, -(-cols // 8)), np.uint8)
        row_offsets = np.zeros(rows + 1, np.int64)
        _core.nonzero_mask(x, mask, row_offsets[1:])
        if ":" in layout:
            filled = _fill_groups(mask, cols, layout)
            if np.any(mask & ~filled):
                row = int(np.argmax(np.any(mask & ~filled, axis=1)))
                raise ValueError(
                    f"w: row {row} has more non-zeros than {layout}; prune it with pattern={layout!r} first"
                )
            mask = filled
            row_offsets[1:] = np.unpackbits(mask, axis=1).sum(axis=1, dtype=np.int64)
        np.cumsum(row_offsets, out=row_offsets)
        values = np.empty(int(row_offsets[-1]), x.dtype)
        _core.compress(x, mask, row_offsets, values)
        if ":" in layout:
            values[values == 0] = 0  # -0 becomes +0
        return cls._of_mask(layout, mask, row_offsets, values, array.shape)

    @classmethod
    def _of_mask(
        cls, layout: str, mask: NDArray[np.uint8], row_offsets: Array, values: Array, shape: tuple[int, ...]
    ) -> SparseTensor:
        """Return a tensor of the given layout, or the best one for "auto", from a mask and the values under it."""
        cols = as_matrix(shape)[1]
        if layout == "auto":
            index = values.size <= _INDEX_DENSITY * math.prod(shape) and cols <= _INDEX_COLUMNS
            layout = "index16" if index else "mask"
        if not layout.startswith("index"):
            return cls(layout, mask, row_offsets, values, shape)
        if cols > _INDEX_COLUMNS:
            raise ValueError(f"layout: {layout!r} has up to {_INDEX_COLUMNS} columns, got {cols}; 'mask' has no limit")
        columns = np.empty(values.size, np.uint16)
        _core.mask_columns(mask, row_offsets, cols, columns)
        if layout == "index16":
            return cls(layout, columns, row_offsets, values, shape)
        gap_offsets = np.zeros_like(row_offsets)
        _core.count_gaps(columns, row_offsets, cols, gap_offsets[1:])
        np.cumsum(gap_offsets, out=gap_offsets)
        entries = int(gap_offsets[-1])
        gaps = np.empty(entries, np.uint8)
        gap_values = np.zeros(entries, values.dtype)
        _core.column_gaps(columns, row_offsets, cols, values, gap_offsets, gaps, gap_values)
        return cls("index8", gaps, gap_offsets, gap_values, shape)

    def quantize(
        self,
        bits: int = 8,
        *,
        group_size: GroupSize = "auto",
        param_dtype: DTypeLike = "float16",
        param_bits: int | None = None,
        param_group: int = -1,
        fit: Fit = "auto",
        importance: ArrayLike | Literal["magnitude"] | None = None,
    ) -> SparseTensor:
        """Return the same weight with its values in 8, 6, 5, 4, 3 or 2 bits.

        Parameters
        ----------
        bits : 8, 6, 5, 4, 3 or 2
        group_size : int, -1, None or "auto"
            How many neighbouring values share a scale and a minimum; groups run across the ends of rows. "auto" is
            128 for 8 bits, 64 for 6, 32 for 5, 4 and 3, and 16 for 2. -1 and None are all values.
        param_dtype, param_bits, param_group, fit
            As in `fastopt.quantize`; all values are one row.
        importance : array_like of a float type, or "magnitude", optional
            As in `fastopt.quantize`: one number for each column or for each weight, zeros included.

        Returns
        -------
        SparseTensor
            It has the same layout, but for "index8" with distances above 255, which becomes "index16" to keep zeros
            exact.

        Raises
        ------
        ValueError
            If the values have NaN or infinity, or an option is out of range.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.SparseTensor.from_dense(np.eye(64, dtype=np.float32)).quantize(bits=4)
        SparseTensor(shape=(64, 64), layout=index16, density=0.016, 4-bit values, 1.34 bits per weight)
        """
        bits = require_bits(bits)
        if isinstance(group_size, str) and group_size == "auto" and param_bits is None:
            group_size = SPARSE_GROUP_SIZE[bits]
        values = self._float_values()
        s = self
        if self.layout == "index8" and not values.all():
            s = self.to_layout("index16")
            values = s._float_values()
        weight = importance if importance is None or isinstance(importance, str) else s._at_values(importance)
        quantized = quantize(
            values,
            bits,
            group_size=group_size,
            param_dtype=param_dtype,
            param_bits=param_bits,
            param_group=param_group,
            fit=fit,
            importance=weight,
        )
        return SparseTensor(s.layout, s.positions, s.row_offsets, quantized, s.shape)

    def _at_values(self, numbers: ArrayLike) -> Array:
        """Return the numbers of a row or of the whole weight that stand where values are stored, in their order."""
        rows, cols = as_matrix(self.shape)
        given = as_float_array(numbers, "importance")
        if given.shape not in ((cols,), self.shape):
            raise ValueError(f"importance: expected shape {(cols,)} or {self.shape}, got {given.shape}")
        ones = np.ones(self.values.shape, np.float32)
        stored = SparseTensor(self.layout, self.positions, self.row_offsets, ones, self.shape).to_dense() != 0
        stored = stored.reshape(rows, cols)
        matrix = np.broadcast_to(given.reshape(-1, cols), (rows, cols))
        if self.layout == "1x16":  # whole blocks, also at the end of a row
            ends = ((0, 0), (0, -cols % BLOCK))
            matrix, stored = np.pad(matrix, ends), np.pad(stored, ends)
            stored = np.repeat(stored.reshape(rows, -1, BLOCK).any(axis=2), BLOCK, axis=1)
        return np.asarray(matrix[stored])

    def to_layout(self, layout: str) -> SparseTensor:
        """Return the same weight in another layout.

        Parameters
        ----------
        layout : str
            As in `from_dense`.

        Returns
        -------
        SparseTensor
            Its values are floats, even if these are quantized.

        Raises
        ------
        ValueError
            As in `from_dense`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastopt as fo
        >>> fo.SparseTensor.from_dense(np.eye(64, dtype=np.float32)).to_layout("1x16").nnz
        1024
        """
        return SparseTensor.from_dense(self.to_dense(), layout=layout)

    def _float_values(self) -> Array:
        return self.values.dequantize() if isinstance(self.values, QuantizedTensor) else self.values

    def to_dense(self, out: Array | None = None) -> Array:
        """Return the weight as an array, with its zeros; see `PackedTensor.to_dense`."""
        if out is not None:
            self._check_out(out)
        if not isinstance(_owner(self.positions), bytes):  # somebody may have changed the file, and this writes
            _core.check_sparse(
                self._kernel_layout, self.positions, self.row_offsets, as_matrix(self.shape)[1], self._entries
            )
        result = np.empty(self.shape, self.dtype) if out is None else out
        values, matrix = self._float_values(), result.reshape(as_matrix(self.shape))
        with np.errstate(over="ignore"):
            values = values.astype(result.dtype, copy=False)
        if self.layout == "1x16":
            _expand_blocks(self.positions, values, matrix)
        else:
            _core.expand(self._kernel_layout, self.positions, self.row_offsets, values, matrix)
        return result

    def _take(self, key: slice | NDArray[np.int64], rows: NDArray[np.int64], shape: tuple[int, ...]) -> SparseTensor:
        """Return some rows; quantized values become floats, because their groups run through the rows."""
        counts = np.diff(self.row_offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        entries: slice | NDArray[np.int64]
        if isinstance(key, slice):
            begin = int(self.row_offsets[rows[0]]) if rows.size else 0
            entries = slice(begin, begin + int(offsets[-1]))
        else:
            entries = np.arange(offsets[-1]) + np.repeat(self.row_offsets[rows] - offsets[:-1], counts)
        width = BLOCK if self.layout == "1x16" else 1
        values = self._float_values().reshape(-1, width)[entries].reshape(-1)
        positions = self.positions[entries if self.layout.startswith("index") else key]
        return SparseTensor(self.layout, positions, offsets, values, shape)

    def _linear(self, x: ArrayLike, bias: ArrayLike | None, out: Array | None, precision: Precision) -> Array:
        if isinstance(self.values, QuantizedTensor):
            args = (self._kernel_layout, self.positions, self.row_offsets, *self.values.kernel_args, self.nnz)
            return _core.linear_sparse_quantized(x, *args, self.shape, bias, out)
        values = self.values if self.dtype != np.float64 else as_float32(self.values, "w")
        return _core.linear_sparse(
            x, self._kernel_layout, self.positions, self.row_offsets, values, self.shape, bias, out
        )

    @property
    def storage(self) -> Storage:
        """The kind of storage: "sparse", or "sparse+quantized" if the values are quantized."""
        return "sparse+quantized" if isinstance(self.values, QuantizedTensor) else "sparse"

    @property
    def bits(self) -> int | None:
        """The bits of a value; None if the values are not quantized."""
        return self.values.bits if isinstance(self.values, QuantizedTensor) else None

    @property
    def param_bits(self) -> int | None:
        """The bits of the codes of scale and minimum, as in `QuantizedTensor`."""
        return self.values.param_bits if isinstance(self.values, QuantizedTensor) else None

    @property
    def group_size(self) -> int | None:
        """The number of values that share a scale and minimum; None if all do, or if they are not quantized."""
        return self.values.group_size if isinstance(self.values, QuantizedTensor) else None

    def _arrays(self) -> tuple[Array, ...]:
        values = self.values._arrays() if isinstance(self.values, QuantizedTensor) else (self.values,)
        return (self.positions, self.row_offsets, *values)

    @property
    def mask(self) -> NDArray[np.uint8]:
        """A bit for each element that is stored; uint8, shape (rows, ceil(cols / 8)), lowest bit first."""
        if self._kernel_layout == "mask":
            return self.positions
        return SparseTensor.from_dense(self.to_dense(), layout="mask").positions

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return int(self.values.shape[0])

    @property
    def density(self) -> float:
        """Fraction of the weights that is stored."""
        return self.nnz / max(self.size, 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `to_dense`."""
        return self.values.dtype

    # ---- other libraries -------------------------------------------------------------------------------------

    def _csr(self) -> tuple[Array, NDArray[np.int64], Array]:
        """Return values, columns and row offsets; a value that is stored as zero stays an entry."""
        s = self if self._kernel_layout != "block" else self.to_layout("mask")
        cols = as_matrix(s.shape)[1]
        if s.layout.startswith("index"):
            columns: Array = s.positions
            if s.layout == "index8":
                columns = np.empty(s.nnz, np.uint16)
                _core.gap_columns(s.positions, s.row_offsets, cols, columns)
        else:
            columns = np.nonzero(np.unpackbits(s.positions, axis=1, count=cols, bitorder="little"))[1]
        return s._float_values(), columns.astype(np.int64), s.row_offsets

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.csr_array`` of two axes.

        Returns
        -------
        scipy.sparse.csr_array
            float16 and bfloat16 become float32, because SciPy does not have them.
        """
        from scipy.sparse import csr_array

        values, columns, offsets = self._csr()
        if values.dtype not in (np.float32, np.float64):
            values = values.astype(np.float32)
        return csr_array((values, columns, offsets), shape=as_matrix(self.shape))

    @classmethod
    def from_scipy(cls, matrix: Any, *, layout: str = "auto") -> SparseTensor:
        """Return a SciPy sparse matrix of any format as a SparseTensor.

        Parameters
        ----------
        matrix : scipy.sparse matrix or array of float32 or float64
        layout : str
            As in `from_dense`.

        Returns
        -------
        SparseTensor
        """
        if not hasattr(matrix, "tocsr"):
            raise TypeError(f"matrix: expected a sparse matrix of SciPy, got {type(matrix).__name__}")
        csr = matrix.tocsr(copy=True)
        csr.sum_duplicates()
        return cls._from_csr(csr.data, csr.indices, csr.indptr, csr.shape, layout)

    def to_torch(self) -> Any:
        """Return a torch tensor of two axes in CSR layout.

        Returns
        -------
        torch.Tensor
        """
        import torch

        values, columns, offsets = self._csr()
        if values.dtype.name == "bfloat16":
            data = torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        else:
            data = torch.from_numpy(values.copy())
        indices = torch.from_numpy(columns)
        row_pointers = torch.from_numpy(offsets.copy())
        return torch.sparse_csr_tensor(row_pointers, indices, data, as_matrix(self.shape), check_invariants=True)

    @classmethod
    def from_torch(cls, tensor: Any, *, layout: str = "auto") -> SparseTensor:
        """Return a torch tensor in CSR layout as a SparseTensor.

        Parameters
        ----------
        tensor : torch.Tensor of float32, float64 or float16
        layout : str
            As in `from_dense`.

        Returns
        -------
        SparseTensor
        """
        if not hasattr(tensor, "crow_indices") or str(tensor.layout) != "torch.sparse_csr":
            raise TypeError(f"tensor: expected a torch tensor in CSR layout, got {type(tensor).__name__}")
        csr = tensor.detach().cpu()
        values, columns, offsets = (part.numpy() for part in (csr.values(), csr.col_indices(), csr.crow_indices()))
        return cls._from_csr(values, columns, offsets, tuple(tensor.shape), layout)

    @classmethod
    def _from_csr(
        cls, values: Array, columns: Array, offsets: Array, shape: tuple[int, int], layout: str
    ) -> SparseTensor:
        if layout != "auto":
            require_layout(layout)
        values, (rows, cols) = as_float_array(values, "values"), shape
        rising = len(offsets) == rows + 1 and offsets[0] == 0 and offsets[-1] == values.size
        if not rising or np.any(np.diff(offsets) < 0):
            raise ValueError("row offsets: must rise from 0 to the number of values")
        if columns.size and not 0 <= columns.min() <= columns.max() < cols:
            raise ValueError(f"columns: expected 0 to {cols - 1}, got {columns.min()} to {columns.max()}")
        row = np.repeat(np.arange(rows), np.diff(offsets))
        keep = values != 0
        order = np.lexsort((columns[keep], row[keep]))
        row, columns, values = row[keep][order], columns[keep][order], values[keep][order]
        stored = np.zeros((rows, cols), np.bool_)
        stored[row, columns] = True
        row_offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(stored, axis=1))]).astype(np.int64)
        if row_offsets[-1] != values.size:
            raise ValueError("columns: expected each once in a row")
        mask = np.packbits(stored, axis=1, bitorder="little")
        if layout in ("auto", "mask", "index16", "index8"):
            return cls._of_mask(layout, mask, row_offsets, values, shape)
        return cls("mask", mask, row_offsets, values, shape).to_layout(layout)

    def __repr__(self) -> str:
        values = str(self.dtype) if self.bits is None else f"{self.bits}-bit"
        return (
            f"SparseTensor(shape={self.shape}, layout={self.layout}, density={self.density:.3f}, {values} values, "
            f"{self.bits_per_weight:.2f} bits per weight)"
        )


def _unchangeable(array: Array) -> Array:
    """Return a view of memory that nobody can write to: of `array` if that is so already, else of a copy.

    Being read-only is not enough. Whoever holds the array that owns the memory can make it writable again.
    """
    if array.dtype.hasobject:
        return array  # the kernels refuse it
    owner = _owner(array)
    if isinstance(owner, bytes) or (isinstance(owner, mmap.mmap) and memoryview(owner).readonly):
        return array.view(np.ndarray)
    return np.ndarray(array.shape, array.dtype, array.tobytes())


def _owner(array: Array) -> Any:
    """Return the object that the memory of an array belongs to, or an array on the way there that could be written."""
    base: Any = array
    while isinstance(base, np.ndarray) and not (base.flags.writeable or base.flags.owndata):
        base = base.base
    return base.obj if isinstance(base, memoryview) and base.readonly else base


def sparsity(w: Any) -> float:
    """Return the fraction of weights that are zero.

    Parameters
    ----------
    w : array, packed tensor, or a sequence or mapping of them

    Returns
    -------
    float
        The fraction over all arrays together; 0 if there are no weights.

    Raises
    ------
    TypeError
        If `w` holds anything else.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.tensors.sparse import sparsity
    >>> sparsity(np.eye(4, dtype=np.float32))
    0.75
    """
    zeros, size = _zeros(w)
    return zeros / max(size, 1)


def _zeros(w: Any) -> tuple[int, int]:
    if isinstance(w, SparseTensor) and w.layout in ("mask", "index16"):  # these store no zeros to fill places
        return w.size - w.nnz, w.size
    if isinstance(w, PackedTensor):
        w = w.to_dense()
    if isinstance(w, Iterable) and not hasattr(w, "__array__") and not isinstance(w, str | bytes):
        counts = [_zeros(part) for part in (w.values() if isinstance(w, Mapping) else w)]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)
    array = np.asarray(w)
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"w: expected an array, a packed tensor, or a list or dict of them, got {type(w).__name__}")
    return array.size - int(np.count_nonzero(array)), array.size
