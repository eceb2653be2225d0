"""Weights of a file, read one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastopt._text import shown
from fastopt._types import Array
from fastopt.files.safetensors_file import _nothing
from fastopt.tensors.packed import PackedTensor, Weight


@dataclass(frozen=True)
class Origin:
    """Where weights were opened, for other processes that open them again.

    Attributes
    ----------
    path : str
        The absolute path that was given.
    key : str or None
    skip : tuple of str
    stamps : dict from path to (int, int)
        Bytes and time of change of each file, in nanoseconds, when it was opened.
    """

    path: str
    key: str | None
    skip: tuple[str, ...]
    stamps: dict[str, tuple[int, int]]


class Weights(Mapping[str, Array]):
    """The arrays of a model's files by name; each is read when it is accessed, and not kept.

    Made by `open_weights`.

    Parameters
    ----------
    sources : mapping from name to Source
    shards : mapping from file name to names, optional
        The arrays of each file, if there are several files.
    metadata : mapping of str, optional
        Texts of other programs in the file, such as its licence.
    folder : Path, optional
        The folder that was opened, if it was not a file.
    origin : Origin, optional
        Where other processes can open the same weights.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        shards: Mapping[str, Sequence[str]] | None = None,
        metadata: Mapping[str, str] | None = None,
        folder: Path | None = None,
        origin: Origin | None = None,
    ) -> None:
        self._sources = dict(sources)
        self.folder = folder
        self.shards = shards
        self.metadata = dict(metadata or {})
        self.origin = origin

    def __getitem__(self, name: str) -> Array:
        return self._sources[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._sources  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __repr__(self) -> str:
        return f"Weights({len(self)} arrays, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(source.nbytes for source in self._sources.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each array."""
        return {name: source.nbytes for name, source in self._sources.items()}

    def only(self, names: Sequence[str]) -> Weights:
        """Return the arrays of these names.

        Parameters
        ----------
        names : sequence of str

        Returns
        -------
        Weights
        """
        return type(self)({name: self._sources[name] for name in names}, metadata=self.metadata)

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Return the same arrays under other names.

        Parameters
        ----------
        names : mapping of str
            The new name of each.

        Returns
        -------
        Weights
        """
        return type(self)({names[name]: source for name, source in self._sources.items()}, metadata=self.metadata)

    def as_stored(self) -> StoredWeights:
        """Return the same mapping whose values are as the file stores them: packed tensors stay packed."""
        return StoredWeights(self._sources, self.shards, self.metadata, self.folder, self.origin)

    def spec(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape and the dtype of an array without reading it.

        Parameters
        ----------
        name : str

        Returns
        -------
        shape : tuple of int
        dtype : numpy.dtype
        """
        source = self._sources[name]
        return source.shape, source.dtype

    def has_rows(self, name: str) -> bool:
        """Return whether some rows of an array can be read without reading all of it: it is mapped, and not packed."""
        source = self._sources[name]
        return source.packed is None and source.identity is not None

    def release(self, name: str) -> None:
        """Free the memory of an array that was read and is not needed any more.

        Parameters
        ----------
        name : str
        """
        self._sources[name].release()


class StoredWeights(Weights):
    """`Weights` whose values are packed tensors where the file stores such."""

    def __getitem__(self, name: str) -> Weight:  # type: ignore[override]
        return stored_of(self, name)


@dataclass(frozen=True)
class Source:
    """How a weight is read.

    Attributes
    ----------
    shape, dtype
        Those of the array.
    read : callable
        Returns the array, unpacked.
    release : callable
        Frees its memory.
    packed : callable or None
        Returns the weight as it is stored, if that is packed.
    parts : sequence of str
        The names in the file, if the weight is stored as several arrays.
    identity : hashable
        The same for weights that are stored once; None if that is not known.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]
    release: Callable[[], None] = _nothing
    packed: Callable[[], PackedTensor] | None = None
    parts: Sequence[str] = ()
    identity: Hashable = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def _source_of(weights: Mapping[str, Weight], name: str) -> Source:
    """Return how a weight is read that is in a file or in memory already."""
    if isinstance(weights, Weights):
        return weights._sources[name]
    weight = require_weight(name, weights[name])
    if isinstance(weight, PackedTensor):
        return Source(weight.shape, weight.dtype, weight.to_dense, packed=lambda: weight)
    return Source(weight.shape, weight.dtype, lambda: weight)


def spec_of(weights: Mapping[str, Weight], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the dtype of a weight without reading it from a file."""
    source = _source_of(weights, name)
    return source.shape, source.dtype


def is_packed(weights: Mapping[str, Weight], name: str) -> bool:
    """Return whether a weight is packed already; it is not read."""
    return _source_of(weights, name).packed is not None


def stored_of(weights: Mapping[str, Weight], name: str) -> Weight:
    """Return a weight as it is stored: packed if it is packed already."""
    source = _source_of(weights, name)
    return source.read() if source.packed is None else source.packed()


def stored_nbytes(weights: Mapping[str, Weight], name: str) -> int:
    """Return the bytes that a weight takes where it is stored; a plain array of a file is not read."""
    source = _source_of(weights, name)
    return source.nbytes if source.packed is None else source.packed().nbytes


def tied_in(weights: Mapping[str, Weight], names: Iterable[str]) -> dict[str, str]:
    """Return the names whose tensor is also that of an earlier name, each with that name.

    Only files and dicts are asked: other mappings may make a new array each time.
    """
    first: dict[Hashable, str] = {}
    tied: dict[str, str] = {}
    if isinstance(weights, Weights):
        keys = {name: weights._sources[name].identity for name in names}
    else:
        keys = {name: _identity(weights[name]) for name in names} if isinstance(weights, dict) else {}
    for name, key in keys.items():
        if key is not None and first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _identity(weight: Any) -> Hashable:
    if isinstance(weight, np.ndarray) and weight.size:
        return weight.ctypes.data, weight.dtype.str, weight.shape, weight.strides
    return id(weight)


def require_name(name: Any) -> str:
    """Return the name of a weight, or raise if it is no text."""
    if not isinstance(name, str):
        raise TypeError(f"weights: expected texts as names, got {shown(name)}")
    return name


def require_weight(name: str, weight: Any) -> Weight:
    """Return a weight, or raise if it is neither an array nor packed, or its name is no text."""
    require_name(name)
    if not isinstance(weight, np.ndarray | PackedTensor):
        raise TypeError(f"weights: {name!r} is a {type(weight).__name__}, expected a NumPy array")
    return weight
