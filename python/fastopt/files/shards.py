"""Models in several files under one index."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from fastopt._types import PathLike
from fastopt.files.atomic import naming, sync, write_text
from fastopt.files.safetensors_file import Part, parse_json


def read_index(path: PathLike) -> dict[str, list[str]]:
    """Return the files that an index of shards names, each with its tensors."""
    path = Path(path)
    try:
        parsed = parse_json(path.read_text(encoding="utf-8"))
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


def write_shards(index: Path, count: int, write_one: Callable[[Path, int], list[Part]]) -> None:
    """Write files beside an index, and the index last.

    Names of files tell their content, so files of an older model stay as they are until the index has been replaced;
    then those that were written here, and only the old index named, are removed.

    Parameters
    ----------
    index : Path
        ``NAME.index.json`` or ``NAME.safetensors.index.json``.
    count : int
        How many files there are.
    write_one : callable
        Writes file number i, from 0 on, to a path; returns what is in it.
    """
    index = index.resolve()
    stem = index.name.removesuffix(".index.json").removesuffix(".safetensors")
    try:
        old = set(read_index(index))
    except (OSError, ValueError):
        old = set()
    placed: dict[str, str] = {}
    total, made, text = 0, [], ""
    try:
        with naming(index):
            for i in range(count):
                number = f"{stem}-{i + 1:05}-of-{count:05}"
                temporary = index.with_name(f".{number}.part")
                made.append(temporary)
                parts = write_one(temporary, i)
                name = f"{number}-{_digest(temporary)}.safetensors"
                if name not in old:
                    made.append(index.with_name(name))
                temporary.replace(index.with_name(name))
                placed |= {part.name: name for part in parts}
                total += sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
            sync(index.parent)  # no index before what it names
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=1) + "\n"
            write_text(index, text)
    except BaseException:
        if not index.exists() or index.read_text(encoding="utf-8") != text:  # nothing names them
            for path in made:
                path.unlink(missing_ok=True)
        raise
    ours = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors")
    for name in old - set(placed.values()):
        if ours.fullmatch(name):
            index.with_name(name).unlink(missing_ok=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]
