"""Packing and unpacking of files by the tasks of an executor; the files are those that one process writes.

The tensors of each file are dealt to runs by their bytes. A task packs a run, and writes its arrays to a file in a
folder beside the target. When all runs of a file are there, another task joins them to the file. The folder is on the
file system that all workers share, and disappears at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastopt._types import Array
from fastopt.files.atomic import Temporary, folder_beside, move, naming, real_path
from fastopt.files.container import describe, disassemble, require_readable
from fastopt.files.mapped import Map
from fastopt.files.safetensors_file import ALIGNMENT, Part, file_nbytes, require_dtype, write_array, write_to
from fastopt.files.shards import Shard, digest_of, nbytes_of, place_shards
from fastopt.files.weights import Origin, Weights, is_packed, stored_of, tied_in
from fastopt.models.bias import CORRECTED, BiasCorrection, missing_of
from fastopt.models.choose import Check, Choice, Measure, Sizes, Wanted
from fastopt.models.choose import measured as choices_of
from fastopt.models.recipe import PACKED_BEFORE, Options, Recipe, same_options
from fastopt.models.report import Report, Reporter, TensorReport, bits_per_weight
from fastopt.models.report import measured as report_of
from fastopt.models.tasks import (
    Jobs,
    Task,
    dealt,
    files_of,
    naming_task,
    opened,
    origin_of,
    placed_in,
    require_unchanged,
    results,
    run_nbytes,
    temporary_in,
)
from fastopt.progress import Progress
from fastopt.tensors.calibration import InputSums
from fastopt.tensors.error import ErrorSums
from fastopt.tensors.packed import Weight, unpacked

# Bytes of the file of an index with these stored arrays.
IndexBytes = Callable[[dict[str, int]], int]


# ---- packing: the tasks ------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A tensor to be packed, or some of its rows; without options it is kept as it is."""

    name: str
    rows: tuple[int, int] | None
    nbytes: int
    options: Options | None
    reason: str
    inputs: InputSums | None  # of a weight whose bias is corrected

    @property
    def key(self) -> tuple[str, int]:
        """The name and the first row."""
        return self.name, self.rows[0] if self.rows else 0


