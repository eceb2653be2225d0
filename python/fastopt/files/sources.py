"""Models in files of any kind, read one array at a time."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastopt._types import Array, PathLike
from fastopt.files.atomic import open_regular
from fastopt.files.container import assemble, disassemble, others, tied_names
from fastopt.files.numpy_files import npy_source, npz_sources
from fastopt.files.safetensors_file import PAD, MappedFile
from fastopt.files.shards import is_placed_in, opened_shards, read_index
from fastopt.files.torch_files import torch_sources
from fastopt.files.weights import Origin, Source, Weights
from fastopt.tensors.packed import PackedTensor, Weight

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_OTHERS = (".npz", ".npy", *_TORCH)
_INDEX = ".index.json"
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")
_PICKLES = (".pkl", ".pickle", ".joblib")


class Reader(NamedTuple):
    """How the files of another format are read.

    Attributes
    ----------
    read : callable
        Gets a path, and a function that says of a name whether to leave it out; returns the arrays and the metadata.
    start : bytes, optional
        The first bytes of such a file.
    member : str, optional
        A name in such a file, if it is a zip archive.
    """

    read: Callable[[Path, Callable[[str], bool]], tuple[dict[str, Source], dict[str, str]]]
    start: bytes = b""
    member: str = ""


# The formats that the layer above knows, by suffix.
READERS: dict[str, Reader] = {}


def open_weights(path: PathLike, *, key: str | None = None, skip: str | Iterable[str] = ()) -> Weights:
    """Open the arrays of a model; each is read when it is asked for.

    Parameters
    ----------
    path : path-like
        A safetensors file, which is mapped into memory; one that fastopt packed, whose tensors are unpacked; a ``.npy``
        or ``.npz`` file; a state dict or a training checkpoint that torch saved (``.pt``, ``.pth``, ``.bin``,
        ``.ckpt``), through torch, which must be installed; the ``.index.json`` of a model in shards; or a folder with
        one of them. An ``.onnx`` model, through onnx, with its weights as [out, in, ...]. A ``.gguf`` file, or one of
        the parts of a model that llama.cpp split, which are read together; its types that are affine are packed tensors
        with the same codes, and the others are decoded, with a warning. A ``.keras`` or ``.h5`` file of Keras, through
        h5py, with its kernels as [out, in, ...] and without the optimizer. Other suffixes are judged by the first
        bytes. In a folder an index comes before a safetensors file, that before files of torch, and these before the
        others; a folder of ``.npy`` files alone is one model.
    key : str, optional
        Which part of a training checkpoint is the model, as ``"model"`` or ``"generator/state_dict"``; ``""`` is all
        of it. By default the part that stands out: the only one with tensors, not counting those of optimizers, or the
        one under a usual key such as ``state_dict`` or ``model``.
    skip : str or iterable of str
        Glob patterns: tensors whose names match are left out, even if they could not be read.

    Returns
    -------
    Weights
        A mapping from name to array, which also knows shapes, dtypes and shards. Pairs ``NAME_orig`` and ``NAME_mask``
        of ``torch.nn.utils.prune`` are one array ``NAME``.

    Raises
    ------
    OSError
        If a file cannot be opened, or is a pipe or a device.
    ValueError
        If it is none of these, or not sound, or if it is not clear which part is the model.
    ImportError
        If the package that reads the format is not installed.

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
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    return _opened(Origin(os.path.abspath(path), key, patterns, {}), Path(path))  # noqa: PTH100 - no links followed


def reopen(origin: Origin, shards: Collection[str] = ()) -> Weights:
    """Open weights again, in any process; of an index only the files of these names, unless there are none.

    Raises
    ------
    OSError, ValueError
        As `open_weights` does, and if a file is not the one that was opened before.
    """
    weights = _opened(Origin(origin.path, origin.key, origin.skip, {}), Path(origin.path), shards or None)
    assert weights.origin is not None
    require_stamps(weights.origin.stamps, origin.stamps)
    return weights


