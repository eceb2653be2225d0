"""Types that every layer shares."""

import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
# Bits of a code.
BITS = (8, 4, 2)
Bits: TypeAlias = Literal[8, 4, 2]
GroupSize: TypeAlias = "int | Literal['auto'] | None"
# Dtypes of weights.
FLOATS = ("float32", "float64", "float16", "bfloat16")
PathLike: TypeAlias = str | os.PathLike[str]
# Called with the number of bytes done, the number of all bytes, and the name of the next tensor.
Notify: TypeAlias = Callable[[int, int, str], None]
