"""Helpers that several formats use: they declare options, and read groups of codes."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastopt._checks import as_matrix
from fastopt._types import Array
from fastopt.tensors.quantized import QuantizedTensor, unpacked_rows


class Option(NamedTuple):
    """A keyword of a format's `write`, as the command line offers it.

    Attributes
    ----------
    help : str
    kind : type
        bool, int, str or list (which may be repeated).
    metavar : str, optional
        The placeholder of the value in --help.
    flag : str, optional
        The name on the command line, such as "--layer"; by default the keyword.
    parse : callable, optional
        Makes a value of each text of a list.
    """

    help: str
    kind: type = str
    metavar: str | None = None
    flag: str | None = None
    parse: Callable[[str], Any] = str


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse ``N,N,...``."""
    try:
        return tuple(int(number) for number in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f"input_shape: expected numbers with commas, such as 1,28,28, got {text!r}") from None


def require_package(name: str) -> None:
    """Raise ImportError, with what to install, unless there is a package of that name."""
    if find_spec(name) is None:
        raise ImportError(f"this needs {name}: pip install {name}")


def regroup(q: QuantizedTensor, size: int) -> tuple[Array, Array] | None:
    """Return scale and minimum of every `size` columns, or None where these do not share them.

    The last group of a row may be shorter.
    """
    q = q.one_level()
    rows, cols = as_matrix(q.shape)
    own = cols if q.group_size in (None, -1) else q.group_size
    if own % size and own < cols:
        return None
    groups = -(-cols // size)
    if q.group_size is None:
        return np.broadcast_to(q.scale, (rows, groups)), np.broadcast_to(q.minimum, (rows, groups))
    times = -(-own // size)
    return q.scale.repeat(times, axis=1)[:, :groups], q.minimum.repeat(times, axis=1)[:, :groups]


def codes_matrix(q: QuantizedTensor) -> NDArray[np.uint8]:
    """Return the codes, one a byte, as a matrix of rows and columns."""
    return unpacked_rows(q.codes, q.bits, as_matrix(q.shape)[1])


def cast_exactly(params: tuple[Array, Array], dtype: DTypeLike) -> tuple[Array, Array] | None:
    """Return scale and minimum in another dtype, or None if it does not hold them."""
    with np.errstate(over="ignore"):
        scale, minimum = (array.astype(dtype, copy=False) for array in params)
    same = np.array_equal(scale, params[0]) and np.array_equal(minimum, params[1])
    return (scale, minimum) if same else None
