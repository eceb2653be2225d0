"""Quantize, dequantize, pack bits, and multiply by quantized weights."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import common
import numpy as np

import fastopt as fo
from fastopt.bench import (
    FASTOPT,
    NUMPY,
    Case,
    copies,
    limit,
    linear_case,
    normal,
    pack_into,
    quantize_cases,
    relative_error,
    unpack_into,
)

GROUPS = {8: (-1, 128, 32), 4: (-1, 128, 32), 2: (-1, 128, 16)}


def bit_cases(size: int, bits: int) -> Iterator[Case]:
    """Pack and unpack; the error is the number of wrong bytes."""
    codes = np.random.default_rng(0).integers(0, 1 << bits, size, np.uint8)
    packed = fo.pack_bits(codes, bits)
    packed_out, codes_out = np.empty_like(packed), np.empty_like(codes)
    moved = {"size": size, "nbytes": codes.nbytes + packed.nbytes}
    yield Case(
        name=f"pack_bits {bits} bits, {size:,}",
        contenders={
            FASTOPT: [lambda: fo.pack_bits(codes, bits)],
            NUMPY: [lambda: pack_into(codes, bits, packed_out)],
        },
        limit=limit(read=codes.nbytes, write=packed.nbytes),
        errors={NUMPY: lambda: np.count_nonzero(packed_out != packed)},
        **moved,
    )
    yield Case(
        name=f"unpack_bits {bits} bits, {size:,}",
        contenders={
            FASTOPT: [lambda: fo.unpack_bits(packed, bits, size)],
            NUMPY: [lambda: unpack_into(packed, bits, codes_out)],
        },
        limit=limit(read=packed.nbytes, write=codes.nbytes),
        errors={
            FASTOPT: lambda: np.count_nonzero(fo.unpack_bits(packed, bits, size) != codes),
            NUMPY: lambda: np.count_nonzero(codes_out != codes),
        },
        **moved,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    side = 1024 if options.quick else 4096
    for bits, groups in GROUPS.items():
        for group_size in groups[-1:] if options.quick else groups:
            yield from quantize_cases(side, side, bits, group_size)
    for bits in (4, 2):
        yield from bit_cases(side * side, bits)
    for bits in (4, 2):
        yield fit_case(side, bits, 128)
    yield from product_cases(side, options.quick)


def fit_case(side: int, bits: int, group_size: int) -> Case:
    """Least squares; the error is that of the weight, the ranges' beside it."""
    w = normal(side, side)
    made = {fit: fo.quantize(w, bits, group_size=group_size, fit=fit) for fit in ("lsq", "minmax")}
    quantize = partial(fo.quantize, w, bits, group_size=group_size)
    nbytes = made["lsq"].nbytes
    return Case(
        name=f"quantize {bits} bits, g{group_size}, least squares, {side}x{side}",
        size=w.size,
        nbytes=w.nbytes + nbytes,
        contenders={
            FASTOPT: [lambda: quantize(fit="lsq", out=made["lsq"])],
            "fastopt ranges": [lambda: quantize(out=made["minmax"])],
        },
        limit=limit(read=w.nbytes, write=nbytes),
        errors={
            FASTOPT: lambda: made["lsq"].error(w).relative,
            "fastopt ranges": lambda: made["minmax"].error(w).relative,
        },
    )


def product_cases(side: int, quick: bool) -> Iterator[Case]:
    """From memory, cached, with few and many rows of x, and a small matrix."""
    for bits, groups in {8: (-1, 128), 4: (32, 64, 128), 2: (16, 128)}.items():
        for group_size in groups[-1:] if quick else groups:
            yield product_case(side, bits, group_size, 1, cold=True)
            yield product_case(side, bits, group_size, 1, cold=False)
        for batch in (4, 16) if quick else (4, 16, 64, 256):
            yield product_case(side, bits, groups[-1], batch, cold=True)
        yield product_case(512, bits, groups[-1], 1, cold=False)
    if not quick:
        yield product_case(4099, 4, 64, 1, cold=True)  # nothing divides evenly


def product_case(side: int, bits: int, group_size: int, batch: int, cold: bool) -> Case:
    """Exact and with x in 8 bits, against NumPy with the same weights in float32."""
    w = normal(side, side)
    make = partial(fo.quantize, w, bits, group_size=group_size)
    dense = make().dequantize()
    group = "row" if group_size == -1 else f"g{group_size}"
    case = linear_case(f"{bits} bits, {group}", make, dense, batch, cold)
    x, y = normal(batch, side, seed=2), np.empty((batch, side), np.float32)

    def int8() -> Callable[[], object]:
        q = make()
        return lambda: fo.linear(x, q, out=y, precision="int8")

    def error() -> float:
        int8()()
        return relative_error(y, x.astype(np.float64) @ dense.T.astype(np.float64))

    case.contenders["fastopt int8"] = copies(int8, make().nbytes, cold)
    case.errors["fastopt int8"] = error
    return case


if __name__ == "__main__":
    common.main(cases)
