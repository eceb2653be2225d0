"""Networks in C: a list of operations with shapes, a plan of their scratch, and the function that runs them.

A network is built by one method for each operation, which checks the shapes. Each operation reads and writes buffers.
Buffers that are not needed at the same time share scratch, and an operation that works in place keeps its buffer.
Feature maps lie with the channels last, as the products write them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from fastopt._checks import as_matrix
from fastopt._text import proposal, shown
from fastopt._types import Array
from fastopt.tensors.packed import Weight

# Makes a call from the pointers to what it reads, to what it writes, and to its own scratch.
Call: TypeAlias = Callable[[Sequence[str], str, str], str]

PATCHES = 4  # FO_NN_PATCHES
_TENSOR_BYTES, _WINDOW_BYTES, _RECURRENT_BYTES = 60, 60, 40  # of the structures, with pointers of 32 bits
_IN_PLACE = {
    "relu": "fo_nn_relu",
    "relu6": "fo_nn_relu6",
    "gelu": "fo_nn_gelu",
    "gelu_tanh": "fo_nn_gelu_tanh",
    "silu": "fo_nn_silu",
    "tanh": "fo_nn_tanh",
    "sigmoid": "fo_nn_sigmoid",
}


def identifier(name: str) -> str:
    """Return a name with `_` for each character that a name in C cannot have."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


class Step(NamedTuple):
    """The cost of an operation.

    Attributes
    ----------
    name : str
        The node.
    call : str
        The function in C.
    shape : tuple of int
        The shape of the output, with the batch of 1.
    flash : int
        Bytes of its constants; a tensor that several operations read counts once.
    macs : int
        Multiply-adds of weights.
    """

    name: str
    call: str
    shape: tuple[int, ...]
    flash: int
    macs: int


class Cost(NamedTuple):
    """The cost of running a network in C.

    Attributes
    ----------
    flash : int
        Bytes of all constants, with pointers of 32 bits; the code comes on top.
    scratch : int
        Bytes of NAME_SCRATCH_BYTES.
    macs : int
        Multiply-adds of weights in a run.
    input_bytes, output_bytes : int
        Bytes of x and y.
    steps : tuple of Step
    """

    flash: int
    scratch: int
    macs: int
    input_bytes: int
    output_bytes: int
    steps: tuple[Step, ...]


@dataclass(eq=False)
class _Buffer:
    """Floats that one operation writes, or the input."""

    size: int
    place: str = ""  # x, y, or empty for scratch
    shared: _Buffer | None = None  # whose memory this one keeps
    first: int = -1  # operations that write and read its memory
    last: int = -1
    offset: int = 0

    def memory(self) -> _Buffer:
        return self if self.shared is None else self.shared.memory()

    def pointer(self) -> str:
        memory = self.memory()
        return memory.place or ("s" if memory.offset == 0 else f"s + {memory.offset}")


class Value(NamedTuple):
    """The output of an operation: its shape, whose first axis is the batch of 1, and where its floats are.

    With `channels_last`, axis 1 is stored behind all others.
    """

    shape: tuple[int, ...]
    buffer: _Buffer
    channels_last: bool = False


@dataclass
class _Op:
    name: str
    kind: str
    reads: list[_Buffer]
    writes: _Buffer
    shape: tuple[int, ...]
    call: Call
    scratch: int = 0  # floats that it needs for itself
    macs: int = 0
    shares: tuple[int, ...] = ()  # which of the inputs may be overwritten by the output
    in_place: bool = False  # the output must lie where the first input lies
    returns: bool = False  # a code
    tensors: list[str] = field(default_factory=list)
    constants: int = 0  # bytes of other constants
    int8: Call | None = None  # with whole numbers; returns a code
    int8_scratch: int = 0