def require_stamps(now: Mapping[str, tuple[int, int]], before: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError if a file is not the one that was opened before."""
    for file, stamp in now.items():
        if before.get(file) != stamp:
            raise ValueError(f"{file}: has changed since it was opened")


def stamp_of(path: PathLike) -> tuple[int, int]:
    """Return the bytes of a file and the time of its last change."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # NFS asks the server about a file that is opened
    try:
        info = os.fstat(handle)
    finally:
        os.close(handle)
    return info.st_size, info.st_mtime_ns


def _opened(origin: Origin, path: Path, only: Collection[str] | None = None) -> Weights:
    """Open weights; adds the stamps of the files to their origin."""

    def skipped(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in origin.skip)

    def is_part_of_skipped(part: str) -> bool:
        steps = part.split(".")  # the arrays of a packed tensor are named after it: "fc.weight.codes"
        return any(skipped(".".join(steps[: n + 1])) for n in range(len(steps)))

    def stamped(file: Path) -> Path:
        with contextlib.suppress(OSError):  # who opens it reports the error
            origin.stamps[os.path.abspath(file)] = stamp_of(file)  # noqa: PTH100
        return file

    found, folder = model_files(path), path if path.is_dir() else None
    if isinstance(found, list):
        if origin.key is not None:
            raise _no_key(path)
        files = {file.stem: npy_source(stamped(file)) for file in found if not skipped(file.stem)}
        return Weights(files, None, None, folder, origin)
    if not found.name.endswith(_INDEX):
        one, texts = _open_file(stamped(found), origin.key, skipped)
        return Weights(_joined(one, skipped), None, texts, folder, origin)
    sources: dict[str, Source] = {}
    shards: dict[str, list[str]] = {}
    opened = opened_shards(stamped(found), lambda file: _open_file(stamped(file), origin.key, skipped), only)
    placed = {name: shard for shard, (_, names) in opened.items() for name in names}
    metadata: dict[str, str] = {}
    for shard, ((of_shard, texts), names) in opened.items():
        metadata = {**texts, **metadata}
        stored = {part for name, source in of_shard.items() for part in (name, *source.parts)}
        missing = [name for name in names if name not in stored and not is_part_of_skipped(name)]
        if missing:
            raise ValueError(f"{found}: {missing[0]!r} is not in {shard}")
        for name, source in of_shard.items():
            # If several files hold a tensor, the file that the index names counts.
            if not is_placed_in(shard, (name, *source.parts), placed):
                continue
            if name in sources:
                raise ValueError(f"{found}: {name!r} is in two shards")
            sources[name] = source
            shards.setdefault(shard, []).append(name)
    joined = _joined(sources, skipped)
    in_shards = {shard: _renamed(names, joined) for shard, names in shards.items()}
    return Weights(joined, in_shards, metadata, folder, origin)


def model_files(path: Path) -> Path | list[Path]:
    """Return the file of a model: `path` itself, or the one that a folder holds; a list of its .npy files.

    Raises
    ------
    ValueError
        If a folder holds none, or several.
    """
    if not path.is_dir():
        return path
    safetensors = sorted(path.glob("*.safetensors"))
    indices = sorted(path.glob(f"*{_INDEX}"))
    if len(indices) > 1:  # safetensors and torch hold the same model
        indices = [index for index in indices if not index.name.endswith(f".bin{_INDEX}")]
    arrays = sorted(path.glob("*.npy"))
    torch = sorted(file for file in path.iterdir() if file.suffix in _TORCH)
    for found in (indices, safetensors):
        if len(found) == 1 and (found is indices or not (arrays or indices)):
            return found[0]
    if arrays and not (safetensors or indices or torch):
        return arrays
    if not (arrays or safetensors or indices):
        named = [file for file in torch if file.name == "pytorch_model.bin"]
        others = [file for file in path.iterdir() if file.suffix in READERS] if not torch else []
        others = [file for file in others if not _LATER_PART.search(file.name)]  # its reader finds them
        for candidates in (torch, named, others):
            if len(candidates) == 1:
                return candidates[0]
    raise ValueError(
        f"{path}: expected one .index.json, one .safetensors file or .npy files, found {len(indices)}, "
        f"{len(safetensors)} and {len(arrays)}, and {len(torch)} files of torch; name the file"
    )


def is_safetensors(path: Path) -> bool:
    """Return whether a file, or the files that an index names, are read as safetensors."""
    return _kind_of_all(path) == "safetensors"


def is_torch(path: Path) -> bool:
    """Return whether a file, the files that an index names, or those of a folder are read through torch."""
    found = model_files(path)
    return isinstance(found, Path) and _kind_of_all(found) == "torch"


def _kind_of_all(path: Path) -> str:
    if path.name.endswith(_INDEX):
        return "torch" if any(Path(file).suffix in _TORCH for file in read_index(path)) else "safetensors"
    return _kind(path)


def _open_file(path: Path, key: str | None, skipped: Callable[[str], bool]) -> tuple[dict[str, Source], dict[str, str]]:
    """Return the arrays of a file, and its metadata."""
    kind = _kind(path)
    if kind == "torch":
        return torch_sources(path, key, skipped), {}
    if key is not None:
        raise _no_key(path)
    with naming_formats(path):
        if kind in READERS:
            return READERS[kind].read(path, skipped)
        if kind == "npz":
            return npz_sources(path, skipped), {}
        if kind == "npy":
            return {} if skipped(path.stem) else {path.stem: npy_source(path)}, {}
        return _of_safetensors(MappedFile(path), skipped)


@contextlib.contextmanager
def naming_formats(path: Path) -> Iterator[None]:
    """Let the error of a file of an unknown format say which formats are read."""
    try:
        yield
    except ValueError as error:
        if path.suffix in (".npz", ".npy", ".safetensors") or "not a safetensors file" not in str(error):
            raise
        if path.suffix in _PICKLES:
            raise ValueError(
                f"{path}: is a pickle, which is not read, as it could run code; load it, and pack what it holds"
            ) from error
        raise ValueError(f"{error}; expected .safetensors, .index.json, {', '.join((*_OTHERS, *READERS))}") from error


def _no_key(path: Path) -> ValueError:
    return ValueError(f"{path}: key: expected a checkpoint of torch")


def _kind(path: Path) -> str:
    """Return the kind of a file by its suffix, or by its first bytes if the suffix says nothing."""
    if path.suffix in (".npz", ".npy", ".safetensors"):
        return path.suffix[1:]
    if path.suffix in READERS:
        return path.suffix
    if path.suffix in _TORCH:
        return "torch"
    with open_regular(path) as file:
        start = file.read(16)
        for suffix, reader in READERS.items():
            if reader.start and start.startswith(reader.start):
                return suffix
        if start.startswith(b"\x93NUMPY"):
            return "npy"
        if start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):  # torch before zip archives
            return "torch"
        if start.startswith(b"PK"):
            try:
                names = zipfile.ZipFile(file).namelist()
            except Exception:  # the reader of safetensors says that it is none
                return "safetensors"
            if any(name.endswith("/data.pkl") for name in names):
                return "torch"
            for suffix, reader in READERS.items():
                if reader.member in names:
                    return suffix
            if names and all(name.endswith(".npy") for name in names):
                return "npz"
    return "safetensors"


