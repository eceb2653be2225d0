"""Optimizers: steps in place on NumPy arrays, with the names, defaults and formulas of ``torch.optim``."""

from __future__ import annotations

import abc
import inspect
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias, TypedDict

import ml_dtypes
import numpy as np

from fastopt import _core
from fastopt._checks import as_float, require, require_count, require_flags, require_number
from fastopt._types import Array
from fastopt.train.param_tree import Params, addresses_of, as_array, as_gradient, is_tensor, leaves_of

LearningRate: TypeAlias = float | Callable[[int], float]
Hyper: TypeAlias = tuple[float, ...]  # made by `hyper`
Job: TypeAlias = tuple[Any, ...]  # made by `job`

# Elements of an 8-bit state that share an exponent; kStateBlock in cpp/kernels/contract.hpp.
STATE_BLOCK = 256

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
    states: list[tuple[Any, ...]],
    counts: list[int],
    indices: list[int] | None,
) -> Job:
    """Return what `_core.step` takes for the tensors of a group, in the order of ``_core.JOB_FIELDS``.

    Of the lists, the tensors at `indices` are stepped, or all if that is None.
    """
    return (
        rule, hyper, grad_scale, shrink, keep_zeros, stochastic, noise, names, params, grads, states, counts, indices
    )  # fmt: skip


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
        self.addresses = addresses_of(leaves)
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
        self.addresses = addresses_of(self.leaves)

    def replaced(self) -> bool:
        """Return whether the dict or list of parameters no longer has the arrays that are stepped."""
        here = self.tree if self.tree_keys is None else self.tree.values()
        if len(here) >= len(self.leaves) and not any(map(operator.is_not, here, self.leaves)):  # it may have more
            return False
        return self.tree_keys is None or any(map(operator.is_not, map(self.tree.get, self.tree_keys), self.leaves))

    def gradients(self, tree: Any) -> list[Any]:
        """Return the gradients in the order of the parameters."""
        if self.single:
            return [tree if type(tree) is np.ndarray else as_gradient(tree)]
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
            require(len(tree) == len(self.params), "grads", f"{len(self.params)} gradients", len(tree))
        return [grad if type(grad) is np.ndarray else as_gradient(grad) for grad in tree]

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
    """Base class of all optimizers: parameter groups, the step, and saving and restoring of states.

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

    @classmethod
    @abc.abstractmethod
    def _rule(cls, options: dict[str, Any]) -> str:
        """Return the name of the rule in cpp/kernels/optim/rules.inl."""

    @classmethod
    @abc.abstractmethod
    def _states(cls, options: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the states that the rule keeps, in its order."""

    @classmethod
    @abc.abstractmethod
    def _hyper(cls, options: dict[str, Any], lr: float, step: int) -> Hyper:
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
        names, leaves = leaves_of(options["params"])
        prefix = f"{len(self._groups)}." if self._grouped or self._groups else ""
        names = [prefix + name for name in names]
        params = [as_array(leaf) for leaf in leaves]
        all_names = [name for g in self._groups for name in g.names] + names
        twice = sorted(name for name, count in Counter(all_names).items() if count > 1)
        require(not twice, "params", "names that differ", twice)
        _core.check_weights(all_names, [param for g in self._groups for param in g.params] + params)
        self._check_fit(names, params, self._common)
        rule, states = self._rule(options), self._states(options)
        self._groups.append(_Group(options, names, leaves, rule, states, self._common))
        self._has_tensors |= any(map(is_tensor, leaves))
        self.param_groups.append(options)

    @staticmethod
    def _check_common(common: MutableMapping[str, Any]) -> None:
        """Raise if an option of the whole optimizer is out of range."""
        if common["max_norm"] is not None:
            require(require_number(common, "max_norm") > 0, "max_norm", "more than 0", common["max_norm"])
        state_dtype, seed = common["state_dtype"], common["seed"]
        known = isinstance(state_dtype, str) and state_dtype in _STATE_DTYPES
        require(known, "state_dtype", f"one of {sorted(_STATE_DTYPES)}", state_dtype)
        require_flags(common)
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
                require(fits, option, f"{needed} for {name!r} of {param.dtype}", common[option])

    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise if the options of a group are not among those of the optimizer, or out of range."""
        unknown = sorted(options.keys() - self._defaults.keys() - {"params"})
        require(not unknown, "group", f"options among {sorted(self._defaults)}", unknown)
        missing = sorted(self._defaults.keys() - options.keys())
        if missing:
            raise ValueError(f"group: expected all options, got none for {missing}")
        self._check(options)
        require_flags(options)
        for name in ("weight_decay", "l1") if callable(options["lr"]) else ("lr", "weight_decay", "l1"):
            require_number(options, name)

    def _note_chance(self) -> None:
        """Note whether a step rounds anything by chance."""
        self._chance = self._common["stochastic_rounding"] or self._common["state_dtype"] != "float32"

    def _refuse_uint8(self, when: str) -> None:
        dtype = self._common["state_dtype"]
        require(dtype != "uint8", "state_dtype", f"'float32' or 'bfloat16' {when}", dtype)

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
                or (self._has_tensors and group.addresses != addresses_of(group.leaves))
            ):
                raise ValueError(
                    "params: expected the arrays that the optimizer was made for, got others in their place; "
                    "change arrays in place, or make another optimizer"
                )
            if options != group.checked:
                self._check_options(options)
                states = self._states(options)
                require(states == group.rule_states, "group", f"options that need {group.rule_states}", states)
                group.checked, group.rule = dict(options), _core.rule(self._rule(options))
            lr = options["lr"]
            if callable(lr):
                lr = require_number({"lr": lr(self._steps[0])}, "lr")
            for count, indices in group.jobs(grads_of_group):
                jobs.append(
                    job(
                        rule=group.rule,
                        hyper=self._hyper(options, lr, count + 1),
                        grad_scale=-scale if options["maximize"] else scale,
                        shrink=lr * options["l1"],
                        keep_zeros=options["keep_zeros"],
                        stochastic=self._common["stochastic_rounding"],
                        noise=mixed(self._common["seed"], self._steps[0], len(jobs)) if self._chance else 0,
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
                if grad is not None and is_tensor(leaf):
                    graph.increment_version(leaf)

    def _scale(self, gradients: list[list[Any]], grad_scale: float | None) -> tuple[float, float]:
        """Return what to multiply gradients by, with clipping, and the norm of all of them before clipping."""
        scale = 1.0 if grad_scale is None else as_float(grad_scale, "grad_scale")
        require(math.isfinite(scale), "grad_scale", "a finite number", grad_scale)
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
            require(key in state_dict, "state_dict", f"the key {key!r}", sorted(state_dict))
        require(state_dict["optimizer"] == name, "optimizer", f"{name!r}", state_dict["optimizer"])
        for key in ("state_dtype", "master_weights"):
            require(state_dict[key] == self._common[key], key, repr(self._common[key]), state_dict[key])
        common = {key: state_dict[key] for key in self._common}
        self._check_common(common)
        steps, skipped = (require_count({"skipped": 0, **state_dict}, key, key) for key in ("steps", "skipped"))
        saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
        if not isinstance(saved_groups, list | tuple) or not _are_dicts(saved_groups):
            raise TypeError(f"param_groups: expected a list of dicts, got {saved_groups!r:.80}")
        if not isinstance(saved_states, Mapping) or not _are_dicts(saved_states.values()):
            raise TypeError(f"state: expected a dict of dicts, got {saved_states!r:.80}")
        require(len(saved_groups) == len(self._groups), "param_groups", str(len(self._groups)), len(saved_groups))

        todo: list[tuple[Array, Array]] = []
        counts: list[list[int]] = []
        options_of: list[dict[str, Any]] = []
        for group, options, saved in zip(self._groups, self.param_groups, saved_groups, strict=True):
            require(saved.get("params") == group.names, "params", str(group.names), saved.get("params"))
            options_of.append({**options, **saved, "params": options["params"]})
            self._check_options(options_of[-1])
            states = self._states(options_of[-1])
            require(states == group.rule_states, "state", str(group.rule_states), states)
            self._check_fit(group.names, group.params, common)
            for param, array in zip(group.names, group.params, strict=True):
                require(param in saved_states, "state", f"one of {param!r}", sorted(saved_states))
                about = saved_states[param]
                dtype, shape = about.get("dtype"), tuple(about.get("shape", ()))
                require(dtype == array.dtype.name, f"dtype of {param!r}", repr(array.dtype.name), dtype)
                require(shape == array.shape, f"shape of {param!r}", str(array.shape), shape)
            counts.append([require_count(saved_states[param], "step", f"step of {param!r}") for param in group.names])
            for param, arrays in zip(group.names, group.states, strict=True):
                for key, mine in zip(group.keys, arrays, strict=True):
                    what, theirs = f"{key} of {param!r}", saved_states[param].get(key)
                    require(isinstance(theirs, np.ndarray), what, "an array", theirs)
                    require(theirs.dtype == mine.dtype, what, str(mine.dtype), str(theirs.dtype))
                    require(theirs.shape == mine.shape, what, str(mine.shape), theirs.shape)
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


def _are_dicts(items: Iterable[Any]) -> bool:
    return all(isinstance(item, Mapping) for item in items)


def mixed(seed: int, step: int, job: int) -> int:
    """Return 32 bits that differ for every seed, step and job."""
    return (
        (seed + 1) * 0x9E3779B97F4A7C15 ^ (step + 1) * 0xC2B2AE3D27D4EB4F ^ (job + 1) * 0x165667B19E3779F9
    ) >> 24 & 0xFFFFFFFF
