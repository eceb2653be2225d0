"""Pruning, sparse storage, and products with it."""

import argparse
import warnings
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import harness
import numpy as np

import fastopt as fo
from fastopt._types import Array
from fastopt.cli.bench import linear_case, normal, prune_case
from fastopt.cli.timing import FASTOPT, NUMPY, Case, copies, limit

SCIPY, MKL, TORCH, TORCH_CSR, CT = "scipy", "mkl csr", "torch dense", "torch csr int32", "compressed-tensors"
OWN = "fastopt dense 8 bits"


def threshold_case(side: int, threshold: float) -> Case:
    """Pruning in place by magnitude; the error is the number of wrong elements."""
    start = normal(side, side)
    w, t, mask = start.copy(), np.empty_like(start), np.empty(start.shape, np.bool_)
    exact = np.where(np.abs(start) > np.float32(threshold), start, 0)

    def without_temporaries() -> None:
        np.abs(w, out=t)
        np.greater(t, threshold, out=mask)
        np.multiply(w, mask, out=w)

    def error() -> float:
        np.copyto(w, start)
        fo.prune_(w, threshold=threshold)
        return float(np.count_nonzero(w != exact))

    contenders: dict[str, Collection[Any]] = {
        FASTOPT: [lambda: fo.prune_(w, threshold=threshold, return_mask=False)],
        NUMPY: [lambda: w * (np.abs(w) > threshold)],
        "numpy, out=": [without_temporaries],
    }
    torch = harness.peer("torch")
    if torch:
        torch.set_num_threads(fo.get_num_threads())
        tensor = torch.from_numpy(w)
        contenders["torch hardshrink"] = [lambda: torch.nn.functional.hardshrink(tensor, threshold)]
    return Case(
        name=f"prune_ threshold {threshold:g}, {side}x{side}",
        size=w.size,
        nbytes=2 * w.nbytes,
        contenders=contenders,
        limit=limit(update=w.nbytes),
        errors={FASTOPT: error},
        reset=lambda: np.copyto(w, start),
    )


def share_case(side: int, sparsity: float, with_torch: bool) -> Case:
    """Pruning to an exact share; torch takes seconds for a large weight."""
    case = prune_case(side, side, sparsity)
    torch = harness.peer("torch") if with_torch else None
    prune = harness.peer("torch.nn.utils.prune") if with_torch else None
    if torch and prune:
        torch.set_num_threads(fo.get_num_threads())
        w = torch.from_numpy(normal(side, side))

        def torch_prune() -> None:
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(w)
            prune.l1_unstructured(module, "weight", amount=sparsity)

        case.contenders["torch.nn.utils.prune"] = [torch_prune]
    return case


def storage_cases(w: Array, what: str) -> Iterator[Case]:
    """To sparse storage and back; the error is the number of wrong elements."""
    s = fo.SparseTensor.from_dense(w, layout="mask")
    dense, nonzero = np.empty_like(w), np.empty(w.shape, np.bool_)
    moved: dict[str, Any] = {"size": w.size, "nbytes": w.nbytes + s.nbytes}

    def numpy_from_dense() -> Any:
        np.not_equal(w, 0, out=nonzero)
        counts = np.cumsum(np.count_nonzero(nonzero, axis=1))
        return np.packbits(nonzero, axis=1, bitorder="little"), counts, w[nonzero]

    def numpy_to_dense() -> None:
        bits = np.unpackbits(s.positions, axis=1, count=w.shape[1], bitorder="little")
        dense.fill(0)
        dense[bits.view(np.bool_)] = s.values

    to: dict[str, Collection[Any]] = {
        FASTOPT: [lambda: fo.SparseTensor.from_dense(w, layout="mask")],
        NUMPY: [numpy_from_dense],
    }
    back: dict[str, Collection[Any]] = {FASTOPT: [lambda: s.to_dense(out=dense)], NUMPY: [numpy_to_dense]}
    scipy, ct = harness.peer("scipy.sparse"), harness.peer("compressed_tensors.compressors")
    if scipy:
        csr = scipy.csr_array(w)
        to[SCIPY] = [lambda: scipy.csr_array(w)]
        back[SCIPY] = [lambda: csr.toarray(out=dense)]
    torch = harness.peer("torch")
    if torch and ct and hasattr(ct, "BitmaskTensor"):  # until 0.14
        tensor = torch.from_numpy(w)
        packed = ct.BitmaskTensor.from_dense(tensor)
        to[CT] = [lambda: ct.BitmaskTensor.from_dense(tensor)]
        back[CT] = [packed.decompress]
    yield Case(
        name=f"from_dense {what}",
        contenders=to,
        limit=limit(read=w.nbytes, write=s.nbytes),
        errors={FASTOPT: lambda: np.count_nonzero(s.to_dense() != w)},
        **moved,
    )
    yield Case(
        name=f"to_dense {what}",
        contenders=back,
        limit=limit(read=s.nbytes, write=w.nbytes),
        errors={FASTOPT: lambda: np.count_nonzero(s.to_dense(out=dense) != w)},
        **moved,
    )


