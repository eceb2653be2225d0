"""Optimizers: steps in place on NumPy arrays, with the names, defaults and formulas of ``torch.optim``."""

from __future__ import annotations

import abc
import inspect
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastopt import _core

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _HasArray(Protocol):
    def __array__(self) -> Any: ...


class _HasDlpack(Protocol):
    def __dlpack__(self) -> Any: ...


Array: TypeAlias = NDArray[Any]
Leaf: TypeAlias = Array | _HasArray | _HasDlpack
Params: TypeAlias = Leaf | Iterable[Leaf] | Mapping[str, Leaf] | Iterable[Mapping[str, Any]]
LearningRate: TypeAlias = float | Callable[[int], float]
Hyper: TypeAlias = tuple[float, ...]  # made by `hyper`
Job: TypeAlias = tuple[Any, ...]  # made by `job`

# Elements of an 8-bit state that share an exponent; kStateBlock in cpp/kernels/contract.hpp.
STATE_BLOCK = 256

_FLAGS = {
    "amsgrad",
    "centered",
    "keep_zeros",
    "master_weights",
    "maximize",
    "nesterov",
    "stochastic_rounding",
}
_STATE_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}


class Common(TypedDict, total=False):
    """Options that every optimizer takes; `Optimizer` explains them."""

    l1: float
    keep_zeros: bool
    maximize: bool
    max_norm: float | None
    state_dtype: str
    master_weights: bool
    stochastic_rounding: bool
    seed: int


# The two functions below name what crosses into C++: a NamedTuple would take as long as the step of a small tensor.


def hyper(
    *,
    step_size: float,
    weight_decay: float = 0.0,
    decay: float = 1.0,
    decay1: float = 0.0,
    blend1: float = 1.0,
    decay2: float = 0.0,
    blend2: float = 1.0,
    eps: float = 0.0,
) -> Hyper:
    """Return the numbers of one step, which cpp/kernels/contract.hpp explains, in the order of `_core.HYPER_FIELDS`."""
    return (step_size, weight_decay, decay, decay1, blend1, decay2, blend2, eps)


def job(
    *,
    rule: int,
    hyper: Hyper,
    grad_scale: float,
    shrink: float,
    keep_zeros: bool,
    stochastic: bool,
    noise: int,
    names: list[str],
    params: list[Any],
    grads: list[Any],
    states: list[tuple[Array, ...]],
    counts: list[int],
    indices: list[int] | None,
) -> Job:
    """Return what `_core.step` takes for the tensors of a group, in the order of ``_core.JOB_FIELDS``.

    Of the lists, the tensors at `indices` are stepped, or all if that is None.
    """
    return (
        rule, hyper, grad_scale, shrink, keep_zeros, stochastic, noise, names, params, grads, states, counts, indices
    )  # fmt: skip