class _Stored(NamedTuple):
    """An array in a file of temporary arrays."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: str
    start: int


class _Packed(NamedTuple):
    """A tensor that was packed, or some rows of it: its arrays, its description, its report, its error.

    `missing` is what its outputs lose on average, if its bias is corrected.
    """

    arrays: dict[str, _Stored]
    entry: dict[str, Any] | None
    report: TensorReport
    sums: ErrorSums | None
    missing: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class _PackRun:
    """Packs a run of tensors of one file of the target."""

    origin: Origin
    folder: str
    shard: int
    sources: tuple[str, ...]  # the files of the source's index that hold them
    items: tuple[_Item, ...]
    again: bool

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.items]

    def __call__(self) -> list[_Packed]:
        path = temporary_in(self.folder)
        weights = opened(self.origin, self.sources, self.names)
        made = []
        with naming(path), path.open("xb") as file:
            for item in self.items:
                with naming_task(item.name):
                    made.append(_pack_item(weights, item, file, path.name))
                weights.release(item.name)
        _require_still(weights)
        return made


def _pack_item(weights: Weights, item: _Item, file: Any, file_name: str) -> _Packed:
    name, rows, options = item.name, item.rows, item.options
    whole = stored_of(weights, name)
    stored = whole if rows is None else whole[rows[0] : rows[1]]
    tensor: Weight = stored
    if options is not None:
        try:
            tensor = options.apply(stored)
        except ValueError:
            if rows is not None:
                options.apply(whole)  # names the place in the whole tensor
            raise
    inputs = None if options is None else options.inputs
    report, sums = report_of(name, tensor, unpacked(stored), item.reason, nbytes_before=stored.nbytes, inputs=inputs)
    arrays, entry = disassemble(name, tensor)
    placed = {part: _put(file, file_name, part, array) for part, array in arrays.items()}
    return _Packed(placed, entry, report, sums, missing_of(name, unpacked(stored), tensor, item.inputs))


def _put(file: Any, file_name: str, part: str, array: Array) -> _Stored:
    file.write(bytes(-file.tell() % ALIGNMENT))
    stored = _Stored(require_dtype(part, array.dtype), array.shape, file_name, file.tell())
    write_array(file, array)
    return stored


def _require_still(weights: Weights) -> None:
    """Raise if a file of the source was changed while it was read."""
    assert weights.origin is not None
    require_unchanged(weights.origin)


class _File(NamedTuple):
    """A file in the folder of temporary files, and the digest of its content."""

    name: str
    digest: str


@dataclass(frozen=True, eq=False)
class _Join:
    """Joins the arrays of all runs to a file of the target."""

    folder: str
    shard: int
    names: tuple[str, ...]
    arrays: dict[str, tuple[_Stored, ...]]  # in runs of rows
    metadata: dict[str, str]

    def __call__(self) -> _File:
        path = temporary_in(self.folder)
        maps: dict[str, Map] = {}

        def part(name: str, runs: Sequence[_Stored]) -> Part:
            def make() -> Iterator[Array]:
                for stored in runs:
                    if stored.file not in maps:
                        with (path.parent / stored.file).open("rb") as file:
                            maps[stored.file] = Map(file)
                    source = maps[stored.file]
                    array = source.array(stored.dtype, stored.shape, stored.start)
                    yield array
                    source.release(stored.start, stored.start + array.nbytes)

            return Part(name, runs[0].dtype, _whole_shape(runs), make)

        write_to(path, [part(*item) for item in self.arrays.items()], self.metadata, require_readable)
        return _synced(path)


def _whole_shape(runs: Sequence[_Stored]) -> tuple[int, ...]:
    shape = runs[0].shape
    return shape if len(runs) == 1 else (sum(run.shape[0] for run in runs), *shape[1:])


def _synced(path: Path) -> _File:
    """Wait until a file is on the disk; the process that moves it may be on another machine."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _File(path.name, digest_of(path))


# ---- packing: the plan -------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """A file of the target: its tensors, those that are stored under another name, and what is packed so far."""

    names: Sequence[str]
    tied: dict[str, str]
    items: list[_Item]
    packed: dict[tuple[str, int], _Packed] = field(default_factory=dict)  # by name and first row
    missing: int = 0


def pack_by(
    executor: Executor,
    weights: Weights,
    target: Path,
    shards: Sequence[Sequence[str]],
    recipe: Recipe,
    check: Check,
    progress: Progress,
    index_nbytes: IndexBytes | None,
) -> Report:
    """Pack and write a model by tasks; `check` may raise before anything is replaced.

    Parameters
    ----------
    executor, weights, target, recipe, check, progress
    shards : sequence of sequences of str
        The names in each file.
    index_nbytes : callable or None
        The bytes of the index; None if the target is one file.
    """
    origin, target, placed, nbytes = origin_of(weights), real_path(target), placed_in(weights), weights.sizes
    most = run_nbytes(sum(nbytes.values()))
    with naming(target), folder_beside(target) as folder, Jobs[Any](executor, target) as jobs:
        plans = [_planned(weights, names, nbytes, recipe, most) for names in shards]

        def submit(shard: int, items: Sequence[_Item], again: bool = False) -> None:
            for run in dealt(items, lambda item: item.nbytes, most):
                sources = files_of(placed, (item.name for item in run))
                jobs.submit(_PackRun(origin, str(folder.path), shard, sources, tuple(run), again))
                plans[shard].missing += 1

        for shard, plan in enumerate(plans):
            submit(shard, plan.items)
        reporter, written, joined = Reporter(recipe), dict[str, int](), dict[int, _File]()
        contents: list[dict[str, int]] = []
        file = 0

        def join_complete() -> None:
            """Join the runs of the next files, as far as they are complete."""
            nonlocal file
            while len(contents) < len(plans) and plans[len(contents)].missing == 0:
                plan = plans[len(contents)]
                again = _again(plan)
                if again:
                    submit(len(contents), again, True)
                    return
                names, arrays, entries = _content(
                    plan, reporter, BiasCorrection(recipe, plan.names), weights, folder.path
                )
                metadata = describe(names, entries, recipe.to_dict(), plan.tied, weights.metadata)
                parts = [Part(name, runs[0].dtype, _whole_shape(runs), _never) for name, runs in arrays.items()]
                written.update(nbytes_of(parts))
                file += file_nbytes(parts, metadata)
                check(sum(written.values()), file + (index_nbytes(written) if index_nbytes else 0))
                jobs.submit(_Join(str(folder.path), len(contents), tuple(plan.names), arrays, metadata))
                contents.append(nbytes_of(parts))
                if plan.tied:
                    progress.add(plan.tied, sum(nbytes[name] for name in plan.tied))

        join_complete()
        for task, result in jobs:
            if isinstance(task, _Join):
                joined[task.shard] = result
                continue
            assert isinstance(task, _PackRun)
            plan = plans[task.shard]
            for item, packed in zip(task.items, result, strict=True):
                if not task.again:
                    progress.add([item.name], item.nbytes)
                plan.packed[item.key] = packed
            plan.missing -= 1
            join_complete()
        require_unchanged(origin)
        made = [(joined[i], stored) for i, stored in enumerate(contents)]
        _place(target, folder, made, index_nbytes is not None)
    progress.next("")
    return reporter.report()


