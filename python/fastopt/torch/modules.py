"""Modules with packed weights, which take the place of torch's layers, and the operators that run them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastopt._types import Array
from fastopt.files.container import assemble, describe, disassemble
from fastopt.tensors.packed import PackedTensor, Precision
from fastopt.tensors.products import embedding, linear
from fastopt.train.param_tree import as_array

# ---- packed tensors as torch's tensors ---------------------------------------------------------------------------


def tensors_of(packed: PackedTensor) -> tuple[dict[str, torch.Tensor], str]:
    """Return the arrays of a packed tensor as tensors, by their names in a module, and the rest of it as JSON."""
    arrays, entry = disassemble("weight", packed)
    names = [name.removeprefix("weight.") for name in arrays]
    about = json.dumps([names, describe(["weight"], {"weight": entry}, None)["fastopt"]])
    tensors = {name.replace(".", "_"): tensor_of(array) for name, array in zip(names, arrays.values(), strict=True)}
    return tensors, about


def tensor_of(array: Array) -> torch.Tensor:
    """Return a copy of an array as a tensor."""
    if array.dtype.name == "bfloat16":  # which torch.from_numpy does not know
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


# Packed tensors by the id of the first tensor that stores them: a weak reference to that tensor, the addresses and
# versions of all tensors, and the packed tensor over them. It saves assembling at every call.
_packed: dict[int, tuple[Any, list[Any], PackedTensor]] = {}


def packed_of(stored: Sequence[torch.Tensor], about: str) -> PackedTensor:
    """Return the packed tensor that `tensors_of` took apart, over the same memory."""
    first = stored[0]
    key: list[Any] = [about]
    for t in stored:
        key += t.data_ptr(), 0 if t.is_inference() else t._version
    known = _packed.get(id(first))
    if known is not None and known[0]() is first and known[1] == key:
        return known[2]
    names, text = json.loads(about)
    arrays = {f"weight.{name}": as_array(tensor) for name, tensor in zip(names, stored, strict=True)}
    packed = assemble(Path("weight"), arrays, {"fastopt": text}).tensors["weight"]
    assert isinstance(packed, PackedTensor)
    number = id(first)
    _packed[number] = weakref.ref(first, lambda _: _packed.pop(number, None)), key, packed
    return packed


def _shape_of(about: str) -> list[int]:
    return json.loads(json.loads(about)[1])["tensors"]["weight"]["shape"]


def _float32(x: torch.Tensor) -> Array:
    if x.requires_grad:
        x = x.detach()
    if x.dtype is not torch.float32:
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: expected a tensor of a float type, got {x.dtype}")
        x = x.to(torch.float32)
    return x.numpy()


# ---- operators, which torch.compile and torch.export see as they are ------------------------------------------------


def _linear(
    x: torch.Tensor, stored: Sequence[torch.Tensor], about: str, bias: torch.Tensor | None, precision: Precision
) -> torch.Tensor:
    packed = packed_of(stored, about)
    array = linear(_float32(x), packed, None if bias is None else _float32(bias), precision=precision)
    out = torch.from_numpy(array)
    return out if x.dtype is torch.float32 else out.to(x.dtype)


def _linear_backward(grad: torch.Tensor, stored: Sequence[torch.Tensor], about: str) -> torch.Tensor:
    return grad @ torch.from_numpy(packed_of(stored, about).to_dense().astype("float32", copy=False)).to(grad.dtype)


def _embedding(ids: torch.Tensor, stored: Sequence[torch.Tensor], about: str, dtype: torch.dtype) -> torch.Tensor:
    packed: Any = packed_of(stored, about)
    out = torch.empty((*ids.shape, *packed.shape[1:]))
    embedding(packed, ids.numpy(), out=out.numpy())
    return out.to(dtype)


def _dense(stored: Sequence[torch.Tensor], about: str, dtype: torch.dtype) -> torch.Tensor:
    packed = packed_of(stored, about)
    out = torch.empty(packed.shape)
    packed.to_dense(out=out.numpy())
    return out.to(dtype)


def _operator(
    function: Callable[..., torch.Tensor], schema: str, fake: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    name = f"fastopt::{function.__name__.strip('_')}"
    operator = torch.library.custom_op(name, function, mutates_args=(), device_types="cpu", schema=schema)
    operator.register_fake(fake)
    return operator


linear_backward: Any = _operator(
    _linear_backward,
    "(Tensor grad, Tensor[] stored, str about) -> Tensor",
    lambda grad, stored, about: grad.new_empty((*grad.shape[:-1], _shape_of(about)[1])),
)
linear_operator: Any = _operator(
    _linear,
    "(Tensor x, Tensor[] stored, str about, Tensor? bias, str precision) -> Tensor",
    lambda x, stored, about, bias, precision: x.new_empty((*x.shape[:-1], _shape_of(about)[0])),
)
embedding_operator = _operator(
    _embedding,
    "(Tensor ids, Tensor[] stored, str about, ScalarType dtype) -> Tensor",
    lambda ids, stored, about, dtype: ids.new_empty((*ids.shape, *_shape_of(about)[1:]), dtype=dtype),
)
dense_operator = _operator(
    _dense,
    "(Tensor[] stored, str about, ScalarType dtype) -> Tensor",
    lambda stored, about, dtype: stored[0].new_empty(_shape_of(about), dtype=dtype),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.stored, ctx.about, _, _ = inputs


def _linear_gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = linear_backward(grad, ctx.stored, ctx.about) if needs_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
    return grad_x, [None] * len(ctx.stored), None, grad_bias, None


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.stored, ctx.about = inputs


def _linear_backward_gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return linear_operator(grad, ctx.stored, ctx.about, None, "exact"), [None] * len(ctx.stored), None


linear_operator.register_autograd(_linear_gradients, setup_context=_remember)
linear_backward.register_autograd(_linear_backward_gradients, setup_context=_remember_backward)


class _DirectLinear(torch.autograd.Function):
    """The same as `linear_operator`, whose dispatch takes longer than the product of a small layer."""

    @staticmethod
    def forward(  # with `setup_context` apart, torch would inspect the signature at every call
        ctx: Any, x: torch.Tensor, stored: Any, about: str, bias: torch.Tensor | None, precision: Precision
    ) -> torch.Tensor:
        ctx.stored, ctx.about = stored, about
        return _linear(x, stored, about, bias, precision)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        grad_x, _, _, grad_bias, _ = _linear_gradients(ctx, grad)
        return grad_x, None, None, grad_bias, None


def _is_direct(x: torch.Tensor) -> bool:
    """Return whether the kernels can be called without an operator, which is faster: nothing records what is done."""
    return type(x) is torch.Tensor and x.is_cpu and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


# ---- modules -------------------------------------------------------------------------------------------------------


class DecodedWeight(torch.Tensor):
    """A packed weight as a tensor, which is decoded anew whenever a module is asked for its `weight`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def requires_grad(self) -> bool:
        """False; True is refused, as this is a copy."""
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        if requires_grad:
            raise RuntimeError(
                "weight: a packed weight has no gradient; fastopt.torch.unpack_(module) makes it a parameter again"
            )

    def requires_grad_(self, requires_grad: bool = True) -> DecodedWeight:
        """Set `requires_grad`."""
        self.requires_grad = requires_grad
        return self


