"""Models in several files under one index."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastopt._types import PathLike
from fastopt.files.atomic import (
    Temporary,
    locked,
    move,
    naming,
    open_regular,
    real_path,
    sync_folder,
    temporary_beside,
    write_text,
)
from fastopt.files.safetensors_file import Part, parse_json

T = TypeVar("T")


def read_index(path: PathLike) -> dict[str, list[str]]:
    """Return the files that an index of shards names, each with its tensors; raise ValueError if it is damaged."""
    path = Path(path)
    with open_regular(path) as file:
        text = file.read()
    try:
        parsed = parse_json(text.decode())
    except ValueError as error:
        raise ValueError(f"{path}: not an index of shards: {error}") from error
    placed = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(f"{path}: not an index of shards: expected a 'weight_map' from tensors to files")
    shards: dict[str, list[str]] = {}
    for name, file in placed.items():
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{path}: {name!r} is in {file!r:.100}, expected the name of a file beside the index")
        shards.setdefault(file, []).append(name)
    return shards


def opened_shards(
    path: PathLike, open_one: Callable[[Path], T], only: Container[str] | None = None
) -> dict[str, tuple[T, list[str]]]:
    """Open the files that an index names, or `only` some; return each with the tensors that the index places in it.

    A writer may replace the index meanwhile and remove the files of the old one: then the new ones are opened.
    """
    path = Path(path)
    while True:
        shards = read_index(path)
        try:
            wanted = {file: names for file, names in shards.items() if only is None or file in only}
            return {file: (open_one(path.parent / file), names) for file, names in wanted.items()}
        except FileNotFoundError:
            if read_index(path) == shards:
                raise


def is_placed_in(shard: str, parts: Iterable[str], placed: Mapping[str, str]) -> bool:
    """Return whether a tensor counts in a shard: the index decides, if it names one of the tensor's parts."""
    return shard == next((placed[part] for part in parts if part in placed), shard)


def write_shards(index: Path, count: int, write_one: Callable[[Path, int], list[Part]]) -> None:
    """Write files beside an index, and the index last.

    The name of a file has a digest of its content, so the files of the old model stay as they are until the index is
    replaced. Then those that only the old index named are removed, if their names show that they were written here.
    Several processes may write to one index: one of the models remains, complete.

    Parameters
    ----------
    index : Path
        ``NAME.index.json`` or ``NAME.safetensors.index.json``.
    count : int
        The number of files.
    write_one : callable
        Writes file number i, counted from 0, to a path; returns the parts that are in it.

    Raises
    ------
    OSError
        If a file cannot be written. The old model is then left as it was.
    """
    index = real_path(index)
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming(index))
        shards: list[Shard] = []
        for i in range(count):
            temporary = stack.enter_context(temporary_beside(index))
            parts = write_one(temporary.path, i)
            shards.append(Shard(temporary, digest_of(temporary.path), nbytes_of(parts)))
        place_shards(index, shards)


class Shard(NamedTuple):
    """A finished file that is not in its place yet, a digest of its content, and the bytes of each array in it."""

    temporary: Temporary
    digest: str
    nbytes: dict[str, int]


def nbytes_of(parts: Iterable[Part]) -> dict[str, int]:
    """Return the bytes of each part."""
    return {part.name: math.prod(part.shape) * part.dtype.itemsize for part in parts}


def place_shards(index: Path, shards: Sequence[Shard]) -> None:
    """Move finished files to their places beside an index, and replace the index, as `write_shards` does."""
    made: dict[str, Temporary] = {}
    placed: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"{_stem(index)}-{i + 1:05}-of-{len(shards):05}-{shard.digest}.safetensors"
        made[file] = shard.temporary
        for name in shard.nbytes:
            if name in placed:
                raise ValueError(f"{index}: two shards would store {name!r}")
            placed[name] = file
    total = sum(sum(shard.nbytes.values()) for shard in shards)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=1) + "\n"
    # No other writer may remove these files, as those of its old index, before the index names them.
    with locked(index.parent):
        _place(index, made, text)


def _place(index: Path, made: dict[str, Temporary], text: str) -> None:
    """Move finished files to their places, replace the index, and remove the files that nothing names any more."""
    old, new = _named(index), []
    try:
        for file, temporary in made.items():
            if not index.with_name(file).exists():
                new.append(file)
            move(temporary, index.with_name(file), durably=False)
        sync_folder(index.parent)  # no index before the files that it names
        write_text(index, text)
    except BaseException:
        if not index.exists() or index.read_text(encoding="utf-8") != text:
            for file in new:
                index.with_name(file).unlink(missing_ok=True)
        raise
    stem, kept = _stem(index), set(made)
    for name in (f"{stem}.index.json", f"{stem}.safetensors.index.json"):  # two indices may share a file
        kept |= _named(index.with_name(name))
    ours = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors")
    for file in old - kept:
        if ours.fullmatch(file):
            index.with_name(file).unlink(missing_ok=True)


def _stem(index: Path) -> str:
    return index.name.removesuffix(".index.json").removesuffix(".safetensors")


def _named(index: Path) -> set[str]:
    """Return the files that an index names; none if there is no index, or if it is damaged."""
    try:
        return set(read_index(index))
    except (OSError, ValueError):
        return set()


def digest_of(path: Path) -> str:
    """Return the digest of a file's content that its name has."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]
