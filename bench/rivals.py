"""Optimizer steps in NumPy, without temporaries, beside those of ``fastopt bench``."""

from functools import partial

import numpy as np

import fastopt as fo
from fastopt._types import Array
from fastopt.cli import bench
from fastopt.cli.bench import ADAM, SGD_MOMENTUM, Step, fastopt_step, numpy_adam, numpy_sgd
from fastopt.cli.timing import FASTOPT, NUMPY, Call, Case


def numpy_accumulated(
    w: Array, g: Array, decay: float = 1.0, blend: float = 1.0, lr: float = 1e-3, eps: float = 1e-8
) -> Call:
    """Return the step of Adagrad, or of RMSprop with `decay` and `blend`."""
    squares, scratch, root = np.zeros_like(w), np.empty_like(w), np.empty_like(w)

    def step() -> None:
        np.multiply(g, g, out=scratch)
        np.multiply(scratch, blend, out=scratch)
        np.multiply(squares, decay, out=squares)
        np.add(squares, scratch, out=squares)
        np.sqrt(squares, out=root)
        np.add(root, eps, out=root)
        np.divide(g, root, out=scratch)
        np.multiply(scratch, lr, out=scratch)
        np.subtract(w, scratch, out=w)

    return step


def numpy_lion(w: Array, g: Array, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> Call:
    """Return the step of Lion."""
    mean, scratch, blend = np.zeros_like(w), np.empty_like(w), np.empty_like(w)

    def step() -> None:
        np.multiply(mean, betas[0], out=blend)
        np.multiply(g, 1 - betas[0], out=scratch)
        np.add(blend, scratch, out=blend)
        np.sign(blend, out=blend)
        np.multiply(blend, lr, out=blend)
        np.subtract(w, blend, out=w)
        np.multiply(mean, betas[1], out=mean)
        np.multiply(g, 1 - betas[1], out=scratch)
        np.add(mean, scratch, out=mean)

    return step


# For each optimizer, the number of arrays that a step reads (it writes all but the gradient), and its contenders.
OPTIMIZERS: dict[str, tuple[int, dict[str, Step]]] = {
    "SGD": (2, {FASTOPT: fastopt_step(fo.SGD), NUMPY: numpy_sgd}),
    "SGD momentum": SGD_MOMENTUM,
    "Adagrad": (
        3,
        {FASTOPT: fastopt_step(partial(fo.Adagrad, lr=1e-3)), NUMPY: partial(numpy_accumulated, eps=1e-10)},
    ),
    "RMSprop": (
        3,
        {
            FASTOPT: fastopt_step(partial(fo.RMSprop, lr=1e-3)),
            NUMPY: partial(numpy_accumulated, decay=0.99, blend=0.01),
        },
    ),
    "Lion": (3, {FASTOPT: fastopt_step(partial(fo.Lion, lr=1e-3)), NUMPY: numpy_lion}),
    "Adam": ADAM,
    "AdamW": (
        4,
        {FASTOPT: fastopt_step(partial(fo.AdamW, weight_decay=0.01)), NUMPY: partial(numpy_adam, weight_decay=0.01)},
    ),
}


def optimizer_case(name: str, size: int, peers: dict[str, Step] | None = None, gradient: Array | None = None) -> Case:
    """Return one of `OPTIMIZERS` on one tensor, with `peers` as further contenders."""
    streams, steps = OPTIMIZERS[name]
    return bench.optimizer_case(name, size, streams, {**steps, **(peers or {})}, gradient)