class PackedModule(torch.nn.Module):
    """A layer whose weight is packed: buffers hold it, and kernels read these as they are.

    `pack_` turns layers of torch into this in place, so that hooks and references stay; `unpack_` turns them back.

    Attributes
    ----------
    packed : PackedTensor
        The weight, over the memory of the buffers.
    precision : "exact", "int8" or "blas"
        As in `fastopt.linear`.
    """

    layer: ClassVar[Any]  # the class of torch that this one stands for
    about: str
    stored: list[str]  # names of the buffers
    precision: Precision
    weight_dtype: torch.dtype
    weight_requires_grad: bool

    def hold(self, tensors: dict[str, torch.Tensor], about: str, dtype: torch.dtype, precision: Precision) -> None:
        """Become a packed module: buffers take the place of the parameter `weight`."""
        weight = self._parameters.pop("weight")
        self.__class__ = next(cls for cls in PACKED if is_layer(type(self), cls.layer))
        self.weight_requires_grad = bool(weight is not None and weight.requires_grad)
        self.about, self.stored, self.weight_dtype, self.precision = about, list(tensors), dtype, precision
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def release(self, weight: torch.nn.Parameter) -> None:
        """Become the layer of torch again, with a parameter as its weight."""
        for name in self.stored:
            del self._buffers[name]
        for name in ("about", "stored", "precision", "weight_dtype", "weight_requires_grad"):
            delattr(self, name)
        self.__class__ = original_class(self.layer)
        self.register_parameter("weight", weight)

    @property
    def buffers_of_weight(self) -> list[torch.Tensor]:
        """The tensors that hold the weight."""
        buffers = self._buffers
        return [buffers[name] for name in self.stored]

    @property
    def packed(self) -> PackedTensor:
        """The packed weight."""
        return packed_of(self.buffers_of_weight, self.about)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight, a new tensor for every call."""
        return self.dense().as_subclass(DecodedWeight)

    def dense(self) -> torch.Tensor:
        """Return the decoded weight as the layer had it."""
        return dense_operator(self.buffers_of_weight, self.about, self.weight_dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers.pop(name) for name in self.stored}
        try:
            super()._apply(fn, recurse)
            self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
            for name, tensor in kept.items():
                moved = fn(tensor)
                kept[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        finally:
            for name, tensor in kept.items():
                self._buffers[name] = tensor
        return self

    def extra_repr(self) -> str:
        """Return the options of the layer, and how its weight is packed."""
        packed = self.packed
        own = f"{packed.storage}, bits={packed.bits}, group_size={packed.group_size}, precision={self.precision!r}"
        layer = original_class(self.layer).extra_repr(self)
        return f"{layer}, {own}" if layer else own


class PackedLinear(PackedModule, torch.nn.Linear):
    """``torch.nn.Linear`` with a packed weight."""

    layer = torch.nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, or that of autocast."""
        stored, bias = self.buffers_of_weight, self._parameters.get("bias")
        run = linear_operator
        if _is_direct(x):
            needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
            run = _DirectLinear.apply if needs_grad and torch.is_grad_enabled() else _linear
        out = run(x, stored, self.about, bias, self.precision)
        return out.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else out


