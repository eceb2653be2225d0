"""Arrays of files of any kind, one at a time."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from fastopt._types import Array, PathLike
from fastopt.files.container import assemble, disassemble
from fastopt.files.safetensors_file import PAD, MappedFile
from fastopt.files.shards import opened_shards
from fastopt.files.weights import Source, Weights
from fastopt.tensors.packed import PackedTensor, Weight, unpacked

_TORCH = (".pt", ".pth", ".bin")


def open_weights(path: PathLike) -> Weights:
    """Open the arrays of a model; each is read when it is asked for.

    Parameters
    ----------
    path : path-like
        A safetensors file, which is mapped into memory; one that fastopt packed, whose tensors are unpacked; the
        ``.index.json`` of one in shards, or a folder with one; a ``.npy`` or ``.npz`` file, or a folder of ``.npy``
        files; a state dict that torch saved (``.pt``, ``.pth``, ``.bin``), through torch, which must be installed.

    Returns
    -------
    Weights
        A mapping from name to array, which also knows shapes, dtypes and shards.

    Raises
    ------
    OSError
        If a file cannot be opened.
    ValueError
        If it is none of these, or not sound.
    ImportError
        If torch is needed and not installed.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> np.savez("model.npz", w=np.zeros((2, 3), dtype=np.float32))
    >>> weights = fo.open_weights("model.npz")
    >>> weights.spec("w")
    ((2, 3), dtype('float32'))
    >>> weights["w"].size
    6
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        sources: dict[str, Source] = {}
        shards: dict[str, list[str]] = {}
        for shard, (file, names) in opened_shards(path, MappedFile).items():
            missing = [name for name in names if name not in file.stored]
            if missing:
                raise ValueError(f"{path}: {missing[0]!r} is not in {shard}")
            opened = _of_safetensors(file)
            both = sorted(sources.keys() & opened.keys())
            if both:
                raise ValueError(f"{path}: {both[0]!r} is in two shards")
            sources |= opened
            shards[shard] = list(opened)
        return Weights(sources, shards)
    if path.suffix == ".npz":
        return Weights(_of_npz(path))
    if path.suffix == ".npy":
        return Weights({path.stem: _of_npy(path)})
    if path.suffix in _TORCH:
        return Weights(_of_torch(path))
    return Weights(_of_safetensors(MappedFile(path)))


def _open_folder(path: Path) -> Weights:
    indices = sorted(path.glob("*.index.json"))
    arrays = sorted(path.glob("*.npy"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return open_weights(indices[0])
    if arrays and not files and not indices:
        return Weights({file.stem: _of_npy(file) for file in arrays})
    if len(files) == 1 and not arrays and not indices:
        return open_weights(files[0])
    raise ValueError(
        f"{path}: expected one .index.json, one .safetensors file or .npy files, "
        f"found {len(indices)}, {len(files)} and {len(arrays)}"
    )


def _of_safetensors(file: MappedFile) -> dict[str, Source]:
    file.require_known()
    if "fastopt" not in file.metadata:
        return {name: _of_mapped(file, name) for name in file.stored if not name.startswith(PAD)}
    content = assemble(file.path, {name: file.array(name) for name in file.stored}, file.metadata)
    return {
        name: _of_mapped(file, name) if name in file.stored else _of_packed(file, name, tensor)
        for name, tensor in content.tensors.items()
    }


def _of_mapped(file: MappedFile, name: str) -> Source:
    stored = file.stored[name]
    return Source(stored.shape, stored.dtype, lambda: file.array(name), lambda: file.release(name))


def _of_packed(file: MappedFile, name: str, tensor: Weight) -> Source:
    def release() -> None:
        for part in disassemble(name, tensor)[0]:
            file.release(part)

    packed = tensor if isinstance(tensor, PackedTensor) else None
    return Source(tensor.shape, tensor.dtype, lambda: unpacked(tensor), release, packed)


def _npy_spec(file: IO[bytes], what: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and where the data begin of an open .npy file."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception as error:  # NumPy reads its header as Python text
        raise ValueError(f"{what}: not an array of NumPy: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"{what}: holds Python objects, expected numbers")
    return shape, dtype, file.tell()


def _of_npy(path: Path) -> Source:
    with path.open("rb") as file:
        shape, dtype, start = _npy_spec(file, str(path))
    size = path.stat().st_size
    if start + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{path}: expected {start + math.prod(shape) * dtype.itemsize} bytes, got {size}")
    mode: Literal["r"] | None = "r" if math.prod(shape) else None  # a file without elements cannot be mapped
    return Source(shape, dtype, lambda: np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False)))


def _of_npz(path: Path) -> dict[str, Source]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a .npz file: {error}") from error
    return dict(_of_member(path, archive, info) for info in _once(path, archive.infolist()))


def _once(path: Path, infos: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    if len({info.filename for info in infos}) < len(infos):
        raise ValueError(f"{path}: has two arrays of one name")
    return infos


def _of_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, Source]:
    name = info.filename.removesuffix(".npy")
    with _opened(path, archive, info) as file:
        shape, dtype, start = _npy_spec(file, f"{path}: {name!r}")
    expected = start + math.prod(shape) * dtype.itemsize
    # Deflate makes at most 1032 bytes of one, so no size is believed that the file cannot hold.
    if expected != info.file_size or info.file_size > 1032 * info.compress_size + 1032:
        raise ValueError(f"{path}: {name!r} has {info.file_size} bytes, expected {expected}")

    def read() -> Array:
        with _opened(path, archive, info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return name, Source(shape, dtype, read)


@contextlib.contextmanager
def _opened(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    try:
        with archive.open(info) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: {info.filename!r} cannot be read: {error}") from error


def _of_torch(path: Path) -> dict[str, Source]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: a file of torch needs torch: pip install torch") from error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # a file of the old format, which cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever its parts raise
        raise ValueError(f"{path}: not a state dict of torch: {error!s:.300}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict, got a {type(state).__name__}")
    sources = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor")
        sources[name] = _of_tensor(torch, tensor, f"{path}: {name!r}")
    return sources


def _of_tensor(torch: Any, tensor: Any, what: str) -> Source:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{what} is stored as {tensor.layout}, expected a dense tensor")

    def read() -> Array:
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return np.asarray(tensor.contiguous().view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
        return np.asarray(tensor.numpy())

    try:
        return Source(tuple(tensor.shape), read().dtype, read)
    except TypeError as error:
        raise ValueError(f"{what} has dtype {tensor.dtype}, which NumPy does not have") from error
