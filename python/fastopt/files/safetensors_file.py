"""Safetensors files: mapped into memory, and written whole or not at all.

Every tensor of a file of fastopt starts at a multiple of 64 bytes. The format allows no holes, so a tensor of zeros
whose name starts with ``fastopt.pad.`` fills the space up to the next multiple.

A reader trusts nothing that the file says. The header is read from the same descriptor that is mapped, takes at most
64 bytes of memory for each of its own bytes, and time in proportion to its length. The library safetensors cannot do
that: it opens a path, which may be another file by then, or copies all tensors out of bytes in memory, and it accepts
a header with the same name twice.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from fastopt._text import shown
from fastopt._types import Array, PathLike
from fastopt.files.atomic import naming, open_regular, replacing
from fastopt.files.mapped import Map

ALIGNMENT = 64
PAD = "fastopt.pad."

# As the format names them; bytes are little-endian.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of an element in dtypes of the format that NumPy does not have.
_FOREIGN_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# No file may claim arrays of more than this many times its own bytes; it is what deflate can reach.
MOST_OF_ONE_BYTE = 1032
_LONGEST_HEADER = 100_000_000  # as in the library safetensors
_LARGEST = 1 << 59  # elements of up to 16 bytes; NumPy counts bytes in 63 bits


# ---- reading -----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Dtype, shape and position of an array in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


class MappedFile:
    """A safetensors file whose arrays are views of it, without a copy.

    Header and content come from one descriptor: another process may replace the file at any time.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    stored : dict from name to Stored
        In the order of the file.
    foreign : dict from name to str
        The dtypes of tensors that NumPy cannot hold.
    metadata : dict of str

    Raises
    ------
    OSError
        If the file cannot be opened, or is no regular file.
    ValueError
        If it is not a safetensors file.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                header = _read_header(file, size)
                self.metadata, described = _checked_header(header, size - 8 - len(header))
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from error
            self._map = Map(file)
        self.stored: dict[str, Stored] = {}
        self.foreign: dict[str, str] = {}
        for name, dtype_name, shape, start, end in described:
            if dtype_name in DTYPES:
                data = 8 + len(header)
                self.stored[name] = Stored(DTYPES[dtype_name], shape, data + start, data + end)
            else:
                self.foreign[name] = dtype_name

    def require_known(self) -> None:
        """Raise ValueError if the file has tensors that NumPy cannot hold."""
        for name, dtype_name in self.foreign.items():
            raise ValueError(
                f"{self.path}: {name!r} has dtype {dtype_name}, which NumPy does not have; skip leaves it out"
            )

    def array(self, name: str) -> Array:
        """Return a tensor as a read-only view of the file."""
        dtype, shape, start, _ = self.stored[name]
        return self._map.array(dtype, shape, start)

    def release(self, name: str) -> None:
        """Tell the system that the memory of a tensor is not needed for now; it is read again if it is."""
        self._map.release(self.stored[name].start, self.stored[name].end)


