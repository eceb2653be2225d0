"""Quantize, dequantize, pack bits, and multiply by quantized weights."""

import argparse
from collections.abc import Iterator
from functools import partial

import common
import numpy as np

import fastopt as fo
from fastopt.bench import FASTOPT, NUMPY, Case, limit, linear_case, normal, pack_into, quantize_cases, unpack_into

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
    for rows, cold in ((side, True), (512, False)):
        w = normal(rows, rows)
        for bits in (8, 4, 2):
            dense = fo.quantize(w, bits).dequantize()
            for batch in (1, 16):
                yield linear_case(f"{bits} bits", partial(fo.quantize, w, bits), dense, batch, cold)


if __name__ == "__main__":
    common.main(cases)
