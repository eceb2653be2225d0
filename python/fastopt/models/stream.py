"""Pack and unpack files one tensor at a time, so that models may be larger than the memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastopt._checks import require_group_size
from fastopt._types import Notify, PathLike
from fastopt.files.atomic import naming, replacing
from fastopt.files.container import describe, disassemble, require_readable
from fastopt.files.safetensors_file import Part, Scratch, file_nbytes, write_to
from fastopt.files.shards import write_shards
from fastopt.files.sources import open_weights
from fastopt.files.weights import Weights, is_packed, spec_of, stored_nbytes, stored_of, tied_in
from fastopt.models.bias import CORRECTED, BiasCorrection
from fastopt.models.choose import Check, Sizes, make_to_fit
from fastopt.models.folders import copy_others, file_to_write, is_folder
from fastopt.models.parallel import measure_by, pack_by, unpack_by, write_plain
from fastopt.models.recipe import (
    Recipe,
    RecipeOptions,
    pack_tensor,
    recipe_of,
    same_options,
    warn_if_nothing_is_packed,
    warn_of_overrides,
)
from fastopt.models.report import Report, Reporter
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.quantization import TWO_LEVEL_GROUP, quantized_nbytes

if TYPE_CHECKING:
    from typing_extensions import Unpack


def plan(weights: Mapping[str, Weight], recipe: Recipe) -> Report:
    """Return the report that packing `weights` would give, without errors.

    Only tensors that are pruned, or packed already, are read. The predicted bytes can be too small where float16 cannot
    hold the group parameters, and too large where weights kept as outliers have no error at all.
    """
    reporter, tied = Reporter(recipe), tied_in(weights, weights)
    for name in weights:
        if name in tied and same_options(weights, name, tied[name], recipe):
            reporter.add_tied(name, tied[name])
            continue
        shape, dtype = spec_of(weights, name)
        options, reason = recipe.of(name, shape, dtype)
        before = stored_nbytes(weights, name)
        if is_packed(weights, name) or (options is not None and options.prunes):
            tensor, reason = pack_tensor(name, stored_of(weights, name), recipe)
            reporter.add(name, tensor, None, reason, nbytes_before=before)
            if isinstance(weights, Weights):
                weights.release(name)
        elif options is not None:
            assert options.bits is not None
            params = options.param_dtype, options.outliers, options.param_bits, options.param_group
            nbytes = quantized_nbytes(shape, options.bits, options.group_size, *params)
            two_levels = options.param_bits is not None and options.group_size == "auto"
            group_size = TWO_LEVEL_GROUP if two_levels else require_group_size(options.group_size, options.bits)
            reporter.add_planned(
                name,
                shape,
                dtype,
                "quantized",
                nbytes,
                reason,
                bits=options.bits,
                group_size=group_size,
                param_bits=options.param_bits,
            )
        else:
            reporter.add_planned(name, shape, dtype, "dense", math.prod(shape) * dtype.itemsize, reason)
    return reporter.report()


def pack_file(
    source: PathLike | Weights,
    target: PathLike | None = None,
    recipe: Recipe | None = None,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    dry_run: bool = False,
    notify: Notify | None = None,
    executor: Executor | None = None,
    **options: Unpack[RecipeOptions],
) -> Report:
    """Pack a model from file to file, as `pack` does, one tensor at a time.

    The largest tensor must fit in memory, both packed and unpacked. The disk of the target must hold the packed model
    twice. Tensors of the source that are packed already are treated as in `pack`.

    Parameters
    ----------
    source : path-like or Weights
        Any file that `open_weights` opens, or what it returned.
    target : path-like
        A safetensors file, which appears when it is complete and on the disk; it may be the source itself. With
        ``NAME.index.json``, each shard of the source becomes a shard beside it, and the index is written last.
        A folder, if the source is one, as Hugging Face's models are: its other files, such as config and tokenizer,
        are copied. A dry run needs no target.
    recipe, target_bits, target_size, **options
        As in `pack`. With only pruning options the file holds sparse tensors; `unpack_file` turns them into dense
        arrays with zeros.
    dry_run : bool
        Write nothing, and report the sizes without errors.
    notify : callable, optional
        Called with the bytes done, the bytes in total, and the name of the next tensor, "" at the end.
    executor : concurrent.futures.Executor, optional
        Measures and packs the tensors by tasks, in other processes or on other machines: a ``ProcessPoolExecutor``,
        Dask's ``Client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``. The workers read the source and write
        beside the target under the same paths as this process, and need this version of fastopt. The files are those
        that one process writes, byte for byte. A large tensor is packed some rows at a time, so that no worker needs
        memory for all of it, unless it is pruned, keeps `outliers`, is one group, or has calibration; its error in the
        report is then a sum in another order. `notify` hears of tensors when they are done.

    Returns
    -------
    Report
        It has the error of each tensor, except in a dry run.

    Raises
    ------
    OSError
        If a file cannot be opened or written; an existing target is then left as it was.
    TypeError, ValueError
        If the source is damaged, or as in `pack`. With an executor also if the source is no file that others can open,
        if it changes meanwhile, or if a worker has another version of fastopt.
    RuntimeError
        If the executor loses a task for good. After any error, and after an interrupt (Ctrl-C), the tasks that are left
        are cancelled, and an existing target stays as it was.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> np.savez("model.npz", w=np.random.default_rng(0).standard_normal((64, 128)).astype("f4"))
    >>> report = fo.pack_file("model.npz", "model.safetensors", bits=8)
    >>> report.nbytes_before, report.nbytes, report.error.snr > 40
    (32768, 8448, True)
    >>> fo.pack_file("model.npz", bits=4, dry_run=True).nbytes
    5120
    >>> fo.pack_file("model.npz", "pruned.safetensors", sparsity=0.9).tensors[0].density
    0.0999755859375
    """
    recipe = recipe_of(recipe, options)
    if target is None and not dry_run:
        raise TypeError("target: expected a path, got None; only a dry run needs none")
    if target is not None and Path(target).suffix == ".onnx":
        raise ValueError(f"target: {target} would be a safetensors file; fastopt.pack_onnx writes an ONNX model")
    weights = source if isinstance(source, Weights) else open_weights(source)
    warn_of_overrides(recipe, weights)
    searches = target_bits is not None or target_size is not None
    progress = Progress(weights.sizes, notify, passes=searches + (not dry_run))
    file = None if target is None else file_to_write(weights, target)
    shards = _shards(weights, file)
    write = _write_packed if executor is None else partial(_write_by_tasks, executor)

    def make(chosen: Recipe, check: Check) -> Report:
        if dry_run or target is None or file is None:
            report = plan(weights, chosen)
        else:
            progress.restart(int(searches))
            _make_folder(weights, target)
            report = write(weights, file, shards, chosen, check, progress)
            copy_others(weights, target, packed=True)
        warn_if_nothing_is_packed(chosen, [(t.kind != "dense", t.reason) for t in report.tensors])
        return report

    return make_to_fit(
        weights,
        recipe,
        make,
        target_bits=target_bits,
        target_size=target_size,
        notify=progress.next,
        sizes=Sizes(len(shards)),
        measure=None if executor is None else measure_by(executor, weights, progress, None if dry_run else file),
    )


def _write_by_tasks(
    executor: Executor,
    weights: Weights,
    target: Path,
    shards: Sequence[Sequence[str]],
    recipe: Recipe,
    check: Check,
    progress: Progress,
) -> Report:
    index_nbytes = partial(_index_nbytes, target, len(shards)) if _is_index(target) else None
    return pack_by(executor, weights, target, shards, recipe, check, progress, index_nbytes)


def _write_packed(
    weights: Weights, target: Path, shards: Sequence[Sequence[str]], recipe: Recipe, check: Check, progress: Progress
) -> Report:
    """Pack and write a model; `check` may raise before anything is replaced."""
    reporter = Reporter(recipe)
    written: dict[str, int] = {}  # bytes, by the name that an array has in the file
    file = 0

    def pack_some(path: Path, names: Sequence[str]) -> list[Part]:
        nonlocal file
        parts: list[Part] = []
        entries: dict[str, Any] = {}
        tied = {
            name: first for name, first in tied_in(weights, names).items() if same_options(weights, name, first, recipe)
        }
        biases = BiasCorrection(recipe, names)
        with naming(path), Scratch(path.parent) as scratch:
            for name in biases.order:
                progress.next(name)
                if name in tied:
                    reporter.add_tied(name, tied[name])
                    continue
                stored = stored_of(weights, name)
                tensor, reason = pack_tensor(name, stored, recipe)
                original = unpacked(stored)
                tensor, reason = biases.add(name, original, tensor, reason)
                compared = None if reason == CORRECTED else original
                reporter.add(name, tensor, compared, reason, nbytes_before=stored.nbytes)
                arrays, entry = disassemble(name, tensor)
                parts += [scratch.put(part, array) for part, array in arrays.items()]
                written.update((part, array.nbytes) for part, array in arrays.items())
                if entry is not None:
                    entries[name] = entry
                del stored, original, tensor, arrays
                weights.release(name)
            added = [*biases.rest()]
            for name, bias, reason in added:
                if name in weights:
                    raise ValueError(f"bias_correction: expected {name!r} in the same shard as its weight")
                reporter.add(name, bias, None, reason, nbytes_before=0)
                parts.append(scratch.put(name, bias))
                written[name] = bias.nbytes
            metadata = describe(
                [*names, *(name for name, *_ in added)], entries, recipe.to_dict(), tied, weights.metadata
            )
            file += file_nbytes(parts, metadata)
            check(sum(written.values()), file + _index_nbytes(target, len(shards), written))
            write_to(path, parts, metadata, require_readable)
        return parts

    _write_all(target, shards, pack_some)
    progress.next("")
    return reporter.report()


def unpack_file(
    source: PathLike | Weights,
    target: PathLike,
    *,
    notify: Notify | None = None,
    executor: Executor | None = None,
) -> None:
    """Unpack a model from file to file, one tensor at a time: all tensors become plain arrays.

    Parameters
    ----------
    source, target, notify
        As in `pack_file`. A source that is not packed is converted to safetensors.
    executor : concurrent.futures.Executor, optional
        As in `pack_file`; each file of the target is one task.

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
    weights = source if isinstance(source, Weights) else open_weights(source)
    file = file_to_write(weights, target)
    progress = Progress(weights.sizes, notify)

    shards = _shards(weights, file)
    _make_folder(weights, target)
    if executor is not None:
        unpack_by(executor, weights, file, shards, _is_index(file), progress)
    else:
        _write_all(file, shards, lambda path, names: write_plain(weights, path, names, progress.next))
    copy_others(weights, target, packed=False)
    progress.next("")


