"""Optimizer steps, low-bit quantization and pruning for NumPy, at the speed of the memory bus.

>>> import numpy as np
>>> import fastopt as fo
>>> w = np.ones(4, dtype=np.float32)
>>> opt = fo.Adam(w, lr=0.1)
>>> opt.step(np.ones(4, dtype=np.float32))  # in place
>>> w
array([0.9, 0.9, 0.9, 0.9], dtype=float32)
"""

from fastopt import _core as _core  # first: it refuses other interpreters, before NumPy fails in one
from fastopt import schedules
from fastopt._core import __version__
from fastopt.config import get_num_threads, set_num_threads, show_config
from fastopt.files.sources import open_weights
from fastopt.formats import export
from fastopt.formats.onnx_calibrate import calibrate_onnx
from fastopt.formats.onnx_pack import pack_onnx
from fastopt.models.calibration import Calibration
from fastopt.models.choose import choose_bits
from fastopt.models.examine import diff, inspect
from fastopt.models.model import PackedModel, load, pack
from fastopt.models.recipe import Recipe
from fastopt.models.report import Report
from fastopt.models.search import search
from fastopt.models.shrinking import Add, Concat, Layer, drop_layers, shrink
from fastopt.models.stream import pack_file, unpack_file
from fastopt.tensors.packed import PackedTensor
from fastopt.tensors.products import embedding, linear
from fastopt.tensors.pruning import prune, prune_
from fastopt.tensors.quantization import pack_bits, quantize, unpack_bits
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor
from fastopt.train.checkpoint import load_checkpoint, save_checkpoint
from fastopt.train.optimizer import Optimizer
from fastopt.train.optimizers import SGD, Adagrad, Adam, AdamW, Lion, RMSprop

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Add",
    "Calibration",
    "Concat",
    "Layer",
    "Lion",
    "Optimizer",
    "PackedModel",
    "PackedTensor",
    "QuantizedTensor",
    "RMSprop",
    "Recipe",
    "Report",
    "SparseTensor",
    "__version__",
    "calibrate_onnx",
    "choose_bits",
    "diff",
    "drop_layers",
    "embedding",
    "export",
    "get_num_threads",
    "inspect",
    "linear",
    "load",
    "load_checkpoint",
    "open_weights",
    "pack",
    "pack_bits",
    "pack_file",
    "pack_onnx",
    "prune",
    "prune_",
    "quantize",
    "save_checkpoint",
    "schedules",
    "search",
    "set_num_threads",
    "show_config",
    "shrink",
    "unpack_bits",
    "unpack_file",
]