def _place(target: Path, folder: Temporary, made: Sequence[tuple[_File, dict[str, int]]], is_index: bool) -> None:
    """Move finished files to their places."""
    files = [Temporary(folder.path / file.name, folder.mode) for file, _ in made]
    if is_index:
        place_shards(
            target, [Shard(path, file.digest, nbytes) for path, (file, nbytes) in zip(files, made, strict=True)]
        )
    else:
        move(files[0], target)


def _never() -> Array:
    raise AssertionError("only the size of this part is known")


def _planned(weights: Weights, names: Sequence[str], nbytes: Mapping[str, int], recipe: Recipe, most: int) -> _Plan:
    tied = {
        name: first for name, first in tied_in(weights, names).items() if same_options(weights, name, first, recipe)
    }
    items = [item for name in names if name not in tied for item in _items(weights, name, nbytes[name], recipe, most)]
    return _Plan(names, tied, items)


def _items(weights: Weights, name: str, nbytes: int, recipe: Recipe, most: int) -> Iterator[_Item]:
    """Give a tensor, or its rows some at a time if it is large and its rows are packed independently of each other."""
    shape, dtype = weights.spec(name)
    options, reason = recipe.of(name, shape, dtype)
    if is_packed(weights, name):
        reason += PACKED_BEFORE
    alone = options is None or (len(shape) > 1 and _packs_rows_alone(options))
    if nbytes <= most or not shape or not alone or not weights.has_rows(name):
        yield _Item(name, None, nbytes, options, reason, recipe.inputs_of(name) if recipe.bias_correction else None)
        return
    row = nbytes // shape[0]
    step = max(1, most // row)
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        yield _Item(name, (begin, end), (end - begin) * row, options, reason, None)


def _packs_rows_alone(options: Options) -> bool:
    shared = options.outliers is not None or options.group_size is None
    return not options.prunes and not shared and options.inputs is None  # whose output error is that of all rows


def _again(plan: _Plan) -> list[_Item]:
    """Return what must be packed again, because runs of rows of one tensor are not stored alike.

    If float16 cannot hold the parameters of some rows, the others get float32 too, as in one process. If that is not
    the difference, the tensor is packed as a whole.
    """
    runs: dict[str, list[_Item]] = {}
    for item in plan.items:
        if item.rows is not None:
            runs.setdefault(item.name, []).append(item)
    again: list[_Item] = []
    for items in runs.values():
        if len({_storage_of(plan.packed[item.key]) for item in items}) == 1:
            continue
        narrow = [item for item in items if _has_narrow_params(plan.packed[item.key])]
        if 0 < len(narrow) < len(items):
            wide = [item.options.changed({"param_dtype": "float32"}) for item in narrow if item.options is not None]
            again += [item._replace(options=options) for item, options in zip(narrow, wide, strict=True)]
            continue
        whole = items[0]._replace(rows=None, nbytes=sum(item.nbytes for item in items))
        first = plan.items.index(items[0])
        plan.items[first : first + len(items)] = [whole]
        again.append(whole)
    return again


def _storage_of(packed: _Packed) -> str:
    """Return all that must be the same for the runs of a tensor."""
    entry = None if packed.entry is None else {**packed.entry, "shape": None}
    return repr((entry, [(name, stored.dtype.name, stored.shape[1:]) for name, stored in packed.arrays.items()]))


def _has_narrow_params(packed: _Packed) -> bool:
    ends = (".scale", ".param_floats")
    return any(name.endswith(ends) and stored.dtype == np.float16 for name, stored in packed.arrays.items())


def _content(
    plan: _Plan, reporter: Reporter, biases: BiasCorrection, weights: Weights, folder: Path
) -> tuple[list[str], dict[str, tuple[_Stored, ...]], dict[str, Any]]:
    """Return the names in a file, its arrays in runs of rows, and the descriptions of its tensors; report them."""
    runs: dict[str, list[_Packed]] = {}
    for item in plan.items:
        runs.setdefault(item.name, []).append(plan.packed[item.key])
    arrays: dict[str, tuple[_Stored, ...]] = {}
    entries: dict[str, Any] = {}

    def add(name: str, packed: Sequence[_Packed]) -> None:
        report, sums = _merged(packed)
        reporter.add_measured(report, sums)
        for part in packed[0].arrays:
            if part in arrays:
                raise ValueError(f"tensors: two would be stored as {part!r}")
            arrays[part] = tuple(run.arrays[part] for run in packed)
        if packed[0].entry is not None:
            entries[name] = {**packed[0].entry, "shape": report.shape}

    for name in biases.order:
        if name in plan.tied:
            reporter.add_tied(name, plan.tied[name])
        elif name in biases:
            stored = stored_of(weights, name)
            bias = biases.corrected(name, unpacked(stored))
            add(name, [_kept(folder, name, bias, CORRECTED, stored.nbytes)])
        else:
            missing = runs[name][0].missing
            if missing is not None:
                biases.note(name, missing)
            add(name, runs[name])
    names = list(plan.names)
    for name, bias, reason in biases.rest():
        if name in weights:
            raise ValueError(f"bias_correction: expected {name!r} in the same shard as its weight")
        add(name, [_kept(folder, name, bias, reason, 0)])
        names.append(name)
    return names, arrays, entries


def _kept(folder: Path, name: str, array: Array, reason: str, nbytes_before: int) -> _Packed:
    """Write a plain array that was computed here, for the task that joins a file."""
    path = temporary_in(str(folder))
    with path.open("xb") as file:
        stored = _put(file, path.name, name, array)
    report, sums = report_of(name, array, None, reason, nbytes_before=nbytes_before)
    return _Packed({name: stored}, None, report, sums)


def _merged(packed: Sequence[_Packed]) -> tuple[TensorReport, ErrorSums | None]:
    """Return the report and the error of a tensor that was packed in runs of rows."""
    first, sums = packed[0].report, packed[0].sums
    if len(packed) == 1:
        return first, sums
    shape = (sum(run.report.shape[0] for run in packed), *first.shape[1:])
    nbytes = sum(run.report.nbytes for run in packed)
    if sums is not None:
        sums = ErrorSums()
        for run in packed:
            assert run.sums is not None
            sums += run.sums
    return (
        replace(
            first,
            shape=shape,
            nbytes=nbytes,
            nbytes_before=sum(run.report.nbytes_before for run in packed),
            bits_per_weight=bits_per_weight(nbytes, shape),
            error=None if sums is None else sums.error(),
        ),
        sums,
    )


# ---- measuring for a target --------------------------------------------------------------------------------------

_MEASURED = 4 << 20  # the most bytes of a tensor that measuring reads, if it is not pruned


@dataclass(frozen=True, eq=False)
class _Measured:
    """Measures the settings of a run of tensors."""

    origin: Origin
    sources: tuple[str, ...]
    wanted: tuple[Wanted, ...]
    sizes: Sizes

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.wanted]

    def __call__(self) -> list[int | list[Choice]]:
        weights, found = opened(self.origin, self.sources, self.names), []
        for one in self.wanted:
            with naming_task(one.name):
                found.append(choices_of(weights, one, self.sizes))
            weights.release(one.name)
        _require_still(weights)
        return found


