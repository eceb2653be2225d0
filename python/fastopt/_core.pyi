"""The extension module. Array arguments are checked there; what is written is written in place."""

from typing import Any

from numpy.typing import NDArray

__version__: str
threaded: bool
compiler: str
NON_FINITE: int
HALF_MISFIT: int
BEYOND: int
SLAB_COLUMNS: int
SUMS: dict[str, int]

_Array = NDArray[Any]

def isa() -> str: ...
def available_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def use_openmp(parallel: int, max_threads: int, thread_num: int) -> None: ...
def rule(name: str) -> int: ...
def positive_states(rule: int) -> int: ...
def hyper(
    *,
    step_size: float,
    weight_decay: float = 0.0,
    decay: float = 1.0,
    decay1: float = 0.0,
    blend1: float = 1.0,
    decay2: float = 0.0,
    blend2: float = 1.0,
    eps: float = 0.0,
) -> tuple[float, ...]: ...
def job(
    *,
    rule: int,
    hyper: tuple[float, ...],
    grad_scale: float,
    shrink: float,
    keep_zeros: bool,
    stochastic: bool,
    noise: int,
    names: list[str],
    params: list[Any],
    grads: list[Any],
    states: list[tuple[Any, ...]],
    counts: list[int],
    indices: list[int] | None,
) -> tuple[Any, ...]: ...
def step(jobs: list[Any], steps: list[int], /) -> None: ...
def step_unchanged(kept: list[Any], param_groups: list[dict[str, Any]], grads: Any, steps: list[int], /) -> bool: ...
def sum_squares(names: list[Any], grads: list[Any]) -> float: ...
def quantize(
    x: _Array,
    codes: _Array,
    scale: _Array,
    minimum: _Array,
    bits: int,
    group_size: int,
    least_squares: bool = False,
    limit: float = ...,
    importance: _Array | None = None,
) -> int: ...
def quantize_two_level(
    x: _Array,
    codes: _Array,
    scale: _Array,
    minimum: _Array,
    param_floats: _Array,
    bits: int,
    group_size: int,
    param_bits: int,
    param_group: int,
    limit: float,
    importance: _Array | None = None,
) -> int: ...
def gptq(
    x: _Array,
    order: _Array,
    group_order: _Array,
    h: _Array,
    m: _Array,
    importance: _Array,
    codes: _Array,
    scale: _Array,
    minimum: _Array,
    bits: int,
    group_size: int,
    sweeps: int,
    limit: float,
) -> int: ...
def cholesky(a: _Array) -> bool: ...
def dequantize(
    codes: _Array, scale: _Array | tuple[Any, ...], minimum: _Array, bits: int, group_size: int, out: _Array
) -> None: ...
def pack(codes: _Array, bits: int, packed: _Array) -> None: ...
def unpack(packed: _Array, bits: int, codes: _Array) -> None: ...
def check_linear(
    x: Any, shape: tuple[int, ...], bias: Any, out: _Array | None, weight: dict[str, _Array]
) -> tuple[_Array, _Array | None, _Array]: ...
def linear_quantized(
    x: Any,
    codes: _Array,
    scale: _Array | tuple[Any, ...],
    minimum: _Array,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    bias: Any,
    out: _Array | None,
    limbs: int,
    outliers: tuple[_Array, _Array] | None = None,
) -> _Array: ...
def check_weights(names: list[Any], arrays: list[Any]) -> None: ...
def kth_magnitude(arrays: list[Any], k: int) -> tuple[int, int, int]: ...
def prune(w: _Array, write: bool, kept: _Array | None, key: int, keep_ties: int) -> int: ...
def keep_largest(w: _Array, n: int, m: int, kept: _Array) -> None: ...
def clear(w: _Array, kept: _Array) -> None: ...
def check_sparse(layout: str, positions: _Array, row_offsets: _Array, cols: int, entries: int) -> None: ...
def nonzero_mask(x: _Array, mask: _Array, counts: _Array) -> None: ...
def compress(x: _Array, mask: _Array, row_offsets: _Array, values: _Array) -> None: ...
def mask_columns(mask: _Array, row_offsets: _Array, cols: int, columns: _Array) -> None: ...
def count_gaps(columns: _Array, row_offsets: _Array, cols: int, counts: _Array) -> None: ...
def column_gaps(
    columns: _Array,
    row_offsets: _Array,
    cols: int,
    values: _Array,
    gap_offsets: _Array,
    gaps: _Array,
    gap_values: _Array,
) -> None: ...
def gap_columns(gaps: _Array, row_offsets: _Array, cols: int, columns: _Array) -> None: ...
def expand(layout: str, positions: _Array, row_offsets: _Array, values: _Array, out: _Array) -> None: ...
def linear_sparse(
    x: Any,
    layout: str,
    positions: _Array,
    row_offsets: _Array,
    values: _Array,
    shape: tuple[int, ...],
    bias: Any,
    out: _Array | None,
) -> _Array: ...
def linear_sparse_quantized(
    x: Any,
    layout: str,
    positions: _Array,
    row_offsets: _Array,
    codes: _Array,
    scale: _Array | tuple[Any, ...],
    minimum: _Array,
    bits: int,
    group_size: int,
    count: int,
    shape: tuple[int, ...],
    bias: Any,
    out: _Array | None,
) -> _Array: ...
def limit_read(x: _Array) -> float: ...
def limit_write(x: _Array) -> None: ...
def limit_update(streams: list[Any], writes: int) -> None: ...
