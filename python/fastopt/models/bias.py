"""Bias correction: what quantizing a weight adds to its outputs on average is taken from the bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastopt._checks import as_matrix
from fastopt._types import Array
from fastopt.models.recipe import Recipe, naming_tensor
from fastopt.tensors.calibration import InputSums
from fastopt.tensors.packed import PackedTensor, Weight, unpacked

CORRECTED = "corrected bias"  # the reason of a bias that was changed


def bias_of(name: str) -> str:
    """Return the name of the bias that goes with a weight."""
    return f"{name.removesuffix('.weight')}.bias"


def missing_of(name: str, original: Array, packed: Weight, sums: InputSums | None) -> NDArray[np.float64] | None:
    """Return what the outputs of a weight lose on average; None if it is not packed, or nothing is known of inputs."""
    if sums is None or not isinstance(packed, PackedTensor):
        return None
    with naming_tensor(name):
        difference = original.astype(np.float64) - unpacked(packed)
        # No BLAS, whose sums depend on the machine.
        missing: NDArray[np.float64] = np.multiply(difference.reshape(as_matrix(original.shape)), sums.mean).sum(axis=1)
    return missing


class BiasCorrection:
    """Adds ``(W - Q) @ E[x]`` to the biases of calibrated weights that were quantized.

    Parameters
    ----------
    recipe : Recipe
    names : sequence of str
        The tensors, in the order of the model.

    Attributes
    ----------
    order : list of str
        The names in the order in which to pack: a weight comes before its bias.
    """

    def __init__(self, recipe: Recipe, names: Sequence[str]) -> None:
        self._recipe = recipe if recipe.bias_correction else None
        found = set() if self._recipe is None else {bias_of(name) for name in names if recipe.inputs_of(name)}
        self.order = sorted(names, key=found.__contains__)
        self._missing: dict[str, tuple[str, NDArray[np.float64]]] = {}

    def add(self, name: str, original: Array, packed: Weight, reason: str) -> tuple[Weight, str]:
        """Return a tensor and its reason: a bias is corrected, and a weight is noted for its bias."""
        if self._recipe is None:
            return packed, reason
        if name in self._missing:
            return self.corrected(name, original), CORRECTED
        missing = missing_of(name, original, packed, self._recipe.inputs_of(name))
        if missing is not None:
            self.note(name, missing)
        return packed, reason

    def note(self, name: str, missing: NDArray[np.float64]) -> None:
        """Note what a weight loses."""
        self._missing[bias_of(name)] = name, missing

    def __contains__(self, name: object) -> bool:
        """Return whether a bias must be corrected."""
        return name in self._missing

    def corrected(self, name: str, original: Array) -> Array:
        """Return a bias with what its weight loses."""
        _, missing = self._missing.pop(name)
        if original.shape != missing.shape:
            raise ValueError(f"bias_correction: {name!r} has shape {original.shape}, expected {missing.shape}")
        return (original + missing).astype(original.dtype)

    def rest(self) -> Iterator[tuple[str, Array, str]]:
        """Give the biases that the model did not have, with their reasons."""
        for bias, (name, missing) in self._missing.items():
            yield bias, missing.astype(np.float32), f"bias correction of {name!r}"
        self._missing.clear()
