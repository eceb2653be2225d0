"""Weights for Keras, written with h5py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastopt.files.atomic import replacing
from fastopt.formats.common import Option, require_package
from fastopt.formats.keras_weights import METADATA, Layout
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked

SUFFIX = ".h5"
SUMMARY = "weights of a model that came from a file of Keras, decoded, for its load_weights"
OPTIONS: dict[str, Option] = {}


def write(model: Mapping[str, Weight], path: Path, progress: Progress) -> None:
    """Write the decoded weights in the layout of the file that they came from.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
        One that came from a ``.keras`` or ``.h5`` file, whose layout is in its metadata.
    path : Path
        Its name ends in ``.weights.h5`` for the layout of Keras 3, and in ``.h5`` for the older one, as Keras wants.
    progress : Progress

    Raises
    ------
    ImportError
        If h5py is not installed.
    OSError
        If the file cannot be written.
    ValueError
        If the model did not come from a file of Keras, or the name has another ending.
    """
    require_package("h5py")
    import h5py

    text = getattr(model, "metadata", {}).get(METADATA)
    if text is None:
        raise ValueError(
            "model: expected one that came from a .keras or .h5 file, whose layout Keras wants to see again"
        )
    layout = Layout.from_json(text)
    if not layout.groups:
        raise ValueError("model: came from a Keras model in memory; put the weights back by its method assign")
    if not path.name.endswith(".h5") or path.name.endswith(".weights.h5") is not layout.numbers:
        suffix = ".weights.h5" if layout.numbers else ".h5, and not in .weights.h5"
        raise ValueError(f"{path}: Keras loads this layout from a file whose name ends in {suffix}")
    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as file:  # it is locked already
        for group, attributes in layout.groups.items():
            place = file.require_group(group) if group else file
            for key, value in attributes.items():
                place.attrs[key] = value if isinstance(value, str) else _bytes(value)
        for name, tensor in model.items():
            progress.next(name)
            array = unpacked(tensor)
            if name in layout.turned:
                if len(layout.turned[name]) != array.ndim:
                    raise ValueError(f"{name!r}: has {array.ndim} axes, the file had {len(layout.turned[name])}")
                array = array.transpose(np.argsort(layout.turned[name]))
            dataset = file.create_dataset(name, data=np.ascontiguousarray(array).reshape(array.shape))
            if array.dtype.name == "bfloat16":
                dataset.attrs["dtype"] = "bfloat16"  # HDF5 does not know it


def _bytes(texts: Any) -> Any:
    return np.array([str(text).encode() for text in texts]) if texts else np.array([], "S1")
