"""The base class of all optimizers: parameter groups, the step in place, and saving and restoring of states."""

from __future__ import annotations

import abc
import difflib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypedDict

import numpy as np

from fastopt import _core
from fastopt._checks import (
    FLOAT32_MAX,
    as_float,
    as_index,
    require,
    require_count,
    require_flags,
    require_float32,
    require_number,
)
from fastopt._text import shown
from fastopt._types import Array
from fastopt.train.param_group import STATE_DTYPES, ParamGroup
from fastopt.train.param_tree import (
    Params,
    addresses_of,
    as_tree,
    is_tensor,
    name_of,
)
from fastopt.train.reduction import Reduce, Reduction

LearningRate: TypeAlias = float | Callable[[int], float]
Hyper: TypeAlias = tuple[float, ...]  # made by `_core.hyper`
Job: TypeAlias = tuple[Any, ...]  # made by `_core.job`

# Options that the arrays of a group were made for.
_FIXED = ("state_dtype", "master_weights")


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


class Optimizer(abc.ABC):
    """Base class of all optimizers: parameter groups, the step, and saving and restoring of states.

    A subclass names its rule in the kernels, its states, and the numbers of a step.

    Parameters
    ----------
    params : array, list, dict, or list of group dicts
        Arrays of float32, float64, float16 or bfloat16, changed in place: NumPy arrays, CPU tensors of torch, or
        anything that gives its memory by ``__array__`` or ``__dlpack__``. They must be writable and dense, in any
        order of their axes. Dicts and lists may be nested; pairs of name and array, as of ``named_parameters()``,
        are taken as a dict. A group is a dict with ``"params"`` and options of its own.
    lr : float or callable
        Learning rate, or a function that maps the number of steps taken so far to it; see `fastopt.schedules`.
    l1 : float, default 0
        L1 penalty, as a proximal step after the update: it makes exact zeros.
    keep_zeros : bool, default False
        Keep a weight at 0 that is exactly 0, to fine-tune a pruned model.
    maximize : bool, default False
        Ascend the gradient instead of descending it.
    max_norm : float, optional
        Gradient clipping: scale the gradients down if their norm over all tensors is larger than this, as
        ``torch.nn.utils.clip_grad_norm_`` does, but in the same pass and without changing the gradients. A step whose
        norm is not finite is skipped. With infinity nothing is clipped, but NaN and infinite gradients are skipped;
        without `max_norm` and `grad_scale` they reach the weights, as in torch.
    state_dtype : "float32", "bfloat16" or "uint8", default "float32"
        Dtype of the states. Float64 parameters need "float32" here and have float64 states. bfloat16 halves the
        states. uint8 is an 8-bit float with an exponent for each 256 elements: 1.004 bytes an element. Both are
        rounded stochastically, so that small changes are not lost. With uint8, clip the gradients: an element far
        larger than the others of its 256 is remembered as less than it was.
    master_weights : bool, default False
        Keep a float32 copy of float16 and bfloat16 parameters, and step that; other parameters need none. Parameters
        may be changed between steps: a weight that differs from its rounded copy replaces it.
    stochastic_rounding : bool, default False
        Round float16 and bfloat16 parameters up or down at random, the nearer number with the higher probability,
        instead of to the nearest. Other parameters, and those with master weights, are not rounded so.
    seed : int, default 0
        Seed of the stochastic rounding, which depends on seed, step and index alone: it is the same for any number of
        threads, and in a resumed run.

    Attributes
    ----------
    param_groups : list of dict
        One dict for each group: ``"params"`` as they were given, and the options. Options may be changed between steps,
        but not `state_dtype` and `master_weights`. Other keys are kept, for the use of the caller.
    max_norm : float or None
        As given; it may be changed between steps.
    skipped : int
        Number of steps that were skipped because the norm of the gradients was not finite.

    Notes
    -----
    All parameters but those of float64 are stepped in float32, where subnormal numbers count as zero. Options that
    float32 cannot hold are errors; a learning rate below 1.2e-38 is 0, and `eps` is never less than that.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common) -> None:
        known = [*defaults, *Common.__annotations__]
        for name in common:
            if name not in known:
                close = ["lr"] if name == "learning_rate" else difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{type(self).__name__}: unexpected options {[name]}{hint} (options: {sorted(known)})")
        self.max_norm = common.get("max_norm")
        self._max_norm()
        self._seed = as_index(common.get("seed", 0), "seed")
        self._defaults: dict[str, Any] = {
            **defaults,
            "l1": common.get("l1", 0.0),
            "keep_zeros": common.get("keep_zeros", False),
            "maximize": common.get("maximize", False),
            "state_dtype": common.get("state_dtype", "float32"),
            "master_weights": common.get("master_weights", False),
            "stochastic_rounding": common.get("stochastic_rounding", False),
        }
        self._groups: list[ParamGroup] = []
        self._steps = [0]  # calls of `step`; in a list, so that the call that steps the tensors raises it too
        self.skipped = 0
        self._has_tensors = False
        self._reduction: Reduction | None = None
        self.param_groups = []
        tree = as_tree(params)
        self._grouped = (
            isinstance(tree, list)
            and all(isinstance(part, Mapping) for part in tree)
            and any("params" in part or "lr" in part for part in tree)  # else a list of layers
        )
        for group in tree if self._grouped else [{"params": tree}]:
            self.add_param_group(group)
        if not any(group.leaves for group in self._groups):
            raise ValueError("params: expected at least one array, got none")

    # ---- defined by a subclass --------------------------------------------------------------------------------

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

    @classmethod
    def _refused_state_dtypes(cls, options: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        """Return the dtypes that states must not have with these options, and a phrase that says when."""
        return (), ""

    @classmethod
    def _check_state_dtype(cls, options: Mapping[str, Any], state_dtype: str) -> None:
        """Raise if states must not have this dtype with these options."""
        refused, when = cls._refused_state_dtypes(options)
        if state_dtype in refused:
            left = " or ".join(repr(name) for name in STATE_DTYPES if name not in refused)
            raise ValueError(f"state_dtype: expected {left} {when}, got {shown(state_dtype)}")

    # ---- groups ----------------------------------------------------------------------------------------------

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own.

        Parameters
        ----------
        group : mapping
            ``"params"``: an array, or a list or dict of arrays, also nested. Other keys override the options of the
            optimizer, but for `max_norm` and `seed`, which all groups share. Keys that are no options are kept.

        Raises
        ------
        TypeError
            If a parameter is not an array of a float type.
        ValueError
            If an option is misspelt or out of range, two arrays have the same name, or an array is read-only, not
            dense, or shares memory with another one.
        """
        if "params" not in group:
            raise ValueError(f"params: missing from the group with {sorted(group, key=str)}")
        options = {**self._defaults, **group, "params": as_tree(group["params"])}
        prefix = f"{len(self._groups)}." if self._grouped or self._groups else ""
        self._check_options(options, in_float32=False)
        made = ParamGroup(options, prefix, self._states(options))
        all_names = [name for g in self._groups for name in g.names] + made.names
        twice = sorted(name for name, count in Counter(all_names).items() if count > 1)
        require(not twice, "params", "names that differ", twice)
        _core.check_weights(all_names, [param for g in self._groups for param in g.params] + made.params)
        self._check_options(options, in_float32=made.in_float32)
        for name, param in zip(made.names, made.params, strict=True):
            fits = param.dtype != np.float64 or options["state_dtype"] == "float32"
            require(fits, "state_dtype", f"float32 for {name!r} of {param.dtype}", options["state_dtype"])
        made.allocate(options)
        made.accept(options, self._rule(options), self._hyper)
        self._groups.append(made)
        self._kept = [each.kept for each in self._groups]
        self._has_tensors |= any(map(is_tensor, made.leaves))
        self.param_groups.append(options)

    def _max_norm(self) -> float | None:
        """Return `max_norm`, or raise if it is out of range."""
        if self.max_norm is None:
            return None
        value = as_float(self.max_norm, "max_norm")
        require(value > 0, "max_norm", "more than 0", self.max_norm)
        return value

    def _check_options(self, options: dict[str, Any], *, in_float32: bool) -> None:
        """Raise if an option of a group is missing, misspelt or out of range."""
        for key in options.keys() - self._defaults.keys() - {"params"}:
            if key in ("max_norm", "seed"):
                raise ValueError(f"group: {key} is an option of the whole optimizer")
            close = difflib.get_close_matches(str(key), self._defaults, 1, cutoff=0.8)
            if close:
                raise ValueError(f"group: unknown option {key!r}; did you mean {close[0]!r}?")
        missing = sorted(self._defaults.keys() - options.keys())
        if missing:
            raise ValueError(f"group: expected all options, got none for {missing}")
        state_dtype = options["state_dtype"]
        known = isinstance(state_dtype, str) and state_dtype in STATE_DTYPES
        require(known, "state_dtype", f"one of {sorted(STATE_DTYPES)}", state_dtype)
        self._check(options)
        self._check_state_dtype(options, state_dtype)
        require_flags(options)
        for name in ("weight_decay", "l1") if callable(options["lr"]) else ("lr", "weight_decay", "l1"):
            require_number(options, name)
        if in_float32:
            require_float32({name: options[name] for name in self._defaults})

    def _check_groups(self) -> None:
        """Raise if `param_groups` is no longer the list of groups that are stepped."""
        if len(self.param_groups) != len(self._groups):
            raise ValueError(
                f"param_groups: expected {len(self._groups)} groups, got {len(self.param_groups)}; "
                "use add_param_group to add one, and make another optimizer to remove one"
            )

    # ---- the step --------------------------------------------------------------------------------------------

    def step(self, grads: Any, *, grad_scale: float | None = None, reduce: Reduce | None = None) -> float | None:
        """Update all parameters in place, in one pass.

        Everything is checked first: a call that raises has changed nothing. An interrupt (Ctrl-C) comes before all
        tensors, states and step counts are stepped, or after: ``state_dict()["steps"]`` tells which.

        Parameters
        ----------
        grads : array, list or dict of arrays, or list of these
            Gradients in the shape of the parameters. With several groups, or one that was given as a group: a list
            with an entry for each group, or a list of all gradients, or a dict from names to gradients. ``None`` in
            place of a gradient skips that tensor and leaves its step count alone.

            Each gradient has the shape of its parameter. Those of float64 parameters are float64, all others
            float32, float16 or bfloat16. They are only read; one that is not C-contiguous is copied first.
        grad_scale : float, optional
            Factor of every gradient, applied in the same pass; ``1 / loss_scale`` undoes a loss scale. If the norm of
            the scaled gradients is not finite, the step is skipped, as with `max_norm`.
        reduce : callable, optional
            For a run on several ranks, each with the gradients of its own part of a batch: sums a flat float32 array
            in place over all ranks and returns None, as ``lambda buffer: comm.Allreduce(MPI.IN_PLACE, buffer)`` with
            mpi4py. Each rank then steps by the mean of the gradients, and ranks with the same parameters keep the same.
            `grad_scale`, `max_norm` and the norm are those of the mean. A step whose norm is not finite is skipped on
            all ranks. Every rank must call `step`, with the same options. float64 parameters are refused.

        Returns
        -------
        float or None
            With `max_norm`, `grad_scale` or `reduce`, the norm of all scaled gradients before clipping. It is not
            finite if the step was skipped.

        Raises
        ------
        TypeError
            If a gradient is not an array of a dtype that its parameter allows.
        ValueError
            If names or shapes do not match, an array shares memory with another one, a number is not finite or
            float32 cannot hold it, an option that was changed is out of range, or the parameters or groups are no
            longer those that the optimizer was made for. With `reduce` also if ranks differ in parameters, options or
            number of steps, or if only some have a gradient of a parameter; all ranks raise, and none has stepped.
        RuntimeError
            With `reduce`, if another rank raised an error of its own. None has stepped.
        """
        plain = grad_scale is None and reduce is None and self.max_norm is None
        plain = plain and (type(grads) is list or not self._grouped)
        if plain and _core.step_unchanged(self._kept, self.param_groups, grads, self._steps):
            return None  # nearly always; below, all else
        groups = self._groups
        count = len(groups)
        if reduce is None and len(self.param_groups) != count:
            self._check_groups()
        ranks = 1.0
        if reduce is None:
            gradients = self._gradients(grads) if count > 1 or self._grouped else [groups[0].gradients(grads)]
        else:
            gradients, ranks = self._reduced(grads, grad_scale, reduce)
        scale, norm = 1.0, None
        if grad_scale is not None or self.max_norm is not None or reduce is not None:
            scale, norm = self._scale(gradients, grad_scale, ranks)
            if not math.isfinite(norm):
                self.skipped += 1
                return norm

        jobs: list[Job] = []
        for i, group in enumerate(groups):
            options, grads_of_group = self.param_groups[i], gradients[i]
            lr = self._ready(options, group)
            for taken, indices in group.jobs(grads_of_group):
                jobs.append(
                    _core.job(
                        rule=group.rule,
                        hyper=self._hyper(options, lr, taken + 1),
                        grad_scale=-scale if options["maximize"] else scale,
                        shrink=lr * options["l1"],
                        keep_zeros=options["keep_zeros"],
                        stochastic=group.stochastic,
                        noise=mixed(self._seed, self._steps[0], len(jobs)) if group.chance else 0,
                        names=group.names,
                        params=group.params,
                        grads=grads_of_group,
                        states=group.states,
                        counts=group.counts,
                        indices=indices,
                    )
                )
        _core.step(jobs, self._steps)
        if self._has_tensors:
            self._tell_autograd(gradients)
        return norm

    def _ready(self, options: dict[str, Any], group: ParamGroup) -> float:
        """Raise if a group cannot be stepped with its options as they are now; return its learning rate."""
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
            self._check_options(options, in_float32=group.in_float32)
            for key in _FIXED:
                needed = group.checked[key]
                require(options[key] == needed, key, f"{needed!r}, as the states were made for", options[key])
            states = self._states(options)
            require(states == group.rule_states, "group", f"options that need {group.rule_states}", states)
            group.accept(options, self._rule(options), self._hyper)
            self._kept = [each.kept for each in self._groups]
        lr = options["lr"]
        return self._rate(options, group) if callable(lr) else lr

    def _reduced(self, grads: Any, grad_scale: float | None, reduce: Reduce) -> tuple[list[list[Any]], float]:
        """Return the gradients summed over all ranks, and the number of ranks.

        Whatever is wrong on this rank is found before the sum, so that the others learn of it instead of waiting.
        """
        groups = self._groups
        if not callable(reduce):
            raise TypeError(f"reduce: expected a function, got {type(reduce).__name__}")
        names = [name for group in groups for name in group.names]
        if self._reduction is None or self._reduction.names != names:
            params = [param for group in groups for param in group.params]
            wide = [name for name, param in zip(names, params, strict=True) if param.dtype == np.float64]
            require(not wide, "reduce", "no float64 parameters, since float32 cannot hold their gradients", wide)
            self._reduction = Reduction(names, [param.shape for param in params])
        reduction, failure = self._reduction, None
        try:
            self._check_groups()
            rates = [self._ready(*pair) for pair in zip(self.param_groups, groups, strict=True)]
            several = len(groups) > 1 or self._grouped
            mine = self._gradients(grads) if several else [groups[0].gradients(grads)]
            options = [[each[key] for key in self._defaults if key != "lr"] for each in self.param_groups]
            numbers = self._grad_scale(grad_scale), self._max_norm(), self._seed, self._steps[0]
            tensors = [(group.counts, group.orders) for group in groups]
            about = type(self).__name__, rates, options, numbers, tensors
            reduction.fill([grad for each in mine for grad in each], about)
        except Exception as error:
            failure = error
            reduction.fail()
        reduction.sum(reduce)
        if failure is not None:
            raise failure
        summed, ranks = reduction.gradients()
        rest = iter(summed)
        return [[next(rest) for _ in group.params] for group in groups], ranks

    def _gradients(self, grads: Any) -> list[list[Any]]:
        """Return the gradients of each of several groups, or of one that was given as a group."""
        groups = self._groups
        count = sum(len(group.params) for group in groups)
        if isinstance(grads, Mapping):
            grads = self._by_name(grads)
        elif not isinstance(grads, list | tuple):
            raise TypeError(f"grads: expected a list of {len(groups)} entries, one a group, got {type(grads).__name__}")
        if len(grads) == count and not any(isinstance(grad, list | tuple | Mapping) for grad in grads):
            rest = iter(grads)
            flat = [group.arrays([next(rest) for _ in group.params]) for group in groups]
            return [group.in_memory_order(part) for group, part in zip(groups, flat, strict=True)]
        if len(grads) != len(groups):
            raise ValueError(
                f"grads: expected a list of {len(groups)} entries, one a group, or of all {count} gradients, "
                f"got {len(grads)}"
            )
        return [
            [None] * len(group.params) if tree is None else group.gradients(tree)
            for group, tree in zip(groups, grads, strict=True)
        ]

    def _by_name(self, grads: Mapping[str, Any]) -> list[Any]:
        """Return gradients that were given by the names of all parameters, in their order."""
        names = [name for group in self._groups for name in group.names]
        local = [name_of(path) for group in self._groups for path in group.paths]
        given = {str(name): grad for name, grad in grads.items()}
        chosen = local if len(set(local)) == len(local) and given.keys() == set(local) else names
        missing, extra = sorted(set(chosen) - given.keys()), sorted(given.keys() - set(chosen))
        if missing or extra:
            raise ValueError(f"grads: expected the names of params; missing {missing}, unexpected {extra}")
        return [given[name] for name in chosen]

    def _rate(self, options: Mapping[str, Any], group: ParamGroup) -> float:
        """Return the learning rate of the next step."""
        lr = options["lr"]
        if callable(lr):
            lr = require_number({"lr": lr(self._steps[0])}, "lr")
            fits = lr <= FLOAT32_MAX or not group.in_float32
            require(fits, "lr", f"at most {FLOAT32_MAX:.8g}, which float32 can hold", lr)
        return float(lr)

    def _tell_autograd(self, gradients: list[list[Any]]) -> None:
        """Tell torch what was changed: it then refuses to go back through what was computed from the old values."""
        graph = sys.modules["torch"].autograd.graph
        for group, grads in zip(self._groups, gradients, strict=True):
            for leaf, grad in zip(group.leaves, grads, strict=True):
                if grad is not None and is_tensor(leaf):
                    graph.increment_version(leaf)

    def _grad_scale(self, grad_scale: float | None) -> float:
        """Return `grad_scale`, or raise if it is not finite."""
        scale = 1.0 if grad_scale is None else as_float(grad_scale, "grad_scale")
        require(math.isfinite(scale), "grad_scale", "a finite number", grad_scale)
        return scale

    def _scale(self, gradients: list[list[Any]], grad_scale: float | None, ranks: float) -> tuple[float, float]:
        """Return the factor of the gradients, with clipping, and the norm of all of them before clipping."""
        scale = self._grad_scale(grad_scale) / ranks
        norm = abs(scale) * self._norm([grad for grads in gradients for grad in grads])
        max_norm = self._max_norm()
        if max_norm is not None:
            scale *= min(1.0, max_norm / (norm + 1e-6))
        return scale, norm

    def _norm(self, grads: list[Any]) -> float:
        """Return the norm of all gradients; squares of float64 that a float64 cannot hold are scaled."""
        names = [name for group in self._groups for name in group.names]
        norm = math.sqrt(_core.sum_squares(names, grads))
        wide = [grad for grad in grads if isinstance(grad, np.ndarray) and grad.dtype == np.float64]
        if 1e-140 < norm < math.inf or not wide:
            return norm
        largest = max(float(np.abs(grad).max(initial=0)) for grad in wide)
        if not 0 < largest < math.inf:
            return norm
        exponent = math.frexp(largest)[1]
        scaled = [None if grad is None else np.ldexp(grad.astype(np.float64), -exponent) for grad in grads]
        try:
            return math.ldexp(math.sqrt(_core.sum_squares(names, scaled)), exponent)
        except OverflowError:
            return math.inf

    # ---- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs, as plain arrays and numbers; arrays are not copied.

        Returns
        -------
        dict
            ``"optimizer"``: the name of the class. ``"steps"``: calls of `step`. ``"state"``: for each parameter, by
            name, its step count, dtype, shape and states. ``"param_groups"``: the options, with the names of the
            parameters; a learning rate that is a function is left out.
        """
        self._check_groups()
        state: dict[str, Any] = {}
        groups = []
        for group, options in zip(self._groups, self.param_groups, strict=True):
            for i, (name, param, arrays) in enumerate(zip(group.names, group.params, group.states, strict=True)):
                about: dict[str, Any] = {"step": group.counts[i], "dtype": param.dtype.name, "shape": group.shape_at(i)}
                if i in group.orders:
                    about["order"] = group.orders[i]
                given = (group.as_given(i, array) for array in arrays)
                state[name] = {**about, **dict(zip(group.keys, given, strict=False))}
            plain = {key: value for key, value in options.items() if not callable(value)}
            groups.append({**plain, "params": list(group.names)})
        return {
            "optimizer": type(self).__name__,
            "steps": self._steps[0],
            "skipped": self.skipped,
            "max_norm": self._max_norm(),
            "seed": self._seed,
            "state": state,
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the steps that follow are bit for bit the same.

        States, step counts, the seed and the options of the groups are taken from `state_dict`. Two things stay as this
        optimizer has them: a learning rate that is a function, and `max_norm`, unless it is None. Set them after
        loading to have others.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer of the same class over parameters of the same names, in any order, shapes and dtypes.
            Its arrays are copied.

        Raises
        ------
        TypeError, ValueError
            If it belongs to another optimizer or is damaged; the message names the first difference. Nothing has been
            changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        self._check_groups()
        name = type(self).__name__
        for key in ("optimizer", "steps", "state", "param_groups", "max_norm", "seed"):
            require(key in state_dict, "state_dict", f"the key {key!r}", sorted(state_dict, key=str))
        require(state_dict["optimizer"] == name, "optimizer", f"{name!r}", state_dict["optimizer"])
        steps, skipped = (require_count({"skipped": 0, **state_dict}, key, key) for key in ("steps", "skipped"))
        seed, max_norm = as_index(state_dict["seed"], "seed"), state_dict["max_norm"]
        if max_norm is not None:
            max_norm = as_float(max_norm, "max_norm")
            require(max_norm > 0, "max_norm", "more than 0", max_norm)
        saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
        if not isinstance(saved_groups, list | tuple) or not _are_dicts(saved_groups):
            raise TypeError(f"param_groups: expected a list of dicts, got {shown(saved_groups)}")
        if not isinstance(saved_states, Mapping) or not _are_dicts(saved_states.values()):
            raise TypeError(f"state: expected a dict of dicts, got {shown(saved_states)}")
        require(len(saved_groups) == len(self._groups), "param_groups", str(len(self._groups)), len(saved_groups))

        todo: list[tuple[Array, Array]] = []
        counts: list[list[int]] = []
        options_of: list[dict[str, Any]] = []
        for i, (group, saved) in enumerate(zip(self._groups, saved_groups, strict=True)):
            loaded, names = self._loaded_options(i, saved)
            options_of.append(loaded)
            for known in names:
                require(known in saved_states, "state", f"one of {known!r}", sorted(saved_states, key=str))
            counts.append([require_count(saved_states[known], "step", f"step of {known!r}") for known in names])
            for at, known in enumerate(names):
                todo += group.saved_arrays(at, known, saved_states[known])

        for mine, theirs in todo:
            mine[...] = theirs
        for group, steps_of_group, options, loaded in zip(
            self._groups, counts, self.param_groups, options_of, strict=True
        ):
            group.counts[:] = steps_of_group
            options.update(loaded)
        self._steps[0], self.skipped, self._seed = steps, skipped, seed
        self.max_norm = max_norm if self.max_norm is None else self.max_norm

    def _loaded_options(self, i: int, saved: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the options that group `i` will have, and the names by which `saved` knows its parameters."""
        group, options = self._groups[i], self.param_groups[i]
        names: Any = saved.get("params")
        plain = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        # A group that was added later has its number before its names; the first one then has none.
        for rename in (lambda n: n, lambda n: n.removeprefix(f"{i}."), lambda n: f"{i}.{n}"):
            found = {rename(name): name for name in names} if plain else {}
            if found.keys() == set(group.names) and len(names) == len(group.names):
                break
        else:
            require(False, "params", str(group.names), names)
        loaded = {**options, **saved, "params": options["params"]}
        if callable(options["lr"]):
            loaded["lr"] = options["lr"]
        self._check_options(loaded, in_float32=group.in_float32)
        for key in _FIXED:
            require(loaded[key] == options[key], key, repr(options[key]), loaded[key])
        states = self._states(loaded)
        require(states == group.rule_states, "state", str(group.rule_states), states)
        return loaded, [found[name] for name in group.names]

    # ---- shown to the user ----------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Calls of `step` so far, but for those that were skipped."""
        return self._steps[0]

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of each group in the next step."""
        self._check_groups()
        return [self._rate(options, group) for options, group in zip(self.param_groups, self._groups, strict=True)]

    def __repr__(self) -> str:
        count = sum(len(group.params) for group in self._groups)
        size = sum(param.size for group in self._groups for param in group.params)
        parts = []
        for key in self._defaults:
            values = [_at_step(options.get(key), self._steps[0]) for options in self.param_groups]
            parts.append(f"{key}={values[0] if len(set(values)) == 1 else '[' + ', '.join(values) + ']'}")
        if self.max_norm is not None:
            parts.append(f"max_norm={self.max_norm!r}")
        return f"{type(self).__name__}({', '.join(parts)}) over {size:,} parameters in {count} arrays"


def _are_dicts(items: Iterable[Any]) -> bool:
    return all(isinstance(item, Mapping) for item in items)


def _at_step(value: Any, step: int) -> str:
    """Return an option as text; a schedule by its rate at this step."""
    return f"{value(step)!r} at step {step}" if callable(value) else repr(value)


def mixed(seed: int, step: int, job: int) -> int:
    """Return 32 bits that differ for every seed, step and job."""
    return (
        (seed + 1) * 0x9E3779B97F4A7C15 ^ (step + 1) * 0xC2B2AE3D27D4EB4F ^ (job + 1) * 0x165667B19E3779F9
    ) >> 24 & 0xFFFFFFFF