def torch_peers(w: Array, batch: int) -> dict[str, Collection[Any]]:
    """Dense and CSR products of torch, if it is there."""
    torch = harness.peer("torch")
    if torch is None:
        return {}
    torch.set_num_threads(fo.get_num_threads())
    x = torch.from_numpy(normal(batch, w.shape[1], seed=2))
    columns = x.T.contiguous()
    warnings.filterwarnings("ignore", "Sparse")  # torch calls its CSR a beta
    csr = fo.SparseTensor.from_dense(w).to_torch()
    pointers, indices = csr.crow_indices().int(), csr.col_indices().int()

    def dense() -> Any:
        return partial(torch.nn.functional.linear, x, torch.from_numpy(w.copy()))

    def sparse() -> Any:
        matrix = torch.sparse_csr_tensor(pointers.clone(), indices.clone(), csr.values().clone(), w.shape)
        return lambda: matrix @ columns

    return {TORCH: copies(dense, w.nbytes, True), TORCH_CSR: copies(sparse, 8 * csr.values().numel(), True)}


def product_case(what: str, w: Array, batch: int, layout: str = "auto", bits: int | None = None) -> Case:
    """One product, against dense ones, CSR of torch and SciPy, and SciPy's blocks; stored bytes are in its name."""

    def pack() -> fo.SparseTensor:
        s = fo.SparseTensor.from_dense(w, layout=layout)
        return s if bits is None else s.quantize(bits)

    packed = pack()
    wide = packed.to_dense().astype(np.float32)
    case = linear_case(f"{what}, {packed.layout} ({100 * packed.nbytes / wide.nbytes:.1f} %)", pack, wide, batch)
    if bits is not None:
        x, y = normal(batch, wide.shape[1], seed=2), np.empty((batch, len(wide)), np.float32)

        def own() -> Any:
            q = fo.quantize(wide, bits)
            return lambda: fo.linear(x, q, out=y)

        case.contenders[OWN] = copies(own, wide.size, True)
        return case
    case.contenders |= torch_peers(wide, batch)
    scipy = harness.peer("scipy.sparse")
    if scipy:
        columns = normal(batch, wide.shape[1], seed=2).T.copy()
        blocks = layout == "1x16"
        matrix = scipy.bsr_array(wide, blocksize=(1, 16)) if blocks else scipy.csr_array(wide)
        case.contenders[SCIPY] = copies(lambda: partial(matrix.copy().__matmul__, columns), 8 * packed.nnz, True)
        mkl = harness.peer("sparse_dot_mkl")
        if mkl and not blocks:  # takes x transposed, as scipy does
            case.contenders[MKL] = copies(
                lambda: partial(mkl.dot_product_mkl, matrix.copy(), columns), 8 * packed.nnz, True
            )
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
    yield share_case(side, 0.5, False)
    yield share_case(side, 0.9, options.full or options.quick)
    for sparsity in (0.5, 0.9):
        w = fo_pruned(normal(side, side), sparsity=sparsity)
        yield from storage_cases(w, f"{100 * sparsity:.0f} % sparse, {side}x{side}")
    for sparsity in (0.1, 0.5, 0.7, 0.8, 0.9, 0.95):
        w = fo_pruned(normal(side, side), sparsity=sparsity)
        what = f"{100 * sparsity:.0f} % sparse"
        yield product_case(what, w, 1)
        if sparsity >= 0.5:
            yield product_case(f"{what} float16", w.astype(np.float16), 1)
        if sparsity in (0.5, 0.9):
            smallest = "mask" if sparsity == 0.5 else "index8"
            if smallest == "index8":
                yield product_case(f"{what} smallest", w, 1, smallest)
                yield product_case(f"{what} 8 bits", w, 1, bits=8)
            yield product_case(f"{what} 8 bits smallest", w, 1, smallest, bits=8)
            yield product_case(f"{what} 4 bits smallest", w, 1, smallest, bits=4)
        if sparsity in (0.1, 0.5, 0.8, 0.9):
            for batch in (4, 16, 64):
                yield product_case(what, w, batch)
        if sparsity >= 0.8:
            blocks = fo_pruned(normal(side, side), sparsity=sparsity, pattern="1x16")
            yield product_case(f"{what} blocks", blocks, 1, "1x16")
    for sparsity in (0.7, 0.9):
        yield product_case(f"{100 * sparsity:.0f} % sparse, skewed", skewed(side, sparsity), 1)
    yield product_case("2:4", fo_pruned(normal(side, side), pattern="2:4"), 1, "2:4")
    yield product_case("2:4 8 bits", fo_pruned(normal(side, side), pattern="2:4"), 1, "2:4", bits=8)


if __name__ == "__main__":
    harness.main(cases)
