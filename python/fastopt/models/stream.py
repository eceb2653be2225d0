"""From file to file, one tensor at a time: models that are larger than the memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastopt._checks import require_group_size
from fastopt._types import Array, Notify, PathLike
from fastopt.files.atomic import naming
from fastopt.files.container import describe, disassemble
from fastopt.files.safetensors_file import Part, Scratch, require_dtype, write
from fastopt.files.shards import write_shards
from fastopt.files.sources import open_weights
from fastopt.files.weights import Weights, spec_of
from fastopt.models.choose import choose_bits
from fastopt.models.recipe import Recipe, pack_tensor
from fastopt.models.report import Report, Reporter
from fastopt.progress import Progress
from fastopt.tensors.quantization import quantized_nbytes


def plan(weights: Mapping[str, Array], recipe: Recipe) -> Report:
    """Return what a recipe would make of each tensor, without doing it.

    Parameters
    ----------
    weights : mapping from name to array
        A dict, or what `open_weights` returns: of which only shapes are read, but for tensors that are pruned.
    recipe : Recipe

    Returns
    -------
    Report
        Without errors. Bytes of tensors that are only quantized follow from their shapes: they are more where float16
        cannot hold the parameters, and fewer where weights that are kept as outliers are not off at all.

    Raises
    ------
    TypeError, ValueError
        As in `pack`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> weights = {"w": np.zeros((64, 128), dtype=np.float32), "b": np.zeros(64, dtype=np.float32)}
    >>> for tensor in fo.plan(weights, fo.Recipe(bits=4)).tensors:
    ...     print(tensor.name, tensor.kind, tensor.nbytes_before, tensor.nbytes, tensor.reason)
    w quantized 32768 5120 for all
    b dense 256 256 64 weights, fewer than min_size 4096
    """
    reporter = Reporter()
    for name in weights:
        shape, dtype = spec_of(weights, name)
        options, reason = recipe.of(name, shape, dtype)
        if options is not None and options.prunes:
            reporter.add(name, pack_tensor(name, weights[name], recipe)[0], None, reason)
            if isinstance(weights, Weights):
                weights.release(name)
        elif options is not None:
            assert options.bits is not None
            nbytes = quantized_nbytes(shape, options.bits, options.group_size, options.param_dtype, options.outliers)
            group_size = require_group_size(options.group_size, options.bits)
            reporter.add_planned(
                name, shape, dtype, "quantized", nbytes, reason, bits=options.bits, group_size=group_size
            )
        else:
            reporter.add_planned(name, shape, dtype, "dense", math.prod(shape) * dtype.itemsize, reason)
    return reporter.report()


def pack_file(
    source: PathLike,
    target: PathLike,
    recipe: Recipe,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    dry_run: bool = False,
    notify: Notify | None = None,
) -> Report:
    """Pack a model from file to file, as `pack` does, one tensor at a time.

    Memory is needed for the largest tensor, packed and not, and on the disk, beside the target, for the packed model
    twice.

    Parameters
    ----------
    source : path-like
        Whatever `open_weights` opens.
    target : path-like
        A safetensors file, which appears when it is complete and on the disk; it may be the source itself. Or
        ``NAME.index.json``: then each shard of the source becomes one beside it, and the index comes last.
    recipe : Recipe
    target_bits, target_size
        As in `pack`.
    dry_run : bool
        Write nothing and return what `plan` does.
    notify : callable, optional
        Called with the bytes that are done, those of all, and the name of the tensor that is next, "" at the end.

    Returns
    -------
    Report
        With the error of each tensor.

    Raises
    ------
    OSError
        If a file cannot be opened or written; what was there before is there still.
    TypeError, ValueError
        If the source is not sound, or as in `pack`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> np.savez("model.npz", w=np.random.default_rng(0).standard_normal((64, 128)).astype("f4"))
    >>> report = fo.pack_file("model.npz", "model.safetensors", fo.Recipe(bits=8))
    >>> report.nbytes_before, report.nbytes, report.error.snr > 40
    (32768, 8448, True)
    """
    weights = open_weights(source)
    searches = target_bits is not None or target_size is not None
    progress = Progress(weights.sizes, notify, passes=searches + (not dry_run))
    recipe = choose_bits(weights, recipe, target_bits=target_bits, target_size=target_size, notify=progress.next)
    if dry_run:
        return plan(weights, recipe)
    reporter = Reporter()

    def pack_some(path: Path, names: Sequence[str]) -> list[Part]:
        parts: list[Part] = []
        entries: dict[str, Any] = {}
        with naming(path), Scratch(path.parent) as scratch:
            for name in names:
                progress.next(name)
                array = weights[name]
                tensor, reason = pack_tensor(name, array, recipe)
                reporter.add(name, tensor, array, reason)
                arrays, entry = disassemble(name, tensor)
                parts += [scratch.put(stored, part) for stored, part in arrays.items()]
                if entry is not None:
                    entries[name] = entry
                del array, tensor, arrays
                weights.release(name)
            write(path, parts, describe(names, entries, recipe.to_dict()))
        return parts

    _write_all(weights, Path(target), pack_some)
    progress.next("")
    return reporter.report()


def prune_file(
    source: PathLike,
    target: PathLike,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    min_size: int = 4096,
    notify: Notify | None = None,
) -> Report:
    """Prune a model from file to file, one tensor at a time, and store what is left sparse.

    `unpack_file` gives dense arrays with zeros.

    Parameters
    ----------
    source, target : path-like
        As in `pack_file`.
    threshold, sparsity, pattern
        As in `prune`.
    include, exclude, min_size
        As in `pack`.
    notify : callable, optional
        As in `pack_file`.

    Returns
    -------
    Report

    Raises
    ------
    OSError, TypeError, ValueError
        As in `pack_file`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> np.savez("model.npz", w=np.random.default_rng(0).standard_normal((64, 128)).astype("f4"))
    >>> fo.prune_file("model.npz", "pruned.safetensors", sparsity=0.9).tensors[0].density
    0.0999755859375
    """
    recipe = Recipe(
        threshold=threshold, sparsity=sparsity, pattern=pattern, include=include, exclude=exclude, min_size=min_size
    )
    if not recipe.prunes:
        raise ValueError("threshold, sparsity, pattern: expected at least one of them")
    return pack_file(source, target, recipe, notify=notify)


def unpack_file(source: PathLike, target: PathLike, *, notify: Notify | None = None) -> None:
    """Unpack a model from file to file, one tensor at a time: all tensors as plain arrays.

    Parameters
    ----------
    source, target, notify
        As in `pack_file`. With a source that is not packed this converts to safetensors.

    Raises
    ------
    OSError, TypeError, ValueError
        As in `pack_file`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> fo.pack({"w": np.zeros((64, 128), dtype=np.float32)}, bits=8).save("packed.safetensors")
    >>> fo.unpack_file("packed.safetensors", "plain.safetensors")
    >>> fo.load("plain.safetensors")
    PackedModel(1 tensors, 32,768 bytes)
    """
    weights = open_weights(source)
    progress = Progress(weights.sizes, notify)

    def part(name: str) -> Part:
        shape, dtype = weights.spec(name)

        def make() -> Array:
            progress.next(name)
            return weights[name]

        return Part(name, require_dtype(name, dtype), shape, make, lambda: weights.release(name))

    def unpack_some(path: Path, names: Sequence[str]) -> list[Part]:
        parts = [part(name) for name in names]
        write(path, parts, {})
        return parts

    _write_all(weights, Path(target), unpack_some)
    progress.next("")


def _write_all(weights: Weights, target: Path, write_some: Callable[[Path, Sequence[str]], list[Part]]) -> None:
    """Write one file, or to an index one for each shard of the source."""
    if target.name.endswith(".index.json"):
        shards = list((weights.shards or {"": list(weights)}).values())
        write_shards(target, len(shards), lambda path, i: write_some(path, shards[i]))
    else:
        write_some(target, list(weights))
