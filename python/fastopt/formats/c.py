"""C: constant arrays for fastopt.h, so that a program needs neither a file nor a parser."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastopt._checks import as_matrix
from fastopt._types import Array
from fastopt.files.atomic import replacing
from fastopt.formats.common import Option
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor

SUFFIX = ".c"
SUMMARY = "constant arrays in C, with fastopt.h"
OPTIONS: dict[str, Option] = {}

_TYPES = {"float32": "FO_F32", "float16": "FO_F16", "bfloat16": "FO_BF16"}
_LAYOUTS = {"1x16": "FO_BLOCK", "index16": "FO_INDEX16", "index8": "FO_INDEX8"}
_WORDS_A_LINE = 10
# Names with an underscore that belong to C, to C++ or to the headers that fastopt.h includes.
_OF_C = re.compile(
    r"(u?int(_least|_fast)?\d+|u?intptr|u?intmax|size|ptrdiff|wchar|max_align|char\d+|nullptr)_t"
    r"|(U?INT(_LEAST|_FAST)?\d+|U?INTPTR|U?INTMAX|SIZE|PTRDIFF|WCHAR|CHAR|SCHAR|INT|LONG|SHRT|FLT|DBL)_\w+|M_(E|PI\w*|LN\w*|LOG\w*|SQRT\w*|[12]_\w+)"
    r"|(static|const|dynamic|reinterpret)_cast|static_assert|thread_local|co_(await|return|yield)"
    r"|(and|or|xor|not)_eq|typeof_unqual"
)


def write(model: Mapping[str, Weight], path: Path, progress: Progress) -> None:
    """Write BASE.c, BASE.h and, beside them, fastopt.h; a tensor NAME becomes ``const fo_tensor BASE_NAME``.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
    path : Path
        BASE.c. Characters that a name in C cannot have become underscores.
    progress : Progress

    Raises
    ------
    OSError
        If a file cannot be written.
    ValueError
        If a tensor has float64 values, or a name is taken: by another tensor, by fastopt.h or by C.
    """
    if path.suffix != ".c":
        raise ValueError(f"path: expected a name that ends in .c, got {path.name!r}")
    base = _identifier(path.stem)
    if not base[:1].isalpha():
        raise ValueError(f"path: expected a name that starts with a letter, as names in C do, got {path.name!r}")
    if not path.stem.isprintable() or '"' in path.stem or "\\" in path.stem:
        raise ValueError(f"path: expected a name that an #include can hold, got {path.name!r}")
    library = files("fastopt").joinpath("fastopt.h").read_bytes()
    taken = set(re.findall(r"\b(?:fo_|FO_|FASTOPT_)\w+", library.decode()))
    if path.stem.casefold() == "fastopt":
        raise ValueError(f"path: {path.name!r}: its header would be that of the library, fastopt.h; take another name")
    identifiers: dict[str, str] = {}
    for name in model:
        identifier = f"{base}_{_identifier(name)}"
        other = identifiers.setdefault(identifier, name)
        if other != name:
            raise ValueError(f"{name!r} and {other!r}: both would be {identifier} in C; rename one")
        if identifier in taken or _OF_C.fullmatch(identifier):
            raise ValueError(
                f"{name!r}: would be {identifier} in C, which is a name of fastopt.h or of C; take another name than "
                f"{path.name!r}"
            )
    names = set(identifiers)
    with (
        replacing(path) as source_path,
        replacing(path.with_suffix(".h")) as header_path,
        replacing(path.with_name("fastopt.h")) as copy,
        source_path.open("w", encoding="utf-8") as source,
        header_path.open("w", encoding="utf-8") as header,
    ):
        guard = f"FASTOPT_MODEL_{base}_H".upper()
        source.write(f'/* Written by fastopt. */\n#include "{path.stem}.h"\n')
        header.write(f'/* Written by fastopt. */\n#ifndef {guard}\n#define {guard}\n\n#include "fastopt.h"\n')
        header.write('\n#ifdef __cplusplus\nextern "C" {\n#endif\n')
        for identifier, name in identifiers.items():
            progress.next(name)
            tensor = model[name]
            try:
                _write_tensor(source, identifier, tensor, names)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error
            header.write(
                f"\n/* {_comment(name)}: {_comment(_summary(tensor))} */\nextern const fo_tensor {identifier};\n"
            )
        header.write("\n#ifdef __cplusplus\n}\n#endif\n\n#endif\n")
        copy.write_bytes(library)


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _comment(text: str) -> str:
    return text.encode("unicode_escape").decode().replace("*/", "* /").replace("/*", "/ *")


def _summary(tensor: Weight) -> str:
    if isinstance(tensor, np.ndarray):
        return f"{tensor.dtype}, shape {tensor.shape}"
    return repr(tensor)


def _write_tensor(source: TextIO, identifier: str, tensor: Weight, names: set[str]) -> None:
    """Write the arrays of a tensor, under names that are still free, and the structure that points to them."""
    rows, cols = as_matrix(tensor.shape)
    values = tensor.values if isinstance(tensor, SparseTensor) else tensor
    parts: dict[str, Array] = {}
    group = groups = bits = offset_bytes = index_bytes = 0
    layout, type_, param_type = "FO_DENSE", "FO_CODES", "FO_F16"
    if isinstance(values, QuantizedTensor):
        parts = {"values": values.codes, "scale": values.scale, "minimum": values.minimum}
        bits, param_type = values.bits, _TYPES[values.scale.dtype.name]
        if values.group_size is not None:
            length = as_matrix(values.shape)[1]
            group = max(length if values.group_size == -1 else min(values.group_size, length), 1)
            groups = values.scale.shape[1]
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
