"""Optimizer steps, low-bit quantization and pruning for NumPy, at the speed of the memory bus.

>>> import numpy as np
>>> import fastopt as fo
>>> w = np.ones(4, dtype=np.float32)
>>> opt = fo.Adam(w, lr=0.1)
>>> opt.step(np.ones(4, dtype=np.float32))  # in place
>>> w
array([0.9, 0.9, 0.9, 0.9], dtype=float32)
"""

from fastopt import _threads as _threads  # first: it loads the extension
from fastopt import schedules
from fastopt._core import __version__
from fastopt.checkpoint import restore, save
from fastopt.config import get_num_threads, set_num_threads, show_config
from fastopt.export import export
from fastopt.linear import linear
from fastopt.model import PackedModel, load, pack
from fastopt.optim import SGD, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop, l1_penalty, l2_penalty
from fastopt.prune import cubic_sparsity, prune, prune_
from fastopt.quant import QuantizedTensor, embedding, pack_bits, quantize, unpack_bits
from fastopt.shrink import Add, Concat, Layer, Shrunk, drop_layers, shrink
from fastopt.sparse import SparseTensor, sparsity

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Add",
    "Concat",
    "Layer",
    "Lion",
    "Optimizer",
    "PackedModel",
    "QuantizedTensor",
    "RMSprop",
    "Shrunk",
    "SparseTensor",
    "__version__",
    "cubic_sparsity",
    "drop_layers",
    "embedding",
    "export",
    "get_num_threads",
    "l1_penalty",
    "l2_penalty",
    "linear",
    "load",
    "pack",
    "pack_bits",
    "prune",
    "prune_",
    "quantize",
    "restore",
    "save",
    "schedules",
    "set_num_threads",
    "show_config",
    "shrink",
    "sparsity",
    "unpack_bits",
]
