"""Pruning, sparse storage, and products with it."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import common
import numpy as np

import fastopt as fo
from fastopt.bench import FASTOPT, NUMPY, Array, Case, copies, limit, linear_case, normal, prune_case

SCIPY = "scipy csr"


def threshold_case(side: int, threshold: float) -> Case:
    """Pruning in place by magnitude; the error is the number of wrong elements."""
    start = normal(side, side)
    w, t, mask = start.copy(), np.empty_like(start), np.empty(start.shape, np.bool_)
    exact = np.where(np.abs(start) > np.float32(threshold), start, 0)

    def numpys() -> None:
        np.abs(w, out=t)
        np.greater(t, threshold, out=mask)
        np.multiply(w, mask, out=w)

    return Case(
        name=f"prune_ threshold {threshold:g}, {side}x{side}",
        size=w.size,
        nbytes=2 * w.nbytes + mask.nbytes,
        contenders={FASTOPT: [lambda: fo.prune_(w, threshold=threshold)], NUMPY: [numpys]},
        limit=limit(update=w.nbytes, write=mask.nbytes),
        errors={FASTOPT: lambda: np.count_nonzero(w != exact)},
        reset=lambda: np.copyto(w, start),
    )


def storage_cases(w: Array, what: str) -> Iterator[Case]:
    """To sparse storage and back; the error is the number of wrong elements."""
    s = fo.SparseTensor.from_dense(w)
    dense, nonzero = np.empty_like(w), np.empty(w.shape, np.bool_)
    moved = {"size": w.size, "nbytes": w.nbytes + s.nbytes}

    def numpy_from_dense() -> Any:
        np.not_equal(w, 0, out=nonzero)
        counts = np.cumsum(np.count_nonzero(nonzero, axis=1))
        return np.packbits(nonzero, axis=1, bitorder="little"), counts, w[nonzero]

    def numpy_to_dense() -> None:
        bits = np.unpackbits(s.mask, axis=1, count=w.shape[1], bitorder="little")
        dense.fill(0)
        dense[bits.view(np.bool_)] = s.values

    yield Case(
        name=f"from_dense {what}",
        contenders={FASTOPT: [lambda: fo.SparseTensor.from_dense(w)], NUMPY: [numpy_from_dense]},
        limit=limit(read=w.nbytes, write=s.nbytes),
        errors={FASTOPT: lambda: np.count_nonzero(s.to_dense() != w)},
        **moved,
    )
    yield Case(
        name=f"to_dense {what}",
        contenders={FASTOPT: [lambda: s.to_dense(out=dense)], NUMPY: [numpy_to_dense]},
        limit=limit(read=s.nbytes, write=w.nbytes),
        errors={FASTOPT: lambda: np.count_nonzero(dense != w)},
        **moved,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    scipy = common.peer("scipy.sparse")
    side = 1024 if options.quick else 4096
    yield threshold_case(side, 0.67)  # about half
    yield prune_case(side, side, 0.5)
    yield prune_case(side, side, 0.9)
    for sparsity in (0.5, 0.9):
        w = normal(side, side)
        fo.prune_(w, sparsity=sparsity)
        what = f"{100 * sparsity:.0f} % sparse"
        yield from storage_cases(w, f"{what}, {side}x{side}")
        for batch in (1, 16):
            case = linear_case(what, partial(fo.SparseTensor.from_dense, w), w, batch)
            if scipy:
                xt = normal(batch, side, seed=2).T.copy()
                csr = scipy.csr_array(w)
                case.contenders[SCIPY] = copies(lambda m=csr, x=xt: partial(m.copy().__matmul__, x), 8 * csr.nnz, True)
            yield case
            eight = fo.SparseTensor.from_dense(w).quantize(8)
            yield linear_case(
                f"{what}, 8 bits", lambda w=w: fo.SparseTensor.from_dense(w).quantize(8), eight.to_dense(), batch
            )


if __name__ == "__main__":
    common.main(cases)
