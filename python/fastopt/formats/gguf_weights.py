"""GGUF files as weights.

A block of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 has 32 codes, a float16 scale and a minimum that is stored or follows from
the scale. That is a packed tensor with groups of 32, so these types come in with their codes unchanged, and so do
those of gguf_k.py. Other types of blocks are decoded by the gguf package.

The header is read here and not by the gguf package, which takes counts and sizes of a file on trust, and needs seconds
for a vocabulary.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastopt._text import shown
from fastopt._types import BITS, Array
from fastopt.files.atomic import open_regular
from fastopt.files.mapped import Map
from fastopt.files.weights import Source
from fastopt.formats.common import require_package
from fastopt.formats.gguf_k import K_QUANTS, packed_of
from fastopt.tensors.packed import unpacked
from fastopt.tensors.quantization import pack_bits
from fastopt.tensors.quantized import PARAM_COLUMNS, QuantizedTensor

BLOCK = 32  # weights of a block of the affine types
# Where a model keeps the metadata of its GGUF file: a JSON object from key to [type, value], or to
# ["ARRAY", type, values].
METADATA = "gguf"

_PLAIN = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    24: np.dtype("i1"),
    25: np.dtype("<i2"),
    26: np.dtype("<i4"),
    27: np.dtype("<i8"),
    28: np.dtype("<f8"),
    30: np.dtype(ml_dtypes.bfloat16),
}
# Types of values in the metadata, and how struct names those of a fixed size.
_VALUES: list[str] = ["UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"]
_VALUES += ["UINT64", "INT64", "FLOAT64"]
_FIXED = dict(zip(_VALUES, "BbHhIif?__Qqd", strict=True))
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)  # the names that llama.cpp gives
_LONGEST_HEADER = 100_000_000  # as for safetensors, where the metadata go
_AXES = 4
_AT_ONCE = 1 << 13  # blocks that are converted at a time, in cache


class _Affine(NamedTuple):
    """A type of blocks that are affine.

    Attributes
    ----------
    bits : int
    zero : int or None
        The code that stands for 0; None if the block has a minimum.
    """

    bits: int
    zero: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The block as an array of NumPy has it."""
        parts: list[Any] = [("scale", "<f2")]
        parts += [("minimum", "<f2")] if self.zero is None else []
        parts += [("high", "<u4")] if self.bits == 5 else []
        return np.dtype([*parts, ("codes", "u1", BLOCK if self.bits == 8 else BLOCK // 2)])


AFFINE = {"Q4_0": _Affine(4, 8), "Q4_1": _Affine(4, None), "Q5_0": _Affine(5, 16), "Q5_1": _Affine(5, None)}
AFFINE["Q8_0"] = _Affine(8, 128)
_NUMBERS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}


class _Info(NamedTuple):
    """The entry of a tensor in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def gguf_sources(
    path: Path, skipped: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Source], dict[str, str]]:
    """Return the tensors of a GGUF file, or of all parts of a split one, and its metadata as one text.

    Parameters
    ----------
    path : Path
    skipped : callable
        Says of a name whether it is left out.

    Returns
    -------
    sources : dict from name to Source
    metadata : dict of str

    Raises
    ------
    ImportError
        If a tensor is of a type that only the gguf package decodes, and it is not installed.
    OSError
        If the file cannot be opened.
    ValueError
        If it is not a GGUF file, or not sound.

    Warns
    -----
    UserWarning
        If tensors are decoded, since no packed tensor can hold their type.
    """
    sources: dict[str, Source] = {}
    decoded: Counter[str] = Counter()
    texts: dict[str, Any] = {}
    parts = _parts(path)
    for number, part in enumerate(parts):
        metadata, of_part, kinds = _read_part(part, skipped)
        texts = texts or metadata  # of the first part, which has those of the model
        _require_part(part, metadata, number, len(parts))
        for name, source in of_part.items():
            if name in sources:
                raise ValueError(f"{part}: {name!r} is in another part of the model too")
            sources[name] = source
        decoded.update(kinds)
    if decoded:
        text = ", ".join(f"{count} of type {kind}" for kind, count in decoded.items())
        warnings.warn(f"{path}: tensors are decoded, since no packed tensor holds their codes: {text}", stacklevel=2)
    return sources, {METADATA: json.dumps(texts)}


def _parts(path: Path) -> list[Path]:
    """Return the files of a model that llama.cpp has split, in order, or the one file."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    stem, number, count = found[1], int(found[2]), int(found[3])
    if not 1 <= number <= count:
        return [path]
    parts = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.exists():
            raise FileNotFoundError(f"{part}: not found; {path.name} is one of {count} parts of a model")
    return parts


def _require_part(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    """Raise ValueError if a file is not the part of a model that its name says."""
    expected = (number, count)
    found = (metadata.get("split.no", [None, 0])[-1], metadata.get("split.count", [None, 1])[-1])
    if found != expected and found != (0, 0):
        raise ValueError(
            f"{path}: expected part {number + 1} of {count}, as its name says, got split.no {shown(found[0])} and "
            f"split.count {shown(found[1])}"
        )


def _read_part(path: Path, skipped: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Source], Counter[str]]:
    """Return the metadata of a file, its tensors, and how many of each type are decoded."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        mapped = Map(file)
        content = mapped.array(np.dtype(np.uint8), (min(size, _LONGEST_HEADER),), 0).data
        try:
            metadata, tensors, data = _read_header(content)
        except (ValueError, OverflowError, struct.error) as error:
            raise ValueError(f"{path}: not a sound GGUF file: {error}") from error
    sources: dict[str, Source] = {}
    decoded: Counter[str] = Counter()
    places: list[tuple[int, int, str]] = []
    for name, info in tensors.items():
        if skipped(name):
            continue
        what = f"{path}: {name!r}"
        source, nbytes, kind = _source(mapped, info, data + info.offset, size, what)
        places.append((data + info.offset, nbytes, name))
        sources[name] = source
        if kind:
            decoded[kind] += 1
    places.sort()
    for (start, nbytes, name), (after, _, other) in itertools.pairwise(places):
        if start + nbytes > after:
            raise ValueError(f"{path}: not a sound GGUF file: {name!r} and {other!r} overlap")
    return metadata, sources, decoded


# ---- the header ---------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads bytes one after the other; asking for more than there are is a ValueError."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._content) - self.at:
            raise ValueError(f"the header ends early, or has more than {_LONGEST_HEADER} bytes")
        self.at += count
        return bytes(self._content[self.at - count : self.at])

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        # A text that is not UTF-8 must find its way back into a file.
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def kind(self) -> str:
        kind = self.number("I")
        if kind >= len(_VALUES):
            raise ValueError(f"a value of type {kind}, expected 0 to {len(_VALUES) - 1}")
        return _VALUES[int(kind)]


def _read_header(content: memoryview) -> tuple[dict[str, Any], dict[str, _Info], int]:
    """Return metadata and tensors, and where the data begin."""
    cursor = _Cursor(content)
    if cursor.take(4) != b"GGUF":
        raise ValueError("does not begin with GGUF")
    version = cursor.number("I")
    if version in (2 << 24, 3 << 24):
        raise ValueError("is big-endian; the gguf package converts it: gguf-convert-endian")
    if version not in (2, 3):
        raise ValueError(f"expected version 2 or 3, got {version}")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):  # each takes bytes of the header, so their end ends any count
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {shown(key)} is there twice")
        metadata[key] = _read_value(cursor)
    alignment = metadata.get("general.alignment", ["UINT32", 32])
    if alignment[0] != "UINT32" or not 0 < alignment[1] < 1 << 20 or alignment[1] & (alignment[1] - 1):
        raise ValueError(f"general.alignment: expected a power of 2, got {shown(alignment[-1])}")
    tensors: dict[str, _Info] = {}
    for _ in range(tensor_count):
        name, axes = cursor.text(), cursor.number("I")
        if name in tensors:
            raise ValueError(f"the tensor {shown(name)} is there twice")
        if axes > _AXES:
            raise ValueError(f"{shown(name)}: expected up to {_AXES} axes, got {axes}")
        sizes = struct.unpack(f"<{axes}Q", cursor.take(8 * axes))
        if math.prod(max(size, 1) for size in sizes) >= 1 << 59:
            raise ValueError(f"{shown(name)}: expected sizes that memory could hold, got {sizes}")
        info = _Info(sizes[::-1], cursor.number("I"), cursor.number("Q"))
        if info.offset % alignment[1]:
            raise ValueError(f"{shown(name)}: expected a place at a multiple of {alignment[1]}, got {info.offset}")
        tensors[name] = info
    return metadata, tensors, -(-cursor.at // alignment[1]) * alignment[1]


def _read_value(cursor: _Cursor) -> list[Any]:
    kind = cursor.kind()
    if kind == "STRING":
        return [kind, cursor.text()]
    if kind != "ARRAY":
        return [kind, cursor.number(_FIXED[kind])]
    kind, count = cursor.kind(), cursor.number("Q")
    if kind == "ARRAY":
        raise ValueError("has arrays of arrays, which are not read")
    if kind == "STRING":
        return ["ARRAY", kind, [cursor.text() for _ in range(count)]]
    code = _FIXED[kind]
    return ["ARRAY", kind, list(struct.unpack(f"<{count}{code}", cursor.take(count * struct.calcsize(f"<{code}"))))]


# ---- tensors ------------------------------------------------------------------------------------------------------


def _source(mapped: Map, info: _Info, start: int, size: int, what: str) -> tuple[Source, int, str]:
    """Return how a tensor is read, its bytes, and its type if it is decoded."""
    shape, count = info.shape, math.prod(info.shape)
    if info.kind in _PLAIN:
        dtype = _PLAIN[info.kind]
        nbytes = count * dtype.itemsize
        _require_inside(start, nbytes, size, what)
        source = Source(shape, dtype, lambda: mapped.array(dtype, shape, start), _release(mapped, start, nbytes))
        return source, nbytes, ""
    name, block, block_bytes = _blocks(info.kind, what)
    if not shape or shape[-1] % block:
        raise ValueError(f"{what}: {name} has blocks of {block}, got shape {shape}")
    nbytes = count // block * block_bytes
    _require_inside(start, nbytes, size, what)
    release = _release(mapped, start, nbytes)
    affine = AFFINE.get(name)
    if affine is not None and affine.bits in BITS:
        kind = affine.dtype

        def packed() -> QuantizedTensor:
            return _packed(mapped.array(kind, (count // block,), start), affine, shape)

        return Source(shape, np.dtype(np.float32), lambda: unpacked(packed()), release, packed), nbytes, ""
    if name in K_QUANTS:
        k_dtype = K_QUANTS[name].dtype

        def k_packed() -> QuantizedTensor:
            return packed_of(mapped.array(k_dtype, (count // block,), start), name, shape)

        return Source(shape, np.dtype(np.float32), lambda: unpacked(k_packed()), release, k_packed), nbytes, ""
    number = info.kind

    def read() -> Array:
        from gguf import GGMLQuantizationType, dequantize

        rows = mapped.array(np.dtype(np.uint8), (count // shape[-1], shape[-1] // block * block_bytes), start)
        with np.errstate(all="ignore"):  # any bytes are numbers of a float type
            return dequantize(rows, GGMLQuantizationType(number)).reshape(shape)

    return Source(shape, np.dtype(np.float32), read, release), nbytes, name


def _release(mapped: Map, start: int, nbytes: int) -> Callable[[], None]:
    return lambda: mapped.release(start, start + nbytes)


def _require_inside(start: int, nbytes: int, size: int, what: str) -> None:
    if start + nbytes > size:
        raise ValueError(f"{what}: ends at byte {start + nbytes}, the file has {size}")


def _blocks(kind: int, what: str) -> tuple[str, int, int]:
    """Return the name of a type of blocks, and the weights and bytes of a block."""
    if kind in _NUMBERS and AFFINE[_NUMBERS[kind]].bits in BITS:
        return _NUMBERS[kind], BLOCK, AFFINE[_NUMBERS[kind]].dtype.itemsize
    for name, k_quant in K_QUANTS.items():
        if kind == k_quant.number:
            return name, PARAM_COLUMNS, k_quant.dtype.itemsize
    require_package("gguf")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        known = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[known]
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, block_bytes), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{what}: has type {kind}, which the gguf package cannot decode; skip leaves it out"
        ) from error
    return known.name, block, block_bytes


def _packed(blocks: NDArray[Any], affine: _Affine, shape: tuple[int, ...]) -> QuantizedTensor:
    """Return blocks as a packed tensor with groups of 32."""
    rows, groups = math.prod(shape[:-1]), shape[-1] // BLOCK
    params = (rows, groups)
    scale = np.ascontiguousarray(blocks["scale"]).reshape(params)
    if affine.zero is None:
        minimum = np.ascontiguousarray(blocks["minimum"]).reshape(params)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            minimum = scale * np.float16(-affine.zero)  # exact, if it is finite: the factor is a power of 2
        if not np.isfinite(minimum).all():
            scale = scale.astype(np.float32)
            minimum = scale * np.float32(-affine.zero)
    codes = np.empty((len(blocks), BLOCK * affine.bits // 8), np.uint8)
    for at in range(0, len(blocks), _AT_ONCE):
        some = blocks[at : at + _AT_ONCE]
        codes[at : at + _AT_ONCE] = pack_bits(_codes(some, affine).reshape(-1), affine.bits).reshape(len(some), -1)
    # A tensor of several axes is a matrix of its first axis by all others.
    first = shape[0] if len(shape) > 1 else 1
    return QuantizedTensor(
        codes.reshape(first, -1),
        scale.reshape(first, -1),
        minimum.reshape(first, -1),
        affine.bits,
        BLOCK,
        shape,
        np.dtype(np.float32),
    )


def _codes(blocks: NDArray[Any], affine: _Affine) -> NDArray[np.uint8]:
    """Return the codes of blocks, one a byte: byte j has code j in its low half and code j + 16 in its high half."""
    stored = blocks["codes"]
    if affine.bits == 8:  # signed
        return stored ^ np.uint8(0x80)
    codes = np.concatenate([stored & 15, stored >> 4], axis=1)
    if affine.bits == 5:
        bit = np.arange(BLOCK, dtype=np.uint32)
        codes |= ((blocks["high"][:, None] >> bit) & 1).astype(np.uint8) << 4
    return codes