def _read_header(file: IO[bytes], size: int) -> bytes:
    """Return the header, or raise ValueError if these are the first bytes of something else."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    first = file.read(1)
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER) or first != b"{":
        raise ValueError(_not_safetensors(start + first + file.read(14), size, length))
    return first + file.read(length - 1)


# First bytes of files that people take for safetensors.
_MAGIC = {
    b"PK\x03\x04": "a zip archive, as .npz and .pt files are",
    b"\x93NUMPY": "a .npy file",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x80": "a pickle, which is not read, as it could run code",
    b"<": "a text, HTML or XML",
}


def _not_safetensors(start: bytes, size: int, length: int) -> str:
    if start[4:8] == b"TFL3":
        return "not a safetensors file but a TFLite file"
    for magic, kind in _MAGIC.items():
        # A single byte says something only if the eight are no length that a header can have.
        if start.startswith(magic) and (len(magic) > 1 or length > _LONGEST_HEADER):
            return f"not a safetensors file but {kind}"
    if size < 8:
        return f"not a safetensors file: it has {size} bytes"
    if length > min(size - 8, _LONGEST_HEADER):
        return "not a safetensors file: its first 8 bytes are not the length of a header"
    return "not a safetensors file: it does not begin with a JSON object"


def _checked_header(
    header: bytes, size: int
) -> tuple[dict[str, str], list[tuple[str, str, tuple[int, ...], int, int]]]:
    """Return the metadata, and name, dtype, shape, start and end of each tensor in the order of the file.

    Raises ValueError unless the tensors fill `size` bytes without overlap or hole.
    """
    try:
        entries = parse_json(header.decode())
        if not isinstance(entries, dict):
            raise ValueError(f"expected a JSON object, got {type(entries).__name__}")
        metadata = entries.pop("__metadata__", None)
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__: expected a map of texts")
        described = sorted(
            (_checked_entry(name, entry) for name, entry in entries.items()), key=lambda tensor: tensor[3:]
        )
        at = 0
        for name, _, _, start, end in described:
            if start != at:
                raise ValueError(f"{name!r} starts at byte {start} of the data, expected {at}")
            at = end
        if at != size:
            raise ValueError(f"the tensors have {at} bytes, the file has {size} behind the header")
    except ValueError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    return metadata, described


def _checked_entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name!r}: expected a JSON object, got {type(entry).__name__}")
    kind, offsets = entry.get("dtype"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES.keys() | _FOREIGN_BITS.keys():
        raise ValueError(f"{name!r}: dtype: expected a dtype of the format, got {shown(kind)}")
    shape = as_shape(entry.get("shape"), f"{name!r}: shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        raise ValueError(f"{name!r}: data_offsets: expected two numbers, got {shown(offsets)}")
    start, end = offsets
    bits = math.prod(shape) * (DTYPES[kind].itemsize * 8 if kind in DTYPES else _FOREIGN_BITS[kind])
    if (end - start) * 8 != bits:
        raise ValueError(f"{name!r}: {kind} of shape {shape} has {bits / 8:g} bytes, got {end - start}")
    return name, kind, shape, start, end


def parse_json(text: str) -> Any:
    """Return the value of a JSON text of an untrusted file; ValueError if it is not one, too deep, or repeats a key."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise ValueError(f"{shown(name)} is there twice")
                seen.add(name)
        return made

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("metadata: nested too deeply") from error


def as_shape(sizes: Any, name: str) -> tuple[int, ...]:
    """Return the sizes of axes as a tuple, or raise if no array can have them."""
    whole = isinstance(sizes, list) and len(sizes) <= 32 and all(type(n) is int and n >= 0 for n in sizes)
    if not whole or math.prod(max(n, 1) for n in sizes) >= _LARGEST:
        raise ValueError(f"{name}: expected the sizes of up to 32 axes, got {shown(sizes)}")
    return tuple(sizes)


def read_arrays(path: PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of a safetensors file as views of it, and its metadata; raise as `MappedFile` does."""
    file = MappedFile(path)
    file.require_known()
    return {name: file.array(name) for name in file.stored}, file.metadata


# ---- writing -----------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


class Part(NamedTuple):
    """An array to be written: `make` is called when it is written, and `release` afterwards.

    `make` returns the array, or gives its rows some at a time.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array | Iterator[Array]]
    release: Callable[[], None] = _nothing


def part_of(name: str, array: Array) -> Part:
    """Return the part for an array in memory, or raise if the file cannot hold it."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"tensors: {name!r} is a {type(array).__name__}, expected a NumPy array")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"tensors: {name!r} is a masked array, whose mask the file cannot hold; fill it")
    return Part(name, require_dtype(name, array.dtype), array.shape, lambda: array)


def require_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in little-endian order, or raise if the file cannot hold it."""
    native = dtype.newbyteorder("=")
    if native not in _NAMES:
        raise TypeError(f"tensors: {name!r} has dtype {dtype}, which the file cannot hold")
    return native.newbyteorder("<")


def write(
    path: PathLike,
    parts: Iterable[Part],
    metadata: Mapping[str, str],
    check: Callable[[MappedFile], object] | None = None,
) -> None:
    """Write arrays to one safetensors file, which replaces `path` when it is complete and on the disk.

    Parameters
    ----------
    path : path-like
    parts : iterable of Part
    metadata : mapping of str
        Where no key starts with ``fastopt``, other programs read the file, and nothing is padded: arrays are sorted by
        the sizes of their elements instead, and so aligned to these.
    check : callable, optional
        The reader's checks: called with the complete file before it replaces `path`. Its errors pass through.

    Raises
    ------
    OSError
        If the file cannot be written. An existing file is then left as it was.
    TypeError, ValueError
        If a name is not text, is used twice or is reserved by the format, or a shape is one that no reader accepts.
    """
    with replacing(path) as temporary:
        write_to(temporary, parts, metadata, check)


