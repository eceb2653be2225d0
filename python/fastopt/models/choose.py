"""The choice of bits and group size for each tensor: the least error within a budget of bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from fastopt._text import shown
from fastopt._types import Array, GroupSize
from fastopt.files.safetensors_file import ALIGNMENT
from fastopt.files.weights import Weights, require_weight, spec_of, stored_nbytes, stored_of
from fastopt.models.recipe import Options, Recipe, naming_tensor, recipe_of
from fastopt.tensors.error import ErrorSums
from fastopt.tensors.packed import Weight, unpacked
from fastopt.tensors.pruning import prune
from fastopt.tensors.quantization import quantized_nbytes
from fastopt.tensors.quantized import QuantizedTensor
from fastopt.tensors.sparse import SparseTensor

# The group sizes to try if the recipe has none, by bits.
_GROUP_SIZES = {
    2: (16, 32, 64, 128, -1),
    3: (16, 32, 64, 128, -1),
    4: (16, 32, 64, 128, -1),
    5: (32, 128, -1),
    6: (64, -1),
    8: (128, -1),
}
_SPARSE_GROUP_SIZES = {2: (16, 32), 3: (16, 32), 4: (16, 32, 64), 5: (32, 64), 6: (64,), 8: (128,)}
_TWO_LEVEL_GROUP_SIZES = 32, 16

_SAMPLE = 1 << 20  # the most weights of a tensor that are measured
_UNITS_OF_BUDGET = 1 << 14
_WORST = 1e100  # the error of a setting whose decoded values are not finite
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Sizes:
    """The bytes that a model takes in a file: here in the safetensors file of a packed model.

    Parameters
    ----------
    files : int
        The number of shards.
    """

    def __init__(self, files: int = 1) -> None:
        self.files = files

    def quantized(
        self,
        shape: tuple[int, ...],
        bits: int,
        group_size: GroupSize,
        param_dtype: DTypeLike,
        outliers: float | None,
        param_bits: int | None = None,
        param_group: int = -1,
    ) -> int:
        """Return the bytes of a quantized tensor, at most."""
        return quantized_nbytes(shape, bits, group_size, param_dtype, outliers, param_bits, param_group)

    def stored(self, tensor: Weight) -> int:
        """Return the bytes of a packed tensor."""
        return tensor.nbytes

    def header(self, name: str, options: Options | None) -> int:
        """Return an estimate, rather too large, of the bytes that describe a tensor, and of its padding."""
        parts = 1 if options is None else 3 + 2 * (options.outliers is not None or options.prunes)
        parts += options is not None and options.param_bits is not None
        letters = len(json.dumps(name))
        recipes = (self.files - 1) * (200 + 2 * letters)
        return parts * (200 + letters + ALIGNMENT) + 400 + 3 * letters + recipes

    def rest(self, recipe: Recipe) -> int:
        """Return an estimate, rather too large, of the bytes of a file that belong to no tensor."""
        return 1000 + 2 * len(str(recipe.to_dict())) * self.files


@dataclass(frozen=True)
class Choice:
    """A setting of a tensor, with its bytes and its error: squared, relative to the tensor's square, and weighted."""

    nbytes: int
    error: float
    changes: dict[str, Any]


class Wanted(NamedTuple):
    """A tensor to be measured: its options, None if it is kept as it is, and whether its bits are open."""

    name: str
    options: Options | None
    is_open: bool


# Measures tensors, and gives the useful settings of each, or its bytes if nothing about it is open. The last argument
# is called with the name of each.
Measure: TypeAlias = Callable[
    [Mapping[str, Weight], Sequence[Wanted], Sizes, Callable[[str], None] | None],
    Iterable[tuple[str, int | list[Choice]]],
]


