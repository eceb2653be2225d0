"""Layouts of sparse tensors, and n:m patterns."""

import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastopt._text import shown
from fastopt._types import Array

BLOCK = 16  # columns of a block of layout "1x16"
_INDEX_COLUMNS = 1 << 16  # the columns that 16 bits can address
# Up to this density an index is faster than a mask, which is read in full: see bench/bench_sparse.py.
_INDEX_DENSITY = 0.18


def parse_pattern(pattern: str, name: str = "pattern") -> tuple[int, int] | None:
    """Return N and M of a pattern "N:M", None for "1x16", or raise."""
    if pattern == "1x16":
        return None
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", pattern) if isinstance(pattern, str) else None
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"{name}: expected 'N:M' with N < M, as in '2:4', or '1x16', got {shown(pattern)}")
    return int(match[1]), int(match[2])


def require_layout(layout: str) -> str:
    """Return `layout`, or raise."""
    if layout in ("mask", "index16", "index8", "1x16"):
        return layout
    group = re.fullmatch(r"(\d):([248])", layout) if isinstance(layout, str) else None
    if group is None or not 1 <= int(group[1]) < int(group[2]):
        raise ValueError(
            f"layout: expected 'mask', 'index16', 'index8', '1x16', or 'N:M' with M of 2, 4 or 8, got {shown(layout)}"
        )
    return layout


@lru_cache
def _filled_groups(n: int, m: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return, for each byte of a mask, the byte with n bits set in each group of m, and whether a group had more."""
    filled, over = np.zeros(256, np.uint8), np.zeros(256, np.bool_)
    for byte in range(256):
        for start in range(0, 8, m):
            places = range(start, start + m)
            free = [p for p in places if not byte >> p & 1]
            over[byte] |= len(free) < m - n
            chosen = [p for p in places if p not in free[n - (m - len(free)) :]] if len(free) >= m - n else places
            filled[byte] |= sum(1 << p for p in chosen)
    return filled, over


def _fill_groups(mask: NDArray[np.uint8], cols: int, layout: str) -> NDArray[np.uint8]:
    """Return the mask with N bits set in each group of M, the lowest that are free; those over N removed."""
    n, m = map(int, layout.split(":"))
    filled, over = _filled_groups(n, m)
    if np.any(over[mask]):
        return np.where(over[mask], np.uint8(0), mask)  # lacks bits of `mask`, which the caller detects
    result = filled[mask]
    if cols % 8:  # a short last group
        result[:, -1] &= (1 << cols % 8) - 1
    return result


def _blocks(x: Array) -> tuple[NDArray[np.uint8], NDArray[np.int64], Array]:
    """Return mask, row offsets and values of the blocks that are not all zero."""
    rows, cols = x.shape
    count = -(-cols // BLOCK)
    if cols % BLOCK:
        x = np.concatenate([x, np.zeros((rows, count * BLOCK - cols), x.dtype)], axis=1)
    blocks = x.reshape(rows, count, BLOCK)
    stored = np.any(blocks != 0, axis=2)
    row_offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(stored, axis=1))]).astype(np.int64)
    values = blocks[stored].reshape(-1)
    values[values == 0] = 0  # -0 becomes +0
    return np.packbits(stored, axis=1, bitorder="little"), row_offsets, values


def _expand_blocks(mask: NDArray[np.uint8], values: Array, out: Array) -> None:
    rows, cols = out.shape
    count = -(-cols // BLOCK)
    stored = np.unpackbits(mask, axis=1, count=count, bitorder="little").view(np.bool_)
    blocks = np.zeros((rows, count, BLOCK), out.dtype)
    blocks[stored] = values.reshape(-1, BLOCK)
    out[...] = blocks.reshape(rows, count * BLOCK)[:, :cols]
