"""Pruning, sparse storage, and products with it."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import common
import numpy as np

import fastopt as fo
from fastopt.bench import FASTOPT, NUMPY, Array, Case, copies, limit, linear_case, normal, prune_case

SCIPY, TORCH = "scipy csr", "torch dense"


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
        nbytes=2 * w.nbytes,
        contenders={
            FASTOPT: [lambda: fo.prune_(w, threshold=threshold, return_mask=False)],
            NUMPY: [numpys],
        },
        limit=limit(update=w.nbytes),
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


def dense_peers(w: Array, batch: int) -> dict[str, list[Any]]:
    """Dense BLAS of other libraries, as far as they are there."""
    torch = common.peer("torch")
    if torch is None:
        return {}
    torch.set_num_threads(fo.get_num_threads())
    x = torch.from_numpy(normal(batch, w.shape[1], seed=2))
    return {TORCH: copies(lambda: partial(torch.nn.functional.linear, x, torch.from_numpy(w.copy())), w.nbytes, True)}


def product_case(what: str, w: Array, batch: int, layout: str = "auto", bits: int | None = None) -> Case:
    """One product, against the dense ones and SciPy."""

    def pack() -> fo.SparseTensor:
        s = fo.SparseTensor.from_dense(w, layout=layout)
        return s if bits is None else s.quantize(bits)

    wide = pack().to_dense().astype(np.float32)
    case = linear_case(f"{what}, {pack().layout}", pack, wide, batch)
    case.contenders |= dense_peers(wide, batch)
    scipy = common.peer("scipy.sparse")
    if scipy and bits is None:
        x = normal(batch, wide.shape[1], seed=2).T.copy()
        csr = scipy.csr_array(wide)
        case.contenders[SCIPY] = copies(lambda: partial(csr.copy().__matmul__, x), 8 * csr.nnz, True)
    return case


def skewed(side: int, sparsity: float) -> Array:
    """Weights whose first rows keep most, as pruned networks have them."""
    w = normal(side, side)
    return fo_pruned(w * np.geomspace(10, 0.1, side, dtype=np.float32)[:, None], sparsity=sparsity)


def fo_pruned(w: Array, **options: Any) -> Array:
    fo.prune_(w, return_mask=False, **options)
    return w


def cases(options: argparse.Namespace) -> Iterator[Case]:
    side = 1024 if options.quick else 4096
    yield threshold_case(side, 0.67)  # about half
    yield prune_case(side, side, 0.5)
    yield prune_case(side, side, 0.9)
    for sparsity in (0.5, 0.9):
        w = fo_pruned(normal(side, side), sparsity=sparsity)
        yield from storage_cases(w, f"{100 * sparsity:.0f} % sparse, {side}x{side}")
    for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95):
        w = fo_pruned(normal(side, side), sparsity=sparsity)
        what = f"{100 * sparsity:.0f} % sparse"
        yield product_case(what, w, 1)
        yield product_case(f"{what} float16", w.astype(np.float16), 1)
        if sparsity == 0.9:
            yield product_case(f"{what} 8 bits", w, 1, bits=8)
        if sparsity in (0.5, 0.8, 0.9):
            yield product_case(what, w, 16)
            yield product_case(what, w, 64)
        if sparsity >= 0.8:
            blocks = fo_pruned(normal(side, side), sparsity=sparsity, pattern="1x16")
            yield product_case(f"{what} blocks", blocks, 1, "1x16")
    yield product_case("90 % sparse, skewed", skewed(side, 0.9), 1)
    yield product_case("2:4", fo_pruned(normal(side, side), pattern="2:4"), 1, "2:4")


if __name__ == "__main__":
    common.main(cases)
