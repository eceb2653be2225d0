"""Types that every layer shares."""

import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
# Bits of a code.
BITS = (8, 6, 5, 4, 3, 2)
Bits: TypeAlias = Literal[8, 6, 5, 4, 3, 2]
# The default number of neighbours that share a scale and minimum; -1 is a row. Real weights need a pair for each row
# with 8 bits, and for each group with fewer. Groups of the non-zeros of a sparse weight run through the rows.
DEFAULT_GROUP_SIZE = {8: -1, 6: 64, 5: 32, 4: 32, 3: 32, 2: 64}
SPARSE_GROUP_SIZE = {8: 128, 6: 64, 5: 32, 4: 32, 3: 32, 2: 16}
GroupSize: TypeAlias = "int | Literal['auto'] | None"
# With fewer bits, "auto" is least squares: it halves the loss of real models, and lets 2 bits have groups of 64.
LSQ_BELOW = 4
# How scale and minimum follow from the values of a group.
FITS = ("auto", "minmax", "lsq", "gptq")
Fit: TypeAlias = Literal["auto", "minmax", "lsq", "gptq"]
# Dtypes of weights.
FLOATS = ("float32", "float64", "float16", "bfloat16")
PathLike: TypeAlias = str | os.PathLike[str]
# Called with the number of bytes done, the number of all bytes, and the name of the next tensor.
Notify: TypeAlias = Callable[[int, int, str], None]
