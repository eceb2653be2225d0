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
from fastopt.config import get_num_threads, set_num_threads, show_config
from fastopt.files.sources import open_weights
from fastopt.files.weights import Weights
from fastopt.formats import export
from fastopt.formats.onnx_pack import pack_onnx
from fastopt.models.choose import choose_bits
from fastopt.models.examine import Difference, TensorDifference, TensorFacts, diff, inspect
from fastopt.models.model import PackedModel, load, pack
from fastopt.models.recipe import Options, Recipe
from fastopt.models.report import Report, TensorReport
from fastopt.models.shrinking import Add, Concat, Layer, Shrunk, drop_layers, shrink
from fastopt.models.stream import pack_file, plan, prune_file, unpack_file
from fastopt.tensors.packed import PackedTensor
from fastopt.tensors.products import embedding, linear
from fastopt.tensors.pruning import cubic_sparsity, prune, prune_
from fastopt.tensors.quantization import pack_bits, quantize, unpack_bits
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor, sparsity
from fastopt.train.checkpoint import restore, save
from fastopt.train.optimizer import Optimizer
from fastopt.train.optimizers import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from fastopt.train.param_tree import l1_penalty, l2_penalty

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Add",
    "Concat",
    "Difference",
    "Layer",
    "Lion",
    "Optimizer",
    "Options",
    "PackedModel",
    "PackedTensor",
    "QuantizedTensor",
    "RMSprop",
    "Recipe",
    "Report",
    "Shrunk",
    "SparseTensor",
    "TensorDifference",
    "TensorFacts",
    "TensorReport",
    "Weights",
    "__version__",
    "choose_bits",
    "cubic_sparsity",
    "diff",
    "drop_layers",
    "embedding",
    "export",
    "get_num_threads",
    "inspect",
    "l1_penalty",
    "l2_penalty",
    "linear",
    "load",
    "open_weights",
    "pack",
    "pack_bits",
    "pack_file",
    "pack_onnx",
    "plan",
    "prune",
    "prune_",
    "prune_file",
    "quantize",
    "restore",
    "save",
    "schedules",
    "set_num_threads",
    "show_config",
    "shrink",
    "sparsity",
    "unpack_bits",
    "unpack_file",
]
