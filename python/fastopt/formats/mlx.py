"""MLX: a safetensors file for its quantized layers, which read our codes in words of 32 bits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastopt._types import Array
from fastopt.files.safetensors_file import part_of
from fastopt.files.safetensors_file import write as write_arrays
from fastopt.formats.common import Option, cast_exactly, regroup
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight
from fastopt.tensors.quantized import QuantizedTensor

SUFFIX = ".safetensors"
SUMMARY = "a safetensors file for the quantized layers of MLX"
OPTIONS = {"param_dtype": Option("dtype of scales and biases, in which MLX decodes.", metavar="float32|float16")}

_GROUP_SIZES = (128, 64, 32)


def write(model: Mapping[str, Weight], path: Path, progress: Progress, *, param_dtype: DTypeLike = "float32") -> None:
    """Write ``NAME.weight`` in words of 32 bits, ``NAME.scales`` and ``NAME.biases`` for each tensor NAME.weight.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
    path : Path
    progress : Progress
    param_dtype : "float32" or "float16"
        The dtype of scales and biases, in which MLX decodes. float16 makes the file smaller, and the decoded weights
        are rounded to float16.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If MLX cannot hold a tensor; the message names it.
    """
    dtype = np.dtype(param_dtype)
    if dtype not in (np.float16, np.float32):
        raise ValueError(f"param_dtype: expected float32 or float16, got {dtype}")
    arrays: dict[str, Array] = {}
    about: dict[str, Any] = {}

    def add(name: str, array: Array) -> None:
        if name in arrays:
            raise ValueError(f"{name!r}: two arrays would be stored under this name; rename one")
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)

    for name, tensor in model.items():
        progress.next(name)
        if isinstance(tensor, np.ndarray):
            add(name, tensor)
        elif not isinstance(tensor, QuantizedTensor):
            raise ValueError(f"{name!r}: MLX has no sparse weights; unpack it, or pack it without sparsity")
        else:
            group_size, params = _groups(name, tensor)
            cast = cast_exactly(params, dtype)
            if cast is None:
                raise ValueError(f"{name!r}: has float32 parameters, which float16 cannot hold; take float32")
            layer, axes = name.removesuffix(".weight"), tensor.shape[:-1]
            add(name, np.ascontiguousarray(tensor.codes).view("<u4").reshape(*axes, -1))
            add(f"{layer}.scales", cast[0].reshape(*axes, -1))
            add(f"{layer}.biases", cast[1].reshape(*axes, -1))
            about[layer] = {"bits": tensor.bits, "group_size": group_size}
    parts = [part_of(name, array) for name, array in arrays.items()]
    write_arrays(path, parts, {"format": "mlx", "quantization": json.dumps(about)})


def _groups(name: str, tensor: QuantizedTensor) -> tuple[int, tuple[Array, Array]]:
    """Return a group size that MLX has, with scale and minimum of each group, or raise."""
    if tensor.outliers is not None:
        raise ValueError(f"{name!r}: MLX has no outliers; pack it without them")
    for size in _GROUP_SIZES:
        params = regroup(tensor, size) if len(tensor.shape) > 1 and tensor.shape[-1] % size == 0 else None
        if params is not None:
            return size, params
    fits = len(tensor.shape) > 1 and tensor.shape[-1] % _GROUP_SIZES[-1] == 0
    way_out = "pack it in groups of 32" if fits else "keep it unpacked (exclude it when you pack)"
    raise ValueError(
        f"{name!r}: MLX has weights of two or more axes whose last one is made of groups of 32, 64 or 128, "
        f"got shape {tensor.shape} and group_size {tensor.group_size}; {way_out}"
    )
