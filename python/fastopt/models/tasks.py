"""Tasks that any `concurrent.futures.Executor` runs: in other processes, or on machines that share the files.

A task is an object that is called without arguments. It may run twice, also at the same time, because engines repeat
the tasks of a worker that they lost: it writes only files of its own, under names that nobody can guess, and its result
depends on its fields alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import secrets
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastopt._core import __version__
from fastopt.files.atomic import LOCK, folder_beside
from fastopt.files.sources import reopen, require_stamps, stamp_of
from fastopt.files.weights import Origin, Weights

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Named = TypeVar("Named")

# Bytes of the source in one task: at least, at most, and the number of tasks between.
_LEAST, _MOST, _TASKS = 32 << 20, 256 << 20, 256
# Bytes of an array that does not travel with its task.
_LARGE = 1 << 20


class Task(Protocol[R_co]):
    """Work on the tensors of some names."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors, for messages."""
        ...

    def __call__(self) -> R_co:
        """Do the work."""
        ...


# ---- here --------------------------------------------------------------------------------------------------------


class Jobs(Generic[R]):
    """Tasks that are submitted to an executor; those that are left are cancelled at the end of the ``with`` block.

    Parameters
    ----------
    executor : concurrent.futures.Executor
        Or any object with such a method ``submit``.
    beside : Path, optional
        A file that workers see the folder of. Large arrays of tasks, such as the sums of a calibration, then wait in a
        temporary folder there: the engine would hold them once for each task that waits.
    """

    def __init__(self, executor: Executor, beside: Path | None = None) -> None:
        if not callable(getattr(executor, "submit", None)):
            hint = "; Client.get_executor() of Dask returns one" if hasattr(executor, "get_executor") else ""
            raise TypeError(f"executor: expected a concurrent.futures.Executor, got {type(executor).__name__}{hint}")
        self._executor, self._beside = executor, beside
        self._folder: Path | None = None
        self._large: dict[int, tuple[NDArray[Any], str]] = {}  # by id, with the file
        self._stack = contextlib.ExitStack()
        self._running: dict[Future[R], Task[R]] = {}
        self._done: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()

    def submit(self, task: Task[R]) -> None:
        """Let a worker do a task."""
        # Pickled here, so that a worker with another version says so instead of failing to read the task.
        try:
            future = self._executor.submit(_run, __version__, self._pickled(task))
        except BrokenExecutor as error:
            raise _failure(task, error) from error
        self._running[future] = task
        future.add_done_callback(self._done.put)

    def __iter__(self) -> Iterator[tuple[Task[R], R]]:
        """Give tasks with their results as they are done, also those that are submitted meanwhile.

        Raises
        ------
        OSError, TypeError, ValueError, MemoryError
            That of a task, which names its tensor.
        RuntimeError
            If the engine has lost a task.
        """
        while self._running:
            future = self._done.get()
            task = self._running.pop(future)
            try:
                result = future.result()
            except Exception as error:
                if isinstance(error, _OURS):
                    raise
                raise _failure(task, error) from error
            yield task, result

    def _pickled(self, task: Task[R]) -> bytes:
        file = io.BytesIO()
        _Pickler(file, self._set_aside).dump(task)
        return file.getvalue()

    def _set_aside(self, array: NDArray[Any]) -> str | None:
        """Write a large array to a file, once; return the path, or None if the task keeps the array."""
        if self._beside is None or array.nbytes < _LARGE:
            return None
        if self._folder is None:
            place = next(folder for folder in self._beside.parents if folder.is_dir())
            self._folder = self._stack.enter_context(folder_beside(place / self._beside.name)).path
        if id(array) not in self._large:
            path = self._folder / f"{len(self._large)}.npy"
            np.save(path, array)
            self._large[id(array)] = array, str(path)
        return self._large[id(array)][1]

    def __enter__(self) -> Jobs[R]:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._running:
            future.cancel()
        self._stack.close()


class _Pickler(pickle.Pickler):
    """Pickles a task, and leaves arrays out that are set aside."""

    def __init__(self, file: io.BytesIO, set_aside: Callable[[NDArray[Any]], str | None]) -> None:
        super().__init__(file)
        self._set_aside = set_aside

    def persistent_id(self, item: Any) -> str | None:
        return self._set_aside(item) if type(item) is np.ndarray else None


