"""NumPy's .npy and .npz files, read without trust in what they say.

A header has at most 10,000 bytes. Deflate makes at most 1032 bytes of one, so all arrays of an .npz file together have
at most 1032 times the bytes of the file; a file that claims more is refused before memory is taken.
"""

import ast
import contextlib
import errno
import math
import os
import re
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from fastopt._types import Array
from fastopt.files.atomic import open_regular
from fastopt.files.mapped import Map
from fastopt.files.safetensors_file import MOST_OF_ONE_BYTE, as_shape
from fastopt.files.weights import Source

_LONGEST_HEADER = 10_000  # NumPy's own limit for headers of files that it does not trust


class _Spec(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def npy_source(path: Path) -> Source:
    """Return the array of a .npy file, mapped; raise ValueError if it is not sound."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        spec = _read_spec(file, str(path))
        if spec.start + spec.nbytes != size:
            raise ValueError(f"{path}: expected {spec.start + spec.nbytes} bytes, got {size}")
        mapped = Map(file)
    dtype, shape, order, start = spec
    return Source(
        shape,
        dtype,
        lambda: mapped.array(dtype, shape, start, order),
        lambda: mapped.release(start, start + spec.nbytes),
    )


def npz_sources(path: Path, skipped: Callable[[str], bool]) -> dict[str, Source]:
    """Return the arrays of an .npz file but for the skipped ones; raise ValueError if it is not sound."""
    archive = zip_archive(path, "a .npz file")
    sources: dict[str, Source] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if skipped(name):
            continue
        if name in sources:
            raise ValueError(f"{path}: has two arrays of one name, {name!r}")
        sources[name] = _of_member(path, archive, info, name)
    return sources


def zip_archive(path: Path, kind: str) -> zipfile.ZipFile:
    """Open a zip archive, or raise ValueError, which says what `kind` of file was expected, if it is not sound."""
    file = open_regular(path)
    try:
        with sound(f"{path}: not {kind}"):
            archive = zipfile.ZipFile(file)
        if sum(info.compress_size for info in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path}: not {kind}: its parts overlap")
    except BaseException:
        file.close()
        raise
    weakref.finalize(archive, file.close)
    return archive


def _of_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Source:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{path}: {name!r} is compressed by method {info.compress_type}, expected deflate or none")
    cannot = f"{path}: {info.filename!r} cannot be read"
    with sound(cannot), archive.open(info) as file:
        spec = _read_spec(file, f"{path}: {name!r}")
    expected = spec.start + spec.nbytes
    if expected != info.file_size or info.file_size > MOST_OF_ONE_BYTE * (info.compress_size + 1):
        raise ValueError(f"{path}: {name!r} has {info.file_size} bytes, expected {expected}")

    def read() -> Array:
        content = np.empty(spec.nbytes, np.uint8)
        with sound(cannot), archive.open(info) as file:
            file.read(spec.start)
            rest = content.data
            while rest and (count := file.readinto(rest)):  # type: ignore[attr-defined]
                rest = rest[count:]
            if rest or file.read(1):
                raise ValueError(f"expected {expected} bytes")
        return content.view(spec.dtype).reshape(spec.shape, order=spec.order)

    return Source(spec.shape, spec.dtype, read)


def _read_spec(file: IO[bytes], what: str) -> _Spec:
    """Return what the header of an open .npy file says, and where the data begin."""
    start = file.read(10)
    if start[:6] != b"\x93NUMPY" or len(start) < 10:
        raise ValueError(f"{what}: not an array of NumPy")
    width = {(1, 0): 2, (2, 0): 4}.get((start[6], start[7]))
    if width is None:
        raise ValueError(f"{what}: not an array of NumPy: version {start[6]}.{start[7]} of the format")
    start += file.read(width - 2)
    length = int.from_bytes(start[8:], "little")
    if length > _LONGEST_HEADER:
        raise ValueError(
            f"{what}: not an array of NumPy: a header of {length} bytes, expected at most {_LONGEST_HEADER}"
        )
    header = file.read(length)
    try:
        described = _literal(header.decode("latin-1"))
        if not isinstance(described, dict) or described.keys() != {"descr", "fortran_order", "shape"}:
            raise ValueError("expected descr, fortran_order and shape")
        descr, fortran, sizes = described["descr"], described["fortran_order"], described["shape"]
        if not isinstance(descr, str | list) or not isinstance(sizes, tuple) or not isinstance(fortran, bool):
            raise ValueError("expected a dtype, an order and a shape")
        shape = as_shape(list(sizes), "shape")
        dtype = np.dtype(descr)
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{what}: not an array of NumPy: {error!s:.200}") from error
    if dtype.hasobject:
        raise ValueError(f"{what}: holds Python objects, expected numbers; skip leaves it out")
    if dtype.kind not in "biufc" or dtype.itemsize == 0:
        raise ValueError(f"{what}: has dtype {dtype.str}, expected numbers; skip leaves it out")
    return _Spec(dtype, shape, "F" if fortran else "C", len(start) + len(header))


def _literal(text: str) -> Any:
    """Return the value of a Python literal; ValueError if it is none, or nested too deeply."""
    try:
        return ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text))  # Python 2 wrote 3L
    except (MemoryError, RecursionError) as error:
        raise ValueError("the header is nested too deeply") from error


@contextlib.contextmanager
def sound(what: str) -> Iterator[None]:
    """Raise ValueError for all that a damaged file makes a library raise; errors of the system stay as they are."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        if isinstance(error, ValueError) and str(error).startswith(what.partition(":")[0]):
            raise
        raise ValueError(f"{what}: {error}") from error
