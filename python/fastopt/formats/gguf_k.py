"""ggml's K-quants: blocks of 256 weights in groups of 32 or 16, whose scales are codes under one or two floats.

Q4_K, Q5_K and Q2_K have parameters in two levels, as a packed tensor with `param_group` 256 has: codes of weights,
scales and minima are the same numbers, in another order. Q6_K and Q3_K have signed scales and no minima: they become
a float32 scale for each group, and a minimum that follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastopt._types import Array
from fastopt.tensors.quantization import pack_bits, unpack_bits
from fastopt.tensors.quantized import PARAM_COLUMNS, QuantizedTensor

_AT_ONCE = 1 << 10  # blocks that are converted at a time, in cache
_PAIRS = 2 * np.arange(4, dtype=np.uint8)[:, None]  # shifts of the codes of 2 bits in a byte

_Blocks: TypeAlias = Any  # an array of blocks: NumPy's types do not tell the fields of a record


class KQuant(NamedTuple):
    """A type of blocks.

    Attributes
    ----------
    number : int
        In a file.
    bits, group : int
    param_bits : int or None
        None: scales are signed, and there are no minima.
    dtype : numpy.dtype
        A block.
    """

    number: int
    bits: int
    group: int
    param_bits: int | None
    dtype: np.dtype[Any]


def _block(*parts: Any) -> np.dtype[Any]:
    return np.dtype(list(parts))


_D, _DM = ("d", "<f2"), ("dm", "<f2")
_SIX, _LOW = ("params", "u1", 12), ("codes", "u1", 128)
K_QUANTS = {
    "Q4_K": KQuant(12, 4, 32, 6, _block(_D, _DM, _SIX, _LOW)),
    "Q5_K": KQuant(13, 5, 32, 6, _block(_D, _DM, _SIX, ("high", "u1", 32), _LOW)),
    "Q2_K": KQuant(10, 2, 16, 4, _block(("params", "u1", 16), ("codes", "u1", 64), _D, _DM)),
    "Q6_K": KQuant(14, 6, 16, None, _block(_LOW, ("high", "u1", 64), ("params", "i1", 16), _D)),
    "Q3_K": KQuant(11, 3, 16, None, _block(("high", "u1", 32), ("codes", "u1", 64), _SIX, _D)),
}


def k_quant_of(q: QuantizedTensor) -> str | None:
    """Return the type that holds this tensor as it is, if one does."""
    if q.outliers is not None or q.shape[-1] % PARAM_COLUMNS:
        return None
    if q.param_floats is None:
        signed = {6: "Q6_K", 3: "Q3_K"}.get(q.bits) if q.group_size == 16 else None
        return None if signed is None or _split_scales(q) is None else signed
    if q.param_group != PARAM_COLUMNS or q.param_floats.shape[2] != 2 or q.param_floats.dtype != np.float16:
        return None
    own = q.bits, q.group_size, q.param_bits
    return next((name for name, kind in K_QUANTS.items() if kind[1:4] == own), None)


# ---- reading ------------------------------------------------------------------------------------------------------


def packed_of(blocks: _Blocks, name: str, shape: tuple[int, ...]) -> QuantizedTensor:
    """Return blocks as a packed tensor with the same codes."""
    kind = K_QUANTS[name]
    rows, count = (shape[0] if len(shape) > 1 else 1), len(blocks)
    codes = np.empty((count, PARAM_COLUMNS * kind.bits // 8), np.uint8)
    for at, some in _some(blocks):
        codes[at : at + len(some)] = pack_bits(_CODES[name](some), kind.bits).reshape(len(some), -1)
    own = kind.bits, kind.group, shape, np.dtype(np.float32)
    if kind.param_bits is None:
        scales = blocks["params"] if name == "Q6_K" else _signed_scales(blocks["params"])
        with np.errstate(all="ignore"):  # any bytes are floats
            scale = blocks["d"].astype(np.float32)[:, None] * scales.astype(np.float32)
            minimum = scale * np.float32(-(1 << (kind.bits - 1)))
        return QuantizedTensor(codes.reshape(rows, -1), scale.reshape(rows, -1), minimum.reshape(rows, -1), *own)
    scales, minima = _params(blocks["params"], kind.param_bits)
    scales, minima = (pack_bits(p, kind.param_bits).reshape(rows, -1) for p in (scales, minima))
    floats = np.stack([blocks["d"], blocks["dm"]], axis=1).reshape(rows, -1, 2)
    return QuantizedTensor(codes.reshape(rows, -1), scales, minima, *own, None, kind.param_bits, PARAM_COLUMNS, floats)


def _some(blocks: _Blocks) -> Iterator[tuple[int, _Blocks]]:
    return ((at, blocks[at : at + _AT_ONCE]) for at in range(0, len(blocks), _AT_ONCE))


def _params(stored: Any, bits: int) -> tuple[Any, Any]:
    """Return the codes of scales and minima."""
    if bits == 4:
        return stored & 15, stored >> 4
    first, second, rest = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    return scales, np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)


def _signed_scales(stored: Any) -> Any:
    """Return the scales of Q3_K: four low bits, then two high ones."""
    low = np.concatenate([stored[:, :8] & 15, stored[:, :8] >> 4], axis=1)
    high = ((stored[:, None, 8:] >> _PAIRS) & 3).reshape(-1, 16)
    return (low | (high << 4)).astype(np.int8) - np.int8(32)


def _codes_4(blocks: _Blocks) -> Any:
    """Return codes of 4 bits: of each 64, the first half lies in the low bits."""
    stored = blocks["codes"].reshape(-1, 4, 32)
    return np.stack([stored & 15, stored >> 4], axis=2).reshape(-1, PARAM_COLUMNS)


def _codes_5(blocks: _Blocks) -> Any:
    high = (blocks["high"][:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _codes_4(blocks) | (high << 4).reshape(-1, PARAM_COLUMNS)


def _codes_2(blocks: _Blocks) -> Any:
    """Return codes of 2 bits: of each 128, byte j has codes j, j + 32, j + 64 and j + 96."""
    return ((blocks["codes"].reshape(-1, 2, 1, 32) >> _PAIRS) & 3).reshape(-1, PARAM_COLUMNS)


def _codes_3(blocks: _Blocks) -> Any:
    high = (blocks["high"][:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _codes_2(blocks) | (high << 2).reshape(-1, PARAM_COLUMNS)


def _codes_6(blocks: _Blocks) -> Any:
    low = blocks["codes"].reshape(-1, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (blocks["high"].reshape(-1, 2, 1, 32) >> _PAIRS) & 3
    return (low | (high << 4)).reshape(-1, PARAM_COLUMNS)


_CODES: dict[str, Callable[[_Blocks], Any]]
_CODES = {"Q4_K": _codes_4, "Q5_K": _codes_5, "Q2_K": _codes_2, "Q6_K": _codes_6, "Q3_K": _codes_3}


# ---- writing ------------------------------------------------------------------------------------------------------


def _split_scales(q: QuantizedTensor) -> tuple[Array, Array] | None:
    """Return d of each 256 columns and the signed scales under it, or None if these are not what the tensor has."""
    scale = q.scale.astype(np.float32)
    if not np.array_equal(q.minimum, scale * np.float32(-(1 << (q.bits - 1)))):
        return None
    scale = scale.reshape(-1, PARAM_COLUMNS // 16)
    most = 127 if q.bits == 6 else 31
    largest = scale[np.arange(len(scale)), np.abs(scale).argmax(1)]
    d, signed = np.zeros(len(scale), np.float16), np.zeros(scale.shape, np.int8)
    left = np.flatnonzero(largest)
    for number in (*range(most, 0, -1), -most - 1):
        with np.errstate(all="ignore"):
            half = (largest[left] / np.float32(number)).astype(np.float16)
            unit = half.astype(np.float32)[:, None]
            counts = np.rint(scale[left] / unit)
            good = (counts * unit == scale[left]).all(1) & (np.abs(counts + 0.5) <= most + 0.5).all(1)
        d[left[good]], signed[left[good]] = half[good], counts[good]
        left = left[~good]
    return None if left.size else (d, signed)


def blocks_of(q: QuantizedTensor, name: str) -> Array:
    """Return a tensor that `k_quant_of` knows as blocks."""
    kind = K_QUANTS[name]
    count = math.prod(q.shape) // PARAM_COLUMNS
    out = np.empty(count, kind.dtype)
    _store_params(q, kind, out)
    step = PARAM_COLUMNS * kind.bits // 8
    flat = q.codes.reshape(-1)
    for at, some in _some(out):
        packed = flat[at * step : (at + len(some)) * step]
        _store_codes(unpack_bits(packed, kind.bits, len(some) * PARAM_COLUMNS), kind.bits, some)
    return out


def _store_params(q: QuantizedTensor, kind: KQuant, out: _Blocks) -> None:
    count, groups = len(out), PARAM_COLUMNS // kind.group
    if kind.param_bits is None or q.param_floats is None:
        split = _split_scales(q)
        assert split is not None
        out["d"], signed = split
        if kind.bits == 6:
            out["params"] = signed
            return
        six = (signed + np.int8(32)).view(np.uint8)
        high = np.bitwise_or.reduce(six.reshape(-1, 4, 4) >> 4 << _PAIRS, axis=1)
        out["params"] = np.concatenate([(six[:, :8] & 15) | (six[:, 8:] << 4), high], axis=1)
        return
    out["d"], out["dm"] = q.param_floats.reshape(count, 2).T
    scales, minima = (
        unpack_bits(p, kind.param_bits, count * groups).reshape(count, groups) for p in (q.scale, q.minimum)
    )
    if kind.param_bits == 4:
        out["params"] = scales | (minima << 4)
    else:
        first, second = (p[:, :4] | (p[:, 4:] >> 4 << 6) for p in (scales, minima))
        rest = (scales[:, 4:] & 15) | (minima[:, 4:] << 4)
        out["params"] = np.concatenate([first, second, rest], axis=1)


def _store_codes(codes: Any, bits: int, out: _Blocks) -> None:
    bit = np.arange(8, dtype=np.uint8)[:, None]
    if bits in (2, 3):
        parts = (codes.reshape(-1, 2, 4, 32) & 3) << _PAIRS
        out["codes"] = np.bitwise_or.reduce(parts, axis=2).reshape(len(out), -1)
    elif bits == 6:
        quarters = codes.reshape(-1, 2, 4, 32)
        out["codes"] = ((quarters[:, :, :2] & 15) | (quarters[:, :, 2:] << 4)).reshape(len(out), -1)
        out["high"] = np.bitwise_or.reduce(quarters >> 4 << _PAIRS, axis=2).reshape(len(out), -1)
    else:
        halves = codes.reshape(-1, 4, 2, 32)
        out["codes"] = ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).reshape(len(out), -1)
    if bits in (3, 5):
        out["high"] = np.bitwise_or.reduce(codes.reshape(-1, 8, 32) >> (bits - 1) << bit, axis=1)
