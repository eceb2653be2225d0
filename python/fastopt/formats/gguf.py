"""GGUF, the format of ggml and llama.cpp, written with the gguf package.

Its type Q4_1 has blocks of 32 codes of 4 bits with a float16 scale and minimum: ``w = m + d * code``. This is our
4-bit format with groups of 32 and float16 parameters. Codes of 3 and 2 bits, larger groups and rows are stored as Q4_1
too. Q5_1 is the same for 5 bits. Tensors that came in as Q4_0, Q5_0 or Q8_0, whose minimum follows from the scale, go
out as such. Parameters in two levels for 256 columns are those of Q4_K, Q5_K and Q2_K.

A model that came from a GGUF file keeps its metadata: architecture, sizes, tokenizer. So the result runs where the
source ran.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastopt._types import Array
from fastopt.files.atomic import replacing
from fastopt.formats.common import Option, cast_exactly, regroup, require_package
from fastopt.formats.gguf_k import K_QUANTS, blocks_of, k_quant_of
from fastopt.formats.gguf_weights import AFFINE, METADATA
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantization import pack_bits, unpack_bits
from fastopt.tensors.quantized import QuantizedTensor

SUFFIX = ".gguf"
SUMMARY = "tensors for llama.cpp and others that build on ggml"
OPTIONS = {
    "requantize": Option("requantize what the format cannot hold to Q8_0, or store it as F32.", bool),
    "architecture": Option("general.architecture; by default that of the GGUF file that the model came from."),
}

_BLOCK = 32  # weights of a block, of Q4_1 and of Q8_0
_AT_ONCE = 1 << 13  # blocks that are converted at a time, in cache
_BELOW, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
_PLAIN = ("float16", "float32", "float64", "int8", "int16", "int32", "int64")
_NAME_BYTES = 63
_AXES = 4


class _Stored(NamedTuple):
    """A tensor as the file stores it: its entry in the directory, and a function that makes its content."""

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Array]


def write(
    model: Mapping[str, Weight],
    path: Path,
    progress: Progress,
    *,
    requantize: bool = False,
    architecture: str | None = None,
) -> None:
    """Write a GGUF file.

    Parameters
    ----------
    model : mapping from name to array, QuantizedTensor or SparseTensor
    path : Path
    progress : Progress
    requantize : bool
        Decode tensors that no type can hold and quantize them to Q8_0, or, if their rows do not consist of blocks of
        32, store them as float32.
    architecture : str, optional
        The file's ``general.architecture``. By default that of the GGUF file that the model came from, or "fastopt".

    Raises
    ------
    ImportError
        If gguf is not installed.
    OSError
        If the file cannot be written.
    ValueError
        If GGUF cannot hold a tensor; the message names it.
    """
    require_package("gguf")
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    kept = _kept_metadata(model)
    own = str(kept.pop("general.architecture", ("STRING", "fastopt"))[1])
    # llama.cpp wants the weights of one axis, as of a norm, as numbers.
    known = {name: unpacked(w) if kept and len(w.shape) < 2 else w for name, w in model.items()}
    stored = {name: _stored(name, tensor, requantize) for name, tensor in known.items()}
    with _naming(path), replacing(path) as temporary:
        writer = GGUFWriter(temporary, architecture or own)
        try:
            if "general.name" not in kept:
                writer.add_name(path.stem)
            _add_metadata(writer, kept)
            types = {tensor.dtype for tensor in stored.values()}
            if types & (AFFINE.keys() | K_QUANTS.keys()):
                writer.add_quantization_version(GGML_QUANT_VERSION)
            k_quants = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q2_K": "Q2_K"}
            types = {k_quants.get(kind, kind) for kind in types}
            mostly = next(
                (t for t in (*k_quants.values(), "Q4_1", "Q4_0", "Q5_1", "Q5_0", "Q8_0", "BF16", "F16") if t in types),
                None,
            )
            writer.add_file_type(LlamaFileType[f"MOSTLY_{mostly}"] if mostly else LlamaFileType.ALL_F32)
            for name, tensor in stored.items():
                kind = GGMLQuantizationType[tensor.dtype]
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), _nbytes(tensor), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in stored.items():
                progress.next(name)
                writer.write_tensor_data(tensor.make())
        finally:
            writer.close()


def _kept_metadata(model: Mapping[str, Weight]) -> dict[str, Any]:
    """Return the metadata of the GGUF file that a model came from, but for entries that the writer makes."""
    text = getattr(model, "metadata", {}).get(METADATA)
    if text is None:
        return {}
    try:
        kept = json.loads(text)
        found = {key: value for key, value in kept.items() if value[0] == "ARRAY" or len(value) == 2}
        if len(found) < len(kept):
            raise ValueError("expected [type, value]")
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"metadata: {METADATA!r} is not what a GGUF file left: {error}") from error
    made = ("general.file_type", "general.quantization_version", "general.alignment")
    # The parts of a split model are one file now.
    return {key: value for key, value in found.items() if key not in made and not key.startswith("split.")}


def _add_metadata(writer: Any, kept: Mapping[str, Any]) -> None:
    from gguf import GGUFValueType

    def encoded(value: Any) -> Any:
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value

    for key, (kind, *rest) in kept.items():
        try:
            if kind != "ARRAY":
                writer.add_key_value(key, encoded(rest[0]), GGUFValueType[kind])
            elif rest[1]:  # the library writes no empty arrays
                writer.add_key_value(key, list(map(encoded, rest[1])), GGUFValueType.ARRAY, GGUFValueType[rest[0]])
        except (LookupError, TypeError) as error:
            raise ValueError(f"metadata: {key!r} is not what a GGUF file left: {error}") from error


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the library, as of a full disk, name the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise OSError(f"{path}: {error}") from error


def _nbytes(tensor: _Stored) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.dtype]]
    return int(np.prod(tensor.shape, dtype=np.int64)) // block * size


def _stored(name: str, tensor: Weight, requantize: bool) -> _Stored:
    """Return how a tensor is stored, or raise."""
    if len(name.encode()) > _NAME_BYTES:
        raise ValueError(
            f"{name!r}: GGUF has names of up to {_NAME_BYTES} bytes, got {len(name.encode())}; rename it, or exclude it"
        )
    if len(tensor.shape) > _AXES:
        raise ValueError(f"{name!r}: GGUF has tensors of up to {_AXES} axes, got shape {tensor.shape}; reshape it")
    if 0 in tensor.shape:  # ggml divides by the size
        raise ValueError(f"{name!r}: GGUF has no empty tensors, got shape {tensor.shape}; exclude it")
    shape = tuple(tensor.shape) or (1,)
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.name == "bfloat16":
            return _Stored(shape, "BF16", lambda: np.ascontiguousarray(tensor).view(np.uint16))
        if tensor.dtype.name not in _PLAIN:
            raise ValueError(
                f"{name!r}: GGUF has no {tensor.dtype}; convert it to one of {', '.join(_PLAIN)}, or exclude it"
            )
        return _Stored(shape, f"{tensor.dtype.kind.upper()}{8 * tensor.itemsize}", lambda: _contiguous(tensor))
    blocks = shape[-1] % _BLOCK == 0
    if isinstance(tensor, QuantizedTensor) and (k_quant := k_quant_of(tensor)) is not None:
        return _Stored(shape, k_quant, lambda: blocks_of(tensor, k_quant))
    if not isinstance(tensor, QuantizedTensor):
        trouble = "GGUF has no sparse tensors; unpack it, or pack it without sparsity"
    elif tensor.outliers is not None:
        trouble = "GGUF has no outliers; pack it without them"
    elif not blocks:
        trouble = f"GGUF has rows of blocks of {_BLOCK}, got shape {tensor.shape}; leave it unpacked"
    elif (kind := _without_minimum(tensor)) is not None:
        return _Stored(shape, kind, lambda: _blocks(tensor, kind))
    elif tensor.param_bits is not None:
        trouble = (
            "GGUF has parameters in two levels, in float16 for 256 columns, with 6 bits for 4 or 5 bits in groups "
        )
        trouble += f"of 32 (Q4_K and Q5_K) and with 4 bits for 2 bits in groups of 16 (Q2_K), got {tensor!r}"
    elif tensor.bits > 5:
        trouble = f"GGUF has no {tensor.bits}-bit codes with a minimum; pack it to 4 bits in groups of 32"
    else:
        params = regroup(tensor, _BLOCK)
        if params is None:
            trouble = f"GGUF has a scale and minimum for {_BLOCK} weights, got groups of {tensor.group_size}"
            trouble += "; pack it in groups of 32"
        else:
            half = cast_exactly(params, np.float16)
            if half is not None and tensor.bits == 5:
                return _Stored(shape, "Q5_1", lambda: _q5(tensor, "Q5_1", *half))
            if half is not None:
                return _Stored(shape, "Q4_1", lambda: _q4_1(tensor, *half))
            trouble = "GGUF has float16 scales and minima, which cannot hold these float32 ones; leave it unpacked"
    if not requantize:
        fallback = "Q8_0" if blocks else "F32"
        raise ValueError(f"{name!r}: {trouble}; or let it be decoded and stored as {fallback}, with requantize")
    if blocks:
        return _Stored(shape, "Q8_0", lambda: _q8_0(name, unpacked(tensor)))
    return _Stored(shape, "F32", lambda: unpacked(tensor).astype(np.float32))


def _contiguous(array: Array) -> Array:
    """Return the array as the file holds it."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _without_minimum(q: QuantizedTensor) -> str | None:
    """Return the type whose minimum follows from the scale, as it does in this tensor; None if it does not."""
    params = regroup(q, _BLOCK)
    half = None if params is None else cast_exactly(params, np.float16)
    if params is None or half is None or not half[0].any():
        return None
    for kind, (bits, zero) in AFFINE.items():
        if q.bits == bits and zero is not None:
            scale, minimum = (array.astype(np.float32) for array in params)
            return kind if np.array_equal(minimum, scale * np.float32(-zero)) else None
    return None


