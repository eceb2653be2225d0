"""NumPy's npz, for inspection: every weight decoded, and the parts that store it."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fastopt._types import Array
from fastopt.files.atomic import replacing
from fastopt.formats.common import Option, codes_matrix
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor

SUFFIX = ".npz"
SUMMARY = "arrays for NumPy, decoded and in parts"
OPTIONS: dict[str, Option] = {}


def write(model: Mapping[str, Weight], path: Path, progress: Progress) -> None:
    """Write ``NAME``, decoded, and ``NAME.codes`` (one a byte), ``NAME.scale`` ... for each tensor.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
    path : Path
    progress : Progress

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If two arrays would be stored under one name.
    """
    written: set[str] = set()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        for name, tensor in model.items():
            progress.next(name)
            for part, array in _parts(name, tensor):
                if part in written:
                    raise ValueError(f"{part!r}: two arrays would be stored under this name; rename one")
                written.add(part)
                # A file of NumPy has no bfloat16; float32 holds every value.
                known = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
                with archive.open(f"{part}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, known, allow_pickle=False)


def _parts(name: str, tensor: Weight) -> Iterator[tuple[str, Array]]:
    yield name, unpacked(tensor)
    if isinstance(tensor, QuantizedTensor):
        yield from _quantized_parts(name, tensor)
    elif isinstance(tensor, SparseTensor):
        yield f"{name}.positions", tensor.positions
        yield f"{name}.row_offsets", tensor.row_offsets
        yield f"{name}.values", unpacked(tensor.values)
        if isinstance(tensor.values, QuantizedTensor):
            yield from _quantized_parts(f"{name}.values", tensor.values)


def _quantized_parts(name: str, q: QuantizedTensor) -> Iterator[tuple[str, Array]]:
    one_level = q.one_level()
    yield f"{name}.codes", codes_matrix(q).reshape(q.shape)
    yield f"{name}.scale", one_level.scale
    yield f"{name}.minimum", one_level.minimum
    if q.outliers is not None:
        yield f"{name}.outlier_index", q.outliers.indices
        yield f"{name}.outlier_value", q.outliers.values
