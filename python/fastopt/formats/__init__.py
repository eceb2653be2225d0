"""Packed models in other people's runtimes: a module for each, and one function in front of them."""

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastopt._checks import as_matrix
from fastopt._types import Array, Notify, PathLike
from fastopt.files.weights import Weights
from fastopt.models.model import open_model
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight
from fastopt.tensors.quantized import QuantizedTensor

# Each is a module here with a function `write(model, path, progress, **options)`.
TARGETS = ("c", "gguf", "mlx", "npz", "onnx")


def export(
    model: Mapping[str, Weight] | PathLike,
    path: str | os.PathLike[str],
    *,
    to: str,
    notify: Notify | None = None,
    **options: Any,
) -> None:
    """Write a model in the format of another runtime.

    Codes, scales and minima are taken over as they are: the other runtime decodes the same weights. What a format
    cannot hold is refused by the name of the tensor, and never quantized anew unless that is asked for.

    Parameters
    ----------
    model : PackedModel, mapping from name to array, QuantizedTensor or SparseTensor, or path-like
    path : path-like
        Replaced when the file is complete.
    to : str
        "c": constant arrays in BASE.c, beside BASE.h and fastopt.h, which multiplies with them on any machine. "gguf":
        ggml's and llama.cpp's; 4 and 2 bits in groups of 32, or of a multiple. "mlx": a safetensors file for MLX's
        quantized layers; groups of 32, 64, 128 or a multiple. "npz": NumPy's, to look into: decoded weights, and what
        they are stored as. "onnx": a model that runs, of a `graph` of layers, or with every tensor as an output; any
        bits, groups, outliers and sparse weights.
    notify : callable, optional
        Called with the bytes of the model that are done, those of all, and the name of the tensor that is next, "" at
        the end.
    **options
        Of the target. "gguf": ``requantize=True`` decodes what the format cannot say and stores it as Q8_0, else that
        is an error; ``architecture`` is a text for the file's head. "mlx": ``param_dtype="float16"`` makes the file
        smaller, and MLX decode in float16. "onnx": ``graph``, a list of `Layer` (dense), `Add` and `Concat` as for
        `shrink`, makes a model from ``x`` [batch, in]; ``fast=True`` multiplies by ONNX Runtime's MatMulNBits instead
        of standard operators, and ``accuracy_level=4`` lets that round x to int8.

    Raises
    ------
    ImportError
        If the package that writes the format is not installed.
    OSError
        If the file cannot be written.
    TypeError, ValueError
        If `to` or an option is unknown, or a tensor cannot be told in that format; the message names it and says
        what to do.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> model = fo.pack({"w": 15 * np.eye(64, dtype=np.float32)}, bits=4)
    >>> fo.export(model, "model.npz", to="npz")
    >>> np.load("model.npz")["w.codes"].shape  # one a byte
    (64, 64)
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    write = import_module(f"fastopt.formats.{to}").write
    known = [name for name, p in inspect.signature(write).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise TypeError(f"options: {to} has no {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if not isinstance(model, Mapping):
        model = open_model(model)
    sizes = model.sizes if isinstance(model, Weights) else {name: tensor.nbytes for name, tensor in model.items()}
    progress = Progress(sizes, notify)
    write(model, Path(path), progress, **options)
    progress.next("")


def require_package(name: str) -> None:
    """Raise ImportError, with what to install, unless there is a package of that name."""
    if find_spec(name) is None:
        raise ImportError(f"this export needs {name}: pip install 'fastopt[export]'")


def regroup(q: QuantizedTensor, size: int) -> tuple[Array, Array] | None:
    """Return scale and minimum of every `size` columns, or None where these do not share them.

    The last of a row may be fewer.
    """
    rows, cols = as_matrix(q.shape)
    own = cols if q.group_size in (None, -1) else q.group_size
    if own % size and own < cols:
        return None
    groups = -(-cols // size)
    if q.group_size is None:
        return np.broadcast_to(q.scale, (rows, groups)), np.broadcast_to(q.minimum, (rows, groups))
    times = -(-own // size)
    return q.scale.repeat(times, axis=1)[:, :groups], q.minimum.repeat(times, axis=1)[:, :groups]


def cast_exactly(params: tuple[Array, Array], dtype: DTypeLike) -> tuple[Array, Array] | None:
    """Return scale and minimum in another dtype, or None if it does not hold them."""
    with np.errstate(over="ignore"):
        scale, minimum = (array.astype(dtype, copy=False) for array in params)
    same = np.array_equal(scale, params[0]) and np.array_equal(minimum, params[1])
    return (scale, minimum) if same else None