def _blocks(q: QuantizedTensor, kind: str) -> Array:
    """Return blocks of a scale and codes of 4, 5 or 8 bits."""
    params = regroup(q, _BLOCK)
    assert params is not None
    if q.bits == 5:
        return _q5(q, kind, params[0])
    out = np.empty(params[0].size, AFFINE[kind].dtype)
    out["scale"] = params[0].reshape(-1)
    codes = q.codes.reshape(len(out), -1)
    if q.bits == 8:
        out["codes"] = codes ^ np.uint8(0x80)
    else:
        out["codes"] = _q4_1(q, *params)["codes"].view(np.uint8).reshape(len(out), -1)
    return out


def _q4_1(q: QuantizedTensor, scale: Array, minimum: Array) -> Array:
    """Return blocks of scale, minimum and 16 bytes: byte j has code j in its low and code j + 16 in its high half."""
    out = np.empty(scale.size, [("scale", "<f2"), ("minimum", "<f2"), ("codes", "<u2", 8)])
    out["scale"], out["minimum"] = scale.reshape(-1), minimum.reshape(-1)
    flat = q.codes.reshape(-1)
    for begin in range(0, out.size, _AT_ONCE):
        codes = out["codes"][begin : begin + _AT_ONCE]
        step = 4 * q.bits  # bytes of a block
        packed = flat[begin * step : (begin + len(codes)) * step]
        if q.bits != 4:
            packed = pack_bits(unpack_bits(packed, q.bits, len(codes) * _BLOCK), 4)
        # Eight bytes at a time: codes 0 to 15 of each block, and 16 to 31. Even codes are in the low halves.
        first, second = packed.view("<u8").reshape(-1, 2).T
        even = (first & _BELOW) | ((second & _BELOW) << _FOUR)
        odd = ((first >> _FOUR) & _BELOW) | (second & ~_BELOW)
        pairs = odd.view(np.uint8).astype(np.uint16) << 8
        pairs |= even.view(np.uint8)
        codes[:] = pairs.reshape(-1, 8)
    return out