class PackedConv1D(PackedLinear):
    """``Conv1D`` of transformers, a linear layer whose weight is [in, out]; packed, it is [out, in]."""

    layer = "transformers.pytorch_utils.Conv1D"

    def dense(self) -> torch.Tensor:
        """Return the decoded weight as the layer had it."""
        return super().dense().T.contiguous()

    def extra_repr(self) -> str:
        """Return the shape, and how the weight is packed."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"


class PackedEmbedding(PackedModule, torch.nn.Embedding):
    """``torch.nn.Embedding`` with a packed weight, of which only the rows that are asked for are decoded."""

    layer = torch.nn.Embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the weight with these numbers."""
        run = _embedding if _is_direct(ids) else embedding_operator
        return run(ids, self.buffers_of_weight, self.about, self.weight_dtype)


class PackedConv1d(PackedModule, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` with a packed weight, which every call decodes."""

    layer = torch.nn.Conv1d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution."""
        return self._conv_forward(x, self.dense(), self.bias)


class PackedConv2d(PackedModule, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with a packed weight, which every call decodes."""

    layer = torch.nn.Conv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution."""
        return self._conv_forward(x, self.dense(), self.bias)


PACKED: list[type[PackedModule]] = [PackedLinear, PackedConv1D, PackedEmbedding, PackedConv1d, PackedConv2d]


def is_layer(cls: type, layer: Any) -> bool:
    """Return whether a class is exactly `layer`, a class or the name of one that may not be installed."""
    return cls is layer if isinstance(layer, type) else f"{cls.__module__}.{cls.__qualname__}" == layer


def original_class(layer: Any) -> Any:
    """Return the class of torch or transformers."""
    if isinstance(layer, type):
        return layer
    module, _, name = layer.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)
