"""The base class of the optimizers of `fastopt.torch`: torch's optimizers, stepped by fastopt's kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypedDict

import torch

from fastopt import _core
from fastopt._checks import as_float, require, require_number
from fastopt._text import shown
from fastopt.torch.states import codes_name, find_or_make
from fastopt.train.optimizer import Job, mixed
from fastopt.train.optimizer import Optimizer as ArrayOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Group: TypeAlias = dict[str, Any]
GroupParams: TypeAlias = tuple[Group, list[torch.Tensor]]  # a group, and those of its parameters that are meant
Operand: TypeAlias = tuple[int, int, int]  # address, elements and the number of their type, as in cpp/bindings/

# Float in cpp/kernels/contract.hpp: the narrow types come first.
FLOAT_NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_FLOAT32, _FLOAT64 = FLOAT_NUMBERS[torch.float32], FLOAT_NUMBERS[torch.float64]
STATE_NUMBERS = {torch.bfloat16: 1, torch.uint8: 2}  # 0 for others
_UINT8 = STATE_NUMBERS[torch.uint8]
_STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    **{dtype: dtype for dtype in (torch.float32, torch.bfloat16, torch.uint8)},
}


class Options(TypedDict, total=False):
    """Options that every optimizer takes: torch's own about how to step, and those that `Optimizer` explains."""

    foreach: bool | None
    maximize: bool
    capturable: bool
    differentiable: bool
    fused: bool | None
    decoupled_weight_decay: bool
    max_norm: float | None
    l1: float
    keep_zeros: bool
    state_dtype: str | torch.dtype
    master_weights: bool
    stochastic_rounding: bool
    seed: int


# The options that torch's classes do not have, and their defaults.
OWN: dict[str, Any] = {
    "max_norm": None,
    "l1": 0.0,
    "keep_zeros": False,
    "state_dtype": "float32",
    "master_weights": False,
    "stochastic_rounding": False,
    "seed": 0,
}