class Net:
    """A network for one sample.

    Parameters
    ----------
    base : str
        With what all names in C begin.
    model : mapping from name to tensor
    """

    def __init__(self, base: str, model: Mapping[str, Weight]) -> None:
        self.base = base
        self.model = model
        self._more: dict[str, Weight] = {}
        self.tensors: dict[str, Weight] = {}  # those that are read
        self.declarations: list[str] = []
        self.names = {self.tensor_name(name) for name in model} | {f"{base}_run", f"{base}_run_int8"}
        self.ids = False  # x is of indices
        self._ops: list[_Op] = []
        self._input = self._output = _Buffer(0, "x")
        self._places: list[tuple[_Buffer, int, int, int]] = []
        self.int8 = False
        self.input_shape: tuple[int, ...] = ()
        self.shape: tuple[int, ...] = ()  # of y
        self.scratch = 0  # bytes

    # ---- names and constants ----

    def added(self, name: str, tensor: Weight) -> str:
        """Add a tensor that the model does not have; return the name that it gets."""
        while self.tensor_name(name) in self.names:
            name += "_"
        self.names.add(self.tensor_name(name))
        self._more[name] = tensor
        return name

    def tensor_name(self, name: str) -> str:
        """Return the name in C of a tensor of the model."""
        return f"{self.base}_{identifier(name)}"

    def fresh(self, name: str) -> str:
        """Return a name in C that begins with the network's, and take it."""
        unique = self.tensor_name(name)
        while unique in self.names:
            unique += "_"
        self.names.add(unique)
        return unique

    def has(self, name: str) -> bool:
        """Return whether the model has a tensor."""
        return name in self.model or name in self._more

    def tensor(self, node: str, name: str) -> Weight:
        """Return a tensor that a node needs."""
        if name in self._more:
            return self._more[name]
        if name not in self.model:
            raise ValueError(f"model: {node!r} needs {name!r}, which is missing")
        return self.model[name]

    def _weight(self, node: str, name: str, ndims: Sequence[int] = (2,)) -> Weight:
        w = self.tensor(node, name)
        kind = np.dtype(w.dtype).name
        if len(w.shape) not in ndims or kind not in ("float64", "float32", "float16", "bfloat16"):
            axes = " or ".join(map(str, ndims))
            raise ValueError(f"{node!r}: expected {name!r} to be of floats and {axes} axes, got {kind} {w.shape}")
        self.tensors[name] = w
        return w

    def _bias(self, node: str, name: str | None, rows: int) -> str:
        """Return an expression for a bias of `rows` values."""
        if name is None:
            return "NULL"
        self.vector(node, name, rows)
        self.tensors[name] = self.tensor(node, name)
        return f"&{self.tensor_name(name)}"

    def vector(self, node: str, name: str, size: int) -> Array:
        """Return a tensor that a node needs, of one axis and this size, as float64."""
        tensor = self.tensor(node, name)
        if tensor.shape != (size,):
            raise ValueError(f"{node!r}: expected {name!r} of shape {(size,)}, got {tensor.shape}")
        dense = tensor if isinstance(tensor, np.ndarray) else tensor.to_dense()
        return dense.astype(np.float64)

    def _floats(self, name: str, values: Array) -> str:
        """Declare an array of floats; return its name."""
        unique = self.fresh(name)
        with np.errstate(over="ignore"):
            numbers = values.astype(np.float32).reshape(-1)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name!r}: has values that are not finite in float32")
        texts = [_float(float(number)) for number in numbers]
        lines = [", ".join(texts[i : i + 8]) for i in range(0, len(texts), 8)]
        self.declarations.append(f"static const float {unique}[] = {{\n    " + ",\n    ".join(lines) + "};\n")
        return unique

    # ---- operations ----

    def input(self, shape: Sequence[int], *, ids: bool = False) -> Value:
        """Return the input: floats, or indices of rows of an embedding."""
        self._input = _Buffer(math.prod(shape), "x")
        self.ids, self.input_shape = ids, tuple(shape)
        return Value(tuple(shape), self._input)

    def is_input(self, x: Value) -> bool:
        """Return whether a value is the input, maybe in another shape."""
        return x.buffer is self._input

    def _add(
        self, name: str, kind: str, reads: Sequence[Value], shape: Sequence[int], call: Call, *,
        channels_last: bool = False, scratch: int = 0, macs: int = 0, shares: tuple[int, ...] = (),
        in_place: bool = False, returns: bool = False, tensors: Sequence[str | None] = (), constants: int = 0,
        int8: Call | None = None, int8_scratch: int = 0,
    ) -> Value:  # fmt: skip
        if self.ids and kind != "fo_embedding" and any(value.buffer is self._input for value in reads):
            raise ValueError(f"{name!r}: reads the indices of an embedding as numbers")
        buffer = _Buffer(math.prod(shape))
        used = [name for name in tensors if name is not None]
        self._ops.append(
            _Op(name, kind, [value.buffer for value in reads], buffer, tuple(shape), call, scratch, macs, shares,
                in_place, returns, used, constants, int8, int8_scratch)
        )  # fmt: skip
        return Value(tuple(shape), buffer, channels_last)

    def plain(self, name: str, x: Value) -> Value:
        """Return a value with all its axes stored in their order."""
        if not x.channels_last:
            return x
        channels = x.shape[1]
        positions = math.prod(x.shape[2:])
        if channels == 1 or positions == 1:
            return Value(x.shape, x.buffer)
        return self._add(name, "fo_nn_transpose", [x], x.shape,
                         lambda r, y, s: f"fo_nn_transpose({r[0]}, {positions}, {channels}, {y})")  # fmt: skip

    def _channels_last(self, name: str, x: Value) -> Value:
        """Return a value with axis 1 stored behind all others."""
        if x.channels_last or len(x.shape) < 3:
            return x
        channels, positions = x.shape[1], math.prod(x.shape[2:])
        if channels == 1 or positions == 1:
            return Value(x.shape, x.buffer, True)
        return self._add(name, "fo_nn_transpose", [x], x.shape,
                         lambda r, y, s: f"fo_nn_transpose({r[0]}, {channels}, {positions}, {y})",
                         channels_last=True)  # fmt: skip

    def linear(self, name: str, x: Value, weight: str, bias: str | None = None) -> Value:
        """Multiply the last axis with a weight [out, in]."""
        w = self._weight(name, weight, (2, 3, 4, 5))
        rows, cols = as_matrix(w.shape)
        if x.shape[-1] != cols:
            raise ValueError(
                f"{name!r}: {weight!r} has {cols} columns, but reads {_described(x)} of {x.shape[-1]}; expected as many"
            )
        x = self.plain(name, x)
        batch = math.prod(x.shape[:-1])
        pointers = f"&{self.tensor_name(weight)}, {self._bias(name, bias, rows)}"
        kind = "fo_nn_linear" if batch == 1 else "fo_linear"

        def call(r: Sequence[str], y: str, s: str) -> str:
            if batch == 1:
                return f"fo_nn_linear({pointers}, {r[0]}, {y})"
            return f"fo_linear({pointers}, {r[0]}, {batch * cols}, {y}, {batch * rows})"

        def int8(r: Sequence[str], y: str, s: str) -> str:
            if batch == 1:
                return f"fo_nn_linear_int8({pointers}, {r[0]}, {y}, (int8_t *)({s}))"
            return f"fo_nn_rows_int8({pointers}, {r[0]}, {batch}, {y}, (int8_t *)({s}))"

        return self._add(name, kind, [x], (*x.shape[:-1], rows), call, macs=batch * rows * cols,
                         tensors=[weight, bias], int8=int8, int8_scratch=-(-cols // 4))  # fmt: skip

    def conv(
        self, name: str, x: Value, weight: str, bias: str | None = None, *, stride: Sequence[int] = (1,),
        padding: Sequence[tuple[int, int]] | str = ((0, 0),), dilation: Sequence[int] = (1,), groups: int = 1,
    ) -> Value:  # fmt: skip
        """Convolve a signal [1, channels, length] or a feature map [1, channels, height, width]."""
        w = self._weight(name, weight, (3, 4))
        out, channels = w.shape[0], w.shape[1] * groups
        if len(x.shape) != len(w.shape) or x.shape[1] != channels or out % groups:
            raise ValueError(
                f"{name!r}: {weight!r} of shape {w.shape} with {groups} groups does not fit {_described(x)}; expected "
                f"{len(w.shape) - 2} axes behind {channels} channels, and outputs that {groups} divides"
            )
        window, shape, positions = self._window(name, x, w.shape[2:], stride, padding, dilation, ceil=False)
        cols = as_matrix(w.shape)[1]
        pointers = f"&{self.tensor_name(weight)}, {self._bias(name, bias, out)}"
        arguments = f"{pointers}, &{window}"
        macs = positions * out * cols
        if groups == 1:
            return self._add(
                name, "fo_nn_conv", [x], (1, out, *shape),
                lambda r, y, s: f"fo_nn_conv({arguments}, {r[0]}, {y}, {s})",
                channels_last=True, scratch=cols * min(PATCHES, positions), macs=macs, tensors=[weight, bias],
                constants=_WINDOW_BYTES, int8=lambda r, y, s: f"fo_nn_conv_int8({arguments}, {r[0]}, {y}, {s})",
                int8_scratch=cols + -(-cols // 4),
            )  # fmt: skip
        return self._add(
            name, "fo_nn_conv_grouped", [x], (1, out, *shape),
            lambda r, y, s: f"fo_nn_conv_grouped({arguments}, {groups}, {r[0]}, {y}, {s})",
            channels_last=True, scratch=cols + out, macs=macs, tensors=[weight, bias], constants=_WINDOW_BYTES,
        )  # fmt: skip

    def pool(
        self, name: str, x: Value, kind: str, size: Sequence[int], *, stride: Sequence[int] = (1,),
        padding: Sequence[tuple[int, int]] | str = ((0, 0),), dilation: Sequence[int] = (1,),
        count_padding: bool = False, ceil: bool = False,
    ) -> Value:  # fmt: skip
        """Take the largest value ("max") or the mean ("average") below a window."""
        window, shape, _ = self._window(name, x, size, stride, padding, dilation, ceil=ceil)
        if kind == "max":

            def call(r: Sequence[str], y: str, s: str) -> str:
                return f"fo_nn_max_pool(&{window}, {r[0]}, {y})"
        else:

            def call(r: Sequence[str], y: str, s: str) -> str:
                return f"fo_nn_average_pool(&{window}, {int(count_padding)}, {r[0]}, {y})"

        return self._add(name, f"fo_nn_{kind}_pool", [x], (*x.shape[:2], *shape), call, channels_last=True,
                         constants=_WINDOW_BYTES)  # fmt: skip

    def global_pool(self, name: str, x: Value, kind: str) -> Value:
        """Pool each channel to one value; the axes behind it become 1."""
        if len(x.shape) < 3:
            raise ValueError(f"{name!r}: expected a feature map, got {_described(x)}")
        return self.pool(name, x, kind, x.shape[2:])

    def _window(
        self, name: str, x: Value, kernel: Sequence[int], stride: Sequence[int],
        padding: Sequence[tuple[int, int]] | str, dilation: Sequence[int], *, ceil: bool,
    ) -> tuple[str, tuple[int, ...], int]:  # fmt: skip
        """Declare a window; return its name, the shape behind the channels, and the number of its positions."""
        spatial = x.shape[2:]
        if len(spatial) not in (1, 2) or len(kernel) != len(spatial):
            raise ValueError(
                f"{name!r}: expected a signal [channels, length] or a feature map [channels, height, width] and a "
                f"window of as many axes, got {_described(x)} and a window of {tuple(kernel)}"
            )
        steps, spread = _each(name, "stride", stride, len(spatial)), _each(name, "dilation", dilation, len(spatial))
        if min(*steps, *spread, *kernel) < 1:
            raise ValueError(f"{name!r}: stride, dilation and size of the window must be 1 or more")
        covered = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
        if isinstance(padding, str):
            pads = _same(name, padding, spatial, covered, steps)
        else:
            pads = list(padding) * len(spatial) if len(padding) == 1 else list(padding)
            if len(pads) != len(spatial) or min(min(pair) for pair in pads) < 0:
                raise ValueError(f"{name!r}: padding: expected {len(spatial)} numbers of 0 or more, got {padding}")
        out = []
        for length, (begin, end), span, step in zip(spatial, pads, covered, steps, strict=True):
            room = length + begin + end - span
            if room < 0:
                raise ValueError(
                    f"{name!r}: the window covers {span} of an axis that has {length} and {begin + end} of padding"
                )
            places = (-(-room // step) if ceil else room // step) + 1
            if ceil and (places - 1) * step >= length + begin:  # the last window must begin inside
                places -= 1
            out.append(places)
        channels, positions = x.shape[1], math.prod(spatial)
        by_channel, by_pixel = (1, channels) if x.channels_last else (positions, 1)
        two = [(1, 1, 1, 1, 0)] if len(spatial) == 1 else []
        two += [(k, s, d, o, p[0]) for k, s, d, o, p in zip(kernel, steps, spread, out, pads, strict=True)]
        (kh, sy, dy, oh, top), (kw, sx, dx, ow, left) = two
        height, width = spatial if len(spatial) == 2 else (1, spatial[0])
        unique = self.fresh(f"{name}_window")
        numbers = [channels, height, width, oh, ow, kh, kw, sy, sx, dy, dx, top, left, by_channel, by_pixel]
        if max(*numbers, positions * channels) >= 1 << 31:
            raise ValueError(f"{name!r}: {_described(x)} is too large for C")
        self.declarations.append(f"static const fo_nn_window {unique} = {{{', '.join(map(str, numbers))}}};\n")
        return unique, tuple(out), math.prod(out)

    def activation(self, name: str, x: Value, kind: str, slope: float = 0.01, axis: int = -1) -> Value:
        """Apply an activation."""
        count = math.prod(x.shape)
        if kind == "softmax":
            return self._softmax(name, x, axis)
        if kind == "leaky_relu":
            return self._unary(name, x, "fo_nn_leaky_relu", f"{count}, {_float(slope)}")
        if kind not in _IN_PLACE:
            known = sorted([*_IN_PLACE, "leaky_relu", "softmax"])
            raise ValueError(
                f"{name!r}: expected an activation of {', '.join(known)}, got {shown(kind)}{proposal(kind, known)}"
            )
        return self._unary(name, x, _IN_PLACE[kind], str(count))

    def _unary(self, name: str, x: Value, function: str, arguments: str, constants: int = 0) -> Value:
        return self._add(name, function, [x], x.shape, lambda r, y, s: f"{function}({y}, {arguments})",
                         channels_last=x.channels_last, shares=(0,), in_place=True, constants=constants)  # fmt: skip

    def _softmax(self, name: str, x: Value, axis: int) -> Value:
        axis %= len(x.shape)
        if axis == 1 and len(x.shape) > 2:
            x = self._channels_last(name, x)
        elif axis == len(x.shape) - 1:
            x = self.plain(name, x)
        else:
            raise ValueError(f"{name!r}: softmax: expected the last axis or the channels, got axis {axis}")
        cols = x.shape[axis]
        return self._unary(name, x, "fo_nn_softmax", f"{math.prod(x.shape) // cols}, {cols}")

    def affine(self, name: str, x: Value, factor: Array | None, summand: Array | None, axis: int = 1) -> Value:
        """Multiply with a factor and add a summand, one value for each place of an axis: the channels or the last."""
        axis %= len(x.shape)
        if axis == 1 and len(x.shape) > 2:
            x = self._channels_last(name, x)
        elif axis == len(x.shape) - 1:
            x = self.plain(name, x)
        else:
            raise ValueError(f"{name!r}: expected constants along the channels or the last axis, got axis {axis}")
        cols, pointers, nbytes = x.shape[axis], [], 0
        for part, values in (("factor", factor), ("summand", summand)):
            if values is None:
                pointers.append("NULL")
                continue
            if values.shape != (cols,):
                raise ValueError(f"{name!r}: expected a {part} of {cols} values, got shape {values.shape}")
            pointers.append(self._floats(f"{name}_{part}", values))
            nbytes += 4 * cols
        rows = math.prod(x.shape) // cols
        return self._unary(name, x, "fo_nn_affine", f"{rows}, {cols}, {pointers[0]}, {pointers[1]}", nbytes)

    def join(self, name: str, a: Value, b: Value, kind: str = "add") -> Value:
        """Add or multiply two values of the same shape."""
        if a.shape != b.shape:
            raise ValueError(f"{name!r}: expected two values of one shape, got {a.shape} and {b.shape}")
        if a.channels_last != b.channels_last:
            a, b = self.plain(name, a), self.plain(name, b)
        if a.channels_last != b.channels_last:  # one of them has a single channel or position
            a, b = Value(a.shape, a.buffer), Value(b.shape, b.buffer)
        count = math.prod(a.shape)
        return self._add(name, f"fo_nn_{kind}", [a, b], a.shape,
                         lambda r, y, s: f"fo_nn_{kind}({r[0]}, {r[1]}, {count}, {y})",
                         channels_last=a.channels_last, shares=(0, 1))  # fmt: skip

    def concat(self, name: str, values: Sequence[Value], axis: int) -> Value:
        """Concatenate values along an axis."""
        first = values[0]
        axis %= len(first.shape)
        for value in values:
            if len(value.shape) != len(first.shape) or any(
                a != b for i, (a, b) in enumerate(zip(value.shape, first.shape, strict=True)) if i != axis
            ):
                raise ValueError(
                    f"{name!r}: expected shapes that differ in axis {axis} alone, got "
                    f"{' and '.join(str(value.shape) for value in values)}"
                )
        last = axis == 1 and any(value.channels_last for value in values)
        parts = [self._channels_last(name, value) if last else self.plain(name, value) for value in values]
        total = sum(value.shape[axis] for value in values)
        shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
        rows = math.prod(first.shape[2:]) if last else math.prod(first.shape[:axis])
        widths = [math.prod(value.shape) // rows for value in parts]

        def call(r: Sequence[str], y: str, s: str) -> str:
            places = [sum(widths[:i]) for i in range(len(widths))]
            return ";\n  ".join(
                f"fo_nn_copy({x}, {width}, {rows}, {width}, {y}{f' + {at}' if at else ''}, {sum(widths)})"
                for x, width, at in zip(r, widths, places, strict=True)
            )

        return self._add(name, "fo_nn_copy", parts, shape, call, channels_last=last)

    def part(self, name: str, x: Value, axis: int, begin: int, end: int) -> Value:
        """Take places [begin, end) of an axis."""
        axis %= len(x.shape)
        x = self.plain(name, x)
        length, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
        if not 0 <= begin < end <= length:
            raise ValueError(f"{name!r}: takes {begin} to {end} of {length}")
        shape = (*x.shape[:axis], end - begin, *x.shape[axis + 1 :])
        if shape == x.shape:
            return x
        rows, cols = math.prod(x.shape[:axis]), (end - begin) * inner
        return self._add(
            name, "fo_nn_copy", [x], shape,
            lambda r, y, s: f"fo_nn_copy({r[0]} + {begin * inner}, {length * inner}, {rows}, {cols}, {y}, {cols})",
        )  # fmt: skip

    def reshape(self, name: str, x: Value, shape: Sequence[int]) -> Value:
        """Give a value another shape of the same size; -1 stands for what is left."""
        size = math.prod(x.shape)
        known = math.prod(n for n in shape if n != -1)
        if -1 in shape and known and size % known == 0:
            shape = [size // known if n == -1 else n for n in shape]
        if math.prod(shape) != size or min(shape, default=1) < 1:
            raise ValueError(f"{name!r}: cannot give {_described(x)} the shape {tuple(shape)}")
        x = self.plain(name, x)
        return Value(tuple(shape), x.buffer)

    def flatten(self, name: str, x: Value) -> Value:
        """Make one row of all values, channel by channel."""
        return self.reshape(name, x, (1, -1))

    def transpose(self, name: str, x: Value, perm: Sequence[int]) -> Value:
        """Change the order of axes: of two parts of them, or of axes of length 1."""
        if sorted(perm) != list(range(len(x.shape))):
            raise ValueError(f"{name!r}: expected an order of {len(x.shape)} axes, got {tuple(perm)}")
        shape = tuple(x.shape[axis] for axis in perm)
        stored = [0, *range(2, len(x.shape)), 1] if x.channels_last else list(range(len(x.shape)))
        long = [axis for axis in stored if x.shape[axis] > 1]
        wanted = [axis for axis in perm if x.shape[axis] > 1]
        if long == wanted:
            return Value(shape, x.buffer)
        turned = wanted[1:] + wanted[:1]
        if turned == long and len(shape) > 2 and wanted[0] == perm[1]:
            return Value(shape, x.buffer, True)
        split = next((at for at in range(1, len(long)) if long[at:] + long[:at] == wanted), None)
        if split is not None:
            rows, cols = (math.prod(x.shape[axis] for axis in part) for part in (long[:split], long[split:]))
            return self._add(name, "fo_nn_transpose", [x], shape,
                             lambda r, y, s: f"fo_nn_transpose({r[0]}, {rows}, {cols}, {y})")  # fmt: skip
        if x.channels_last:
            return self.transpose(name, self.plain(name, x), perm)
        raise ValueError(f"{name!r}: cannot bring the axes of {_described(x)} into the order {tuple(perm)}")

    def layer_norm(
        self, name: str, x: Value, gain: Array | None, shift: Array | None, epsilon: float, count: int = 1
    ) -> Value:
        """Normalize over the last `count` axes."""
        x = self.plain(name, x)
        cols, pointers, nbytes = math.prod(x.shape[-count:]), [], 0
        for part, values in (("gain", gain), ("shift", shift)):
            if values is not None and values.size != cols:
                raise ValueError(f"{name!r}: expected a {part} of {cols} values, got shape {values.shape}")
            pointers.append("NULL" if values is None else self._floats(f"{name}_{part}", values))
            nbytes += 0 if values is None else 4 * cols
        rows = math.prod(x.shape) // cols
        arguments = f"{rows}, {cols}, {pointers[0]}, {pointers[1]}, {_float(epsilon)}"
        return self._unary(name, x, "fo_nn_layer_norm", arguments, nbytes)

    def embedding(self, name: str, x: Value, weight: str) -> Value:
        """Take rows of a table."""
        w = self._weight(name, weight)
        if not self.ids or x.buffer is not self._input:
            raise ValueError(f"{name!r}: an embedding must read the input, which are its indices")
        count, cols = math.prod(x.shape), w.shape[1]
        return self._add(
            name, "fo_embedding", [x], (*x.shape, cols),
            lambda r, y, s: f"fo_embedding(&{self.tensor_name(weight)}, {r[0]}, {count}, {y}, {count * cols})",
            returns=True, tensors=[weight],
        )  # fmt: skip

    def recurrent(
        self, name: str, kind: str, x: Value, weights: tuple[str, str], biases: tuple[str | None, str | None], *,
        gates: Sequence[int], last: bool, backward: bool = False, reset_before: bool = False,
    ) -> Value:  # fmt: skip
        """Run an LSTM or a GRU over [1, steps, inputs]; return [1, steps, units], or the last [1, units]."""
        w, r = (self._weight(name, weight) for weight in weights)
        count = {"lstm": 4, "gru": 3}[kind]
        x = self.plain(name, x)
        units = r.shape[1]
        if len(x.shape) != 3 or w.shape != (count * units, x.shape[2]) or r.shape != (count * units, units):
            raise ValueError(
                f"{name!r}: {weights[0]!r} and {weights[1]!r} of shapes {w.shape} and {r.shape} do not fit "
                f"{_described(x)}; expected [steps, inputs] and [{count} * units, inputs], [{count} * units, units]"
            )
        steps, inputs = x.shape[1:]
        pointers = [f"&{self.tensor_name(weight)}" for weight in weights]
        pointers += [self._bias(name, bias, count * units) for bias in biases]
        places = ", ".join(map(str, [*gates, 0][:4]))
        numbers = (
            f"{steps}, {inputs}, {units}, {0 if last else units}, {{{places}}}, {int(backward)}, {int(reset_before)}"
        )
        unique = self.fresh(f"{name}_{kind}")
        self.declarations.append(f"static const fo_nn_recurrent {unique} = {{{', '.join(pointers)}, {numbers}}};\n")
        again = units * units * count if reset_before else 0
        return self._add(
            name, f"fo_nn_{kind}", [x], (1, units) if last else (1, steps, units),
            lambda read, y, s: f"fo_nn_{kind}(&{unique}, {read[0]}, {y}, {s})",
            scratch={"lstm": 10, "gru": 8}[kind] * units,
            macs=steps * (count * units * (inputs + units) + again),
            tensors=[*weights, *biases], constants=_RECURRENT_BYTES,
        )  # fmt: skip

    # ---- the plan of memory ----

    def finish(self, value: Value, *, int8: bool = False) -> None:
        """Make a value the output y, and give each buffer its place."""
        value = self.plain("y", value)
        if value.buffer is self._input:
            count = math.prod(value.shape)
            value = self._add("y", "fo_nn_copy", [value], value.shape,
                              lambda r, y, s: f"fo_nn_copy({r[0]}, {count}, 1, {count}, {y}, {count})")  # fmt: skip
        self.int8 = int8
        self._output, self.shape = value.buffer, value.shape
        reads: dict[_Buffer, int] = {value.buffer: len(self._ops)}
        for at, op in enumerate(self._ops):
            for buffer in op.reads:
                reads[buffer] = max(reads.get(buffer, -1), at)
        for at, op in enumerate(self._ops):
            for place in op.shares:
                buffer = op.reads[place]
                once = op.reads.count(buffer) == 1
                if buffer is not self._input and reads[buffer] == at and once and buffer.size == op.writes.size:
                    op.writes.shared = buffer
                    break
        self._output.memory().place = "y"
        for at, op in enumerate(self._ops):
            memory = op.writes.memory()
            memory.first = at if memory.first < 0 else memory.first
            memory.last = max(memory.last, at)
            for buffer in op.reads:
                buffer.memory().last = at
        self._own = [_Buffer(self._scratch_of(op), first=at, last=at) for at, op in enumerate(self._ops)]
        all_ = [*{op.writes.memory(): None for op in self._ops}, *self._own]
        buffers = [buffer for buffer in all_ if buffer.size and not buffer.place]
        best = min(_ORDERS, key=lambda order: _placed(buffers, order))
        self.scratch = 4 * _placed(buffers, best)

    def _scratch_of(self, op: _Op) -> int:
        return max(op.scratch, op.int8_scratch if self.int8 and op.int8 else 0)

    @property
    def input_bytes(self) -> int:
        """Bytes of x."""
        return 4 * self._input.size

    @property
    def output_bytes(self) -> int:
        """Bytes of y."""
        return 4 * math.prod(self.shape)

    def cost(self, nbytes: Mapping[str, int]) -> Cost:
        """Return the cost, given the bytes of the arrays of each tensor."""
        steps, counted = [], set[str]()
        for op in self._ops:
            new = [name for name in op.tensors if name not in counted]
            counted.update(new)
            flash = op.constants + sum(nbytes[name] + _TENSOR_BYTES for name in new)
            steps.append(Step(op.name, op.kind, op.shape, flash, op.macs))
        return Cost(
            sum(step.flash for step in steps), self.scratch, sum(step.macs for step in steps), self.input_bytes,
            self.output_bytes, tuple(steps),
        )  # fmt: skip

    # ---- code ----

    def function(self, *, int8: bool = False) -> str:
        """Return the function NAME_run, or NAME_run_int8, in C."""
        lines = [f"int {self.prototype(int8=int8)} {{"]
        body, code, end = list[str](), False, "  return FO_OK;"
        for at, op in enumerate(self._ops):
            reads, y = [buffer.pointer() for buffer in op.reads], op.writes.pointer()
            if op.in_place and reads[0] != y:
                count = op.writes.size
                body.append(f"  fo_nn_copy({reads[0]}, {count}, 1, {count}, {y}, {count});")
            whole = int8 and op.int8 is not None
            call = op.int8 if whole and op.int8 is not None else op.call
            text = call(reads, y, self._own[at].pointer() if self._own[at].size else "NULL")
            checked = whole or op.returns
            if at + 1 == len(self._ops) and (checked or op.kind == "fo_nn_linear"):
                end = f"  return {text};"
            elif checked:
                code = True
                body += [f"  code = {text};", "  if (code) return code;"]
            else:
                body += [f"  {text};"]
        used = any(re.search(r"\bs\b", line) for line in (*body, end))
        lines.append("  float *const s = (float *)scratch;" if used else "  (void)scratch;")
        if code:
            lines.append("  int code;")
        return "\n".join([*lines, *body, end, "}", ""])

    def prototype(self, *, int8: bool = False) -> str:
        """Return the name and the parameters of the function."""
        name = f"{self.base}_run_int8" if int8 else f"{self.base}_run"
        kind = "uint32_t" if self.ids else "float"
        return f"{name}(const {kind} *x, float *y, void *scratch)"


_ORDERS: tuple[Callable[[_Buffer], tuple[int, ...]], ...] = (
    lambda buffer: (-buffer.size, buffer.first),
    lambda buffer: (buffer.first, -buffer.size),
    lambda buffer: (-(buffer.last - buffer.first), -buffer.size),
    lambda buffer: (-(buffer.last - buffer.first) * buffer.size, buffer.first),
)


def _placed(buffers: Sequence[_Buffer], order: Callable[[_Buffer], tuple[int, ...]]) -> int:
    """Give each buffer the lowest offset where no other lies at the same time; return the floats in all."""
    done: list[_Buffer] = []
    for buffer in sorted(buffers, key=order):
        rivals = [other for other in done if other.first <= buffer.last and buffer.first <= other.last]
        offset = 0
        for other in sorted(rivals, key=lambda other: other.offset):
            if other.offset - offset >= buffer.size:
                break
            offset = max(offset, other.offset + other.size)
        buffer.offset = offset
        done.append(buffer)
    return max((buffer.offset + buffer.size for buffer in done), default=0)


def _float(number: float) -> str:
    text = f"{np.float32(number):.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def _described(x: Value) -> str:
    return f"a value of shape {x.shape[1:]}"


def _each(name: str, option: str, values: Sequence[int], count: int) -> list[int]:
    """Return a number for each axis."""
    if len(values) not in (1, count):
        raise ValueError(f"{name!r}: {option}: expected 1 or {count} numbers, got {tuple(values)}")
    return list(values) * count if len(values) == 1 else list(values)


def _same(
    name: str, padding: str, spatial: Sequence[int], covered: Sequence[int], steps: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding with which an axis gets shorter by the stride alone; the odd one is at the end, or before."""
    if padding not in ("same", "same_lower"):
        raise ValueError(f"{name!r}: padding: expected numbers or 'same', got {shown(padding)}")
    pads = []
    for length, span, step in zip(spatial, covered, steps, strict=True):
        total = max((-(-length // step) - 1) * step + span - length, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if padding == "same" else (more, less))
    return pads
