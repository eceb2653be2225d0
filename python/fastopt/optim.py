"""Optimizers: steps in place on NumPy arrays, with the names, defaults and formulas of ``torch.optim``."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastopt import _core

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = "Array | Iterable[Array] | Mapping[str, Array] | Iterable[dict[str, Any]]"
LearningRate: TypeAlias = "float | Callable[[int], float]"


class Hyper(NamedTuple):
    """The numbers of one step, in the order of ``Hyper`` in cpp/kernels/contract.hpp, which explains them."""

    step_size: float
    grad_scale: float = 1.0
    weight_decay: float = 0.0
    decay: float = 1.0
    shrink: float = 0.0
    decay1: float = 0.0
    blend1: float = 1.0
    decay2: float = 0.0
    blend2: float = 1.0
    root_scale: float = 1.0
    eps: float = 0.0
    keep_zeros: bool = False


def _leaves(tree: Any) -> dict[str, Any]:
    """Return the arrays of a dict, a list or a single array by the names that messages and states use."""
    if isinstance(tree, Mapping):
        return {str(name): leaf for name, leaf in tree.items()}
    if isinstance(tree, list | tuple):
        return {str(i): leaf for i, leaf in enumerate(tree)}
    return {"0": tree}


def _require(condition: bool, name: str, needed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {needed}, got {got!r}")


def _number(options: Mapping[str, Any], name: str) -> float:
    """Return an option that must be a finite number, 0 or more."""
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    _require(bool(math.isfinite(value) and value >= 0), name, "a finite number, 0 or more", value)
    return float(value)


class _Group:
    """The tensors of one parameter group: what a step needs, in parallel lists."""

    def __init__(self, names: list[str], params: list[Array], state_count: int) -> None:
        self.names = names
        self.params = params
        self.states = [tuple(np.zeros_like(p) for _ in range(state_count)) for p in params]
        self.steps = [0] * len(params)


class Optimizer(abc.ABC):
    """What all optimizers share: parameter groups, the step, and saving and restoring of states.

    A subclass names its rule in the kernels, its states, and the numbers of a step.

    Attributes
    ----------
    param_groups : list of dict
        One dict a group: ``"params"`` as they were given, and the options, which may be changed between steps.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._defaults = defaults
        self._groups: list[_Group] = []
        self._steps = 0
        self.param_groups = []
        tree: Any = params if isinstance(params, np.ndarray | Mapping) else list(params)
        self._grouped = isinstance(tree, list) and bool(tree) and all(isinstance(p, Mapping) for p in tree)
        for group in tree if self._grouped else [{"params": tree}]:
            self.add_param_group(group)

    # ---- what a subclass says --------------------------------------------------------------------------------

    @abc.abstractmethod
    def _check(self, options: dict[str, Any]) -> None:
        """Raise if an option is out of range."""

    @abc.abstractmethod
    def _rule(self, options: dict[str, Any]) -> str:
        """Return the name of the rule in cpp/kernels/optim.inl."""

    @abc.abstractmethod
    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the states that the rule keeps, in its order."""

    @abc.abstractmethod
    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        """Return the numbers of step number `step`, counted from 1."""

    # ---- groups ----------------------------------------------------------------------------------------------

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own.

        Parameters
        ----------
        group : mapping
            ``"params"``: an array, a list or a dict of arrays; other keys override the optimizer's options.

        Raises
        ------
        TypeError
            If a parameter is not a NumPy array of float32 or float64.
        ValueError
            If an option is unknown or out of range, or an array is read-only, not contiguous, or shares
            memory with another one.
        """
        if "params" not in group:
            raise ValueError(f"params: missing from the group with {sorted(group)}")
        unknown = sorted(set(group) - {"params"} - set(self._defaults))
        _require(not unknown, "group", f"options among {sorted(self._defaults)}", unknown)
        options = {**self._defaults, **group}
        self._check(options)
        lr = options["lr"]
        if not callable(lr):
            _number(options, "lr")
        for name in ("weight_decay", "l1"):
            _number(options, name)

        if not isinstance(options["params"], np.ndarray | Mapping):
            options["params"] = list(options["params"])
        leaves = _leaves(options["params"])
        prefix = f"{len(self._groups)}." if self._grouped or self._groups else ""
        names = [prefix + name for name in leaves]
        params = list(leaves.values())
        _core.check_weights(
            [name for g in self._groups for name in g.names] + names,
            [param for g in self._groups for param in g.params] + params,
        )
        self._groups.append(_Group(names, params, len(self._states(options))))
        self.param_groups.append(options)

    # ---- the step --------------------------------------------------------------------------------------------

    def step(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Update all parameters in place, in one pass.

        Everything is checked first: a call that raises has changed nothing.

        Parameters
        ----------
        grads : array, list or dict of arrays, or list of these
            Gradients in the shape of the parameters: what was passed as ``params``, with a list of one entry
            a group if there are several groups. Each has the shape and dtype of its parameter. ``None`` in
            place of a gradient skips that tensor, whose own step count then stays.
        grad_scale : float
            Multiplies every gradient in the same pass; ``1 / loss_scale`` undoes a loss scale.

        Raises
        ------
        TypeError
            If a gradient is not an array of its parameter's dtype.
        ValueError
            If names or shapes do not match, an array is not contiguous or shares memory with another one, or
            a number is not finite.
        """
        _require(math.isfinite(grad_scale), "grad_scale", "a finite number", grad_scale)
        several = self._grouped or len(self._groups) > 1
        trees = grads if several else [grads]
        if several and (not isinstance(grads, list | tuple) or len(grads) != len(self._groups)):
            raise ValueError(f"grads: expected a list of {len(self._groups)} entries, one a group")

        jobs: list[tuple[Any, ...]] = []
        stepped: list[tuple[_Group, list[int]]] = []
        for group, options, tree in zip(self._groups, self.param_groups, trees, strict=True):
            rule = self._rule(options)
            aligned = self._align(group, options["params"], tree)
            lr = options["lr"](self._steps) if callable(options["lr"]) else options["lr"]
            _require(math.isfinite(lr) and lr >= 0, "lr", "a finite number, 0 or more", lr)
            scale = -grad_scale if options["maximize"] else grad_scale
            for count, indices in _by_step(group.steps, aligned).items():
                hyper = self._hyper(options, lr, count + 1)._replace(
                    grad_scale=scale, shrink=lr * options["l1"], keep_zeros=options["keep_zeros"]
                )
                _require(all(map(math.isfinite, hyper)), "options", "finite numbers", hyper)
                whole = len(indices) == len(group.params)

                def pick(values: list[Any], indices: list[int] = indices, whole: bool = whole) -> list[Any]:
                    return values if whole else [values[i] for i in indices]

                tensors = (pick(group.names), pick(group.params), pick(aligned), pick(group.states))
                jobs.append((rule, tuple(hyper), *tensors))
                stepped.append((group, indices))
        _core.step(jobs)
        self._steps += 1
        for group, indices in stepped:
            for i in indices:
                group.steps[i] += 1

    @staticmethod
    def _align(group: _Group, params: Any, tree: Any) -> list[Any]:
        """Return the gradients in the order of the parameters."""
        if isinstance(params, Mapping):
            if not isinstance(tree, Mapping):
                raise TypeError(f"grads: expected a dict like params, got {type(tree).__name__}")
            if tree.keys() != params.keys():
                missing, extra = sorted(params.keys() - tree.keys()), sorted(tree.keys() - params.keys())
                raise ValueError(f"grads: expected the names of params; missing {missing}, unexpected {extra}")
            return [tree[name] for name in params]
        if isinstance(params, list):
            if not isinstance(tree, list | tuple):
                raise TypeError(f"grads: expected a list like params, got {type(tree).__name__}")
            _require(len(tree) == len(params), "grads", f"{len(params)} gradients", len(tree))
            return list(tree)
        return [tree]

    # ---- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs, as plain arrays and numbers; arrays are not copied.

        Returns
        -------
        dict
            ``"optimizer"``: the class's name; ``"steps"``: calls of `step`; ``"state"``: by parameter name its
            step count and states; ``"param_groups"``: options, with the names of the parameters.
        """
        state = {}
        for group, options in zip(self._groups, self.param_groups, strict=True):
            names = self._states(options)
            for name, steps, arrays in zip(group.names, group.steps, group.states, strict=True):
                state[name] = {"step": steps, **dict(zip(names, arrays, strict=True))}
        groups = [
            {**options, "params": list(group.names)}
            for group, options in zip(self._groups, self.param_groups, strict=True)
        ]
        return {
            "optimizer": type(self).__name__,
            "steps": self._steps,
            "state": state,
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the steps that follow are bit for bit the same.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer of the same class over parameters of the same names, shapes and dtypes. Its
            arrays are copied.

        Raises
        ------
        ValueError
            If it is another optimizer's, naming the first difference. Nothing has then been changed.
        """
        name = type(self).__name__
        _require(state_dict["optimizer"] == name, "optimizer", f"{name!r}", state_dict["optimizer"])
        saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
        _require(len(saved_groups) == len(self._groups), "param_groups", str(len(self._groups)), len(saved_groups))
        todo: list[tuple[Array, Array]] = []
        for group, options, saved in zip(self._groups, self.param_groups, saved_groups, strict=True):
            _require(saved["params"] == group.names, "params", str(group.names), saved["params"])
            self._check({**options, **saved})
            names = self._states(options)
            _require(self._states(saved) == names, "state", str(names), self._states(saved))
            for param, arrays in zip(group.names, group.states, strict=True):
                for key, mine in zip(names, arrays, strict=True):
                    theirs = saved_states[param][key]
                    what = f"{key} of {param!r}"
                    _require(theirs.dtype == mine.dtype, what, str(mine.dtype), str(theirs.dtype))
                    _require(theirs.shape == mine.shape, what, str(mine.shape), theirs.shape)
                    todo.append((mine, theirs))
        for mine, theirs in todo:
            mine[...] = theirs
        for group, options, saved in zip(self._groups, self.param_groups, saved_groups, strict=True):
            group.steps = [int(saved_states[param]["step"]) for param in group.names]
            options.update({key: value for key, value in saved.items() if key != "params"})
        self._steps = int(state_dict["steps"])

    def __repr__(self) -> str:
        count = sum(len(group.params) for group in self._groups)
        size = sum(param.size for group in self._groups for param in group.params)
        options = ", ".join(f"{key}={value!r}" for key, value in self._defaults.items())
        return f"{type(self).__name__}({options}) over {size:,} parameters in {count} arrays"


def _by_step(steps: list[int], grads: list[Any]) -> dict[int, list[int]]:
    """Return the tensors that have a gradient, by how many steps they have taken."""
    groups: dict[int, list[int]] = {}
    for i, (count, grad) in enumerate(zip(steps, grads, strict=True)):
        if grad is not None:
            groups.setdefault(count, []).append(i)
    return groups


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
        float32 or float64 arrays, C-contiguous and writable, changed in place.
    lr : float or callable
        Learning rate, or a function from the number of steps taken so far to it.
    momentum, dampening : float
        See the formula.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    nesterov : bool
        Needs ``momentum > 0`` and ``dampening == 0``.
    l1 : float
        L1 penalty as a proximal step after the update, which makes exact zeros.
    keep_zeros : bool
        A weight that is exactly 0 stays 0: fine-tune a pruned model.
    maximize : bool
        Climb instead of descend.

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
        l1: float = 0.0,
        keep_zeros: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "l1": l1,
                "keep_zeros": keep_zeros,
                "maximize": maximize,
            },
        )

    def _check(self, options: dict[str, Any]) -> None:
        momentum, dampening = _number(options, "momentum"), _number(options, "dampening")
        if options["nesterov"]:
            _require(momentum > 0, "momentum", "more than 0 with nesterov", momentum)
            _require(dampening == 0, "dampening", "0 with nesterov", dampening)

    def _rule(self, options: dict[str, Any]) -> str:
        if options["nesterov"]:
            return "nesterov"
        return "momentum" if options["momentum"] > 0 else "sgd"

    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if options["momentum"] > 0 else ()

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        return Hyper(
            step_size=lr,
            weight_decay=options["weight_decay"],
            decay1=options["momentum"],
            blend1=1.0 if step == 1 else 1.0 - options["dampening"],
        )


class Adam(Optimizer):
    r"""Adam, with bias correction.

    .. math::
        m &= m + (1 - \beta_1)(g - m) \\
        v &= \beta_2 v + (1 - \beta_2) g^2 \\
        w &= w - \frac{\mathrm{lr}}{1 - \beta_1^t} \cdot
             \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \varepsilon}

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        float32 or float64 arrays, C-contiguous and writable, changed in place.
    lr : float or callable
        Learning rate, or a function from the number of steps taken so far to it.
    betas : (float, float)
        Decay of the running means of the gradient and of its square, each at least 0 and below 1.
    eps : float
        Keeps the denominator from zero.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    l1 : float
        L1 penalty as a proximal step after the update, which makes exact zeros.
    keep_zeros : bool
        A weight that is exactly 0 stays 0: fine-tune a pruned model.
    maximize : bool
        Climb instead of descend.

    Raises
    ------
    TypeError, ValueError
        See `Optimizer.add_param_group`.

    Notes
    -----
    Two states of the size of the parameters, ``exp_avg`` and ``exp_avg_sq``. Subnormal numbers are treated as
    zero, so that units whose gradients have died do not slow the step down.

    References
    ----------
    Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1.

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
        l1: float = 0.0,
        keep_zeros: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "l1": l1,
                "keep_zeros": keep_zeros,
                "maximize": maximize,
            },
        )

    def _check(self, options: dict[str, Any]) -> None:
        _number(options, "eps")
        betas = options["betas"]
        _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", "two numbers in [0, 1)", betas)

    def _rule(self, options: dict[str, Any]) -> str:
        return "adam"

    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        beta1, beta2 = options["betas"]
        return Hyper(
            step_size=lr / (1 - beta1**step),
            weight_decay=options["weight_decay"],
            decay1=beta1,
            blend1=1 - beta1,
            decay2=beta2,
            blend2=1 - beta2,
            root_scale=1 / math.sqrt(1 - beta2**step),
            eps=options["eps"],
        )


class AdamW(Adam):
    r"""Adam with decoupled weight decay.

    Before the step of `Adam`, the weights shrink by themselves: :math:`w = w (1 - \mathrm{lr} \cdot \lambda)` with
    ``weight_decay`` :math:`\lambda`; the gradient, and so the states, know nothing of it.

    Parameters
    ----------
    params, lr, betas, eps, l1, keep_zeros, maximize
        As in `Adam`.
    weight_decay : float
        Decoupled; 0.01 unless said otherwise.

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
        l1: float = 0.0,
        keep_zeros: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            l1=l1,
            keep_zeros=keep_zeros,
            maximize=maximize,
        )

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        hyper = super()._hyper(options, lr, step)
        return hyper._replace(weight_decay=0.0, decay=1 - lr * options["weight_decay"])