def results(
    executor: Executor, tasks: Sequence[Task[R]], done: Callable[[Task[R]], None], beside: Path | None = None
) -> Iterator[R]:
    """Give the results of tasks in their order; `done` is called when one is done."""
    found: dict[int, R] = {}
    place = {id(task): i for i, task in enumerate(tasks)}
    with Jobs[R](executor, beside) as jobs:
        for task in tasks:
            jobs.submit(task)
        at = 0
        for task, result in jobs:
            found[place[id(task)]] = result
            done(task)
            while at in found:
                yield found.pop(at)
                at += 1


def origin_of(weights: object, name: str = "source") -> Origin:
    """Return where other processes can open weights, or raise."""
    origin = weights.origin if isinstance(weights, Weights) else None
    if origin is None:
        raise TypeError(f"{name}: expected a path, or what open_weights returned, together with an executor")
    return origin


def require_unchanged(origin: Origin) -> None:
    """Raise ValueError if a file of weights has changed since they were opened."""
    for file, stamp in origin.stamps.items():
        require_stamps({file: stamp_of(file)}, {file: stamp})


def placed_in(weights: Weights) -> dict[str, str]:
    """Return the file of the source's index that holds each tensor; nothing if there is no index."""
    return {name: file for file, names in (weights.shards or {}).items() for name in names}


def files_of(placed: Mapping[str, str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the files that hold some tensors."""
    return tuple(dict.fromkeys(placed[name] for name in names if name in placed))


def run_nbytes(total: int) -> int:
    """Return the bytes for each task, if a model has so many."""
    return min(max(total // _TASKS, _LEAST), _MOST)


def dealt(items: Iterable[Named], nbytes: Callable[[Named], int], most: int) -> Iterator[list[Named]]:
    """Deal items to runs of at most so many bytes; a larger item is a run of its own."""
    run: list[Named] = []
    size = 0
    for item in items:
        if run and size + nbytes(item) > most:
            yield run
            run, size = [], 0
        run.append(item)
        size += nbytes(item)
    if run:
        yield run


def _failure(task: Task[Any], error: Exception) -> RuntimeError:
    names = list(task.names)
    shown = repr(names[0]) if len(names) == 1 else f"{names[0]!r} to {names[-1]!r}"
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return RuntimeError(f"{shown}: the task failed, and nothing was replaced: {text}")


# ---- in a worker -------------------------------------------------------------------------------------------------


class _TaskError(RuntimeError):
    """An error in a task that is none of those that callers expect; its text names the tensor."""


_OURS = (OSError, TypeError, ValueError, MemoryError, _TaskError)


def _run(version: str, pickled: bytes) -> Any:
    """Do a task in a worker."""
    if version != __version__:
        raise ValueError(f"{_worker()} has fastopt {__version__}, expected {version}")
    return _Unpickler(io.BytesIO(pickled)).load()()


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, path: str) -> NDArray[Any]:
        require_folder(str(Path(path).parent))
        array: NDArray[Any] = np.load(path)
        return array


def opened(origin: Origin, shards: Collection[str] = (), names: Collection[str] = ()) -> Weights:
    """Open the weights of a task in a worker: only some files of an index, if these names are in them."""
    try:
        weights = reopen(origin, shards)
        if shards and not all(name in weights for name in names):  # a mask may be in another file than its weight
            weights = reopen(origin)
        return weights
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, on {_worker()}", error.filename) from error
    except ValueError as error:
        raise ValueError(f"{error} (on {_worker()})") from error


def require_folder(folder: str) -> Path:
    """Return the folder of temporary files, or raise if this worker does not see it."""
    path = Path(folder)
    if not (path / LOCK).exists():
        raise OSError(f"{folder}: {_worker()} does not see this folder; all workers need the file system of the target")
    return path


def temporary_in(folder: str) -> Path:
    """Return the path of a new file in the folder of temporary files."""
    return require_folder(folder) / secrets.token_hex(8)


@contextlib.contextmanager
def naming_task(name: str) -> Iterator[None]:
    """Put the name of a tensor before the message of an error, unless it is there."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(repr(name)):
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name!r}: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{name!r}: {error}") from error
        raise OSError(error.errno, f"{error.strerror}, at {name!r} on {_worker()}", error.filename) from error
    except MemoryError as error:
        raise MemoryError(f"{name!r}: not enough memory on {_worker()}") from error
    except Exception as error:
        raise _TaskError(f"{name!r}: {type(error).__name__}: {error} (on {_worker()})") from error


def _worker() -> str:
    return f"worker {socket.gethostname()}:{os.getpid()}"
