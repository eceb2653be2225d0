"""Optimizers that take the place of those of ``torch.optim``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fastopt._checks import require_betas, require_number
from fastopt.torch.optimizer import Group, Optimizer, Options
from fastopt.train import optimizers as arrays
from fastopt.train.optimizer import Optimizer as ArrayOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Number: TypeAlias = float | torch.Tensor


class SGD(Optimizer, torch.optim.SGD):
    """``torch.optim.SGD``, with momentum and Nesterov's variant; the formula is that of `fastopt.SGD`.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, maximize
        As in ``torch.optim.SGD``.
    **options
        See `fastopt.torch.Optimizer`.

    Examples
    --------
    >>> import torch
    >>> import fastopt.torch as ft
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> opt = ft.SGD([w], lr=0.5)
    >>> w.grad = torch.tensor([1.0, 2.0])
    >>> opt.step()
    >>> w.detach()
    tensor([-0.5000, -1.0000])
    """

    _array_class = arrays.SGD
    _counts_steps = False

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **options)


class Adagrad(Optimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad``; the formula is that of `fastopt.Adagrad`.

    Parameters
    ----------
    params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize
        As in ``torch.optim.Adagrad``.
    **options
        See `fastopt.torch.Optimizer`. 8-bit states are refused, as they cannot hold a sum that only grows.
    """

    _array_class = arrays.Adagrad

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, **options)


class RMSprop(Optimizer, torch.optim.RMSprop):
    """``torch.optim.RMSprop``; the formula is that of `fastopt.RMSprop`.

    Parameters
    ----------
    params, lr, alpha, eps, weight_decay, momentum, centered, maximize
        As in ``torch.optim.RMSprop``.
    **options
        See `fastopt.torch.Optimizer`. bfloat16 and 8-bit states are refused if `centered`.
    """

    _array_class = arrays.RMSprop

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Any,
    ) -> None:
        flags = (centered, capturable, foreach, maximize, differentiable)
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, *flags, **options)


class Adam(Optimizer, torch.optim.Adam):
    """``torch.optim.Adam``; the formula is that of `fastopt.Adam`.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in ``torch.optim.Adam``.
    **options
        See `fastopt.torch.Optimizer`. 8-bit states are refused with `amsgrad`.
    """

    _array_class = arrays.Adam

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

    def _array_class_of(self, group: Group) -> type[ArrayOptimizer]:
        return arrays.AdamW if group.get("decoupled_weight_decay", False) else self._array_class


class AdamW(Optimizer, torch.optim.AdamW):
    """``torch.optim.AdamW``: Adam with decoupled weight decay; the formula is that of `fastopt.AdamW`.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize
        As in ``torch.optim.AdamW``.
    **options
        See `fastopt.torch.Optimizer`. 8-bit states are refused with `amsgrad`.

    Examples
    --------
    >>> import torch
    >>> import fastopt.torch as ft
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = ft.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    >>> schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-3, total_steps=10)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> opt.step()
    """

    _array_class = arrays.AdamW

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class Lion(Optimizer):
    """Lion, which torch does not have; the formula is that of `fastopt.Lion`.

    Parameters
    ----------
    params : iterable
        Tensors, pairs of name and tensor, or groups, as every optimizer of torch takes them.
    lr : float or tensor
        Learning rate.
    betas : (float, float)
        Factors of the blend and of the running mean, each at least 0 and below 1.
    weight_decay : float
        Decoupled weight decay.
    **options
        See `fastopt.torch.Optimizer`.
    """

    _array_class = arrays.Lion

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        flags = {"foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None}
        given: dict[str, Any] = dict(options)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        defaults |= {name: given.pop(name, value) for name, value in flags.items()}
        checked = dict(defaults)  # the checks make floats of tensors
        require_number(checked, "lr")
        require_betas(checked)
        require_number(checked, "weight_decay")
        super().__init__(params, defaults, **given)

    def _torch_step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad.is_sparse:
                    raise RuntimeError("Lion does not support sparse gradients")
                grad, state = -p.grad if group["maximize"] else p.grad, self.state[p]
                if not state:
                    state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(p)
                state["step"] += 1
                update = torch.sgn(state["exp_avg"] * beta1 + grad * (1 - beta1))
                p.mul_(1 - lr * group["weight_decay"]).sub_(update * lr)
                state["exp_avg"].mul_(beta2).add_(grad * (1 - beta2))
