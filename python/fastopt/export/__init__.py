"""Packed models in other people's runtimes: a module for each, and one function in front of them."""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from fastopt.linear import Weight

# Called with the name of each tensor that is written, how many are done, and how many there are.
Notify: TypeAlias = Callable[[str, int, int], None]

# Each is a module here with a function `write(model, path, notify, **options)`.
TARGETS = ("npz",)


def export(
    model: Mapping[str, Weight],
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
    model : PackedModel, or mapping from name to array, QuantizedTensor or SparseTensor
    path : path-like
        Replaced when the file is complete.
    to : str
        "npz": NumPy's, to look into: decoded weights, and what they are stored as.
    notify : callable, optional
        Called with the name of each tensor when it is written, how many are, and how many there are.
    **options
        Of the target; see above.

    Raises
    ------
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
    import_module(f"fastopt.export.{to}").write(model, Path(path), notify or _ignore, **options)


def _ignore(name: str, done: int, total: int) -> None:
    pass
