"""Recipes: the options that apply to each tensor of a model."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import DTypeLike

from fastopt._checks import as_matrix, require_bits, require_group_size, require_param_dtype
from fastopt._text import pattern_proposal, proposal, shown
from fastopt._types import DEFAULT_GROUP_SIZE, FLOATS, SPARSE_GROUP_SIZE, Array, Fit, GroupSize, PathLike
from fastopt.files.weights import require_name, require_weight, spec_of
from fastopt.models.calibration import Calibration
from fastopt.tensors.calibration import InputSums
from fastopt.tensors.packed import PackedTensor, Weight, unpacked
from fastopt.tensors.pruning import check_selection, prune
from fastopt.tensors.quantization import TWO_LEVEL_GROUP, quantize, require_fit
from fastopt.tensors.quantized import QuantizedTensor, require_two_levels
from fastopt.tensors.sparse import SparseTensor

# Sets of options by one word. docs/explanation/choosing-bits.md shows what they cost real models.
PRESETS: dict[str, dict[str, Any]] = {
    "safe": {"bits": 8, "group_size": 64, "fit": "lsq"},
    "balanced": {"bits": 5, "group_size": 32, "param_bits": 6, "fit": "lsq"},
    "small": {"bits": 4, "group_size": 32, "param_bits": 4, "fit": "lsq"},
}

# In ONNX, codes of 5 bits are stored in 8, and parameters of 6 too; so these take the place of some options there.
ONNX_PRESETS: dict[str, dict[str, Any]] = {"balanced": {"bits": 4, "group_size": 16, "param_bits": 8}}

_PRUNING = ("threshold", "sparsity", "pattern")


@dataclass(frozen=True)
class Options:
    """Options for packing one tensor.

    Attributes
    ----------
    bits : 8, 6, 5, 4, 3, 2 or None
        None: it is not quantized.
    group_size, param_dtype, param_bits, param_group, fit, outliers
        As in `quantize`.
    threshold, sparsity, pattern
        As in `prune`; the tensor is stored sparse. With `bits` too, its values are quantized. All None: it stays
        dense.
    importance : "magnitude" or None
        As in `quantize`. A tensor that was calibrated has the importance of its inputs instead.
    inputs : InputSums or None
        Sums over the inputs of the tensor, if it was calibrated.
    """

    bits: int | None = None
    group_size: GroupSize = "auto"
    param_dtype: DTypeLike = "float16"
    param_bits: int | None = None
    param_group: int = -1
    fit: Fit = "auto"
    outliers: float | None = None
    threshold: float | None = None
    sparsity: float | None = None
    pattern: str | None = None
    importance: Literal["magnitude"] | None = None
    inputs: InputSums | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.bits is not None:
            require_bits(self.bits)
        group_size = require_group_size(self.group_size, self.bits or 8)
        if self.param_bits is not None:
            auto = isinstance(self.group_size, str)
            require_two_levels(self.param_bits, self.param_group, TWO_LEVEL_GROUP if auto else group_size)
            if self.fit == "minmax":
                raise ValueError("fit: expected 'auto', 'lsq' or 'gptq' with param_bits, got 'minmax'")
        elif self.param_group != -1:
            raise ValueError(f"param_group: expected -1 without param_bits, got {shown(self.param_group)}")
        object.__setattr__(self, "param_dtype", require_param_dtype(self.param_dtype).name)
        for name in ("outliers", "threshold", "sparsity"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise TypeError(f"{name}: expected a number, got {shown(value)}")
        require_fit(self.fit)
        if self.outliers is not None and not 0 <= self.outliers <= 1:
            raise ValueError(f"outliers: expected a share between 0 and 1, got {shown(self.outliers)}")
        if self.importance not in (None, "magnitude"):
            raise ValueError(f"importance: expected 'magnitude' or None, got {shown(self.importance)}")
        if self.importance is not None and self.fit == "minmax":
            raise ValueError("importance: expected None with fit='minmax', which does not weigh errors")
        if self.prunes:
            check_selection(self.threshold, self.sparsity, self.pattern)
            if self.outliers is not None and self.bits is not None:
                raise ValueError("outliers: expected None for a tensor that is stored sparse")

    @property
    def prunes(self) -> bool:
        """True if the tensor is pruned and stored sparse."""
        return any(getattr(self, name) is not None for name in _PRUNING)

    def changed(self, other: Mapping[str, Any]) -> Options:
        """Return the options with some changed; a change of one pruning option resets the others."""
        fresh = dict.fromkeys(_PRUNING) if any(name in other for name in _PRUNING) else {}
        return Options(**{**{f.name: getattr(self, f.name) for f in fields(Options)}, **fresh, **other})

    def apply(self, tensor: Weight) -> QuantizedTensor | SparseTensor:
        """Return a tensor packed with these options; `bits` or a way to prune must be given.

        A sparse tensor stays sparse, so its zeros stay zero. A tensor that has these bits and groups already stays as
        it is.
        """
        if self.prunes:
            array = unpacked(tensor)
            pruned: SparseTensor = prune(array, threshold=self.threshold, sparsity=self.sparsity, pattern=self.pattern)
            return pruned if self.bits is None else self.quantize_values(pruned)
        if isinstance(tensor, SparseTensor):
            if self.outliers is not None:
                raise ValueError("outliers: expected None for a tensor that is stored sparse")
            if self._made(tensor.values, SPARSE_GROUP_SIZE):
                return tensor
            masked = tensor.layout in ("mask", "index16", "index8")  # others also store zeros, which must stay so
            return self.quantize_values(
                tensor if masked or np.all(unpacked(tensor.values)) else tensor.to_layout("auto")
            )
        if isinstance(tensor, QuantizedTensor) and self._made(tensor, DEFAULT_GROUP_SIZE):
            return tensor
        return quantize(
            unpacked(tensor),
            self.bits or 8,
            group_size=self.group_size,
            param_dtype=self.param_dtype,
            param_bits=self.param_bits,
            param_group=self.param_group,
            fit=self.fit,
            importance=self.importance if self.inputs is None else None,
            outliers=self.outliers,
            calibration=self.inputs,
        )

    def _made(self, values: Weight, group_sizes: Mapping[int, int]) -> bool:
        """Return whether values have these bits and groups already: quantized again they could only lose."""
        if not isinstance(values, QuantizedTensor) or values.bits != self.bits:
            return False
        group_size = self.group_size
        if group_size == "auto":
            group_size = group_sizes[values.bits] if self.param_bits is None else TWO_LEVEL_GROUP
        params = self.param_bits, self.param_group
        same = group_size == values.group_size and params == (values.param_bits, values.param_group)
        return same and values.param_dtype in (self.param_dtype, np.float32)

    def quantize_values(self, pruned: SparseTensor) -> SparseTensor:
        """Return a pruned tensor with its values in `bits` bits."""
        assert self.bits is not None
        if pruned.layout == "index16":  # index8 takes a third less, and a tenth more time
            pruned = pruned.to_layout("index8")
        weight: Array | Literal["magnitude"] | None = self.importance
        if self.inputs is not None:
            weight = None if self.fit == "minmax" else self.inputs.importance()
        fit: Fit = "lsq" if self.fit == "gptq" else self.fit  # the zeros cannot make good for errors
        return pruned.quantize(
            self.bits,
            group_size=self.group_size,
            param_dtype=self.param_dtype,
            param_bits=self.param_bits,
            param_group=self.param_group,
            fit=fit,
            importance=weight,
        )


_DATA = ("inputs", "calibration")  # fields that are no options: they are not written
_NO_FLOATS = "is not quantized or pruned"
_OPTIONS = tuple(f.name for f in fields(Options) if f.name != "inputs")


@dataclass(frozen=True)
class Recipe(Options):
    """Options for packing a model: defaults for all tensors, and overrides for names that match a glob pattern.

    Attributes
    ----------
    bits, group_size, param_dtype, param_bits, param_group, fit, outliers, importance
        As in `quantize`; ``bits=None`` does not quantize.
    threshold, sparsity, pattern
        As in `prune`. If one is given, tensors are stored sparse; with `bits`, their values are quantized.
    include, exclude : sequences of glob patterns
        A tensor is packed if its name matches a pattern of `include` and none of `exclude`.
    overrides : mapping from glob pattern to options
        Other values of the options above for tensors whose names match; the first pattern that matches counts.
    min_size : int
        Tensors of fewer weights are kept as they are.
    bias_correction : bool
        Add to each bias what its calibrated weight loses on average: ``b += (W - Q) @ E[x]``. The bias of
        ``NAME.weight`` is ``NAME.bias``, a new tensor if the model has none.
    calibration : Calibration or None
        Sums over the inputs of tensors, by their names, which a file does not keep. Scales and minima are then fitted
        to make the errors of the outputs small. A tensor without sums is packed without data, as its reason says, with
        ``fit="lsq"`` in the place of "auto" and "gptq".

    Raises
    ------
    TypeError, ValueError
        If an option is unknown or out of range.

    Examples
    --------
    >>> import fastopt as fo
    >>> recipe = fo.Recipe(bits=4, exclude=["*norm*"], overrides={"*embed*": {"bits": 8}})
    >>> options, reason = recipe.of("embed.weight", (1000, 64), "float32")
    >>> options.bits, reason
    (8, "override '*embed*'")
    >>> recipe.of("norm.weight", (4096,), "float32")
    (None, "excluded by '*norm*'")
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    min_size: int = 4096
    bias_correction: bool = False
    calibration: Calibration | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bias_correction, bool):
            raise TypeError(f"bias_correction: expected a bool, got {type(self.bias_correction).__name__}")
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise TypeError(f"calibration: expected a Calibration, got {type(self.calibration).__name__}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(getattr(self, name), name))
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides: expected a mapping, got {type(self.overrides).__name__}")
        changed = {}
        for pattern, options in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(options, Mapping):
                raise TypeError(f"overrides: expected options for a pattern, got {shown(options)} for {shown(pattern)}")
            unknown = sorted(set(map(str, options)) - set(_OPTIONS))
            if unknown:
                raise ValueError(
                    f"overrides: {pattern!r} has unknown options {unknown}{proposal(unknown[0], _OPTIONS)} "
                    f"(options: {', '.join(_OPTIONS)})"
                )
            try:
                checked = self.changed(options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides: {pattern!r}: {error}") from error
            changed[pattern] = {name: getattr(checked, name) for name in options}
        object.__setattr__(self, "overrides", changed)
        if isinstance(self.min_size, bool) or not isinstance(self.min_size, int) or self.min_size < 0:
            raise ValueError(f"min_size: expected a number, 0 or more, got {shown(self.min_size)}")

    def of(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[Options | None, str]:
        """Return what is done to a tensor, or None if it is kept as it is, and why.

        Parameters
        ----------
        name : str
        shape : tuple of int
        dtype : dtype

        Returns
        -------
        options : Options or None
        reason : str
        """
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return None, "not included"
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return None, f"excluded by {pattern!r}"
        kind = np.dtype(dtype).name
        if kind not in FLOATS:
            return None, f"{kind} {_NO_FLOATS}"
        size = int(np.prod(shape, dtype=object))
        if size < self.min_size:
            return None, f"{size} weights, fewer than min_size {self.min_size}"
        matching, changes = self.override_of(name)
        options = self.changed(changes)
        reason = "for all" if matching is None else f"override {matching!r}"
        if self.calibration is not None:
            options = options.changed({"inputs": self.inputs_of(name)})
            sums = options.inputs
            if sums is None:
                reason += "; no calibration"
                if options.fit in ("auto", "gptq"):
                    options = options.changed({"fit": "lsq"})
            elif options.fit == "gptq" and sums.rows < sums.columns:
                reason += f"; calibrated by {sums.rows} rows for {sums.columns} inputs"
        if options.bits is None and not options.prunes:
            return None, "nothing is asked for" if matching is None else reason
        return options, reason

    def inputs_of(self, name: str) -> InputSums | None:
        """Return the sums over the inputs of a tensor, None if none were seen."""
        sums = None if self.calibration is None else self.calibration.get(name)
        return sums if sums is not None and sums.rows else None

    def require_fitting(self, weights: Mapping[str, Weight]) -> None:
        """Raise unless all that was calibrated is in a model, with as many inputs."""
        for name, sums in (self.calibration or {}).items():
            if name not in weights:
                raise ValueError(f"calibration: has inputs of {name!r}, which the model does not have")
            cols = as_matrix(spec_of(weights, name)[0])[1]
            if sums.columns != cols:
                raise ValueError(f"calibration: has {sums.columns} inputs of {name!r}, which takes {cols}")

    def override_of(self, name: str) -> tuple[str | None, Mapping[str, Any]]:
        """Return the first pattern of `overrides` that matches a name, None if none does, and its options."""
        for pattern, changes in self.overrides.items():
            if fnmatchcase(name, pattern):
                return pattern, changes
        return None, {}

    def to_dict(self) -> dict[str, Any]:
        """Return all options as a plain dict, which JSON can hold.

        Returns
        -------
        dict
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _DATA}
        plain["overrides"] = {pattern: dict(options) for pattern, options in self.overrides.items()}
        return {**plain, "include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a plain dict describes.

        Parameters
        ----------
        raw : mapping from option to value

        Returns
        -------
        Recipe

        Raises
        ------
        TypeError, ValueError
            If an option is unknown or out of range.
        """
        return _recipe_from(raw)

    @classmethod
    def from_toml(cls, path: PathLike) -> Recipe:
        r"""Read a recipe from a TOML file: options by name, "none" for None, and a table ``[overrides]``.

        Parameters
        ----------
        path : path-like

        Returns
        -------
        Recipe

        Raises
        ------
        OSError
            If the file cannot be opened.
        TypeError, ValueError
            If it is not TOML, or an option is unknown or out of range; the message names the file.

        Examples
        --------
        >>> import pathlib
        >>> import fastopt as fo
        >>> text = 'bits = 4\nexclude = ["*norm*"]\n[overrides]\n"*embed*" = {bits = 8, group_size = "none"}'
        >>> _ = pathlib.Path("recipe.toml").write_text(text)
        >>> fo.Recipe.from_toml("recipe.toml").overrides
        {'*embed*': {'bits': 8, 'group_size': None}}
        """
        return read_recipe(path)

    def replace(self, **changes: Any) -> Recipe:
        """Return the same with some options changed.

        Parameters
        ----------
        **changes
            Options by name.

        Returns
        -------
        Recipe
        """
        return replace(self, **changes)


Preset: TypeAlias = Literal["small", "balanced", "safe"]


class RecipeOptions(TypedDict, total=False):
    """The fields of `Recipe` as keyword arguments, and a preset that gives some of them."""

    preset: Preset
    bits: int | None
    group_size: GroupSize
    param_dtype: DTypeLike
    param_bits: int | None
    param_group: int
    fit: Fit
    outliers: float | None
    threshold: float | None
    sparsity: float | None
    pattern: str | None
    importance: Literal["magnitude"] | None
    include: Sequence[str]
    exclude: Sequence[str]
    overrides: Mapping[str, Mapping[str, Any]]
    min_size: int
    bias_correction: bool
    calibration: Calibration | None


def same_options(weights: Mapping[str, Weight], name: str, other: str, recipe: Recipe) -> bool:
    """Return whether a recipe treats two names of one tensor alike."""
    shape, dtype = spec_of(weights, name)
    return recipe.of(name, shape, dtype)[0] == recipe.of(other, shape, dtype)[0]


def with_preset(options: Mapping[str, Any], *, onnx: bool = False) -> dict[str, Any]:
    """Return options with those of their preset, if they name one; those that are given beside it replace its own."""
    given = {name: value for name, value in options.items() if name != "preset"}
    preset = options.get("preset")
    if preset is None:
        return given
    if not isinstance(preset, str) or preset not in PRESETS:
        names = ", ".join(map(repr, PRESETS))
        raise ValueError(f"preset: expected one of {names}, got {shown(preset)}{proposal(preset, PRESETS)}")
    return {**PRESETS[preset], **(ONNX_PRESETS.get(preset, {}) if onnx else {}), **given}


def read_recipe(path: PathLike, *, onnx: bool = False) -> Recipe:
    """Return the recipe of a TOML file, as `Recipe.from_toml` does; with `onnx`, a preset is that for ONNX models."""
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with Path(path).open("rb") as file:
        try:
            return _recipe_from(_without_none(tomllib.load(file)), onnx=onnx)
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from error


def _recipe_from(raw: Mapping[str, Any], *, onnx: bool = False) -> Recipe:
    known = [*(f.name for f in fields(Recipe) if f.name not in _DATA), "preset"]
    if not isinstance(raw, Mapping):
        raise TypeError(f"recipe: expected a mapping, got {type(raw).__name__}")
    unknown = sorted(set(map(str, raw)) - set(known))
    if unknown:
        raise ValueError(
            f"recipe: unknown options {unknown}{proposal(unknown[0], known)} (options: {', '.join(known)})"
        )
    return Recipe(**with_preset(raw, onnx=onnx))


def recipe_of(recipe: Recipe | None, options: Mapping[str, Any], *, onnx: bool = False) -> Recipe:
    """Return the given recipe, or one made of keyword arguments; an unknown keyword is a TypeError."""
    known = [*(f.name for f in fields(Recipe) if f.name != "inputs"), "preset"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"unknown option {name!r}{hint} (options: {', '.join(known)})")
    if recipe is None:
        return Recipe(**with_preset(options, onnx=onnx))
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
    if options.keys() == {"calibration"}:
        return recipe.replace(**options)
    if options:
        raise ValueError("recipe: cannot be given together with other options; use recipe.replace")
    return recipe


def require_no_correction(recipe: Recipe, where: str) -> None:
    """Raise if a recipe asks for bias correction where there is none."""
    if recipe.bias_correction:
        raise ValueError(f"bias_correction: expected False {where}")


# Ends the reason of a tensor that was packed when it came.
PACKED_BEFORE = "; was packed before"


def pack_tensor(name: str, tensor: Weight, recipe: Recipe) -> tuple[Weight, str]:
    """Return a tensor packed as the recipe says, and the reason. One that is packed already stays packed."""
    tensor = require_weight(name, tensor)
    options, reason = recipe.of(name, tensor.shape, tensor.dtype)
    if isinstance(tensor, PackedTensor):
        reason += PACKED_BEFORE
    if options is None:
        return tensor, reason
    with naming_tensor(name):
        return options.apply(tensor), reason


def warn_of_overrides(recipe: Recipe, names: Iterable[str]) -> None:
    """Warn of each pattern of the overrides that matches none of the names."""
    names = dict.fromkeys(map(require_name, names))
    for pattern in recipe.overrides:
        if names and pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            proposed = pattern_proposal(pattern, names)
            warnings.warn(f"overrides: no tensor matches {pattern!r}{proposed}", stacklevel=_outside())


def warn_if_nothing_is_packed(recipe: Recipe, tensors: Iterable[tuple[bool, str]]) -> None:
    """Warn if of tensors, given as whether they are packed and why so, none is packed; integers are not counted."""
    tensors = [(packed, reason) for packed, reason in tensors if not reason.endswith(_NO_FLOATS)]
    if not tensors or not recipe.include or any(packed for packed, _ in tensors):
        return
    reasons = Counter(re.sub(r"^\d+ weights, ", "", reason) for _, reason in tensors)
    text = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
    if recipe.bits is None and not recipe.prunes and not recipe.overrides:
        text = "nothing is asked for; give bits, sparsity, threshold, pattern, overrides or a target"
    warnings.warn(f"no tensor is packed: {text}", stacklevel=_outside())


def _outside() -> int:
    """Return the `stacklevel` of the first frame that is not of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastopt."):
        frame, level = frame.f_back, level + 1
    return level


@contextlib.contextmanager
def naming_tensor(name: str) -> Iterator[None]:
    """Put the name of a tensor before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name!r}: {error}") from error


def _patterns(given: Any, name: str) -> tuple[str, ...]:
    """Return glob patterns as a tuple; a text alone is one pattern, not its letters."""
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name}: expected glob patterns, got {shown(given)}")
    return tuple(patterns)


def _without_none(node: Any) -> Any:
    """Replace the text "none" by None, which TOML does not have."""
    if isinstance(node, dict):
        return {key: _without_none(value) for key, value in node.items()}
    return None if node == "none" else node
