"""Safetensors files: mapped into memory, and written aligned and whole or not at all.

Every tensor of a file that is written here starts at a multiple of 64 bytes. The format allows no holes, so a tensor
of zeros whose name starts with ``fastopt.pad.`` fills what another leaves to the next multiple.
"""

import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fastopt._types import Array, PathLike
from fastopt.files.atomic import replacing

ALIGNMENT = 64
PAD = "fastopt.pad."

# As the format names them; bytes are little-endian.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
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
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # that a reader accepts
_LARGEST = 1 << 62  # elements; NumPy counts bytes in 63 bits


# ---- reading -----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """An array of a file: where it lies and what it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


class MappedFile:
    """A safetensors file whose arrays are views of it, without a copy.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    stored : dict from name to Stored
        In the order of the file.
    metadata : dict of str

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not a safetensors file.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            self.metadata, described = _checked_header(self.path)
            _refuse_twice(self.path, file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self._content = np.frombuffer(self._map, np.uint8)
        self.stored: dict[str, Stored] = {}
        start = 8 + length
        for name, dtype_name, shape in described:
            dtype = DTYPES.get(dtype_name)
            if dtype is None:
                raise ValueError(f"{self.path}: {name!r} has dtype {dtype_name}, which NumPy does not have")
            require_shape(shape, f"{self.path}: {name!r}: shape")
            end = start + math.prod(shape) * dtype.itemsize
            if end > size:
                raise ValueError(f"{self.path}: {name!r} ends at byte {end} of {size}")
            self.stored[name] = Stored(dtype, tuple(shape), start, end)
            start = end

    def array(self, name: str) -> Array:
        """Return a tensor as a read-only view of the file."""
        dtype, shape, start, end = self.stored[name]
        array = self._content[start:end].view(dtype).reshape(shape)
        # Files of other writers may place a tensor on an address that its dtype does not allow.
        return array if array.flags.aligned else array.copy()

    def release(self, name: str) -> None:
        """Tell the system that the memory of a tensor is not needed for now; it is read again if it is."""
        _, _, start, end = self.stored[name]
        first, last = start // mmap.PAGESIZE * mmap.PAGESIZE, end
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            assert isinstance(self._map, mmap.mmap)
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _checked_header(path: Path) -> tuple[dict[str, str], list[tuple[str, str, list[int]]]]:
    """Return metadata and the name, dtype and shape of each tensor, in the order of the file."""
    try:
        # The library checks the header: its length, its JSON, and that tensors fill the file without overlap or hole.
        with safe_open(path, framework="numpy") as opened:
            specs = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            return opened.metadata() or {}, [(name, spec.get_dtype(), spec.get_shape()) for name, spec in specs]
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def _refuse_twice(path: Path, header: bytes) -> None:
    """Raise if a name is in the header twice, which the library lets pass."""
    try:
        parse_json(header.decode())
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def parse_json(text: str) -> Any:
    """Return what a JSON text of an untrusted file says; ValueError if it is none, too deep, or has a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("metadata: nested too deeply") from error


def require_shape(sizes: Any, name: str) -> tuple[int, ...]:
    """Return the sizes of axes as a tuple, or raise if no array can have them."""
    whole = isinstance(sizes, list) and len(sizes) <= 32 and all(type(n) is int and n >= 0 for n in sizes)
    if not whole or math.prod(max(n, 1) for n in sizes) >= _LARGEST // 8:
        raise ValueError(f"{name}: expected the sizes of up to 32 axes, got {sizes!r:.100}")
    return tuple(sizes)


def read_arrays(path: PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of a safetensors file as views of it, and its metadata; raise as `MappedFile` does."""
    file = MappedFile(path)
    return {name: file.array(name) for name in file.stored}, file.metadata


# ---- writing -----------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


class Part(NamedTuple):
    """An array to be written, made when its turn comes and released when it is done."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]
    release: Callable[[], None] = _nothing


def part_of(name: str, array: Array) -> Part:
    """Return a part of an array that is at hand, or raise if the file cannot hold it."""
    return Part(name, require_dtype(name, array.dtype), array.shape, lambda: array)


def require_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in little-endian order, or raise if the file cannot hold it."""
    native = dtype.newbyteorder("=")
    if native not in _NAMES:
        raise TypeError(f"tensors: {name!r} has dtype {dtype}, which the file cannot hold")
    return native.newbyteorder("<")


def write(path: PathLike, parts: Iterable[Part], metadata: Mapping[str, str]) -> None:
    """Write arrays to one safetensors file, which takes the place of `path` when it is whole and on the disk.

    Without metadata nothing tells a reader what only fills, so that nothing does: arrays are sorted by the sizes of
    their elements, and so aligned to these.

    Raises
    ------
    OSError
        If the file cannot be written; what was there before is there still.
    ValueError
        If two parts have one name, or a name is one that the format keeps for itself.
    """
    if not metadata:
        parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    laid, header = _layout(list(parts), metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for part, fill in laid:
            write_array(file, part.make())
            part.release()
            file.write(bytes(fill))


def _layout(parts: list[Part], metadata: Mapping[str, str]) -> tuple[list[tuple[Part, int]], bytes]:
    """Return the parts, each with how many bytes of zeros follow it, and the header that describes them."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    alignment = ALIGNMENT if metadata else 1
    laid, at = [], 0
    for i, part in enumerate(parts):
        if part.name == "__metadata__" or part.name.startswith(PAD):
            raise ValueError(f"tensors: {part.name!r} is a name that the format keeps for itself")
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
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"tensors: names make a header of {len(text)} bytes, expected at most {_LONGEST_HEADER}")
    return laid, len(text).to_bytes(8, "little") + text


def write_array(file: IO[bytes], array: Array) -> None:
    """Write the bytes of an array, in C order and little-endian."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    file.write(plain.reshape(-1).view(np.uint8).data)


class Scratch:
    """Arrays on the disk that are needed once more: an unnamed file, which vanishes with the process.

    Parameters
    ----------
    folder : path
        Where the file lies.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__

    def put(self, name: str, array: Array) -> Part:
        """Write an array; return the part that reads it again."""
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