def choose_bits(
    weights: Mapping[str, Weight],
    recipe: Recipe,
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Recipe:
    """Return a recipe with bits and group size for each tensor, so that the model has a given size.

    Each tensor that the recipe packs is quantized with each width of codes and several group sizes, unless an override
    gives its bits; a group size of the recipe is the only one that is tried. The error is measured on at most a million
    weights of a tensor. The result is the combination of least error among those that fit.

    The error of a model is the sum of the squared relative errors of its tensors, each weighted by the square root of
    the tensor's size. Equal weights for tensors would starve the large ones, and equal weights for single values the
    small ones: on all-MiniLM-L6-v2, from 2.7 to 5 bits, either alone was the worst choice at some size, and the square
    root never was.

    Parameters
    ----------
    weights : mapping from name to array
    recipe : Recipe
        Its `bits` are None; its other options hold.
    target_bits : float, optional
        Bits for each weight of all tensors together, also of those that are kept as they are.
    target_size : int or str, optional
        Bytes of the saved model, as ``12_000_000``, ``"12MB"`` or ``"11.5MiB"``.
    notify : callable, optional
        Called with the name of each tensor before it is measured.

    Returns
    -------
    Recipe
        The recipe with an override for each chosen tensor; it makes the same model without a search. Without a
        target, `recipe` itself.

    Raises
    ------
    TypeError
        If `recipe` is no `Recipe`.
    ValueError
        If the target cannot be reached, both are given, or the recipe gives bits.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> rng = np.random.default_rng(0)
    >>> weights = {name: rng.standard_normal((64, 256)).astype("f4") for name in ("a", "b")}
    >>> recipe = fo.choose_bits(weights, fo.Recipe(fit="lsq"), target_bits=4.5)
    >>> recipe.overrides["a"]
    {'bits': 4, 'group_size': 64}
    >>> fo.pack(weights, recipe=recipe).report().bits_per_weight
    4.5
    """
    recipe = recipe_of(recipe, {})
    recipe.require_fitting(weights)
    if target_bits is None and target_size is None:
        return recipe
    return _Search(Sizes(), weights, recipe, target_bits, target_size, notify).recipe(strict=True)


# Raises if a model that was made, of so many bytes in its tensors and so many in its file, is larger than the target.
Check: TypeAlias = Callable[[int, int], None]
T = TypeVar("T")


def make_to_fit(
    weights: Mapping[str, Weight],
    recipe: Recipe,
    make: Callable[[Recipe, Check], T],
    *,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    notify: Callable[[str], None] | None = None,
    sizes: Sizes | None = None,
    measure: Measure | None = None,
) -> T:
    """Return what `make` makes with the recipe that `choose_bits` chooses, and within the target.

    Parameters
    ----------
    weights, recipe, target_bits, target_size, notify
        As in `choose_bits`.
    make : callable
        Called with a recipe and a check. Before it replaces anything, it calls the check with the bytes of all tensors
        and of the whole file. If these are more than the target, the check raises, and `make` is called with a smaller
        recipe.
    sizes : Sizes, optional
        The bytes of tensors in the file, by default in a safetensors file.
    measure : Measure, optional
        Measures the tensors; by default they are measured here, one after the other.
    """
    recipe.require_fitting(weights)
    if target_bits is None and target_size is None:
        return make(recipe, lambda tensors, file: None)
    search = _Search(sizes or Sizes(), weights, recipe, target_bits, target_size, notify, measure)
    while True:
        try:
            return make(search.recipe(), search.check)
        except _TooLargeError as error:
            search.lower(error.excess)


class _TooLargeError(Exception):
    def __init__(self, excess: int) -> None:
        super().__init__(f"{excess} bytes more than the target")
        self.excess = excess


class _Search:
    """The settings of each tensor with their bytes and errors, and a budget of bytes for all tensors."""

    def __init__(
        self,
        sizes: Sizes,
        weights: Mapping[str, Weight],
        recipe: Recipe,
        target_bits: float | None,
        target_size: int | str | None,
        notify: Callable[[str], None] | None,
        measure: Measure | None = None,
    ) -> None:
        if target_bits is not None and target_size is not None:
            raise ValueError("target_bits, target_size: expected one of them, got both")
        if target_bits is not None and not 0 <= target_bits < math.inf:
            raise ValueError(f"target_bits: expected a number, 0 or more, got {shown(target_bits)}")
        if recipe.bits is not None:
            raise ValueError(f"bits: expected None together with a target, got {recipe.bits}")
        size = None if target_size is None else parse_size(target_size)
        self._recipe, self._probe, self._target_bits = recipe, recipe.replace(bits=8), target_bits
        self._target = target_bits if target_size is None else target_size
        self._tried: dict[str, list[Choice]] = {}
        fixed = self._count = 0
        self._overhead = sizes.rest(recipe)
        wanted = []
        for name in weights:
            shape, dtype = spec_of(weights, name)
            self._count += int(np.prod(shape, dtype=object))
            options, _ = self._probe.of(name, shape, dtype)
            self._overhead += sizes.header(name, options)
            wanted.append(Wanted(name, options, "bits" not in self._probe.override_of(name)[1]))
        for name, found in (measure or _measured_here)(weights, wanted, sizes, notify):
            if isinstance(found, list):
                self._tried[name] = found
            else:
                fixed += found
        self._limit = int((target_bits or 0) * self._count / 8) if size is None else size
        self._budget = self._limit if size is None else size - self._overhead
        self._least = fixed + sum(choices[0].nbytes for choices in self._tried.values())
        self._smallest = False

    def recipe(self, *, strict: bool = False) -> Recipe:
        """Return the recipe of least error within the budget.

        The overhead is an estimate, so the smallest recipe is returned too if only that can fit, unless `strict`.
        """
        if self._least > self._budget:
            if strict or self._smallest or self._target_bits is not None or self._least > self._limit:
                self._refuse(self._least + (self._overhead if self._target_bits is None else 0))
            self._smallest = True
        best = _best(list(self._tried.values()), max(self._budget - self._least, 0))
        mine = {
            escape(name): {**self._probe.override_of(name)[1], **choice.changes}
            for name, choice in zip(self._tried, best, strict=True)
        }
        others = {pattern: changes for pattern, changes in self._recipe.overrides.items() if pattern not in mine}
        return self._recipe.replace(overrides={**mine, **others})

    def check(self, tensors: int, file: int) -> None:
        """Raise if a model of these bytes is larger than the target."""
        excess = (file if self._target_bits is None else tensors) - self._limit
        if excess > 0:
            raise _TooLargeError(excess)

    def lower(self, excess: int) -> None:
        """Lower the budget, because a model had so many bytes more than the target."""
        if self._smallest or self._budget <= self._least:
            self._refuse(self._limit + excess)
        self._budget = max(self._budget - excess, self._least)

    def _refuse(self, needed: int) -> NoReturn:
        if self._target_bits is not None:
            fewest = 8 * needed / max(self._count, 1)
            raise ValueError(f"target_bits: expected at least {fewest:.3f}, got {self._target_bits}")
        raise ValueError(f"target_size: expected at least {size_like(needed, self._target)}, got {self._target}")


def measured(weights: Mapping[str, Weight], wanted: Wanted, sizes: Sizes) -> int | list[Choice]:
    """Return the useful settings of a tensor, or its bytes if nothing about it is open."""
    name, options = wanted.name, wanted.options
    if options is None:
        return stored_nbytes(weights, name)
    with naming_tensor(name):
        tensor = require_weight(name, stored_of(weights, name))
        if wanted.is_open:
            return _useful(_choices(tensor, options, sizes))
        return sizes.stored(options.apply(tensor))


def _measured_here(
    weights: Mapping[str, Weight], wanted: Sequence[Wanted], sizes: Sizes, notify: Callable[[str], None] | None
) -> Iterator[tuple[str, int | list[Choice]]]:
    for one in wanted:
        if notify is not None:
            notify(one.name)
        yield one.name, measured(weights, one, sizes)
        if isinstance(weights, Weights):
            weights.release(one.name)


def _choices(tensor: Weight, options: Options, sizes: Sizes) -> Iterator[Choice]:
    """Yield the bytes and the error of a tensor for each setting that is open."""
    pruned: SparseTensor | None = None
    array = unpacked(tensor)
    if isinstance(tensor, SparseTensor) and not options.prunes:
        pruned, sample = tensor, array
    elif options.prunes:
        pruned = prune(array, threshold=options.threshold, sparsity=options.sparsity, pattern=options.pattern)
        sample = pruned.to_dense()
    else:
        step = max(1, -(-array.size // _SAMPLE))
        sample = array[::step] if array.ndim > 1 else array
    for bits in _GROUP_SIZES:
        groups: tuple[Any, ...] = (options.group_size,)
        if options.group_size == "auto":
            groups = (_GROUP_SIZES if pruned is None else _SPARSE_GROUP_SIZES)[bits]
            groups = groups if options.param_bits is None else _TWO_LEVEL_GROUP_SIZES
        for group_size in groups:
            changes = {"bits": bits, "group_size": group_size}
            changed = options.changed({**changes, "fit": "lsq"} if options.fit == "gptq" else changes)  # much faster
            if pruned is None:
                q = changed.apply(sample)
                assert isinstance(q, QuantizedTensor)
                params = q.param_dtype, changed.outliers, q.param_bits, q.param_group
                nbytes = sizes.quantized(array.shape, bits, group_size, *params)
                sums = q.error_sums(sample)
            else:
                s = changed.apply(pruned) if pruned is tensor else changed.quantize_values(pruned)
                nbytes, sums = sizes.stored(s), ErrorSums()
                sums.add(s.to_dense(), sample)
            noise, signal = sums.noise, sums.signal
            if options.importance is not None:
                noise, signal = _weighted(sample, unpacked(q if pruned is None else s))
            if options.inputs is not None:
                noise, signal = options.inputs.output_error(sample, unpacked(q if pruned is None else s))
            relative = noise / signal if signal > 0 else 0.0
            yield Choice(nbytes, relative * math.sqrt(array.size) if math.isfinite(relative) else _WORST, changes)


def _weighted(w: Array, q: Array) -> tuple[float, float]:
    """Return the squared error of a weight and its square, each weighted by `importance="magnitude"`."""
    theirs, ours = w.astype(np.float64), q.astype(np.float64)
    weight = np.abs(theirs) + math.sqrt(np.square(theirs).mean()) if theirs.size else theirs
    return float((weight * np.square(ours - theirs)).sum()), float((weight * np.square(theirs)).sum())


def _useful(choices: Iterator[Choice]) -> list[Choice]:
    """Return the choices by rising bytes, without those that another choice beats in both bytes and error."""
    useful: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.error)):
        if not useful or choice.error < useful[-1].error:
            useful.append(choice)
    return useful


def _best(tensors: list[list[Choice]], budget: int) -> list[Choice]:
    """Return a choice for each tensor, with the least total error that a budget of bytes beyond the smallest allows.

    This is dynamic programming over tensors and bytes, which are counted in units: ``least[b]`` is the least error of
    the tensors so far for b units.
    """
    unit = max(1, -(-budget // _UNITS_OF_BUDGET))
    least = np.zeros(budget // unit + 1)
    picks = []
    for choices in tensors:
        before, least = least, least + choices[0].error
        pick = np.zeros(least.size, np.uint8)
        for c, choice in enumerate(choices[1:], 1):
            cost = -(-(choice.nbytes - choices[0].nbytes) // unit)
            error = before[: max(least.size - cost, 0)] + choice.error
            better = np.flatnonzero(error < least[cost:])
            least[cost + better] = error[better]
            pick[cost + better] = c
        picks.append(pick)
    chosen, left = [0] * len(tensors), least.size - 1
    for t in reversed(range(len(tensors))):
        chosen[t] = int(picks[t][left])
        left -= -(-(tensors[t][chosen[t]].nbytes - tensors[t][0].nbytes) // unit)
    return _filled(tensors, chosen, budget)


def _filled(tensors: list[list[Choice]], chosen: list[int], budget: int) -> list[Choice]:
    """Spend the bytes that the rounding to units left, each time on the step that gains most for a byte."""
    budget -= sum(choices[c].nbytes - choices[0].nbytes for choices, c in zip(tensors, chosen, strict=True))
    while True:
        steps = [
            ((choices[c].error - better.error) / (better.nbytes - choices[c].nbytes), -t, -to)
            for t, (choices, c) in enumerate(zip(tensors, chosen, strict=True))
            for to, better in enumerate(choices[c + 1 :], c + 1)
            if better.nbytes - choices[c].nbytes <= budget
        ]
        if not steps:
            return [choices[c] for choices, c in zip(tensors, chosen, strict=True)]
        _, t, to = max(steps)
        budget -= tensors[-t][-to].nbytes - tensors[-t][chosen[-t]].nbytes
        chosen[-t] = -to


def parse_size(size: int | str) -> int:
    """Return the number of bytes that is given as a number, or as a text such as "12MB" or "1.5 GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", str(size).lower())
    if match is None or isinstance(size, bool):
        raise ValueError(f"target_size: expected bytes, as 12000000 or '12MB', got {shown(size)}")
    return int(float(match[1]) * _UNITS[match[2]])


def size_like(nbytes: int, like: object) -> str:
    """Return a number of bytes in the unit of another size that `parse_size` takes, rounded up."""
    match = re.fullmatch(r"\s*[\d.]+(\s*)([a-zA-Z]+)\s*", str(like))
    unit = parse_size(f"1{match[2]}") if match else 1
    if match is None or unit == 1:
        return f"{nbytes} bytes"
    digits = max(2, 2 - math.floor(math.log10(max(nbytes, 1) / unit)))
    return f"{math.ceil(nbytes / unit * 10**digits) / 10**digits:.{digits}f}{match[1]}{match[2]}"