def write_to(
    path: Path,
    parts: Iterable[Part],
    metadata: Mapping[str, str],
    check: Callable[[MappedFile], object] | None = None,
) -> None:
    """Write arrays as `write` does to a file that is not in its place yet."""
    laid, header = _layout(list(parts), metadata)
    with naming(path), path.open("wb") as file:
        file.write(header)
        for part, fill in laid:
            _write_part(file, part)
            part.release()
            file.write(bytes(fill))
    if check is not None:
        check(MappedFile(path))


def _write_part(file: IO[bytes], part: Part) -> None:
    made = part.make()
    shapes: list[tuple[int, ...]] = []
    for array in [made] if isinstance(made, np.ndarray) else made:
        if array.dtype.newbyteorder("<") != part.dtype:
            raise ValueError(f"tensors: {part.name!r}: expected {part.dtype}, got {array.dtype}")
        write_array(file, array)
        shapes.append(array.shape)
    shape = shapes[0] if len(shapes) == 1 else (sum(rows for rows, *_ in shapes), *part.shape[1:])
    if shape != part.shape:
        raise ValueError(f"tensors: {part.name!r}: expected shape {part.shape}, got {shape}")


def file_nbytes(parts: Iterable[Part], metadata: Mapping[str, str]) -> int:
    """Return the bytes of the file that `write` makes of these parts."""
    laid, header = _layout(list(parts), metadata)
    return len(header) + sum(math.prod(part.shape) * part.dtype.itemsize + fill for part, fill in laid)


def _layout(parts: list[Part], metadata: Mapping[str, str]) -> tuple[list[tuple[Part, int]], bytes]:
    """Return the parts, each with the number of zero bytes that follow it, and the header that describes them."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    alignment = ALIGNMENT
    if not any(key.startswith("fastopt") for key in metadata):
        alignment = 1
        parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    laid, at = [], 0
    for i, part in enumerate(parts):
        if not isinstance(part.name, str):
            raise TypeError(f"tensors: expected texts as names, got {shown(part.name)}")
        if part.name == "__metadata__" or part.name.startswith(PAD):
            raise ValueError(f"tensors: {part.name!r} is a name that the format reserves")
        if part.name in entries:
            raise ValueError(f"tensors: two would be stored as {part.name!r}")
        size = math.prod(part.shape) * part.dtype.itemsize
        fill = -size % alignment if i + 1 < len(parts) else 0
        entries[part.name] = {
            "dtype": _NAMES[part.dtype.newbyteorder("=")],
            "shape": list(part.shape),
            "data_offsets": [at, at + size],
        }
        if fill:
            entries[f"{PAD}{i}"] = {"dtype": "U8", "shape": [fill], "data_offsets": [at + size, at + size + fill]}
        laid.append((part, fill))
        at += size + fill
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        wrong = next((name for name in entries if not name.isprintable()), "the metadata")
        raise ValueError(f"tensors: {wrong!r} is not valid Unicode: {error.reason}") from error
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"tensors: names make a header of {len(text)} bytes, expected at most {_LONGEST_HEADER}")
    try:
        _checked_header(text, at)
    except ValueError as error:
        raise ValueError(f"tensors: no reader would accept them: {error}") from error
    return laid, len(text).to_bytes(8, "little") + text


def write_array(file: IO[bytes], array: Array) -> None:
    """Write the bytes of an array, in C order and little-endian."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    file.write(plain.reshape(-1).view(np.uint8).data)


class Scratch:
    """Arrays that wait on the disk until they are written: an unnamed file, which disappears with the process.

    Parameters
    ----------
    folder : path
        The folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__

    def put(self, name: str, array: Array) -> Part:
        """Store an array and return the part that reads it back."""
        dtype, start = require_dtype(name, array.dtype), self._file.tell()
        write_array(self._file, array)

        def make() -> Array:
            self._file.seek(start)
            return np.frombuffer(self._file.read(array_bytes), dtype).reshape(shape)

        shape, array_bytes = array.shape, array.nbytes
        return Part(name, dtype, shape, make)

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