def measure_by(executor: Executor, weights: Weights, progress: Progress, target: Path | None) -> Measure:
    """Return a function that measures the tensors of a model by tasks, before it is written to `target`."""
    origin, nbytes, placed = origin_of(weights), weights.sizes, placed_in(weights)
    beside = None if target is None else real_path(target)

    def cost(one: Wanted) -> int:
        if one.options is None:
            return 0
        return nbytes[one.name] if one.options.prunes else min(nbytes[one.name], _MEASURED)

    def measure(_: object, wanted: Sequence[Wanted], sizes: Sizes, __: object) -> Iterator[tuple[str, Any]]:
        tasks = [
            _Measured(origin, files_of(placed, (one.name for one in run)), tuple(run), sizes)
            for run in dealt(wanted, cost, 4 * _MEASURED)
        ]

        def done(task: Task[Any]) -> None:
            progress.add(task.names, sum(nbytes[name] for name in task.names))

        for task, found in zip(tasks, results(executor, tasks, done, beside), strict=True):
            yield from zip(task.names, found, strict=True)

    return measure


# ---- unpacking ---------------------------------------------------------------------------------------------------


def write_plain(weights: Weights, path: Path, names: Sequence[str], started: Callable[[str], None]) -> list[Part]:
    """Write tensors as plain arrays to a file; `started` is called with the name of each."""

    def part(name: str) -> Part:
        shape, dtype = weights.spec(name)

        def make() -> Array:
            started(name)
            return weights[name]

        return Part(name, require_dtype(name, dtype), shape, make, lambda: weights.release(name))

    tied = tied_in(weights, names)
    parts = [part(name) for name in names if name not in tied]
    write_to(path, parts, {**weights.metadata, **tied})
    return parts