def _joined(sources: dict[str, Source], skipped: Callable[[str], bool]) -> dict[str, Source]:
    """Return the sources with each NAME_orig and NAME_mask, as torch.nn.utils.prune stores them, as one NAME."""
    joined: dict[str, Source] = {}
    for name, source in sources.items():
        base = name[:-5] if name.endswith(("_orig", "_mask")) else name
        orig, mask = sources.get(f"{base}_orig"), sources.get(f"{base}_mask")
        if base == name or base in sources or orig is None or mask is None or orig.shape != mask.shape:
            joined[name] = source
        elif base not in joined and not skipped(base):
            joined[base] = _masked(orig, mask)
    return joined


def _masked(orig: Source, mask: Source) -> Source:
    def read() -> Array:
        factor = mask.read().astype(orig.dtype)
        array: Array = orig.read() * factor
        array[factor == 0] = 0  # +0, whatever was pruned
        return array

    def release() -> None:
        orig.release()
        mask.release()

    return Source(orig.shape, orig.dtype, read, release)


def _renamed(names: list[str], joined: dict[str, Source]) -> list[str]:
    """Return the names of a shard after joining; a joined array is where its values are."""
    kept = [name if name in joined else name.removesuffix("_orig") for name in names]
    return [name for name in kept if name in joined]


def _of_safetensors(file: MappedFile, skipped: Callable[[str], bool]) -> tuple[dict[str, Source], dict[str, str]]:
    for name in [name for name in file.foreign if skipped(name)]:
        del file.foreign[name]
    file.require_known()
    if "fastopt" not in file.metadata:
        metadata = others(file.metadata)
        sources = {name: _of_mapped(file, name) for name in file.stored if not name.startswith(PAD)}
        for name, to in tied_names(metadata, sources).items():
            sources[name] = sources[to]
            del metadata[name]
        return {name: source for name, source in sources.items() if not skipped(name)}, metadata
    tensors, _, metadata = assemble(file.path, {name: file.array(name) for name in file.stored}, file.metadata)
    by_tensor: dict[int, Source] = {}
    for name, tensor in tensors.items():
        parts = list(disassemble(name, tensor)[0])
        if parts[0] in file.stored:  # else it is tied to the tensor of another name
            by_tensor[id(tensor)] = _of_mapped(file, name) if parts == [name] else _of_packed(file, parts, tensor)
    sources = {name: by_tensor[id(tensor)] for name, tensor in tensors.items()}
    return {name: source for name, source in sources.items() if not skipped(name)}, metadata


def _of_mapped(file: MappedFile, name: str) -> Source:
    stored = file.stored[name]
    return Source(
        stored.shape, stored.dtype, lambda: file.array(name), lambda: file.release(name), identity=(id(file), name)
    )


def _of_packed(file: MappedFile, parts: Sequence[str], tensor: Weight) -> Source:
    def release() -> None:
        for part in parts:
            file.release(part)

    assert isinstance(tensor, PackedTensor)
    return Source(
        tensor.shape, tensor.dtype, tensor.to_dense, release, lambda: tensor, parts, identity=(id(file), parts[0])
    )
