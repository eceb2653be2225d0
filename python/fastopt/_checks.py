"""Checks of arguments that every layer shares."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastopt._text import shown
from fastopt._types import BITS, DEFAULT_GROUP_SIZE, FLOATS, Array, GroupSize

_BITS_TEXT = f"{', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
_FLOATS_TEXT = f"{', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
# Halfway from the largest number to the next, which rounds to infinity, lies just above.
_LARGEST = {"float16": float.fromhex("0x1.ffdffep15"), "bfloat16": float.fromhex("0x1.fefffep127")}
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
BELOW_ONE = 1 - 2.0**-25  # what is not below it is rounded to 1 in float32
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
    """Return the shape of the matrix that an array is seen as: the first axis by all others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def require_real(value: Any, name: str) -> None:
    """Raise if an argument is neither None nor a number."""
    if value is not None and not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def as_index(value: Any, name: str, needed: str = "an integer") -> int:
    """Return an integer of Python or NumPy as an int, or raise; a bool does not count as one."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected {needed}, got {shown(value)}")


def require_bits(bits: int) -> int:
    """Return `bits` as an int, or raise."""
    width = as_index(bits, "bits", _BITS_TEXT)
    if width not in BITS:
        raise ValueError(f"bits: expected {_BITS_TEXT}, got {shown(bits)}")
    return width


def require_array(array: Any, name: str) -> Array:
    """Return `array`, or raise if it is not a NumPy array."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    return array


def require_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of ints, or raise."""
    if not isinstance(shape, tuple):
        raise TypeError(f"shape: expected a tuple of integers, got {shown(shape)}")
    sizes = tuple(as_index(size, "shape", "a tuple of integers") for size in shape)
    if min(sizes, default=0) < 0 or math.prod(max(size, 1) for size in sizes) >= 1 << 62:
        raise ValueError(f"shape: expected sizes of 0 or more that memory could hold, got {shown(shape)}")
    return sizes


def require_group_size(group_size: GroupSize, bits: int) -> int | None:
    """Return `group_size` with its default filled in, or raise."""
    if isinstance(group_size, str) and group_size == "auto":
        return DEFAULT_GROUP_SIZE[bits]
    if group_size is None:
        return None
    size = as_index(group_size, "group_size", "an integer, None or 'auto'")
    if (size < 1 and size != -1) or size >= 1 << 62:
        raise ValueError(f"group_size: expected a positive number, -1 (a row) or None (the whole tensor), got {size}")
    return size


def require_param_dtype(param_dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype of scale and minimum, or raise."""
    dtype: np.dtype[Any] | None
    try:
        dtype = np.dtype(param_dtype)
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or dtype not in (np.float16, np.float32):
        raise ValueError(f"param_dtype: expected float16 or float32, got {shown(param_dtype)}")
    return dtype


def require_float_dtype(dtype: Any, name: str) -> np.dtype[Any]:
    """Return a dtype of weights in the byte order of the machine, or raise."""
    found: np.dtype[Any] | None
    try:
        found = np.dtype(dtype).newbyteorder("=")
    except (TypeError, ValueError):
        found = None
    if dtype is None or found is None or found.name not in FLOATS:
        raise TypeError(f"{name}: expected {_FLOATS_TEXT}, got {shown(dtype)}")
    return found


