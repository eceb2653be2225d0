"""Checks of arguments that every layer shares."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastopt._types import FLOATS, Array, GroupSize

# What real weights need: 8 bits a pair of parameters a row, 4 and 2 bits one a group.
DEFAULT_GROUP_SIZE = {8: -1, 4: 32, 2: 16}
FLAGS = {
    "amsgrad",
    "centered",
    "keep_zeros",
    "master_weights",
    "maximize",
    "nesterov",
    "stochastic_rounding",
}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that an array of any shape is seen as: the first axis, and all others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def require_bits(bits: int) -> int:
    """Return `bits`, or raise."""
    if isinstance(bits, bool) or not hasattr(bits, "__index__"):
        raise TypeError(f"bits: expected 8, 4 or 2, got {bits!r}")
    if bits not in DEFAULT_GROUP_SIZE:
        raise ValueError(f"bits: expected 8, 4 or 2, got {bits!r}")
    return operator.index(bits)


def require_group_size(group_size: GroupSize, bits: int) -> int | None:
    """Return `group_size` with its default filled in, or raise."""
    if isinstance(group_size, str) and group_size == "auto":
        return DEFAULT_GROUP_SIZE[bits]
    if group_size is None:
        return None
    if isinstance(group_size, bool | str) or not hasattr(group_size, "__index__"):
        raise TypeError(f"group_size: expected an integer, None or 'auto', got {group_size!r}")
    size = operator.index(group_size)
    if (size < 1 and size != -1) or size >= 1 << 62:
        raise ValueError(f"group_size: expected a positive number, -1 (a row) or None (the whole tensor), got {size}")
    return size


def as_float_array(w: ArrayLike, name: str) -> Array:
    """Return `w` as an array of a float type, or raise."""
    array = np.asarray(w)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {array.dtype}")
    return array


def matrix_of_out(out: Array, shape: tuple[int, ...]) -> Array:
    """Return `out` seen as the matrix that the kernels fill, without a copy, or raise."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out: must be C-contiguous; got strides {out.strides}")
    return out.reshape(as_matrix(shape))


def require(condition: bool, name: str, needed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {needed}, got {got!r}")


def is_number(x: object) -> bool:
    return isinstance(x, int | float | np.floating | np.integer) and not isinstance(x, bool)


def as_float(value: Any, name: str) -> float:
    """Return a number as Python's float: NumPy's narrower ones would make the arithmetic between steps narrower."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def require_number(options: MutableMapping[str, Any], name: str) -> float:
    """Return an option that must be a finite number, 0 or more, and keep it as a float."""
    value = as_float(options[name], name)
    require(math.isfinite(value) and value >= 0, name, "a finite number, 0 or more", options[name])
    options[name] = value
    return value


def require_count(options: Mapping[str, Any], name: str, what: str) -> int:
    """Return an entry of a saved state that must be a number of steps."""
    value = options.get(name)
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0
    require(bool(fits), what, "a whole number, 0 or more", value)
    return operator.index(value)  # type: ignore[arg-type]  # an integer, as was found


def require_flags(options: Mapping[str, Any]) -> None:
    """Refuse what is not a bool where only a bool makes sense."""
    for name in FLAGS & options.keys():
        if not isinstance(options[name], bool | np.bool_):
            raise TypeError(f"{name}: expected a bool, got {type(options[name]).__name__}")


def require_betas(options: MutableMapping[str, Any]) -> None:
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or not all(is_number(b) for b in betas):
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", "two numbers in [0, 1)", betas)
    options["betas"] = tuple(float(b) for b in betas)  # no list, which could be changed unseen
