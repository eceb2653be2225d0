"""Progress of long work, counted in bytes."""

from collections.abc import Iterable, Mapping

from fastopt._types import Notify


class Progress:
    """Tells how many bytes of a model are done.

    Parameters
    ----------
    sizes : mapping from name to int
        Bytes of each tensor.
    notify : callable or None
        Called with the bytes that are done, those of all, and the name of the next tensor.
    passes : int
        How many times the whole model is gone through.
    """

    def __init__(self, sizes: Mapping[str, int], notify: Notify | None, passes: int = 1) -> None:
        self._sizes, self._notify = sizes, notify
        self._done, self._total, self._name = 0, passes * sum(sizes.values()), ""

    def restart(self, passes: int) -> None:
        """Tell that after so many complete passes the work starts again."""
        self._done, self._name = passes * sum(self._sizes.values()), ""

    def next(self, name: str) -> None:
        """Tell that the tensor named before is done, and that `name` is next."""
        if self._name:
            self._done += self._sizes[self._name]
        self._name = name
        if self._notify is not None:
            self._notify(self._done, self._total, name)

    def add(self, names: Iterable[str], nbytes: int) -> None:
        """Tell that so many bytes of some tensors are done, in whatever order."""
        self._done += nbytes
        if self._notify is not None:
            self._notify(self._done, self._total, next(iter(names), ""))
