"""Calibration of a model: sums over the inputs of each of its layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastopt._text import shown
from fastopt._types import Array, PathLike
from fastopt.files.safetensors_file import Part, parse_json, part_of, read_arrays, write
from fastopt.tensors.calibration import InputSums

# The key of the metadata that makes a file a calibration, and the version of its layout.
CALIBRATION, _VERSION = "fastopt.calibration", 1


class Calibration(Mapping[str, InputSums]):
    """Sums over the inputs of each weight of a model, for `pack`, `pack_file` and `pack_onnx`.

    A mapping from the name of a weight to `InputSums`. It holds sums alone, so its size does not depend on how much
    was seen, and those of several machines can be added.

    Parameters
    ----------
    products : bool
        Sum the products of columns too, as ``fit="gptq"`` needs them. They take 8 bytes for each pair of
        inputs of a layer, and a product of matrices with each update.

    Notes
    -----
    The sums are float64. `sum` and `sum_squares` do not depend on how the same rows, in the same order, are split into
    updates. ``a + b`` rounds once for each sum, so the order in which many are added may change the last bit.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> rng = np.random.default_rng(0)
    >>> w = rng.standard_normal((64, 128)).astype("f4")
    >>> x = rng.standard_normal((1000, 128)).astype("f4") * np.linspace(0, 3, 128, dtype="f4")
    >>> calib = fo.Calibration()
    >>> calib.update("fc.weight", x)  # for each batch
    >>> calib
    Calibration(1 weights, 1,000 rows)
    >>> calib.save("calib.safetensors")
    >>> fo.Calibration.load("calib.safetensors") == calib
    True
    """

    def __init__(self, *, products: bool = False) -> None:
        if not isinstance(products, bool):
            raise TypeError(f"products: expected a bool, got {type(products).__name__}")
        self.products = products
        self._sums: dict[str, InputSums] = {}

    def __getitem__(self, name: str) -> InputSums:
        return self._sums[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    __hash__ = None  # type: ignore[assignment]  # update changes it

    def __repr__(self) -> str:
        rows = sorted({sums.rows for sums in self._sums.values()}) or [0]
        counts = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        return f"Calibration({len(self)} weights, {counts} rows{', products' if self.products else ''})"

    @property
    def rows(self) -> dict[str, int]:
        """How many rows were added, by the name of the weight."""
        return {name: sums.rows for name, sums in self._sums.items()}

    def update(self, name: str, x: ArrayLike) -> None:
        """Add inputs of a weight.

        Parameters
        ----------
        name : str
            The name of the weight, as in the model that is packed.
        x : array_like of a float type, shape (..., columns)
            The inputs of the weight [out, in]. A weight of more axes is seen as a matrix of its first axis by
            all others: a convolution takes its patches.

        Raises
        ------
        TypeError
            If `x` is not of a float type.
        ValueError
            If it has NaN or infinity, or another number of columns than before. Nothing is added then.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a text, got {type(name).__name__}")
        shape = np.shape(x)
        sums = self._sums.get(name)
        if sums is None:
            if not shape:
                raise ValueError(f"{name!r}: x: expected shape (..., columns), got a single number")
            sums = InputSums(shape[-1], products=self.products)
        try:
            sums.update(x)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name!r}: {error}") from error
        self._sums[name] = sums

    def __add__(self, other: Calibration) -> Calibration:
        """Return the sums over the rows of both, for the names of either; `products` only if both have them."""
        if not isinstance(other, Calibration):
            return NotImplemented
        result = Calibration(products=self.products and other.products)
        for name in [*self, *(name for name in other if name not in self)]:
            sums = [calibration[name] for calibration in (self, other) if name in calibration]
            nothing = InputSums(sums[0].columns, products=result.products)
            try:
                result._sums[name] = nothing + sums[0] + sums[-1] if len(sums) == 2 else nothing + sums[0]
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error
        return result

    def save(self, path: PathLike) -> None:
        """Write the sums to a safetensors file, which appears when it is complete and on the disk.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        parts: list[Part] = []
        for name, sums in self._sums.items():
            parts += [part_of(f"{name}.sum", sums.sum), part_of(f"{name}.sum_squares", sums.sum_squares)]
            if sums.products is not None:
                parts.append(part_of(f"{name}.products", sums.products))
        about = {"version": _VERSION, "products": self.products, "rows": self.rows}
        write(path, parts, {CALIBRATION: json.dumps(about, ensure_ascii=False)})

    @classmethod
    def load(cls, path: PathLike) -> Calibration:
        """Read sums that `save` wrote.

        Parameters
        ----------
        path : path-like

        Returns
        -------
        Calibration

        Raises
        ------
        OSError
            If the file cannot be opened.
        ValueError
            If it is not a calibration, or damaged.
        """
        arrays, metadata = read_arrays(path)
        if CALIBRATION not in metadata:
            raise ValueError(f"{Path(path)}: is not a calibration, as fastopt.Calibration.save writes it")
        try:
            return cls._of(arrays, parse_json(metadata[CALIBRATION]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{Path(path)}: is a damaged calibration: {error}") from error

    @classmethod
    def _of(cls, arrays: Mapping[str, Array], about: dict[str, Any]) -> Calibration:
        if not isinstance(about, dict) or about["version"] != _VERSION:
            raise ValueError(f"expected version {_VERSION}, got {shown(about)}")
        if not isinstance(about["rows"], dict):
            raise ValueError(f"rows: expected a mapping, got {shown(about['rows'])}")
        result = cls(products=about["products"])
        for name, rows in about["rows"].items():
            total, squares = arrays[f"{name}.sum"], arrays[f"{name}.sum_squares"]
            products = arrays[f"{name}.products"] if result.products else None
            sums = InputSums(total.size)
            for array, shape in (
                (total, (total.size,)),
                (squares, (total.size,)),
                (products, (total.size, total.size)),
            ):
                if array is None:
                    continue
                if array.dtype != np.float64 or array.shape != shape:
                    raise ValueError(f"{name!r}: expected float64 of shape {shape}, got {array.dtype} of {array.shape}")
                if not np.isfinite(array).all():
                    raise ValueError(f"{name!r}: has NaN or infinity")
            if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0 or (squares < 0).any():
                raise ValueError(f"{name!r}: has negative sums of squares, or {rows!r} rows")
            sums.rows, sums.sum, sums.sum_squares = rows, np.array(total), np.array(squares)
            sums.products = None if products is None else np.array(products)
            result._sums[name] = sums
        return result
