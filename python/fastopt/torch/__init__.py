"""fastopt for PyTorch: optimizers that are ``torch.optim.Optimizer``.

>>> import fastopt.torch as ft
>>> opt = ft.AdamW(model.parameters(), lr=1e-3)  # doctest: +SKIP
"""

from fastopt.torch.optimizer import Optimizer
from fastopt.torch.optimizers import SGD, Adagrad, Adam, AdamW, Lion, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "Optimizer", "RMSprop"]
