"""Threads, and what the library runs on."""

import ml_dtypes
import numpy as np

from fastopt import _core
from fastopt._checks import as_index


def get_num_threads() -> int:
    """Return how many threads a call may use.

    The default is ``OMP_NUM_THREADS``, up to 4096, or the number of cores that the process may run on. It is 1 in a
    build without threads.

    Returns
    -------
    int

    Examples
    --------
    >>> import fastopt as fo
    >>> fo.set_num_threads(1)
    >>> fo.get_num_threads()
    1
    """
    return _core.get_num_threads()


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use; small work takes fewer.

    Results do not depend on it: they are bit for bit the same for any number. If the system refuses to start so many
    threads, because a limit on processes or memory is reached, a call uses those that there are.

    Parameters
    ----------
    n : int
        At least 1. A build without threads uses one whatever is asked for.

    Raises
    ------
    TypeError
        If `n` is not a whole number.
    ValueError
        If `n` is below 1 or above 4096.

    Examples
    --------
    >>> import fastopt as fo
    >>> fo.set_num_threads(2)
    """
    count = as_index(n, "n")
    if not 1 <= count <= 4096:
        raise ValueError(f"n: expected 1 to 4096 threads, got {count}")
    _core.set_num_threads(count)


def show_config() -> None:
    """Print the version, the instruction set in use and those available, threads, compiler and dependencies.

    The environment variable ``FASTOPT_ISA`` forces an instruction set.

    Examples
    --------
    >>> import fastopt as fo
    >>> fo.show_config()  # doctest: +ELLIPSIS
    fastopt ...
    """
    print(f"fastopt {_core.__version__}")
    print(f"  isa          {_core.isa()} (available: {', '.join(_core.available_isas())})")
    print(f"  threads      {_core.get_num_threads()}{'' if _core.threaded else ' (built without threads)'}")
    print(f"  compiler     {_core.compiler}")
    print(f"  numpy        {np.__version__}")
    print(f"  ml_dtypes    {ml_dtypes.__version__}")
