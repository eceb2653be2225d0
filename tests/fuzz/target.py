"""What a fuzzer, and the tests that repeat what it found, do with a file."""

import contextlib
from pathlib import Path

import numpy as np

import fastopt as fo


def load_and_use(path: Path) -> bool:
    """Load a file and compute with what is in it; return whether it was sound. Nothing but ValueError may be raised."""
    with contextlib.suppress(ValueError):
        fo.load_checkpoint(path)
    try:
        model = fo.load(path)
    except ValueError:
        return False
    use(model)
    return True


def use(model: fo.PackedModel) -> None:
    """Do with a model whatever reads its bytes; it must not crash, whatever they are."""
    for tensor in model.values():
        if np.prod(tensor.shape, dtype=object) > 1 << 16:  # a sparse tensor of a few bytes may be that large
            continue
        with np.errstate(all="ignore"):
            if isinstance(tensor, fo.QuantizedTensor):
                assert tensor.dequantize().shape == tensor.shape
                if len(tensor.shape) > 1 and len(tensor):
                    fo.embedding(tensor, [0, len(tensor) - 1])
            elif isinstance(tensor, fo.SparseTensor):
                assert tensor.to_dense().shape == tensor.shape
                assert tensor.to_layout("mask").shape == tensor.shape
                if len(tensor.shape) > 1 and tensor.shape[0]:
                    assert tensor[[-1, 0]].shape == (2, *tensor.shape[1:])
            if len(tensor.shape) == 2 and (isinstance(tensor, fo.QuantizedTensor) or tensor.dtype == np.float32):
                x = np.ones((130, tensor.shape[1]), np.float32)
                for batch in (1, 5, 130):
                    assert fo.linear(x[:batch], tensor).shape == (batch, tensor.shape[0])
    report = model.report()
    assert report.nbytes == model.nbytes