def _make_folder(weights: Weights, target: PathLike) -> None:
    if is_folder(weights, target):
        Path(target).mkdir(exist_ok=True)


def _shards(weights: Weights, target: PathLike | None) -> list[list[str]]:
    """Return the names in each file to write: one file, or, if the target is an index, one for each of the source."""
    if target is None or not _is_index(Path(target)) or not weights.shards:
        return [list(weights)]
    return [list(names) for names in weights.shards.values()]


def _is_index(target: Path) -> bool:
    return target.name.endswith(".index.json")


def _write_all(
    target: Path, shards: Sequence[Sequence[str]], write_some: Callable[[Path, Sequence[str]], list[Part]]
) -> None:
    if _is_index(target):
        write_shards(target, len(shards), lambda path, i: write_some(path, shards[i]))
    else:
        with replacing(target) as temporary:
            write_some(temporary, shards[0])


def _index_nbytes(target: Path, files: int, written: Mapping[str, int]) -> int:
    """Return the bytes of the index of such a model; 0 if it has none."""
    if not _is_index(target):
        return 0
    stem = target.name.removesuffix(".index.json").removesuffix(".safetensors")
    file = f"{stem}-{1:05}-of-{files:05}-{'0' * 16}.safetensors"
    index = {"metadata": {"total_size": sum(written.values())}, "weight_map": dict.fromkeys(written, file)}
    return len(json.dumps(index, indent=1)) + 1
