"""The operators of DeepSpeed's CPU optimizers: ZeRO-Offload with fastopt's step, and without a compiler."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import torch

from fastopt import _core
from fastopt.torch.optimizer import FLOAT_NUMBERS, STATE_NUMBERS
from fastopt.train.optimizer import Hyper, mixed
from fastopt.train.optimizers import Adagrad, Adam, AdamW, Lion

_LAST_STEP = 1 << 62  # where the bias correction of Adam is 1 to the last bit


def install() -> None:
    """Let ``DeepSpeedCPUAdam``, ``DeepSpeedCPUAdagrad`` and ``DeepSpeedCPULion`` step by fastopt's kernels.

    Call it before an optimizer is made. The classes stay DeepSpeed's, so that its checks for them pass; their
    builders no longer compile anything. Parameters and gradients have one dtype; states are float32, or bfloat16 and
    then rounded stochastically. SuperOffload and ZenFlow need operators that only DeepSpeed has: do not call this
    function for them.

    Raises
    ------
    ImportError
        If DeepSpeed is not installed.

    Examples
    --------
    >>> import fastopt.torch.deepspeed
    >>> fastopt.torch.deepspeed.install()  # doctest: +SKIP
    """
    builders = import_module("deepspeed.ops.op_builder")
    for name in ("CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder"):
        builder = getattr(builders, name)
        builder.load = lambda self, verbose=True: Operators
        builder.is_compatible = lambda self, verbose=False: True


class Operators:
    """The functions of DeepSpeed's compiled modules, by the same names."""

    _decoupled: ClassVar[dict[int, bool]] = {}  # of each optimizer of Adam: whether weight decay is AdamW's

    @classmethod
    def create_adam(
        cls, number: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, adamw: bool, log: bool
    ) -> int:
        """Note how an optimizer decays weights."""
        cls._decoupled[number] = adamw
        return 0

    @classmethod
    def destroy_adam(cls, number: int) -> int:
        """Forget an optimizer."""
        cls._decoupled.pop(number, None)
        return 0

    @classmethod
    def adam_update(
        cls,
        number: int,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
    ) -> int:
        """Step a tensor as Adam does."""
        adam = AdamW if cls._decoupled.get(number, True) else Adam
        options = {"betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        numbers = adam._hyper(options, lr, step if bias_correction else _LAST_STEP)
        return _step("adam", numbers, step, param, grad, exp_avg, exp_avg_sq)

    @staticmethod
    def adam_rollback(*args: Any) -> int:
        """Raise: the weights and states before a step cannot be computed exactly from those after it."""
        raise NotImplementedError(
            "adam_rollback: fastopt takes back no step, as rounding makes that inexact; SuperOffload, which asks for "
            "it, needs DeepSpeed's own operator: do not call fastopt.torch.deepspeed.install()"
        )

    @staticmethod
    def _do_nothing(*args: Any) -> int:
        """Do nothing: each update brings all its numbers."""
        return 0

    create_adagrad = destroy_adagrad = create_lion = destroy_lion = _do_nothing

    @staticmethod
    def adagrad_update(
        number: int,
        step: int,
        lr: float,
        eps: float,
        weight_decay: float,
        param: torch.Tensor,
        grad: torch.Tensor,
        total: torch.Tensor,
    ) -> int:
        """Step a tensor as Adagrad does."""
        numbers = Adagrad._hyper({"lr_decay": 0.0, "weight_decay": weight_decay, "eps": eps}, lr, step)
        return _step("adagrad", numbers, step, param, grad, total)

    @staticmethod
    def lion_update(
        number: int,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
    ) -> int:
        """Step a tensor as Lion does."""
        numbers = Lion._hyper({"betas": (beta1, beta2), "weight_decay": weight_decay}, lr, step)
        return _step("lion", numbers, step, param, grad, exp_avg)


def _step(rule: str, numbers: Hyper, step: int, param: torch.Tensor, grad: torch.Tensor, *states: torch.Tensor) -> int:
    number, size = FLOAT_NUMBERS.get(param.dtype), param.numel()
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, tensor in (("param", param), ("grad", grad), *(("state", state) for state in states)):
        if not (tensor.is_cpu and tensor.is_contiguous() and tensor.numel() == size):
            raise ValueError(f"{name}: expected {size} contiguous elements on the CPU, got {tuple(tensor.shape)}")
    if number is None or grad.dtype not in (param.dtype, wide):
        raise TypeError(f"param, grad: expected one float dtype, got {param.dtype} and {grad.dtype}")
    dtype = states[0].dtype
    if any(state.dtype != dtype for state in states) or (dtype != wide and dtype != torch.bfloat16):
        raise TypeError(f"state: expected {wide} or torch.bfloat16, got {dtype}; set fp32_optimizer_states=True")
    work = _core.job(
        rule=_core.rule(rule),
        hyper=numbers,
        grad_scale=1.0,
        shrink=0.0,
        keep_zeros=False,
        stochastic=False,
        noise=mixed(0, step, 0) if dtype == torch.bfloat16 else 0,
        names=["param"],
        params=[(param.data_ptr(), size, number)],
        grads=[(grad.data_ptr(), size, FLOAT_NUMBERS[grad.dtype])],
        states=[(STATE_NUMBERS.get(dtype, 0), *(state.data_ptr() for state in states))],
        counts=[0],
        indices=None,
    )
    _core.step([work], [0])
    return 0