def as_any_array(value: ArrayLike, name: str) -> Array:
    """Return `value` as an array, or raise."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal lengths, tensors on a GPU ...
        raise TypeError(f"{name}: cannot become an array: {error}") from error


def as_float_array(w: ArrayLike, name: str) -> Array:
    """Return `w` as an array of a float type, or raise."""
    array = as_any_array(w, name)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected {_FLOATS_TEXT}, got {array.dtype}")
    return array


def as_float32(array: Any, name: str) -> Array:
    """Return an array of a float type as float32, or raise if it is of another type or float32 cannot hold it."""
    x = as_float_array(array, name)
    with np.errstate(over="ignore"):
        result = x.astype(np.float32, copy=False)
    if x.dtype.itemsize > 4 and (lost := np.isinf(result) & np.isfinite(x)).any():
        raise ValueError(f"{name}: expected values that float32 can hold, got {x[lost][0]}")
    return result


def largest_of(dtype: np.dtype[Any]) -> float:
    """Return the largest float32 that a dtype of weights rounds to a finite number."""
    return _LARGEST.get(dtype.name, FLOAT32_MAX)


def matrix_of_out(out: Array, shape: tuple[int, ...]) -> Array:
    """Return `out` as the matrix that the kernels fill, without a copy, or raise."""
    require_array(out, "out")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out: must be C-contiguous; got strides {out.strides}")
    if not out.flags.writeable:
        raise ValueError("out: is read-only, but is to be changed in place")
    return out.reshape(as_matrix(shape))


def require(condition: bool, name: str, needed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {needed}, got {shown(got)}")


def is_number(x: object) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_scalar_array(x: Any) -> bool:
    """Return whether `x` is a real number in an array or tensor without axes, as NumPy, torch and jax make them."""
    kind = str(getattr(x, "dtype", "")).rpartition(".")[2]  # torch says torch.float32
    return kind.startswith(("float", "bfloat", "int", "uint")) and tuple(getattr(x, "shape", (0,))) == ()


def as_float(value: Any, name: str) -> float:
    """Return a number as a Python float; NumPy's narrower types would round the arithmetic between steps."""
    if not is_number(value) and not is_scalar_array(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def require_number(options: MutableMapping[str, Any], name: str) -> float:
    """Return an option that must be a finite number, 0 or more; store it as a float."""
    value = as_float(options[name], name)
    require(math.isfinite(value) and value >= 0, name, "a finite number, 0 or more", options[name])
    options[name] = value
    return value


def require_count(options: Mapping[str, Any], name: str, what: str) -> int:
    """Return a saved number of steps, or raise."""
    value = options.get(name)
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0
    require(bool(fits), what, "a whole number, 0 or more", value)
    require(value < 1 << 62, what, "a number below 2**62", value)  # type: ignore[operator]
    return operator.index(value)  # type: ignore[arg-type]  # checked above


def require_flags(options: Mapping[str, Any]) -> None:
    """Raise if an option that must be a bool is not one."""
    for name in FLAGS & options.keys():
        if not isinstance(options[name], bool | np.bool_):
            raise TypeError(f"{name}: expected a bool, got {type(options[name]).__name__}")


def require_betas(options: MutableMapping[str, Any]) -> None:
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or not all(is_number(b) or is_scalar_array(b) for b in betas):
        raise TypeError(f"betas: expected two numbers, got {shown(betas)}")
    pair = tuple(as_float(b, "betas") for b in betas)  # a list could be changed later
    require(len(pair) == 2 and all(0 <= b < 1 for b in pair), "betas", "two numbers in [0, 1)", betas)
    options["betas"] = pair


def require_float32(options: Mapping[str, Any]) -> None:
    """Raise if float32 arithmetic, which flushes subnormal numbers to zero, would make another number of an option.

    Two may become zero: a learning rate, as schedules end there, and `eps`, which the kernels do not let be less than
    the smallest normal number.
    """
    for name, value in options.items():
        for number in value if name == "betas" else (value,):
            if not isinstance(number, float):
                continue
            require(abs(number) <= FLOAT32_MAX, name, f"at most {FLOAT32_MAX:.8g}, which float32 can hold", value)
            lost = 0 < abs(number) < FLOAT32_TINY and name not in ("lr", "eps")
            require(not lost, name, f"0, or at least {FLOAT32_TINY:.8g}, which float32 can hold", value)
            if name in ("betas", "alpha"):
                require(number < BELOW_ONE, name, "less than 1 in float32, where it is rounded to 1", value)
