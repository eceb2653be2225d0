"""Packed models in other people's runtimes: a module for each, and one function in front of them."""

import os
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastopt._types import Notify, PathLike
from fastopt.files.weights import Weights
from fastopt.formats import c, gguf, mlx, npz, onnx
from fastopt.models.model import open_model
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight

# Each has SUFFIX, of its files; SUMMARY, a line for help; OPTIONS, from keyword to `Option`; and
# `write(model, path, progress, **options)`.
FORMATS = {"c": c, "gguf": gguf, "mlx": mlx, "npz": npz, "onnx": onnx}


def export(
    model: Mapping[str, Weight] | PathLike,
    path: str | os.PathLike[str],
    *,
    to: str,
    exclude: str | Sequence[str] = (),
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
    exclude : glob pattern, or a sequence of these
        Tensors whose names match are left out.
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
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    known = FORMATS[to].OPTIONS
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"options: {to} has no {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if not isinstance(model, Mapping):
        model = open_model(model)
    names = _kept(model, (exclude,) if isinstance(exclude, str) else exclude)
    if len(names) < len(model):
        model = model.only(names) if isinstance(model, Weights) else {name: model[name] for name in names}
    sizes = model.sizes if isinstance(model, Weights) else {name: tensor.nbytes for name, tensor in model.items()}
    progress = Progress(sizes, notify)
    FORMATS[to].write(model, Path(path), progress, **options)
    progress.next("")


def _kept(names: Collection[str], exclude: Sequence[str]) -> list[str]:
    """Return the names that match no pattern; a pattern that matches none is an error."""
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude: no tensor matches {pattern!r}")
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
