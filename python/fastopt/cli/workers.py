"""The options that let other processes or machines do the work, and the executors behind them."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from importlib import import_module
from typing import Annotated

import typer

from fastopt.config import set_num_threads

Workers = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Do the work in N processes of this machine.", show_default=False),
]
Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Do the work on the workers of a Dask scheduler, such as tcp://10.0.0.1:8786 (needs distributed). They "
        "need this version of fastopt, and the files under the same paths.",
        show_default=False,
    ),
]


@contextlib.contextmanager
def executor_of(workers: int | None, dask: str | None) -> Iterator[Executor | None]:
    """Give the executor that the options ask for, None if they ask for none."""
    if workers is not None and dask is not None:
        raise typer.BadParameter("--workers and --dask: expected one of them")
    if dask is not None:
        with _client(dask) as client:
            yield client
    elif workers is not None:
        with _pool(workers) as pool:
            yield pool
    else:
        yield None


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    # Imported here, since the command line starts fast.
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (threads,))  # no fork: the progress has a thread
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _client(address: str) -> Iterator[Executor]:
    try:
        distributed = import_module("distributed")
    except ImportError as error:
        raise ImportError("--dask needs distributed: pip install distributed") from error
    try:
        client = distributed.Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise OSError(f"--dask: no scheduler at {address}: {error}") from error
    with client:
        yield client.get_executor()


def _start(threads: int) -> None:
    """Start a worker: it leaves an interrupt to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