def _require(condition: bool, name: str, needed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {needed}, got {got!r}")


def _is_number(x: object) -> bool:
    return isinstance(x, int | float | np.floating | np.integer) and not isinstance(x, bool)


def _float(value: Any, name: str) -> float:
    """Return a number as Python's float: NumPy's narrower ones would make the arithmetic between steps narrower."""
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _number(options: MutableMapping[str, Any], name: str) -> float:
    """Return an option that must be a finite number, 0 or more, and keep it as a float."""
    value = _float(options[name], name)
    _require(math.isfinite(value) and value >= 0, name, "a finite number, 0 or more", options[name])
    options[name] = value
    return value


def _count(options: Mapping[str, Any], name: str, what: str) -> int:
    """Return an entry of a saved state that must be a number of steps."""
    value = options.get(name)
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0
    _require(bool(fits), what, "a whole number, 0 or more", value)
    return operator.index(value)  # type: ignore[arg-type]  # an integer, as was found


def _flags(options: Mapping[str, Any]) -> None:
    """Refuse what is not a bool where only a bool makes sense."""
    for name in _FLAGS & options.keys():
        if not isinstance(options[name], bool | np.bool_):
            raise TypeError(f"{name}: expected a bool, got {type(options[name]).__name__}")


def _betas(options: MutableMapping[str, Any]) -> None:
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or not all(_is_number(b) for b in betas):
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", "two numbers in [0, 1)", betas)
    options["betas"] = tuple(float(b) for b in betas)  # no list, which could be changed unseen


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _addresses(leaves: list[Any]) -> list[int]:
    """Return where the memory of each tensor is, which torch may exchange; 0 for what is none."""
    return [leaf.data_ptr() if _is_tensor(leaf) else 0 for leaf in leaves]


def as_array(x: Any) -> Any:
    """Return `x` as a NumPy array over the same memory, if it can say where that is; else `x` itself.

    Tensors of torch and whatever has ``__array__`` or ``__dlpack__`` are taken; memory is never copied.
    """
    if isinstance(x, np.ndarray):
        return x
    if _is_tensor(x):
        torch, x = sys.modules["torch"], x.detach()
        if x.dtype == torch.bfloat16:  # which NumPy's protocols do not know
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    if hasattr(x, "__array__"):
        array = np.asarray(x)
        return array if np.may_share_memory(array, np.asarray(x)) else x
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else x


def _as_gradient(x: Any) -> Any:
    """Return what `as_array` does, and an array of a scalar: NumPy makes scalars of what has no axes."""
    return np.asarray(x) if isinstance(x, np.generic) else as_array(x)


def _leaves(tree: Any) -> tuple[list[str], list[Any]]:
    """Return the arrays of a dict, a list or a single array, after the names that messages and states use."""
    if isinstance(tree, Mapping):
        return [str(name) for name in tree], list(tree.values())
    if isinstance(tree, list | tuple):
        return [str(i) for i in range(len(tree))], list(tree)
    return ["0"], [tree]


class _Group:
    """The tensors of one parameter group: what a step needs, in parallel lists."""

    def __init__(
        self,
        options: Mapping[str, Any],
        names: list[str],
        leaves: list[Any],
        rule: str,
        keys: tuple[str, ...],
        common: Mapping[str, Any],
    ) -> None:
        self.checked = dict(options)  # as they were when they were found to be right
        self.rule = _core.rule(rule)
        self.rule_states = keys
        self.tree = tree = options["params"]
        # What gradients come in: what the parameters came in.
        self.tree_keys = dict.fromkeys(tree) if isinstance(tree, Mapping) else None
        self.single = not isinstance(tree, Mapping | list)
        self.names = names
        self.leaves = leaves
        self.params = params = [as_array(leaf) for leaf in leaves]
        self.addresses = _addresses(leaves)
        self.counts = [0] * len(params)  # steps that each has taken
        self.keys = keys
        self.states: list[tuple[Array, ...]] = []
        dtype = _STATE_DTYPES[common["state_dtype"]]
        if dtype is np.uint8:
            self.keys += tuple(f"{key}.exponent" for key in keys)
        if common["master_weights"]:
            self.keys += ("master",)
        for param in params:
            wide = np.dtype(np.float64) if param.dtype == np.float64 else np.dtype(np.float32)
            state = [np.zeros(param.shape, wide if dtype is np.float32 else dtype) for _ in keys]
            if dtype is np.uint8:
                state += [np.zeros(-(-param.size // STATE_BLOCK), np.uint8) for _ in keys]
            if common["master_weights"]:
                state.append(param.astype(np.float32))
            self.states.append(tuple(state))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.params = [as_array(leaf) for leaf in self.leaves]  # a copied tensor has memory of its own
        self.addresses = _addresses(self.leaves)

    def replaced(self) -> bool:
        """Return whether the dict or list of parameters no longer has the arrays that are stepped."""
        here = self.tree if self.tree_keys is None else self.tree.values()
        if len(here) >= len(self.leaves) and not any(map(operator.is_not, here, self.leaves)):  # it may have more
            return False
        return self.tree_keys is None or any(map(operator.is_not, map(self.tree.get, self.tree_keys), self.leaves))

    def gradients(self, tree: Any) -> list[Any]:
        """Return the gradients in the order of the parameters."""
        if self.single:
            return [tree if type(tree) is np.ndarray else _as_gradient(tree)]
        if self.tree_keys is not None:
            if type(tree) is not dict and not isinstance(tree, Mapping):
                raise TypeError(f"grads: expected a dict like params, got {type(tree).__name__}")
            if tree.keys() != self.tree_keys.keys():
                missing, extra = (
                    sorted(a.keys() - b.keys(), key=str) for a, b in ((self.tree_keys, tree), (tree, self.tree_keys))
                )
                raise ValueError(f"grads: expected the names of params; missing {missing}, unexpected {extra}")
            tree = [tree[name] for name in self.tree_keys]
        else:
            if not isinstance(tree, list | tuple):
                raise TypeError(f"grads: expected a list like params, got {type(tree).__name__}")
            _require(len(tree) == len(self.params), "grads", f"{len(self.params)} gradients", len(tree))
        return [grad if type(grad) is np.ndarray else _as_gradient(grad) for grad in tree]

    def jobs(self, grads: list[Any]) -> Iterable[tuple[int, list[int] | None]]:
        """Return what to step: numbers of steps taken so far, with the tensors that took them (None: all)."""
        counts = self.counts
        if len(counts) == 1 and grads[0] is not None:
            return ((counts[0], None),)
        for grad in grads:
            if grad is None:
                break
        else:
            if counts and counts.count(counts[0]) == len(counts):
                return ((counts[0], None),)
        by_count: dict[int, list[int]] = {}
        for i, (count, grad) in enumerate(zip(counts, grads, strict=True)):
            if grad is not None:
                by_count.setdefault(count, []).append(i)
        return by_count.items()


class Optimizer(abc.ABC):
    """What all optimizers share: parameter groups, the step, and saving and restoring of states.

    A subclass names its rule in the kernels, its states, and the numbers of a step.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        float32, float64, float16 or bfloat16, C-contiguous and writable, changed in place: NumPy arrays, CPU
        tensors of torch, or anything that gives its memory by ``__array__`` or ``__dlpack__``. A group is a dict
        with ``"params"`` and options of its own.
    lr : float or callable
        Learning rate, or a function from the number of steps taken so far to it; see `fastopt.schedules`.
    l1 : float, default 0
        L1 penalty as a proximal step after the update, which makes exact zeros.
    keep_zeros : bool, default False
        A weight that is exactly 0 stays 0: fine-tune a pruned model.
    maximize : bool, default False
        Climb instead of descend.
    max_norm : float, optional
        Gradients whose norm over all tensors is larger are scaled down to it, as
        ``torch.nn.utils.clip_grad_norm_`` does, but in the same pass and without changing the gradients. A step
        whose norm is not finite is skipped.
    state_dtype : "float32", "bfloat16" or "uint8", default "float32"
        Of the states; those of float64 parameters are float64, and nothing else. bfloat16 halves them; uint8 is a
        small float of its own, with an exponent for each 256 elements: 1.004 bytes a state. Both are rounded up or
        down by chance, so that small changes are not lost.
    master_weights : bool, default False
        Keep a float32 copy of float16 and bfloat16 parameters, and step that. What else changes the parameters
        meanwhile the next step undoes, but for zeros with `keep_zeros`.
    stochastic_rounding : bool, default False
        Round float16 and bfloat16 parameters up or down by chance, the nearer the likelier, instead of to nearest.
    seed : int, default 0
        Of that chance. It is drawn from seed, step and index: the same for any number of threads, and on resuming.

    Attributes
    ----------
    param_groups : list of dict
        One dict a group: ``"params"`` as they were given, and the options, which may be changed between steps.
    skipped : int
        Steps that were skipped because the norm of the gradients was not finite.
    """

    param_groups: list[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        """Spell out in the subclass's documentation what it says of `params`, `lr` and the common options."""
        if cls.__doc__ and Optimizer.__doc__:  # -OO leaves none
            shared = inspect.cleandoc(Optimizer.__doc__).split("Parameters\n----------\n")[1].split("\nAttributes")[0]
            first, others = shared.split("l1 :")
            own = inspect.cleandoc(cls.__doc__).replace("params, lr\n    See `Optimizer`.\n", first)
            cls.__doc__ = own.replace("**common\n    See `Optimizer`.\n", f"l1 :{others}")

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common) -> None:
        unknown = sorted(set(common) - set(Common.__annotations__))
        if unknown:
            raise TypeError(f"{type(self).__name__}: unexpected options {unknown}")
        self._common: dict[str, Any] = {
            "max_norm": common.get("max_norm"),
            "state_dtype": common.get("state_dtype", "float32"),
            "master_weights": common.get("master_weights", False),
            "stochastic_rounding": common.get("stochastic_rounding", False),
            "seed": common.get("seed", 0),
        }
        self._check_common(self._common)
        self._note_chance()
        self._defaults = {
            **defaults,
            "l1": common.get("l1", 0.0),
            "keep_zeros": common.get("keep_zeros", False),
            "maximize": common.get("maximize", False),
        }
        self._groups: list[_Group] = []
        self._steps = [0]  # calls of `step`; in a list, so that the call that steps the tensors raises it too
        self.skipped = 0
        self._has_tensors = False
        self.param_groups = []
        single = isinstance(params, Mapping) or hasattr(params, "__array__") or hasattr(params, "__dlpack__")
        if not single and not isinstance(params, Iterable):
            raise TypeError(f"params: expected an array, a list, a dict or groups, got {type(params).__name__}")
        tree: Any = params
        if not single and not isinstance(tree, list):
            tree = list(tree)
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
            If a parameter is not an array of a float type.
        ValueError
            If an option is unknown or out of range, two arrays have the same name, or an array is read-only, not
            contiguous, or shares memory with another one.
        """
        if "params" not in group:
            raise ValueError(f"params: missing from the group with {sorted(group)}")
        options = {**self._defaults, **group}
        self._check_options(options)

        tree = options["params"]
        if not (isinstance(tree, Mapping) or hasattr(tree, "__array__") or hasattr(tree, "__dlpack__")):
            if not isinstance(tree, Iterable):
                raise TypeError(f"params: expected an array, a list or a dict, got {type(tree).__name__}")
            options["params"] = tree if isinstance(tree, list) else list(tree)
        names, leaves = _leaves(options["params"])
        prefix = f"{len(self._groups)}." if self._grouped or self._groups else ""
        names = [prefix + name for name in names]
        params = [as_array(leaf) for leaf in leaves]
        all_names = [name for g in self._groups for name in g.names] + names
        twice = sorted(name for name, count in Counter(all_names).items() if count > 1)
        _require(not twice, "params", "names that differ", twice)
        _core.check_weights(all_names, [param for g in self._groups for param in g.params] + params)
        self._check_fit(names, params, self._common)
        rule, states = self._rule(options), self._states(options)
        self._groups.append(_Group(options, names, leaves, rule, states, self._common))
        self._has_tensors |= any(map(_is_tensor, leaves))
        self.param_groups.append(options)

    @staticmethod
    def _check_common(common: MutableMapping[str, Any]) -> None:
        """Raise if an option of the whole optimizer is out of range."""
        if common["max_norm"] is not None:
            _require(_number(common, "max_norm") > 0, "max_norm", "more than 0", common["max_norm"])
        state_dtype, seed = common["state_dtype"], common["seed"]
        known = isinstance(state_dtype, str) and state_dtype in _STATE_DTYPES
        _require(known, "state_dtype", f"one of {sorted(_STATE_DTYPES)}", state_dtype)
        _flags(common)
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
            raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
        common["seed"] = int(seed)

    @staticmethod
    def _check_fit(names: list[str], params: list[Array], common: Mapping[str, Any]) -> None:
        """Raise if an option of the whole optimizer does not fit a parameter's dtype."""
        for name, param in zip(names, params, strict=True):
            narrow = param.dtype.itemsize == 2
            for option, fits, needed in (
                ("state_dtype", param.dtype != np.float64 or common["state_dtype"] == "float32", "float32"),
                ("master_weights", narrow or not common["master_weights"], "False"),
                ("stochastic_rounding", narrow or not common["stochastic_rounding"], "False"),
            ):
                _require(fits, option, f"{needed} for {name!r} of {param.dtype}", common[option])

    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise if the options of a group are not among those of the optimizer, or out of range."""
        unknown = sorted(options.keys() - self._defaults.keys() - {"params"})
        _require(not unknown, "group", f"options among {sorted(self._defaults)}", unknown)
        missing = sorted(self._defaults.keys() - options.keys())
        if missing:
            raise ValueError(f"group: expected all options, got none for {missing}")
        self._check(options)
        _flags(options)
        for name in ("weight_decay", "l1") if callable(options["lr"]) else ("lr", "weight_decay", "l1"):
            _number(options, name)

    def _note_chance(self) -> None:
        """Note whether a step rounds anything by chance."""
        self._chance = self._common["stochastic_rounding"] or self._common["state_dtype"] != "float32"

    def _refuse_uint8(self, when: str) -> None:
        dtype = self._common["state_dtype"]
        _require(dtype != "uint8", "state_dtype", f"'float32' or 'bfloat16' {when}", dtype)

    # ---- the step --------------------------------------------------------------------------------------------

    def step(self, grads: Any, *, grad_scale: float | None = None) -> float | None:
        """Update all parameters in place, in one pass.

        Everything is checked first: a call that raises has changed nothing. An interrupt (Ctrl-C) comes before all
        tensors, states and step counts are stepped, or after: ``state_dict()["steps"]`` tells.

        Parameters
        ----------
        grads : array, list or dict of arrays, or list of these
            Gradients in the shape of the parameters: what was passed as ``params``, with a list of one entry
            a group if there are several groups. Each has the shape and dtype of its parameter; those of
            float16 and bfloat16 parameters may also be float32, and those of parameters without axes scalars of
            NumPy. ``None`` in place of a gradient skips that tensor, whose own step count then stays.
        grad_scale : float, optional
            Multiplies every gradient in the same pass; ``1 / loss_scale`` undoes a loss scale. If the norm of the
            gradients is not finite then, nothing is changed, and `skipped` counts one more; so it is with `max_norm`.

        Returns
        -------
        float or None
            With `max_norm` or `grad_scale`: the norm of all scaled gradients, before clipping, which is not finite
            if the step was skipped.

        Raises
        ------
        TypeError
            If a gradient is not an array of a dtype that its parameter allows.
        ValueError
            If names or shapes do not match, an array is not contiguous or shares memory with another one, a
            number is not finite, an option that was changed is out of range, or a dict or list that was passed as
            ``params`` no longer has the same arrays.
        """
        groups = self._groups
        if self._grouped or len(groups) > 1:
            if not isinstance(grads, list | tuple) or len(grads) != len(groups):
                raise ValueError(f"grads: expected a list of {len(groups)} entries, one a group")
            gradients = [group.gradients(tree) for group, tree in zip(groups, grads, strict=True)]
        else:
            gradients = [groups[0].gradients(grads)]
        scale, norm = 1.0, None
        if grad_scale is not None or self._common["max_norm"] is not None:
            scale, norm = self._scale(gradients, grad_scale)
            if not math.isfinite(norm):
                self.skipped += 1
                return norm

        jobs: list[Job] = []
        for i, group in enumerate(groups):
            options, grads_of_group = self.param_groups[i], gradients[i]
            if (
                options.get("params") is not group.tree
                or (not group.single and group.replaced())
                or (self._has_tensors and group.addresses != _addresses(group.leaves))
            ):
                raise ValueError(
                    "params: expected the arrays that the optimizer was made for, got others in their place; "
                    "change arrays in place, or make another optimizer"
                )
            if options != group.checked:
                self._check_options(options)
                states = self._states(options)
                _require(states == group.rule_states, "group", f"options that need {group.rule_states}", states)
                group.checked, group.rule = dict(options), _core.rule(self._rule(options))
            lr = options["lr"]
            if callable(lr):
                lr = _number({"lr": lr(self._steps[0])}, "lr")
            for count, indices in group.jobs(grads_of_group):
                jobs.append(
                    job(
                        rule=group.rule,
                        hyper=self._hyper(options, lr, count + 1),
                        grad_scale=-scale if options["maximize"] else scale,
                        shrink=lr * options["l1"],
                        keep_zeros=options["keep_zeros"],
                        stochastic=self._common["stochastic_rounding"],
                        noise=_mixed(self._common["seed"], self._steps[0], len(jobs)) if self._chance else 0,
                        names=group.names,
                        params=group.params,
                        grads=grads_of_group,
                        states=group.states,
                        counts=group.counts,
                        indices=indices,
                    )
                )
        if self._common["master_weights"]:
            self._prune_masters()
        _core.step(jobs, self._steps)
        if self._has_tensors:
            self._tell_autograd(gradients)
        return norm

    def _prune_masters(self) -> None:
        """Let what was pruned since the last step be zero in the float32 copy too, where zeros are to be kept."""
        for group, options in zip(self._groups, self.param_groups, strict=True):
            if options["keep_zeros"]:
                for param, state in zip(group.params, group.states, strict=True):
                    np.copyto(state[-1], 0, where=param.view(np.uint16) << 1 == 0)

    def _tell_autograd(self, gradients: list[list[Any]]) -> None:
        """Let torch know what was changed: it then refuses to go back through what was computed before."""
        graph = sys.modules["torch"].autograd.graph
        for group, grads in zip(self._groups, gradients, strict=True):
            for leaf, grad in zip(group.leaves, grads, strict=True):
                if grad is not None and _is_tensor(leaf):
                    graph.increment_version(leaf)

    def _scale(self, gradients: list[list[Any]], grad_scale: float | None) -> tuple[float, float]:
        """Return what to multiply gradients by, with clipping, and the norm of all of them before clipping."""
        scale = 1.0 if grad_scale is None else _float(grad_scale, "grad_scale")
        _require(math.isfinite(scale), "grad_scale", "a finite number", grad_scale)
        names = [name for group in self._groups for name in group.names]
        norm = abs(scale) * math.sqrt(_core.sum_squares(names, [grad for those in gradients for grad in those]))
        max_norm = self._common["max_norm"]
        if max_norm is not None:
            scale *= min(1.0, max_norm / (norm + 1e-6))
        return scale, norm

    # ---- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs, as plain arrays and numbers; arrays are not copied.

        Returns
        -------
        dict
            ``"optimizer"``: the class's name; ``"steps"``: calls of `step`; ``"state"``: by parameter name its
            step count, dtype, shape and states; ``"param_groups"``: options, with the names of the parameters. A
            learning rate that is a function is left out: the optimizer that loads it brings its own.
        """
        state = {}
        groups = []
        for group, options in zip(self._groups, self.param_groups, strict=True):
            for name, param, count, arrays in zip(group.names, group.params, group.counts, group.states, strict=True):
                about = {"step": count, "dtype": param.dtype.name, "shape": param.shape}
                state[name] = {**about, **dict(zip(group.keys, arrays, strict=True))}
            plain = {key: value for key, value in options.items() if not callable(value)}
            groups.append({**plain, "params": list(group.names)})
        return {
            "optimizer": type(self).__name__,
            "steps": self._steps[0],
            "skipped": self.skipped,
            **self._common,
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
        TypeError, ValueError
            If it is another optimizer's, or damaged, naming the first difference. Nothing has then been changed.
        """
        name = type(self).__name__
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        for key in ("optimizer", "steps", "state", "param_groups", *self._common):
            _require(key in state_dict, "state_dict", f"the key {key!r}", sorted(state_dict))
        _require(state_dict["optimizer"] == name, "optimizer", f"{name!r}", state_dict["optimizer"])
        for key in ("state_dtype", "master_weights"):
            _require(state_dict[key] == self._common[key], key, repr(self._common[key]), state_dict[key])
        common = {key: state_dict[key] for key in self._common}
        self._check_common(common)
        steps, skipped = (_count({"skipped": 0, **state_dict}, key, key) for key in ("steps", "skipped"))
        saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
        _require(len(saved_groups) == len(self._groups), "param_groups", str(len(self._groups)), len(saved_groups))

        todo: list[tuple[Array, Array]] = []
        counts: list[list[int]] = []
        options_of: list[dict[str, Any]] = []
        for group, options, saved in zip(self._groups, self.param_groups, saved_groups, strict=True):
            _require(saved.get("params") == group.names, "params", str(group.names), saved.get("params"))
            options_of.append({**options, **saved, "params": options["params"]})
            self._check_options(options_of[-1])
            states = self._states(options_of[-1])
            _require(states == group.rule_states, "state", str(group.rule_states), states)
            self._check_fit(group.names, group.params, common)
            for param, array in zip(group.names, group.params, strict=True):
                _require(param in saved_states, "state", f"one of {param!r}", sorted(saved_states))
                about = saved_states[param]
                dtype, shape = about.get("dtype"), tuple(about.get("shape", ()))
                _require(dtype == array.dtype.name, f"dtype of {param!r}", repr(array.dtype.name), dtype)
                _require(shape == array.shape, f"shape of {param!r}", str(array.shape), shape)
            counts.append([_count(saved_states[param], "step", f"step of {param!r}") for param in group.names])
            for param, arrays in zip(group.names, group.states, strict=True):
                for key, mine in zip(group.keys, arrays, strict=True):
                    what, theirs = f"{key} of {param!r}", saved_states[param].get(key)
                    _require(isinstance(theirs, np.ndarray), what, "an array", theirs)
                    _require(theirs.dtype == mine.dtype, what, str(mine.dtype), str(theirs.dtype))
                    _require(theirs.shape == mine.shape, what, str(mine.shape), theirs.shape)
                    todo.append((mine, theirs))

        for mine, theirs in todo:
            mine[...] = theirs
        for group, steps_of_group, options, loaded in zip(
            self._groups, counts, self.param_groups, options_of, strict=True
        ):
            group.counts[:] = steps_of_group
            options.update(loaded)
        self._steps[0], self.skipped = steps, skipped
        self._common.update(common)
        self._note_chance()

    def __repr__(self) -> str:
        count = sum(len(group.params) for group in self._groups)
        size = sum(param.size for group in self._groups for param in group.params)
        options = ", ".join(f"{key}={value!r}" for key, value in self._defaults.items())
        return f"{type(self).__name__}({options}) over {size:,} parameters in {count} arrays"


def _mixed(seed: int, step: int, job: int) -> int:
    """Return 32 bits that differ for every seed, step and job."""
    return (
        (seed + 1) * 0x9E3779B97F4A7C15 ^ (step + 1) * 0xC2B2AE3D27D4EB4F ^ (job + 1) * 0x165667B19E3779F9
    ) >> 24 & 0xFFFFFFFF


def l1_penalty(params: Params, l1: float) -> float:
    """Return ``l1 * sum(abs(w))``, what the option `l1` adds to the loss.

    Parameters
    ----------
    params : array, list or dict of arrays
    l1 : float

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.l1_penalty([np.array([1.0, -2.0]), np.array([3.0])], l1=0.5)
    3.0
    """
    return l1 * sum(float(np.abs(as_array(w)).sum(dtype=np.float64)) for w in _leaves(params)[1])


def l2_penalty(params: Params, weight_decay: float) -> float:
    """Return ``weight_decay / 2 * sum(w**2)``, what the option `weight_decay` (not `AdamW`'s) adds to the loss.

    Parameters
    ----------
    params : array, list or dict of arrays
    weight_decay : float

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.l2_penalty([np.array([1.0, -2.0]), np.array([3.0])], weight_decay=0.5)
    3.5
    """
    return weight_decay / 2 * sum(float(np.square(as_array(w), dtype=np.float64).sum()) for w in _leaves(params)[1])


class SGD(Optimizer):
    r"""Gradient descent, with momentum and Nesterov's variant.

    .. math::
        b &= \mu b + (1 - \tau) g \\
        w &= w - \mathrm{lr} \cdot b \qquad (\text{Nesterov: } w - \mathrm{lr} (g + \mu b))

    with ``momentum`` :math:`\mu` and ``dampening`` :math:`\tau`; without momentum :math:`b = g`. The first step
    takes :math:`b = g`, as ``torch.optim.SGD`` does.

    Parameters
    ----------
    params, lr
        See `Optimizer`.
    momentum, dampening : float
        See the formula.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    nesterov : bool
        Needs ``momentum > 0`` and ``dampening == 0``.
    **common
        See `Optimizer`.

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
        blend = 1.0 if step == 1 else 1.0 - options["dampening"]
        return hyper(step_size=lr, weight_decay=options["weight_decay"], decay1=options["momentum"], blend1=blend)


class Adagrad(Optimizer):
    r"""Adagrad: steps that shrink with the squares of the gradients so far.

    .. math::
        s &= s + g^2 \\
        w &= w - \frac{\mathrm{lr}}{1 + (t - 1) \eta} \cdot \frac{g}{\sqrt{s} + \varepsilon}

    with ``lr_decay`` :math:`\eta`. States of 8 bits are refused: they cannot hold a sum that only grows.

    Parameters
    ----------
    params, lr
        See `Optimizer`.
    lr_decay : float
        See the formula.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    initial_accumulator_value : float
        What :math:`s` starts from.
    eps : float
        Keeps the denominator from zero.
    **common
        See `Optimizer`.

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

    def add_param_group(self, group: Mapping[str, Any]) -> None:  # noqa: D102 - as in Optimizer
        super().add_param_group(group)
        for (total,) in (state[:1] for state in self._groups[-1].states):
            total.fill(self.param_groups[-1]["initial_accumulator_value"])

    def _check(self, options: dict[str, Any]) -> None:
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            _number(options, name)
        self._refuse_uint8("for Adagrad")

    def _rule(self, options: dict[str, Any]) -> str:
        return "adagrad"

    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        size = lr / (1 + (step - 1) * options["lr_decay"])
        return hyper(step_size=size, weight_decay=options["weight_decay"], eps=options["eps"])


class RMSprop(Optimizer):
    r"""RMSprop: steps divided by the running root mean square of the gradient.

    .. math::
        v &= \alpha v + (1 - \alpha) g^2 \\
        b &= \mu b + \frac{g}{\sqrt{v} + \varepsilon} \\
        w &= w - \mathrm{lr} \cdot b

    Centered, the variance :math:`v - \bar g^2` takes the place of :math:`v` in the root, with the running mean
    :math:`\bar g` of the gradient; states of 8 bits are refused then, as rounding would swallow the difference.

    Parameters
    ----------
    params, lr
        See `Optimizer`.
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
        See `Optimizer`.

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
            _number(options, name)
        _require(options["alpha"] < 1, "alpha", "a number in [0, 1)", options["alpha"])
        if options["centered"]:
            self._refuse_uint8("if centered")

    def _rule(self, options: dict[str, Any]) -> str:
        centered = "_centered" if options["centered"] else ""
        return f"rmsprop{centered}_momentum" if options["momentum"] > 0 else f"rmsprop{centered}"

    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if options["momentum"] > 0 else ()
        return ("square_avg", *momentum, *(("grad_avg",) if options["centered"] else ()))

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
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

    AMSGrad puts the largest :math:`v` so far in the root; states of 8 bits are refused then, as chance would only
    ever raise it.

    Parameters
    ----------
    params, lr
        See `Optimizer`.
    betas : (float, float)
        Decay of the running means of the gradient and of its square, each at least 0 and below 1.
    eps : float
        Keeps the denominator from zero.
    weight_decay : float
        L2 penalty: ``weight_decay * w`` is added to the gradient.
    amsgrad : bool
        See above.
    **common
        See `Optimizer`.

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
        _number(options, "eps")
        _betas(options)
        if options["amsgrad"]:
            self._refuse_uint8("with amsgrad")

    def _rule(self, options: dict[str, Any]) -> str:
        return "amsgrad" if options["amsgrad"] else "adam"

    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if options["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        beta1, beta2 = options["betas"]
        unbias = math.sqrt(1 - beta2**step)
        size, eps = lr * unbias / (1 - beta1**step), options["eps"] * unbias
        coupled, decay = self._decay(options["weight_decay"], lr)
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

    Before the step of `Adam`, the weights shrink by themselves: :math:`w = w (1 - \mathrm{lr} \cdot \lambda)` with
    ``weight_decay`` :math:`\lambda`; the gradient, and so the states, know nothing of it.

    Parameters
    ----------
    params, lr
        See `Optimizer`.
    betas : (float, float)
        Decay of the running means of the gradient and of its square, each at least 0 and below 1.
    eps : float
        Keeps the denominator from zero.
    weight_decay : float
        Decoupled, :math:`\lambda`.
    amsgrad : bool
        See `Adam`.
    **common
        See `Optimizer`.

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
    params, lr
        See `Optimizer`.
    betas : (float, float)
        Of the blend and of the running mean, each at least 0 and below 1.
    weight_decay : float
        Decoupled, :math:`\lambda`.
    **common
        See `Optimizer`.

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
        _betas(options)

    def _rule(self, options: dict[str, Any]) -> str:
        return "lion"

    def _states(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _hyper(self, options: dict[str, Any], lr: float, step: int) -> Hyper:
        beta1, beta2 = options["betas"]
        decay = 1 - lr * options["weight_decay"]
        return hyper(step_size=lr, decay=decay, decay1=beta1, blend1=1 - beta1, decay2=beta2, blend2=1 - beta2)
