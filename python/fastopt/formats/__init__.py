"""Formats of other runtimes: a module for each, and `export` in front of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastopt._text import shown
from fastopt._types import Notify, PathLike
from fastopt.files.sources import READERS
from fastopt.files.weights import Weights
from fastopt.formats import c, gguf, mlx, npz, onnx
from fastopt.formats.onnx_weights import onnx_sources
from fastopt.models.model import open_model
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight

# Each module has SUFFIX, the suffix of its files; SUMMARY, a phrase for --help; OPTIONS, a dict from keyword to
# `Option`; and `write(model, path, progress, **options)`.
FORMATS = {"c": c, "gguf": gguf, "mlx": mlx, "npz": npz, "onnx": onnx}
READERS[onnx.SUFFIX] = onnx_sources


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

    Codes, scales and minima are copied unchanged: the other runtime decodes the same weights. A tensor that the format
    cannot hold is an error; nothing is requantized unless you ask for it.

    Parameters
    ----------
    model : PackedModel, mapping from name to array, QuantizedTensor or SparseTensor, or path-like
    path : path-like
        The file to write. An existing file is replaced when the new one is complete.
    to : str
        The format. "c": constant arrays in BASE.c, with BASE.h and a copy of fastopt.h, which multiplies with them on
        any machine. "gguf": for ggml and llama.cpp; 4 and 2 bits in groups of 32, or of a multiple. "mlx": a
        safetensors file for the quantized layers of MLX; groups of 32, 64, 128 or a multiple. "npz": arrays for NumPy,
        for inspection: decoded weights, and the parts that store them. "onnx": a model that runs, made from a `graph`
        of layers, or one whose outputs are the decoded tensors; any bits, groups, outliers and sparse weights.
    exclude : glob pattern, or a sequence of these
        Tensors whose names match are left out.
    notify : callable, optional
        Called with the bytes done, the bytes in total, and the name of the next tensor, "" at the end.
    **options
        Options of the format. "gguf": ``requantize=True`` decodes tensors that the format cannot hold and stores them
        as Q8_0; ``architecture`` is the file's ``general.architecture``. "mlx": ``param_dtype="float16"`` makes the
        file smaller, and MLX decodes in float16. "onnx": ``graph``, a list of `Layer` (dense), `Add` and `Concat` as
        for `shrink`, makes a model with the input ``x`` [batch, in]; ``fast=True`` multiplies with MatMulNBits, an
        operator of ONNX Runtime, instead of standard operators; ``accuracy_level=4`` lets it round x to int8.

    Raises
    ------
    ImportError
        If the package that writes the format is not installed.
    OSError
        If the file cannot be written.
    TypeError, ValueError
        If `to` or an option is unknown, or the format cannot hold a tensor; the message names the tensor and says
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
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {shown(to)}")
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
