"""Types that every layer shares."""

import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Bits: TypeAlias = Literal[8, 4, 2]
GroupSize: TypeAlias = "int | Literal['auto'] | None"
# Dtypes of weights.
FLOATS = ("float32", "float64", "float16", "bfloat16")
PathLike: TypeAlias = str | os.PathLike[str]
# Called with the bytes that are done, those of all, and the name of the tensor that comes next.
Notify: TypeAlias = Callable[[int, int, str], None]
