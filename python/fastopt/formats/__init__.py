"""Formats of other runtimes: a module for each, and `export` in front of them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastopt._text import proposal, shown
from fastopt._types import Notify, PathLike
from fastopt.files.sources import READERS, Reader
from fastopt.files.torch_files import without_tensors
from fastopt.files.weights import Weights
from fastopt.formats import c, gguf, keras, mlx, npz, onnx
from fastopt.formats.c_net import Cost
from fastopt.formats.gguf_weights import gguf_sources
from fastopt.formats.keras_weights import MEMBER, METADATA, import_keras, keras_sources, restore_keras
from fastopt.formats.onnx_weights import onnx_sources
from fastopt.formats.sklearn import import_sklearn
from fastopt.models.model import IMPORTERS, RESTORERS, PackedModel, open_model
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight

# Each module has SUFFIX, the suffix of its files; SUMMARY, a phrase for --help; OPTIONS, a dict from keyword to
# `Option`; and `write(model, path, progress, **options)`.
FORMATS = {"c": c, "gguf": gguf, "keras": keras, "mlx": mlx, "npz": npz, "onnx": onnx}
READERS[onnx.SUFFIX] = Reader(lambda path, skipped: (onnx_sources(path, skipped), {}))
READERS[gguf.SUFFIX] = Reader(gguf_sources, b"GGUF")
READERS[".keras"] = Reader(keras_sources, member=MEMBER)
READERS[".h5"] = READERS[".hdf5"] = Reader(keras_sources, b"\x89HDF\r\n\x1a\n")
IMPORTERS += [import_keras, import_sklearn]
RESTORERS[METADATA] = restore_keras


def export(
    model: Mapping[str, Weight] | PathLike,
    path: str | os.PathLike[str],
    *,
    to: str,
    exclude: str | Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    notify: Notify | None = None,
    **options: Any,
) -> Cost | None:
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
        any machine; with a `graph` of layers a function ``BASE_run`` too, which computes the network. "gguf": for ggml
        and llama.cpp; 2 to 5 bits in groups of 32, or of a multiple. A model that came from a GGUF file keeps its
        metadata, so that it runs where the source ran. "keras": the decoded weights of a model that came from a file of
        Keras, for its ``load_weights``. "mlx": a safetensors file for the quantized layers of MLX; groups of 32, 64,
        128 or a multiple. "npz": arrays for NumPy, for inspection: decoded weights, and the parts that store them.
        "onnx": a model that runs, made from a `graph` of layers, or one whose outputs are the decoded tensors; any
        bits, groups, outliers and sparse weights.
    exclude : glob pattern, or a sequence of these
        Tensors whose names match are left out.
    rename : mapping of str, optional
        Texts that are replaced in all names, in this order, as GGUF has no names of more than 63 bytes.
    notify : callable, optional
        Called with the bytes done, the bytes in total, and the name of the next tensor, "" at the end.
    **options
        Options of the format. "c": ``graph``, a list of `Layer`, `Add` and `Concat` with one output; ``input_shape``,
        the shape of x without the batch, unless the first layer is dense; ``onnx``, the path of the ONNX model that the
        weights are of, instead of a graph (by default the source, if that is one; ``arrays=True`` writes the arrays
        alone); ``int8=True`` writes ``BASE_run_int8`` too,
        which multiplies whole numbers; ``dry_run=True`` writes nothing. "gguf": ``requantize=True`` decodes tensors
        that the format cannot hold and stores them as Q8_0; ``architecture`` is the file's ``general.architecture``.
        "mlx": ``param_dtype="float16"`` makes the file smaller, and MLX decodes in float16. "onnx": ``graph``, a list
        of `Layer`, `Add` and `Concat` as for `shrink`, makes a model with the input ``x`` [batch, ...];
        ``fast=True`` multiplies with MatMulNBits, an operator of ONNX Runtime, instead of standard operators;
        ``accuracy_level=4`` lets it round x to int8.

    Returns
    -------
    Cost or None
        For a network in C: ``flash``, ``scratch`` and ``macs``, the bytes of its constants and of its scratch and the
        multiply-adds of a run, ``input_bytes`` and ``output_bytes``, and ``steps`` with a name, function, shape, flash
        and macs of each operation.

    Raises
    ------
    ImportError
        If the package that writes the format is not installed.
    OSError
        If the file cannot be written.
    TypeError, ValueError
        If `to` or an option is unknown, or the format cannot hold a tensor; the message names the tensor and says
        what to do.

    Warns
    -----
    UserWarning
        If no runtime can run the file, but only read its tensors.

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
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {shown(to)}{proposal(to, FORMATS)}")
    known = FORMATS[to].OPTIONS
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"options: {to} has no {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if isinstance(model, Mapping):
        model = without_tensors(model)
    else:
        options, model = with_network(to, model, options), open_model(model)
    names = _kept(model, (exclude,) if isinstance(exclude, str) else exclude)
    if len(names) < len(model):
        kept = {name: model[name] for name in names} if not isinstance(model, Weights) else {}
        model = model.only(names) if isinstance(model, Weights) else PackedModel(kept, None, _metadata(model))
    if rename:
        model = _renamed(model, rename)
    sizes = model.sizes if isinstance(model, Weights) else {name: tensor.nbytes for name, tensor in model.items()}
    progress = Progress(sizes, notify)
    cost: Cost | None = FORMATS[to].write(model, Path(path), progress, **options)
    progress.next("")
    if to == "onnx" and not options.get("graph"):
        warnings.warn(
            f"{path}: without graph (--layer) the model has no input: each decoded tensor is an output, and no runtime "
            "computes anything with it",
            stacklevel=2,
        )
    return cost


def with_network(to: str, source: PathLike, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the network that C code is written of, where the source is an ONNX model."""
    own = to == "c" and Path(source).suffix == onnx.SUFFIX and "graph" not in options
    return {**({"onnx": source} if own else {}), **options}


def _renamed(model: Mapping[str, Weight], rename: Mapping[str, str]) -> Mapping[str, Weight]:
    """Return a model with texts in its names replaced, or raise if that changes nothing or makes two names equal."""
    names = {name: name for name in model}
    for old, new in rename.items():
        if not old or not any(old in name for name in names.values()):
            raise ValueError(f"rename: no name of a tensor has {old!r}")
        names = {name: to.replace(old, new) for name, to in names.items()}
    for to, count in Counter(names.values()).items():
        if count > 1:
            raise ValueError(f"rename: {count} tensors would have the name {to!r}")
    if isinstance(model, Weights):
        return model.renamed(names)
    return PackedModel({to: model[name] for name, to in names.items()}, None, _metadata(model))


def _metadata(model: Mapping[str, Weight]) -> Mapping[str, str]:
    found: Mapping[str, str] = getattr(model, "metadata", {})
    return found


def _kept(names: Collection[str], exclude: Sequence[str]) -> list[str]:
    """Return the names that match no pattern; a pattern that matches none is an error."""
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude: no tensor matches {pattern!r}")
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