def _q5(q: QuantizedTensor, kind: str, scale: Array, minimum: Array | None = None) -> Array:
    """Return blocks as of Q4_1, perhaps without a minimum, with the fifth bits of the codes before the other four."""
    out = np.empty(scale.size, AFFINE[kind].dtype)
    out["scale"] = scale.reshape(-1)
    if minimum is not None:
        out["minimum"] = minimum.reshape(-1)
    flat, step = q.codes.reshape(-1), 5 * _BLOCK // 8
    for begin in range(0, out.size, _AT_ONCE):
        part = out[begin : begin + _AT_ONCE]
        packed = flat[begin * step : (begin + len(part)) * step]
        codes = unpack_bits(packed, 5, len(part) * _BLOCK).reshape(-1, _BLOCK)
        part["high"] = np.packbits(codes >> 4, axis=1, bitorder="little").view("<u4")[:, 0]
        part["codes"] = (codes[:, :16] & 15) | (codes[:, 16:] << 4)
    return out


def _q8_0(name: str, w: Array) -> NDArray[np.uint8]:
    """Return blocks of a float16 scale and 32 signed bytes, or raise where float16 cannot hold a scale."""
    from gguf import GGMLQuantizationType, quantize

    rows = np.ascontiguousarray(w, np.float32)
    with np.errstate(over="ignore"):
        blocks = quantize(rows, GGMLQuantizationType.Q8_0)
    scale = blocks.reshape(-1, 34)[:, :2].copy().view(np.float16)[:, 0]
    zeros = ~rows.reshape(-1, _BLOCK).any(axis=1)
    if not np.all(np.isfinite(scale) & ((scale != 0) | zeros)):
        raise ValueError(f"{name!r}: Q8_0 has float16 scales, which cannot hold those of it; leave it unpacked")
    return blocks
