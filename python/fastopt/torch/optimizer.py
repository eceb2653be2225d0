"""The step of torch's optimizers by fastopt's kernels: what all classes of `fastopt.torch` share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypedDict

import torch

from fastopt import _core
from fastopt._checks import as_float, require, require_number
from fastopt.torch.states import codes_name, find_or_make
from fastopt.train.optimizer import Job, job, mixed
from fastopt.train.optimizer import Optimizer as Formula

if TYPE_CHECKING:
    from typing_extensions import Unpack

Group: TypeAlias = dict[str, Any]
Part: TypeAlias = tuple[Group, list[torch.Tensor]]  # parameters of a group
Memory: TypeAlias = tuple[int, int, int]  # address, elements and the number of their type: Operand in cpp/bindings/

FLOAT_NUMBERS = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
}  # Float in cpp/kernels/contract.hpp
STATE_NUMBERS = {torch.bfloat16: 1, torch.uint8: 2}  # 0 for others
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
        Gradients whose norm over all parameters of the optimizer, in all groups, is larger are scaled down to it, as
        ``torch.nn.utils.clip_grad_norm_`` does, but in the same pass and without changing the gradients. A step
        whose norm is not finite is skipped.
    l1 : float, default 0
        L1 penalty as a proximal step after the update, which makes exact zeros.
    keep_zeros : bool, default False
        A weight that is exactly 0 stays 0: fine-tune a pruned model.
    state_dtype : "float32", "bfloat16" or "uint8", default "float32"
        Of the states, also of 16-bit parameters; those of float64 parameters are float64. bfloat16 halves them;
        uint8 is a small float, with an exponent for each 256 elements. Both are rounded up or down by chance.
    master_weights : bool, default False
        Keep a float32 copy of float16 and bfloat16 parameters, and step that.
    stochastic_rounding : bool, default False
        Round float16 and bfloat16 parameters up or down by chance, the nearer the likelier, instead of to nearest.
    seed : int, default 0
        Of that chance, with the step count: a run that is resumed goes on bit for bit.

    Attributes
    ----------
    grad_norm : float or None
        Norm of the gradients of the last step, before clipping, if a group has `max_norm`.
    skipped : int
        Steps that this object skipped because `grad_norm` was not finite, or ``GradScaler`` found it so.
    """

    param_groups: list[Group]
    _formula: ClassVar[type[Formula]]
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
        self._step()
        return loss

    @torch._disable_dynamo
    @torch.no_grad()
    def _step(self) -> None:
        found_inf, loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            self.skipped += 1
            return
        scale = 1.0 if loss_scale is None else 1 / float(loss_scale)
        parts: list[Part] = [(group, group["params"]) for group in self.param_groups]
        batch = _Batch(self, parts)
        if any(group.get("max_norm") is not None for group in self.param_groups):
            self.grad_norm = scale * math.sqrt(batch.sum_squares())
            if not math.isfinite(self.grad_norm):
                batch.forget_new_states()
                self.skipped += 1
                return
        self._apply(batch, scale)
        while batch.again:  # a parameter that is listed twice is stepped twice
            batch = _Batch(self, batch.again)
            self._apply(batch, scale)

    def _apply(self, batch: _Batch, scale: float) -> None:
        if batch.others:
            self._step_others(batch.others, scale)
        jobs: list[Job] = []
        for run in batch.runs:
            group, lr = run.group, float(run.group["lr"])
            grad_scale = self._clipped(group, scale)
            formula = self._formula_of(group)
            numbers = formula._hyper(run.options, lr, run.count + 1)
            jobs.append(
                job(
                    rule=_rule(formula._rule(run.options)),
                    hyper=numbers,
                    grad_scale=-grad_scale if group["maximize"] else grad_scale,
                    shrink=lr * group.get("l1", 0.0),
                    keep_zeros=group.get("keep_zeros", False),
                    stochastic=group.get("stochastic_rounding", False),
                    noise=mixed(group.get("seed", 0), run.count, len(jobs)) if run.chance else 0,
                    names=run.names,
                    params=run.params,
                    grads=run.grads,
                    states=run.states,
                    counts=run.counts,
                    indices=None,
                )
            )
        try:
            _core.step(jobs, [0])
        except BaseException:
            batch.forget_new_states()
            raise
        for count in batch.other_counts:
            count.add_(1)
        if batch.changed:
            _increment_versions(batch.changed)  # autograd refuses to go back through what was before

    def _clipped(self, group: Group, scale: float) -> float:
        """Return what to multiply the gradients of a group by."""
        max_norm = group.get("max_norm")
        if max_norm is None or self.grad_norm is None:
            return scale
        return scale * min(1.0, max_norm / (self.grad_norm + 1e-6))

    def _formula_of(self, group: Group) -> type[Formula]:
        return self._formula

    # ---- parameters that torch steps ---------------------------------------------------------------------------

    def _step_others(self, parts: list[Part], scale: float) -> None:
        """Step what the kernels do not take, by torch's own code."""
        for group, params in parts:
            for name in ("state_dtype", "master_weights", "stochastic_rounding"):
                value = group.get(name, OWN[name])
                if value not in (OWN[name], torch.float32):
                    p = params[0]
                    raise ValueError(
                        f"{name}: expected {OWN[name]!r} for a parameter that torch steps, a {type(p).__name__} of "
                        f"{p.dtype} on {p.device}; got {value!r}"
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
        """Raise if one of our own options of a group is out of range."""
        given = [group.get(name) for name in OWN]
        if given == self._checked:
            return
        own = {name: group.get(name, value) for name, value in OWN.items()}
        if own["max_norm"] is not None:
            require(as_float(own["max_norm"], "max_norm") > 0, "max_norm", "more than 0", own["max_norm"])
        require_number(own, "l1")
        for name in ("keep_zeros", "master_weights", "stochastic_rounding"):
            if not isinstance(own[name], bool):
                raise TypeError(f"{name}: expected True or False, got {own[name]!r}")
        dtype, seed = own["state_dtype"], own["seed"]
        known = isinstance(dtype, str | torch.dtype) and dtype in _STATE_DTYPES
        require(known, "state_dtype", "'float32', 'bfloat16' or 'uint8'", dtype)
        if _STATE_DTYPES[dtype] == torch.uint8:
            self._check_uint8(group)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
        if _STATE_DTYPES[dtype] != torch.uint8:  # which other options may forbid
            self._checked = given

    def _check_uint8(self, group: Group) -> None:
        """Raise if the states of a group must not have 8 bits."""

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


class _Run:
    """Tensors of a group that took the same number of steps: the lists of a job."""

    def __init__(self, group: Group, options: dict[str, Any], count: int, chance: bool) -> None:
        self.group, self.options, self.count, self.chance = group, options, count, chance
        self.names: list[Any] = []
        self.params: list[Memory] = []
        self.grads: list[Memory] = []
        self.states: list[tuple[int, ...]] = []
        self.counts: list[int] = []


class _Batch:
    """What one call steps: addresses of dense float tensors of the CPU by runs, and what torch steps.

    Everything is read anew: others exchange parameters, their memory, gradients and states between steps.
    """

    def __init__(self, opt: Optimizer, parts: Iterable[Part]) -> None:
        self.runs: list[_Run] = []
        self.others: list[Part] = []
        self.again: list[Part] = []  # parameters whose memory is in the batch already
        self.changed: list[torch.Tensor] = []
        self._new: list[tuple[dict[str, Any], str]] = []  # states that begin with this step
        self.other_counts: list[torch.Tensor] = []  # step counts that are not float32
        self._alive: list[torch.Tensor] = []  # gradients, of which some are copies
        self._shards: dict[Any, list[Memory]] = {}  # gradients by the process groups that they are spread over
        seen: set[int] = set()
        for group, params in parts:
            opt._check(group)
            others: list[torch.Tensor] = []
            again: list[torch.Tensor] = []
            self._add(opt, group, params, seen, others, again)
            if others:
                self.others.append((group, others))
            if again:
                self.again.append((group, again))

    def _add(
        self,
        opt: Optimizer,
        group: Group,
        params: list[torch.Tensor],
        seen: set[int],
        others: list[torch.Tensor],
        again: list[torch.Tensor],
    ) -> None:
        options = group
        if any(isinstance(number, torch.Tensor) for number in (group["weight_decay"], *group.get("betas", ()))):
            options = {**group, "weight_decay": float(group["weight_decay"])}
            if "betas" in group:
                options["betas"] = tuple(map(float, group["betas"]))
        keys = opt._formula_of(group)._states(options)
        initial = options.get("initial_accumulator_value", 0.0)
        wanted = _STATE_DTYPES[group.get("state_dtype", "float32")]
        masters, stochastic = group.get("master_weights", False), group.get("stochastic_rounding", False)
        chance = stochastic or wanted != torch.float32
        counted = opt._counts_steps or chance
        differentiable = group.get("differentiable", False)
        names = group.get("param_names")
        strided, float32, float64, uint8 = torch.strided, torch.float32, torch.float64, torch.uint8
        state_number = STATE_NUMBERS.get(wanted, 0)
        states_of = opt.state
        runs: dict[int, _Run] = {}
        for index, p in enumerate(params):
            grad = p.grad
            if grad is None:
                continue
            kind, w, sharded = type(p), p, False
            if kind not in _PLAIN and not _is_plain(kind):
                sharded = _is_dtensor(kind)
                if not sharded:
                    others.append(p)
                    continue
                if grad.placements != p.placements:
                    grad = grad.redistribute(p.device_mesh, p.placements)
                w, grad = p.to_local(), grad.to_local()
            dtype, size = w.dtype, w.numel()
            number = FLOAT_NUMBERS.get(dtype)
            contiguous = w.is_contiguous()
            if (
                number is None
                or differentiable
                or not w.is_cpu
                or grad.layout is not strided
                or not (contiguous or _is_dense(w))
            ):
                others.append(p)
                continue
            address = w.data_ptr()
            if address in seen:
                again.append(p)
                continue
            if size:
                seen.add(address)
            strides = None if contiguous else w.stride()

            grad_dtype = grad.dtype
            if grad_dtype is not dtype and (number > 1 or grad_dtype is not float32):
                grad, grad_dtype = grad.to(dtype), dtype
            if not grad.is_contiguous() if contiguous else grad.stride() != strides:
                grad = torch.empty_like(w).copy_(grad)
            self._alive.append(grad)

            state = states_of[p]
            state_dtype = float64 if number == 3 else wanted
            if sharded and wanted is uint8:
                raise ValueError(
                    "state_dtype: expected 'float32' or 'bfloat16' for a DTensor, whose shards may cut the blocks "
                    f"of 8-bit states; got {group['state_dtype']!r}"
                )
            started = bool(keys) and (keys[0] in state or codes_name(keys[0]) in state)
            addresses = [0 if number == 3 else state_number]
            for key in keys:
                name = codes_name(key) if state_dtype is uint8 else key
                s = state.get(name)
                if sharded and s is not None:
                    s = s.to_local()
                if (
                    s is None
                    or s.dtype is not state_dtype
                    or s.numel() != size
                    or not s.is_cpu
                    or (not s.is_contiguous() if contiguous else s.stride() != strides)
                ):
                    if not started:
                        self._new.append((state, name))
                    s = find_or_make(state, key, p, state_dtype, initial)
                    s = s.to_local() if sharded else s
                addresses.append(s.data_ptr())
            if state_dtype is uint8:
                addresses.extend(state["exponents"][key].data_ptr() for key in keys)
            if masters and number < 2:
                addresses.append(self._master(state, p, w, sharded, group))

            count, count_address = int(started), 0
            if counted:
                step = state.get("step")
                if not isinstance(step, torch.Tensor):
                    known = step or (0 if opt._counts_steps else count)
                    step = state["step"] = torch.tensor(float(known))
                count = int(step.item())
                if step.dtype is float32 and step.is_cpu and type(step) is torch.Tensor:
                    count_address = step.data_ptr()
                else:
                    self.other_counts.append(step)
                if keys and not started:
                    count = 0
            run = runs.get(count)
            if run is None:
                run = runs[count] = _Run(group, options, count, chance)
            run.names.append(names[index] if names else index)
            run.params.append((address, size, number))
            memory = (grad.data_ptr(), size, FLOAT_NUMBERS[grad_dtype])
            run.grads.append(memory)
            run.states.append(tuple(addresses))
            run.counts.append(count_address)
            self.changed.append(p)
            if sharded:
                spread = tuple(i for i, place in enumerate(p.placements) if place.is_shard())
                self._shards.setdefault((p.device_mesh, spread), []).append(memory)
        self.runs.extend(runs.values())

    def _master(self, state: dict[str, Any], p: torch.Tensor, w: torch.Tensor, sharded: bool, group: Group) -> int:
        """Return where the float32 copy of a parameter is."""
        master = find_or_make(state, "master", p, torch.float32, math.nan) if "master" in state else None
        if master is None:
            master = state["master"] = p.detach().to(torch.float32)
        master = master.to_local() if sharded else master
        if group.get("keep_zeros", False):
            master.masked_fill_(w == 0, 0)  # what was pruned since the last step
        return int(master.data_ptr())

    def forget_new_states(self) -> None:
        """Take back the states of parameters that would have taken their first step: SGD's first is another one."""
        for state, name in self._new:
            state.pop(name, None)

    def sum_squares(self) -> float:
        """Return the sum of squares of all gradients, over all processes that hold shards of them."""
        whole = [grad for run in self.runs for grad in run.grads]
        if self._shards:
            shards = {memory for memories in self._shards.values() for memory in memories}
            whole = [grad for grad in whole if grad not in shards]
        total = _core.sum_squares(list(range(len(whole))), whole)
        for (mesh, spread), memories in self._shards.items():
            part = torch.tensor(_core.sum_squares(list(range(len(memories))), memories), dtype=torch.float64)
            for dim in spread:
                torch.distributed.all_reduce(part, group=mesh.get_group(dim))
            total += part.item()
        for _, params in self.others:
            for p in params:
                grad = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                norm = torch.linalg.vector_norm(grad)
                total += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
        return total


_rule = functools.cache(_core.rule)


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


def _is_dtensor(kind: type) -> bool:
    return hasattr(kind, "to_local") and hasattr(kind, "from_local")


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether elements fill memory without gaps or overlap, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
