"""C: constant arrays for fastopt.h, so that a program needs neither a file nor a parser."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from fastopt._checks import as_matrix
from fastopt._types import Array, PathLike
from fastopt.files.atomic import replacing
from fastopt.formats.c_layers import add_layers
from fastopt.formats.c_net import Cost, Net, identifier
from fastopt.formats.c_onnx import add_onnx
from fastopt.formats.common import Option
from fastopt.formats.layers import INPUT_SHAPE, LAYER
from fastopt.models.shrinking import Node
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor

SUFFIX = ".c"
SUMMARY = "constant arrays in C, with fastopt.h, and a function that runs a network of layers"
OPTIONS: dict[str, Option] = {
    "graph": LAYER._replace(
        help="a dense layer, NAME.weight and NAME.bias, that reads the previous one; may be repeated. With layers, "
        "BASE_run computes the outputs. Without them, the file has the arrays alone."
    ),
    "onnx": Option(
        "the ONNX model that the weights are of; BASE_run computes its graph. A source that is an ONNX model is it "
        "already.",
        metavar="MODEL.onnx",
    ),
    "arrays": Option("of an ONNX model, write the arrays alone.", bool),
    "input_shape": INPUT_SHAPE,
    "int8": Option("write BASE_run_int8 too, which multiplies whole numbers of 8 bits.", bool),
    "dry_run": Option("write nothing; tell flash, RAM and multiply-adds.", bool),
}

_TYPES = {"float32": "FO_F32", "float16": "FO_F16", "bfloat16": "FO_BF16"}
_LAYOUTS = {"1x16": "FO_BLOCK", "index16": "FO_INDEX16", "index8": "FO_INDEX8"}
_WORDS_A_LINE = 10
_OF_FASTOPT = re.compile(r"\b(?:fo_|FO_|FASTOPT_)\w+")
# Names with an underscore that belong to C, to C++ or to the headers that fastopt.h includes.
_OF_C = re.compile(
    r"(u?int(_least|_fast)?\d+|u?intptr|u?intmax|size|ptrdiff|wchar|max_align|char\d+|nullptr)_t"
    r"|(U?INT(_LEAST|_FAST)?\d+|U?INTPTR|U?INTMAX|SIZE|PTRDIFF|WCHAR|CHAR|SCHAR|INT|LONG|SHRT|FLT|DBL)_\w+|M_(E|PI\w*|LN\w*|LOG\w*|SQRT\w*|[12]_\w+)"
    r"|(static|const|dynamic|reinterpret)_cast|static_assert|thread_local|co_(await|return|yield)"
    r"|(and|or|xor|not)_eq|typeof_unqual"
)


def write(
    model: Mapping[str, Weight],
    path: Path,
    progress: Progress,
    *,
    graph: Sequence[Node] | None = None,
    onnx: PathLike | None = None,
    arrays: bool = False,
    input_shape: Sequence[int] | None = None,
    int8: bool = False,
    dry_run: bool = False,
) -> Cost | None:
    """Write BASE.c, BASE.h and, beside them, fastopt.h; a tensor NAME becomes ``const fo_tensor BASE_NAME``.

    With a graph, BASE.c has ``int BASE_run(const float *x, float *y, void *scratch)``, and fastopt_nn.h is written too.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
    path : Path
        BASE.c. Characters that a name in C cannot have become underscores.
    progress : Progress
    graph : sequence of Layer, Add and Concat, optional
        Tensors that it does not name are left out.
    onnx : path-like, optional
        An ONNX model with these weights, whose graph is computed instead.
    arrays : bool
        Write the arrays alone, also if `onnx` is given.
    input_shape : sequence of int, optional
        The shape of x without the batch; needed unless the first layer is dense, or the ONNX model tells it.
    int8 : bool
        Write BASE_run_int8 too.
    dry_run : bool
        Write nothing.

    Returns
    -------
    Cost or None
        The cost of the network, if there is one.

    Raises
    ------
    OSError
        If a file cannot be written.
    ValueError
        If a tensor has float64 values, a name is taken: by another tensor, by fastopt.h or by C, or the graph does not
        fit the model.
    """
    if path.suffix != ".c":
        raise ValueError(f"path: expected a name that ends in .c, got {path.name!r}")
    base = identifier(path.stem)
    if not base[:1].isalpha():
        raise ValueError(f"path: expected a name that starts with a letter, as names in C do, got {path.name!r}")
    if not path.stem.isprintable() or '"' in path.stem or "\\" in path.stem:
        raise ValueError(f"path: expected a name that an #include can hold, got {path.name!r}")
    if path.stem.casefold() in ("fastopt", "fastopt_nn"):
        raise ValueError(f"path: {path.name!r}: its header would be that of the library; take another name")
    if graph is not None and onnx is not None:
        raise ValueError("graph, onnx: expected one of them")
    if graph is None and (onnx is None or arrays):
        for option, given in (("input_shape", input_shape), ("int8", int8), ("dry_run", dry_run)):
            if given:
                raise ValueError(f"{option}: needs a graph (--layer) or an ONNX model")
        headers: tuple[str, ...] = ("fastopt.h",)
        net, tensors = None, model
    else:
        headers, net = ("fastopt.h", "fastopt_nn.h"), Net(base, model)
        if graph is not None:
            y = add_layers(net, graph, input_shape)
        else:
            assert onnx is not None
            y = add_onnx(net, Path(onnx), input_shape)
        net.finish(y, int8=int8)
        tensors = net.tensors
    library = {name: files("fastopt").joinpath(name).read_bytes() for name in headers}
    taken = {word for text in library.values() for word in _OF_FASTOPT.findall(text.decode())}
    if net is not None:
        taken |= {f"{base}_run", f"{base}_run_int8", f"{base}_SCRATCH_BYTES", f"{base.upper()}_SCRATCH_BYTES"}
    identifiers: dict[str, str] = {}
    for name in tensors:
        own = f"{base}_{identifier(name)}"
        other = identifiers.setdefault(own, name)
        if other != name:
            raise ValueError(f"{name!r} and {other!r}: both would be {own} in C; rename one")
        if own in taken or _OF_C.fullmatch(own):
            raise ValueError(
                f"{name!r}: would be {own} in C, which is a name of fastopt.h or of C; take another name than "
                f"{path.name!r}"
            )
    cost = None if net is None else net.cost({name: _nbytes(name, tensor) for name, tensor in tensors.items()})
    if not dry_run:
        _write_files(base, path, progress, tensors, identifiers, net, library)
    return cost


def _write_files(
    base: str, path: Path, progress: Progress, tensors: Mapping[str, Weight], identifiers: Mapping[str, str],
    net: Net | None, library: Mapping[str, bytes],
) -> None:  # fmt: skip
    names = set(identifiers) if net is None else set(identifiers) | net.names
    with ExitStack() as stack:
        source_path, header_path = (stack.enter_context(replacing(path.with_suffix(suffix))) for suffix in (".c", ".h"))
        copies = {name: stack.enter_context(replacing(path.with_name(name))) for name in library}
        source = stack.enter_context(source_path.open("w", encoding="utf-8"))
        header = stack.enter_context(header_path.open("w", encoding="utf-8"))
        guard = f"FASTOPT_MODEL_{base}_H".upper()
        source.write(f'/* Written by fastopt. */\n#include "{path.stem}.h"\n')
        header.write(f'/* Written by fastopt. */\n#ifndef {guard}\n#define {guard}\n\n#include "{[*library][-1]}"\n')
        header.write('\n#ifdef __cplusplus\nextern "C" {\n#endif\n')
        if net is not None:
            header.write(_declared(base, net))
        for own, name in identifiers.items():
            if net is None or name in net.model:
                progress.next(name)
            tensor = tensors[name]
            with _naming(name):
                _write_tensor(source, own, tensor, names)
            header.write(f"\n/* {_comment(name)}: {_comment(_summary(tensor))} */\nextern const fo_tensor {own};\n")
        if net is not None:
            source.write("\n" + "".join(net.declarations))
            source.write("\n" + net.function())
            if net.int8:
                source.write("\n" + net.function(int8=True))
        header.write("\n#ifdef __cplusplus\n}\n#endif\n\n#endif\n")
        for name, copy in copies.items():
            copy.write_bytes(library[name])


def _declared(base: str, net: Net) -> str:
    """Return the function and its contract, for the header."""
    given = "indices, each below the rows of the embedding's table" if net.ids else "floats"
    returned = "FO_OK" + (", or FO_BAD_ROW for an index that the table does not have" if net.ids else "")
    size = f"{base.upper()}_SCRATCH_BYTES"
    lines = [
        f"Runs the network on one sample: x has {net.input_bytes // 4} {given}, of shape {_shape(net.input_shape)};",
        f"y has {net.output_bytes // 4} floats, of shape {_shape(net.shape)}; both in the order of their axes,",
        f"the last one fastest. scratch has {size} bytes, aligned as a float is; its content means nothing",
        f"before and after. x, y and scratch do not overlap, and nothing checks that. Returns {returned}.",
    ]
    text = "\n/* " + "\n   ".join(lines) + f" */\n#define {size} {net.scratch}\nint {net.prototype()};\n"
    if net.int8:
        text += (
            "\n/* The same with the inputs of layers rounded to whole numbers of 8 bits, for a CPU without a "
            f"floating-point unit.\n   Also returns FO_NOT_FINITE. */\nint {net.prototype(int8=True)};\n"
        )
    return text


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[1:]))}]"


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


def _comment(text: str) -> str:
    return text.encode("unicode_escape").decode().replace("*/", "* /").replace("/*", "/ *")


def _summary(tensor: Weight) -> str:
    if isinstance(tensor, np.ndarray):
        return f"{tensor.dtype}, shape {tensor.shape}"
    return repr(tensor)


class _Parts(NamedTuple):
    """The arrays of a tensor, and the numbers of its structure."""

    arrays: dict[str, Array]
    layout: str
    type: str
    bits: int
    group: int
    groups: int
    param_type: str
    offset_bytes: int
    index_bytes: int


def _nbytes(name: str, tensor: Weight) -> int:
    """Return the bytes of a tensor's arrays in C."""
    with _naming(name):
        return sum(-(-array.nbytes // 4) * 4 for array in _parts(tensor).arrays.values())


def _parts(tensor: Weight) -> _Parts:
    values = tensor.values if isinstance(tensor, SparseTensor) else tensor
    parts: dict[str, Array] = {}
    group = groups = bits = offset_bytes = index_bytes = 0
    layout, type_, param_type = "FO_DENSE", "FO_CODES", "FO_F16"
    if isinstance(values, QuantizedTensor):
        one_level = values.one_level()
        parts = {"values": values.codes, "scale": one_level.scale, "minimum": one_level.minimum}
        bits, param_type = values.bits, _TYPES[one_level.scale.dtype.name]
        if values.group_size is not None:
            length = as_matrix(values.shape)[1]
            group = max(length if values.group_size == -1 else min(values.group_size, length), 1)
            groups = one_level.scale.shape[1]
        if values.outliers is not None:
            if values is not tensor:
                raise ValueError("outliers of sparse values are not known to fastopt.h")
            index, index_bytes = _short(values.outliers.indices)
            parts |= {"outlier_index": index, "outlier_value": values.outliers.values}
    elif values.dtype == np.float64:
        raise ValueError("float64 is not known to fastopt.h; convert it to float32")
    else:
        parts, type_ = {"values": unpacked(values)}, _TYPES.get(values.dtype.name, "FO_OTHER")
    if isinstance(tensor, SparseTensor):
        layout = _LAYOUTS.get(tensor.layout, "FO_MASK")
        offsets, offset_bytes = _short(tensor.row_offsets)
        parts |= {"positions": tensor.positions, "row_offsets": offsets}
    return _Parts(parts, layout, type_, bits, group, groups, param_type, offset_bytes, index_bytes)


def _write_tensor(source: TextIO, identifier: str, tensor: Weight, names: set[str]) -> None:
    """Write the arrays of a tensor, under names that are still free, and the structure that points to them."""
    rows, cols = as_matrix(tensor.shape)
    values = tensor.values if isinstance(tensor, SparseTensor) else tensor
    parts, layout, type_, bits, group, groups, param_type, offset_bytes, index_bytes = _parts(tensor)
    arrays = {part: _fresh(f"{identifier}_{part}", names) for part in parts}
    for part, array in parts.items():
        _write_array(source, arrays[part], array)

    def pointer(part: str) -> str:
        return arrays[part] if part in parts and parts[part].size else "NULL"

    outliers = parts["outlier_value"].size if "outlier_value" in parts else 0
    source.write(
        f"""
const fo_tensor {identifier} = {{
    /* rows, cols, count, group, groups */
    {rows}, {cols}, {values.size}, {group}, {groups},
    /* values, scale, minimum, positions, row_offsets */
    {pointer("values")}, {pointer("scale")}, {pointer("minimum")},
    {pointer("positions")}, {pointer("row_offsets")},
    /* outliers */
    {pointer("outlier_index")}, {pointer("outlier_value")}, {outliers},
    /* layout, type, bits, param_type, offset_bytes, index_bytes */
    {layout}, {type_}, {bits}, {param_type}, {offset_bytes}, {index_bytes}}};
"""
    )


def _fresh(name: str, names: set[str]) -> str:
    while name in names:
        name += "_"
    names.add(name)
    return name


def _short(index: Array) -> tuple[Array, int]:
    """Return indices in 32 bits if they fit, and the bytes of each."""
    if index.size and int(index[-1]) >= 1 << 32:
        return index, 8
    return index.astype(np.uint32), 4


def _write_array(source: TextIO, name: str, array: Array) -> None:
    """Write an array as little-endian words of 32 bits, so that it is aligned to 4 bytes."""
    if array.size == 0:
        return
    little: Any = array.astype(array.dtype.newbyteorder("<"), copy=False)
    content = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    source.write(f"\nstatic const uint32_t {name}[] = {{\n")
    step = 4 * _WORDS_A_LINE << 14
    for begin in range(0, content.size, step):
        part = content[begin : begin + step]
        words = np.concatenate([part, np.zeros(-part.size % 4, np.uint8)]).view("<u4").astype(">u4")
        text = "0x" + words.tobytes().hex(",", 4).replace(",", ",0x") + ","
        width = len("0x00000000,") * _WORDS_A_LINE
        source.writelines(text[i : i + width] + "\n" for i in range(0, len(text), width))
    source.write("};\n")