@dataclass(frozen=True, eq=False)
class _Unpack:
    """Unpacks the tensors of one file of the target."""

    origin: Origin
    sources: tuple[str, ...]
    folder: str
    metadata: dict[str, str]
    names: tuple[str, ...]

    def __call__(self) -> tuple[_File, dict[str, int]]:
        path, weights = temporary_in(self.folder), opened(self.origin, self.sources, self.names)
        weights.metadata = self.metadata
        at = ""

        def started(name: str) -> None:
            nonlocal at
            at = name

        try:
            parts = write_plain(weights, path, self.names, started)
        except Exception as error:
            with naming_task(at):
                raise error
        _require_still(weights)
        return _synced(path), nbytes_of(parts)


def unpack_by(
    executor: Executor,
    weights: Weights,
    target: Path,
    shards: Sequence[Sequence[str]],
    is_index: bool,
    progress: Progress,
) -> None:
    """Unpack a model by tasks, one for each file of the target."""
    origin, target, nbytes, placed = origin_of(weights), real_path(target), weights.sizes, placed_in(weights)
    with naming(target), folder_beside(target) as folder:
        tasks = [
            _Unpack(origin, files_of(placed, names), str(folder.path), weights.metadata, tuple(names))
            for names in shards
        ]

        def done(task: Task[Any]) -> None:
            progress.add(task.names, sum(nbytes[name] for name in task.names))

        made = list(results(executor, tasks, done))
        require_unchanged(origin)
        _place(target, folder, made, is_index)
