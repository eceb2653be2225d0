"""The optimizers, with the names, defaults and formulas of ``torch.optim``.

`Optimizer` explains the options that they share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastopt._checks import require, require_betas, require_number
from fastopt._core import hyper
from fastopt.train.optimizer import Common, Hyper, LearningRate, Optimizer
from fastopt.train.param_tree import Params

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(Optimizer):
    r"""Gradient descent, with momentum and Nesterov's variant.

    .. math::
        b &= \mu b + (1 - \tau) g \\
        w &= w - \mathrm{lr} \cdot b \qquad (\text{Nesterov: } w - \mathrm{lr} (g + \mu b))

    with ``momentum`` :math:`\mu` and ``dampening`` :math:`\tau`; without momentum :math:`b = g`. The first step
    takes :math:`b = g`, as ``torch.optim.SGD`` does.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays to step in place; see `Optimizer`.
    lr : float or callable
        Learning rate, or a schedule: a function of the number of steps taken so far.
    momentum, dampening : float
        See the formula.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    nesterov : bool
        Needs ``momentum > 0`` and ``dampening == 0``.
    **common
        The options that all optimizers share; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    References
    ----------
    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.zeros(3, dtype=np.float32)
    >>> opt = fo.SGD(w, lr=0.5)
    >>> opt.step(np.array([1, 2, 3], dtype=np.float32))
    >>> w
    array([-0.5, -1. , -1.5], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, common)

    def _check(self, options: dict[str, Any]) -> None:
        momentum, dampening = require_number(options, "momentum"), require_number(options, "dampening")
        if options["nesterov"]:
            require(momentum > 0, "momentum", "more than 0 with nesterov", momentum)
            require(dampening == 0, "dampening", "0 with nesterov", dampening)

    @classmethod
    def _rule(cls, options: dict[str, Any]) -> str:
        if options["nesterov"]:
            return "nesterov"
        return "momentum" if options["momentum"] > 0 else "sgd"

    @classmethod
    def _states(cls, options: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if options["momentum"] > 0 else ()

    @classmethod
    def _hyper(cls, options: dict[str, Any], lr: float, step: int) -> Hyper:
        blend = 1.0 if step == 1 else 1.0 - options["dampening"]
        return hyper(step_size=lr, weight_decay=options["weight_decay"], decay1=options["momentum"], blend1=blend)


class Adagrad(Optimizer):
    r"""Adagrad: steps that shrink with the squares of the gradients so far.

    .. math::
        s &= s + g^2 \\
        w &= w - \frac{\mathrm{lr}}{1 + (t - 1) \eta} \cdot \frac{g}{\sqrt{s} + \varepsilon}

    with ``lr_decay`` :math:`\eta`. 8-bit states are refused, as they cannot hold a sum that only grows.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays to step in place; see `Optimizer`.
    lr : float or callable
        Learning rate, or a schedule: a function of the number of steps taken so far.
    lr_decay : float
        See the formula.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    initial_accumulator_value : float
        Initial value of :math:`s`.
    eps : float
        Keeps the denominator from zero.
    **common
        The options that all optimizers share; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    References
    ----------
    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning", 2011.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.ones(2, dtype=np.float32)
    >>> opt = fo.Adagrad(w, lr=0.5)
    >>> opt.step(np.array([3, -4], dtype=np.float32))
    >>> w
    array([0.5, 1.5], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        *,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults, common)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own; see `Optimizer.add_param_group`."""
        super().add_param_group(group)
        for total, *_ in self._groups[-1].states:
            total.fill(self.param_groups[-1]["initial_accumulator_value"])

    def _check(self, options: dict[str, Any]) -> None:
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            require_number(options, name)

    @classmethod
    def _refused_state_dtypes(cls, options: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        return ("uint8",), "for Adagrad"

    @classmethod
    def _rule(cls, options: dict[str, Any]) -> str:
        return "adagrad"

    @classmethod
    def _states(cls, options: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    @classmethod
    def _hyper(cls, options: dict[str, Any], lr: float, step: int) -> Hyper:
        size = lr / (1 + (step - 1) * options["lr_decay"])
        return hyper(step_size=size, weight_decay=options["weight_decay"], eps=options["eps"])


class RMSprop(Optimizer):
    r"""RMSprop: steps divided by the running root mean square of the gradient.

    .. math::
        v &= \alpha v + (1 - \alpha) g^2 \\
        b &= \mu b + \frac{g}{\sqrt{v} + \varepsilon} \\
        w &= w - \mathrm{lr} \cdot b

    If ``centered``, the variance :math:`v - \bar g^2`, with the running mean :math:`\bar g` of the gradient, takes the
    place of :math:`v` in the root. Where the gradient hardly varies, this difference is nothing but the rounding errors
    of :math:`v`: tens of units in its last place. A variance below 64 units counts as 64, so that no step is longer
    than 362 (in float64 8 million) times ``lr``. bfloat16 and 8-bit states are refused then, since 64 of their units
    are half of :math:`v` or more.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays to step in place; see `Optimizer`.
    lr : float or callable
        Learning rate, or a schedule: a function of the number of steps taken so far.
    alpha : float
        Decay of the running means, at least 0 and below 1.
    eps : float
        Keeps the denominator from zero.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    momentum : float
        :math:`\mu`.
    centered : bool
        See above.
    **common
        The options that all optimizers share; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    References
    ----------
    Tieleman and Hinton, "Lecture 6.5", 2012; Graves, "Generating sequences with recurrent neural networks", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.ones(2, dtype=np.float32)
    >>> opt = fo.RMSprop(w, lr=0.05)
    >>> opt.step(np.array([3, -4], dtype=np.float32))
    >>> w.round(4)
    array([0.5, 1.5], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults, common)

    def _check(self, options: dict[str, Any]) -> None:
        for name in ("eps", "momentum", "alpha"):
            require_number(options, name)
        require(options["alpha"] < 1, "alpha", "a number in [0, 1)", options["alpha"])

    @classmethod
    def _refused_state_dtypes(cls, options: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        return (("bfloat16", "uint8") if options["centered"] else ()), "if centered"

    @classmethod
    def _rule(cls, options: dict[str, Any]) -> str:
        centered = "_centered" if options["centered"] else ""
        return f"rmsprop{centered}_momentum" if options["momentum"] > 0 else f"rmsprop{centered}"

    @classmethod
    def _states(cls, options: dict[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if options["momentum"] > 0 else ()
        return ("square_avg", *momentum, *(("grad_avg",) if options["centered"] else ()))

    @classmethod
    def _hyper(cls, options: dict[str, Any], lr: float, step: int) -> Hyper:
        alpha, momentum, eps = options["alpha"], options["momentum"], options["eps"]
        return hyper(
            step_size=lr,
            weight_decay=options["weight_decay"],
            decay1=momentum,
            decay2=alpha,
            blend2=1 - alpha,
            eps=eps,
        )


class Adam(Optimizer):
    r"""Adam, with bias correction.

    .. math::
        m &= m + (1 - \beta_1)(g - m) \\
        v &= \beta_2 v + (1 - \beta_2) g^2 \\
        w &= w - \frac{\mathrm{lr}}{1 - \beta_1^t} \cdot
             \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \varepsilon}

    AMSGrad puts the largest :math:`v` so far in the root. 8-bit states are refused then, as stochastic rounding would
    only ever raise that maximum.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays to step in place; see `Optimizer`.
    lr : float or callable
        Learning rate, or a schedule: a function of the number of steps taken so far.
    betas : (float, float)
        Decay of the running means of the gradient and of its square, each at least 0 and below 1.
    eps : float
        Keeps the denominator from zero.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    amsgrad : bool
        See above.
    **common
        The options that all optimizers share; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    Notes
    -----
    There are two states of the size of the parameters, ``exp_avg`` and ``exp_avg_sq``. Subnormal numbers count as zero,
    so that units without gradients do not slow the step down.

    References
    ----------
    Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1; Reddi et al., "On the
    convergence of Adam and beyond", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> params = {"w": np.ones((2, 2), dtype=np.float32), "b": np.zeros(2, dtype=np.float32)}
    >>> opt = fo.Adam(params, lr=0.1)
    >>> opt.step({"w": np.ones((2, 2), dtype=np.float32), "b": None})  # None: leave b alone
    >>> params["w"]
    array([[0.9, 0.9],
           [0.9, 0.9]], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults, common)

    def _check(self, options: dict[str, Any]) -> None:
        require_number(options, "eps")
        require_betas(options)

    @classmethod
    def _refused_state_dtypes(cls, options: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        return (("uint8",) if options["amsgrad"] else ()), "with amsgrad"

    @classmethod
    def _rule(cls, options: dict[str, Any]) -> str:
        return "amsgrad" if options["amsgrad"] else "adam"

    @classmethod
    def _states(cls, options: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if options["amsgrad"] else ("exp_avg", "exp_avg_sq")

    @classmethod
    def _hyper(cls, options: dict[str, Any], lr: float, step: int) -> Hyper:
        beta1, beta2 = options["betas"]
        unbias = math.sqrt(1 - beta2**step)
        size, eps = lr * unbias / (1 - beta1**step), options["eps"] * unbias
        coupled, decay = cls._decay(options["weight_decay"], lr)
        return hyper(
            step_size=size,
            weight_decay=coupled,
            decay=decay,
            decay1=beta1,
            blend1=1 - beta1,
            decay2=beta2,
            blend2=1 - beta2,
            eps=eps,
        )

    @staticmethod
    def _decay(weight_decay: float, lr: float) -> tuple[float, float]:
        """Return what is added to the gradient for each weight, and what the weight is multiplied by."""
        return weight_decay, 1.0


class AdamW(Adam):
    r"""Adam with decoupled weight decay.

    Before the step of `Adam`, the weights are multiplied by :math:`1 - \mathrm{lr} \cdot \lambda`, with
    ``weight_decay`` :math:`\lambda`. The decay does not enter the gradient, nor the states.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays to step in place; see `Optimizer`.
    lr : float or callable
        Learning rate, or a schedule: a function of the number of steps taken so far.
    betas : (float, float)
        Decay of the running means of the gradient and of its square, each at least 0 and below 1.
    eps : float
        Keeps the denominator from zero.
    weight_decay : float
        Decoupled, :math:`\lambda`.
    amsgrad : bool
        See `Adam`.
    **common
        The options that all optimizers share; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.ones(2, dtype=np.float32)
    >>> opt = fo.AdamW(w, lr=0.1, weight_decay=0.5)
    >>> opt.step(np.zeros(2, dtype=np.float32))
    >>> w
    array([0.95, 0.95], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **common)

    @staticmethod
    def _decay(weight_decay: float, lr: float) -> tuple[float, float]:
        return 0.0, 1 - lr * weight_decay


class Lion(Optimizer):
    r"""Lion: the sign of a blend of momentum and gradient.

    .. math::
        w &= w (1 - \mathrm{lr} \cdot \lambda)
             - \mathrm{lr} \cdot \mathrm{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &= \beta_2 m + (1 - \beta_2) g

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays to step in place; see `Optimizer`.
    lr : float or callable
        Learning rate, or a schedule: a function of the number of steps taken so far.
    betas : (float, float)
        Factors of the blend and of the running mean, each at least 0 and below 1.
    weight_decay : float
        Decoupled, :math:`\lambda`.
    **common
        The options that all optimizers share; see `Optimizer`.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    References
    ----------
    Chen et al., "Symbolic discovery of optimization algorithms", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> w = np.ones(3, dtype=np.float32)
    >>> opt = fo.Lion(w, lr=0.25)
    >>> opt.step(np.array([3, -4, 0], dtype=np.float32))
    >>> w
    array([0.75, 1.25, 1.  ], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, common)

    def _check(self, options: dict[str, Any]) -> None:
        require_betas(options)

    @classmethod
    def _rule(cls, options: dict[str, Any]) -> str:
        return "lion"

    @classmethod
    def _states(cls, options: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    @classmethod
    def _hyper(cls, options: dict[str, Any], lr: float, step: int) -> Hyper:
        beta1, beta2 = options["betas"]
        decay = 1 - lr * options["weight_decay"]
        return hyper(step_size=lr, decay=decay, decay1=beta1, blend1=1 - beta1, decay2=beta2, blend2=1 - beta2)