class Optimizer(torch.optim.Optimizer):
    """Base class: a torch optimizer that steps the float tensors of the CPU by fastopt's kernels.

    Parameters on other devices, complex ones, tensor subclasses, tensors that are not dense and sparse gradients are
    stepped by torch's own code, as are all with `differentiable`. `foreach`, `fused` and `capturable` concern these
    alone.

    Parameters
    ----------
    max_norm : float, optional
        Gradient clipping: scale the gradients down if their norm over the parameters of all groups is larger than this,
        as ``torch.nn.utils.clip_grad_norm_`` does, but in the same pass and without changing the gradients. A step
        whose norm is not finite is skipped.
    l1 : float, default 0
        L1 penalty, as a proximal step after the update: it makes exact zeros.
    keep_zeros : bool, default False
        Keep a weight at 0 that is exactly 0, to fine-tune a pruned model.
    state_dtype : "float32", "bfloat16" or "uint8", default "float32"
        Dtype of the states, also of those of 16-bit parameters; float64 parameters have float64 states. bfloat16
        halves the states; uint8 is an 8-bit float with an exponent for each 256 elements. Both are rounded
        stochastically.
    master_weights : bool, default False
        Keep a float32 copy of float16 and bfloat16 parameters, and step that.
    stochastic_rounding : bool, default False
        Round float16 and bfloat16 parameters up or down at random, the nearer number with the higher probability,
        instead of to the nearest.
    seed : int, default 0
        Seed of the stochastic rounding, which also depends on the step count: a resumed run continues bit for bit.

    Attributes
    ----------
    grad_norm : float or None
        Norm of the gradients of the last step, before clipping, if a group has `max_norm`.
    skipped : int
        Number of steps that were skipped because `grad_norm` was not finite, or ``GradScaler`` found a gradient that
        is not.

    Notes
    -----
    A step counts subnormal weights as zero, as `fastopt.Optimizer` does. With a learning rate of 0, finite gradients
    change no weight.
    """

    param_groups: list[Group]
    _array_class: ClassVar[type[ArrayOptimizer]]  # the class of fastopt with the same formula
    _counts_steps = True  # whether the state of torch's class has "step"
    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling to the step
    _own: Mapping[str, Any] = {}
    _checked: list[Any] | None = None  # options of a group as they were when they were found to be right
    grad_norm: float | None = None
    skipped = 0

    def __init__(self, params: Any, *args: Any, **options: Unpack[Options]) -> None:
        self._own = {name: options.pop(name) for name in OWN if name in options}  # type: ignore[misc]
        super().__init__(params, *args, **options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, as ``torch.optim.Optimizer.add_param_group`` does."""
        self.defaults.update(self._own)
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients, in one pass.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_apart()
        else:
            self._step()
        return loss

    @torch._disable_dynamo
    def _step_apart(self) -> None:
        """Step outside of the graph that is being compiled."""
        self._step()

    def _step(self) -> None:
        with torch.no_grad():
            self._step_all()

    def _step_all(self) -> None:
        found_inf, loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            self.skipped += 1
            return
        scale = 1.0 if loss_scale is None else 1 / float(loss_scale)
        parts: list[GroupParams] = [(group, group["params"]) for group in self.param_groups]
        plan = _StepPlan(self, parts)
        if any(group.get("max_norm") is not None for group in self.param_groups):
            self.grad_norm = scale * math.sqrt(plan.sum_squares())
            if not math.isfinite(self.grad_norm):
                plan.forget_new_states()
                self.skipped += 1
                return
        self._apply(plan, scale)
        while plan.repeated:
            plan = _StepPlan(self, plan.repeated)
            self._apply(plan, scale)

    def _apply(self, plan: _StepPlan, scale: float) -> None:
        try:
            if plan.for_torch:
                self._step_by_torch(plan.for_torch, scale)
            jobs: list[Job] = []
            for lists in plan.jobs:
                needs, group = lists.needs, lists.needs.group
                array_class = self._array_class_of(group)
                grad_scale = self._clipped(group, scale)
                jobs.append(
                    _core.job(
                        rule=_rule(array_class._rule(needs.options)),
                        hyper=array_class._hyper(needs.options, needs.lr, lists.count + 1),
                        grad_scale=-grad_scale if group["maximize"] else grad_scale,
                        shrink=needs.lr * group.get("l1", 0.0),
                        keep_zeros=group.get("keep_zeros", False),
                        stochastic=needs.stochastic,
                        noise=mixed(group.get("seed", 0), lists.count, len(jobs)) if needs.chance else 0,
                        names=lists.names,
                        params=lists.params,
                        grads=lists.grads,
                        states=lists.states,
                        counts=lists.counts,
                        indices=None,
                    )
                )
            _core.step(jobs, [0])
        except BaseException:
            plan.forget_new_states()
            raise
        for count in plan.torch_counts:
            count.add_(1)
        for w, before in plan.unmoved:
            w.copy_(torch.where(w == 0, before, w))
        if plan.changed:
            _increment_versions(plan.changed)  # autograd refuses to go back through what was before

    def _clipped(self, group: Group, scale: float) -> float:
        """Return the factor of the gradients of a group, with clipping."""
        max_norm = group.get("max_norm")
        if max_norm is None or self.grad_norm is None:
            return scale
        return scale * min(1.0, max_norm / (self.grad_norm + 1e-6))

    def _array_class_of(self, group: Group) -> type[ArrayOptimizer]:
        return self._array_class

    # ---- parameters that torch steps ---------------------------------------------------------------------------

    def _step_by_torch(self, parts: list[GroupParams], scale: float) -> None:
        """Step the parameters that the kernels do not take, by torch's own code."""
        for group, params in parts:
            for name in ("state_dtype", "master_weights", "stochastic_rounding"):
                value = group.get(name, OWN[name])
                if value not in (OWN[name], torch.float32):
                    p = params[0]
                    raise ValueError(
                        f"{name}: expected {OWN[name]!r} for a parameter that torch steps, a {type(p).__name__} of "
                        f"{p.dtype} on {p.device}; got {shown(value)}"
                    )
        zeros = [(p, p == 0) for group, params in parts if group.get("keep_zeros", False) for p in params]
        kept = [(p, p.grad) for _, params in parts for p in params]
        groups = self.param_groups
        scaler = {key: self.__dict__.pop(key) for key in ("grad_scale", "found_inf") if key in self.__dict__}
        try:
            self.param_groups = [{**group, "params": params} for group, params in parts]
            for group, params in parts:
                if (factor := self._clipped(group, scale)) != 1:
                    for p in params:
                        p.grad = p.grad * factor
            self._torch_step()
        finally:
            self.param_groups = groups
            for key, value in scaler.items():
                setattr(self, key, value)
            for p, grad in kept:
                p.grad = grad
        for group, params in parts:
            if group.get("l1", 0.0) > 0:
                for p in params:
                    p.copy_(torch.nn.functional.softshrink(p, float(group["lr"]) * group["l1"]))
        for p, zero in zeros:
            p.masked_fill_(zero, 0)

    def _torch_step(self) -> None:
        """Step `param_groups` by the class of torch that this one stands for."""
        step: Any = super().step
        function = step.__func__
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            (function.__wrapped__ if getattr(function, "hooked", False) else function)(self)

    # ---- checks, saving ----------------------------------------------------------------------------------------

    def _check(self, group: Group) -> None:
        """Raise if an option of a group that torch does not check is out of range."""
        given = [group.get(name) for name in OWN]
        if given != self._checked:
            _check_own({name: group.get(name, value) for name, value in OWN.items()})
            self._checked = given
        dtype = _STATE_DTYPES[group.get("state_dtype", "float32")]
        if dtype != torch.float32:
            self._array_class_of(group)._check_state_dtype(group, str(dtype).removeprefix("torch."))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of this class or of torch's, which are the same but for `state_dtype`.

        Tensors are copied, in the dtype that they have. The options of `Optimizer` that `state_dict` does not have
        stay as they are.
        """
        given: dict[str, Any] = {}
        groups = self.param_groups

        def keep(_: Any) -> None:
            for group, old, saved in zip(self.param_groups, groups, given["param_groups"], strict=True):
                for name in OWN:
                    if name in old and name not in saved:
                        group[name] = old[name]
                self._check(group)
                for p, i in zip(group["params"], saved["params"], strict=True):
                    if p.is_cpu and p.dtype in FLOAT_NUMBERS:
                        for key, value in given["state"].get(i, {}).items():
                            self.state[p][key] = _copied(value)

        before = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))
        after = self.register_load_state_dict_post_hook(keep, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _check_own(options: dict[str, Any]) -> None:
    """Raise if one of the options in `OWN` is out of range."""
    if options["max_norm"] is not None:
        require(as_float(options["max_norm"], "max_norm") > 0, "max_norm", "more than 0", options["max_norm"])
    require_number(options, "l1")
    for name in ("keep_zeros", "master_weights", "stochastic_rounding"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name}: expected True or False, got {shown(options[name])}")
    dtype, seed = options["state_dtype"], options["seed"]
    known = isinstance(dtype, str | torch.dtype) and dtype in _STATE_DTYPES
    require(known, "state_dtype", "'float32', 'bfloat16' or 'uint8'", dtype)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")


class _Needs:
    """The options of a group, and what its tensors need by them."""

    def __init__(self, opt: Optimizer, group: Group) -> None:
        self.group = self.options = group
        self.lr = float(group["lr"])
        if any(isinstance(number, torch.Tensor) for number in (group["weight_decay"], *group.get("betas", ()))):
            self.options = {**group, "weight_decay": float(group["weight_decay"])}
            if "betas" in group:
                self.options["betas"] = tuple(map(float, group["betas"]))
        self.keys = opt._array_class_of(group)._states(self.options)
        self.initial = group.get("initial_accumulator_value", 0.0)
        self.state_dtype = _STATE_DTYPES[group.get("state_dtype", "float32")]
        self.state_number = STATE_NUMBERS.get(self.state_dtype, 0)
        self.masters = group.get("master_weights", False)
        self.stochastic = group.get("stochastic_rounding", False)
        self.chance = self.stochastic or self.state_dtype != torch.float32
        self.counts_steps = opt._counts_steps
        self.differentiable = group.get("differentiable", False)
        self.names = group.get("param_names")
        self.signature = (self.keys, self.state_number, self.masters, self.counts_steps, self.chance)


class _JobLists:
    """Tensors of a group that took the same number of steps: the lists of a job."""

    def __init__(self, needs: _Needs, count: int) -> None:
        self.needs, self.count = needs, count
        self.names: list[Any] = []
        self.params: list[Operand] = []
        self.grads: list[Operand] = []
        self.states: list[tuple[int, ...]] = []
        self.counts: list[int] = []


class _StepPlan:
    """The work of one step: jobs for the kernels, which take dense float tensors of the CPU, and the rest for torch.

    It is made anew for every step, as others exchange parameters, their memory, gradients and states in between.
    """

    def __init__(self, opt: Optimizer, parts: Iterable[GroupParams]) -> None:
        self.jobs: list[_JobLists] = []
        self.for_torch: list[GroupParams] = []
        self.repeated: list[GroupParams] = []  # a parameter that is listed twice is stepped twice, by another plan
        self.changed: list[torch.Tensor] = []
        self.torch_counts: list[torch.Tensor] = []  # step counts that the kernels cannot raise: not float32
        self.unmoved: list[tuple[torch.Tensor, torch.Tensor]] = []  # weights with an lr of 0, and their copies
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []  # states that begin with this step, as they were
        self._grads: list[torch.Tensor] = []  # some are copies: this keeps their memory
        self._shards: dict[Any, list[Operand]] = {}  # gradients by the process groups that they are spread over
        seen: set[int] = set()
        self._known = opt.__dict__.setdefault("_known_states", {})  # which a copy does not have
        if len(self._known) > 2 * len(opt.state):  # most are of parameters that were replaced
            self._known.clear()
        try:
            for group, params in parts:
                opt._check(group)
                self._add(_Needs(opt, group), params, opt.state, seen)
        except BaseException:
            self.forget_new_states()
            raise

    def _add(self, needs: _Needs, params: list[torch.Tensor], states: Any, seen: set[int]) -> None:
        """Add the parameters of a group that have gradients; `seen` has the addresses that are in the plan."""
        for_torch: list[torch.Tensor] = []
        repeated: list[torch.Tensor] = []
        jobs: dict[int, _JobLists] = {}
        keys, names, differentiable = needs.keys, needs.names, needs.differentiable
        first_key, first_codes = (keys[0], codes_name(keys[0])) if keys else ("", "")
        strided, known, signature = torch.strided, self._known, needs.signature
        counted, cacheable = needs.counts_steps or needs.chance, bool(keys) and needs.state_number != _UINT8
        last, add_changed = None, self.changed.append
        for index, p in enumerate(params):
            grad = p.grad
            if grad is None:
                continue
            kind, w, sharded = type(p), p, False
            if kind not in _PLAIN and not _is_plain(kind):
                sharded = _is_dtensor(kind)
                if not sharded:
                    for_torch.append(p)
                    continue
                if grad.placements != p.placements:
                    grad = grad.redistribute(p.device_mesh, p.placements)
                w, grad = p.to_local(), grad.to_local()
            dtype = w.dtype
            number = FLOAT_NUMBERS.get(dtype)
            contiguous = w.is_contiguous()
            if (
                number is None
                or differentiable
                or not w.is_cpu
                or grad.layout is not strided
                or not (contiguous or _is_dense(w))
            ):
                for_torch.append(p)
                continue
            address, size = w.data_ptr(), w.numel()
            if address in seen:
                repeated.append(p)
                continue
            if size:
                seen.add(address)

            grad_dtype = grad.dtype
            if grad_dtype is not dtype and (number >= _FLOAT32 or grad_dtype is not torch.float32):
                grad, grad_dtype = grad.to(dtype), dtype
            strides = None if contiguous else w.stride()
            if not grad.is_contiguous() if contiguous else grad.stride() != strides:
                grad = torch.empty_like(w).copy_(grad)
            if grad is not p.grad:
                self._grads.append(grad)

            state = states[p]
            found = known.get(id(state))
            place = (size, number, signature)
            if found is not None and contiguous and found.hold(state, place):
                state_addresses, count_address = found.addresses, found.count_address
                count = 1 if found.step is None else int(found.step.item())
            else:
                started = first_key in state or first_codes in state
                if keys and not started:
                    self._before.append((state, dict(state)))
                state_addresses = _find_states(state, p, needs, number, size, strides, sharded)
                count, count_address = self._count(state, needs, started)
                if cacheable and contiguous and not sharded and (count_address or not counted):
                    known[id(state)] = _KnownStates(state, place, state_addresses, count_address)
            if needs.lr == 0:
                self.unmoved.append((w, w.clone()))

            if count != last:
                lists, last = jobs.get(count), count
                if lists is None:
                    lists = jobs[count] = _JobLists(needs, count)
                add_name, add_param, add_grad = lists.names.append, lists.params.append, lists.grads.append
                add_state, add_count = lists.states.append, lists.counts.append
            add_name(names[index] if names else index)
            add_param((address, size, number))
            operand = (grad.data_ptr(), size, number if grad_dtype is dtype else FLOAT_NUMBERS[grad_dtype])
            add_grad(operand)
            add_state(state_addresses)
            add_count(count_address)
            add_changed(p)
            if sharded:
                spread = tuple(i for i, place in enumerate(p.placements) if place.is_shard())
                self._shards.setdefault((p.device_mesh, spread), []).append(operand)
        self.jobs.extend(jobs.values())
        if for_torch:
            self.for_torch.append((needs.group, for_torch))
        if repeated:
            self.repeated.append((needs.group, repeated))

    def _count(self, state: dict[str, Any], needs: _Needs, started: bool) -> tuple[int, int]:
        """Return the steps that a parameter took, and where the kernels raise this number; 0 for nowhere."""
        if not (needs.counts_steps or needs.chance):
            return int(started), 0
        step = state.get("step")
        if not isinstance(step, torch.Tensor):
            known = step or (0 if needs.counts_steps else int(started))
            step = state["step"] = torch.tensor(float(known))
        address = 0
        if step.dtype is torch.float32 and step.is_cpu and type(step) is torch.Tensor:
            address = step.data_ptr()
        else:
            self.torch_counts.append(step)
        return (int(step.item()) if started or not needs.keys else 0), address

    def forget_new_states(self) -> None:
        """Take back the states of parameters that would have taken their first step: SGD's first is another one."""
        for state, before in self._before:
            state.clear()
            state.update(before)

    def sum_squares(self) -> float:
        """Return the sum of squares of all gradients, over all processes that hold shards of them."""
        whole = [grad for lists in self.jobs for grad in lists.grads]
        if self._shards:
            shards = {operand for operands in self._shards.values() for operand in operands}
            whole = [grad for grad in whole if grad not in shards]
        total = _core.sum_squares(list(range(len(whole))), whole)
        for (mesh, spread), operands in self._shards.items():
            part = torch.tensor(_core.sum_squares(list(range(len(operands))), operands), dtype=torch.float64)
            for dim in spread:
                torch.distributed.all_reduce(part, group=mesh.get_group(dim))
            total += part.item()
        for _, params in self.for_torch:
            for p in params:
                grad = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                norm = torch.linalg.vector_norm(grad)
                total += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
        return total


_rule = functools.cache(_core.rule)


class _KnownStates:
    """The states of a contiguous parameter as they were found: to check them is faster than to find them anew."""

    __slots__ = ("addresses", "count_address", "place", "state", "step", "tensors")

    def __init__(self, state: dict[str, Any], place: Any, addresses: tuple[int, ...], count_address: int) -> None:
        self.state, self.place, self.addresses, self.count_address = state, place, addresses, count_address
        self.step = state["step"] if count_address else None
        tensors = [(name, value) for name, value in state.items() if isinstance(value, torch.Tensor)]
        self.tensors = [(name, tensor, tensor.data_ptr()) for name, tensor in tensors]

    def hold(self, state: dict[str, Any], place: Any) -> bool:
        """Return whether the same tensors are still there, in the same memory."""
        if place != self.place:
            return False
        for name, tensor, address in self.tensors:
            now: Any = state.get(name)
            if now is not tensor or now.data_ptr() != address:
                return False
        return True


def _find_states(
    state: dict[str, Any],
    p: torch.Tensor,
    needs: _Needs,
    number: int,
    size: int,
    strides: tuple[int, ...] | None,
    sharded: bool,
) -> tuple[int, ...]:
    """Return what the kernels are told of the states of a parameter: their type and addresses; make what is missing.

    `number`, `size` and `strides` (None: contiguous) are those of the part of `p` that this process holds.
    """
    wide = number == _FLOAT64
    dtype = torch.float64 if wide else needs.state_dtype
    coded = dtype is torch.uint8
    if sharded and coded:
        raise ValueError(
            "state_dtype: expected 'float32' or 'bfloat16' for a DTensor, whose shards may cut the blocks "
            f"of 8-bit states; got {shown(needs.group['state_dtype'])}"
        )
    addresses = [0 if wide else needs.state_number]
    for key in needs.keys:
        s = state.get(codes_name(key) if coded else key)
        if sharded and s is not None:
            s = s.to_local()
        if (
            s is None
            or s.dtype is not dtype
            or s.numel() != size
            or not s.is_cpu
            or (not s.is_contiguous() if strides is None else s.stride() != strides)
        ):
            s = find_or_make(state, key, p, dtype, needs.initial)
            s = s.to_local() if sharded else s
        addresses.append(s.data_ptr())
    if coded:
        addresses.extend(state["exponents"][key].data_ptr() for key in needs.keys)
    if needs.masters and number < _FLOAT32:
        master = state.get("master")
        if master is None:
            master = state["master"] = p.detach().to(torch.float32)
        else:
            master = find_or_make(state, "master", p, torch.float32, math.nan)
        addresses.append((master.to_local() if sharded else master).data_ptr())
    return tuple(addresses)


def _increment_versions(tensors: list[torch.Tensor]) -> None:
    increment = torch.autograd.graph.increment_version
    if _TAKES_LISTS:
        increment(tensors)
    else:
        for tensor in tensors:
            increment(tensor)


_TAKES_LISTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)

_PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}


def _is_plain(kind: type) -> bool:
    """Return whether tensors of a class are no more than their memory, as those of Parameter are."""

    def function(cls: Any, name: str) -> Any:
        method = getattr(cls, name)
        return getattr(method, "__func__", method)

    plain = all(
        any(function(kind, name) is function(base, name) for base in (torch.Tensor, torch.nn.Parameter))
        for name in ("__torch_function__", "__torch_dispatch__")
    )
    if plain:
        _PLAIN.add(kind)
    return plain


def _is_dtensor(kind: type) -> bool:  # by its methods: torch.distributed is not in every build of torch
    return hasattr(kind, "to_local") and hasattr(kind, "from_local")


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether elements fill memory without gaps or overlap, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
