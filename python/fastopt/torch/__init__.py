"""fastopt for PyTorch: optimizers that are ``torch.optim.Optimizer``, and modules with packed weights.

>>> import fastopt.torch as ft
>>> opt = ft.AdamW(model.parameters(), lr=1e-3)  # doctest: +SKIP
>>> report = ft.pack_(model, bits=4)  # doctest: +SKIP
"""

from fastopt.torch.calibration import calibrate
from fastopt.torch.modules import PackedModule
from fastopt.torch.optimizer import Optimizer
from fastopt.torch.optimizers import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from fastopt.torch.packing import load_, pack_, save, unpack_
from fastopt.torch.threads import share_threads

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Optimizer",
    "PackedModule",
    "RMSprop",
    "calibrate",
    "load_",
    "pack_",
    "save",
    "unpack_",
]

share_threads()
