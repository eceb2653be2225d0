"""Estimators of scikit-learn that keep coefficients: linear models and multilayer perceptrons.

A packed estimator is a copy of the original whose coefficients multiply from packed storage. Activations, labels and
checks of the input stay scikit-learn's own. Its pickles are not read: a pickle can run code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastopt._types import Array
from fastopt.models.model import Imported, PackedModel
from fastopt.models.recipe import Recipe
from fastopt.tensors.packed import PackedTensor, Weight, unpacked
from fastopt.tensors.products import linear

METADATA = "sklearn"
_METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "transform", "score", "classes_")


class PackedEstimator(PackedModel):
    """A packed estimator of scikit-learn, which predicts as the original does.

    Made by `fastopt.pack`. It has those of the methods `predict`, `predict_proba`, `predict_log_proba`,
    `decision_function`, `transform` and `score` that the original has. joblib and pickle store it whole; `save` stores
    the coefficients.

    Attributes
    ----------
    estimator : sklearn.base.BaseEstimator
        A copy of the original, with packed coefficients.
    """

    def __init__(
        self,
        tensors: Mapping[str, Weight],
        recipe: Recipe | None,
        metadata: Mapping[str, str] | None,
        original: Any,
    ) -> None:
        super().__init__(tensors, recipe, metadata)
        self.estimator = copy.copy(original)
        last = self.estimator
        if _last(original) is not original:
            last = copy.copy(_last(original))
            self.estimator.steps = [*original.steps[:-1], (original.steps[-1][0], last)]
        if "coefs_" in vars(last):
            layers = range(len(last.coefs_))
            last.coefs_ = [_coefficients(self[f"coefs_.{layer}"], turned=True) for layer in layers]
            last.intercepts_ = [unpacked(self[f"intercepts_.{layer}"]) for layer in layers]
        else:
            last.coef_ = _coefficients(self["coef_"], turned=False)
            if "intercept_" in self:
                intercept = unpacked(self["intercept_"])
                last.intercept_ = intercept if intercept.ndim else intercept[()]

    def __getattr__(self, name: str) -> Any:
        if name not in _METHODS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.estimator, name)

    def __repr__(self) -> str:
        return f"PackedEstimator({type(self.estimator).__name__}, {len(self)} tensors, {self.nbytes:,} bytes)"


def _last(estimator: Any) -> Any:
    """Return the last step of a pipeline, or the estimator itself if it is none."""
    steps = vars(estimator).get("steps")
    return steps[-1][1] if isinstance(steps, list) and steps else estimator


def import_sklearn(estimator: Any) -> Imported | None:
    """Return the coefficients of an estimator as [out, in]; None if it is no estimator of scikit-learn.

    Those of a pipeline are the coefficients of its last step.

    Raises
    ------
    TypeError
        If it keeps no coefficients in ``coef_`` or ``coefs_``.
    """
    if not any(cls.__module__.partition(".")[0] == "sklearn" for cls in type(estimator).__mro__):
        return None
    kept, arrays = vars(_last(estimator)), {}
    if "coefs_" in kept:
        for layer, (coefficients, intercepts) in enumerate(zip(kept["coefs_"], kept["intercepts_"], strict=True)):
            arrays[f"coefs_.{layer}"] = np.ascontiguousarray(np.asarray(coefficients).T)
            arrays[f"intercepts_.{layer}"] = np.asarray(intercepts)
    elif "coef_" in kept:
        dense = kept["coef_"].toarray() if hasattr(kept["coef_"], "toarray") else kept["coef_"]
        arrays["coef_"] = np.ascontiguousarray(dense)
        if "intercept_" in kept:
            arrays["intercept_"] = np.asarray(kept["intercept_"])
    if not arrays or ("coef_" in arrays and arrays["coef_"].ndim not in (1, 2)):
        raise TypeError(
            "weights: expected a fitted estimator that keeps its coefficients in coef_ or coefs_, as linear models and "
            f"multilayer perceptrons do, got {type(estimator).__name__}"
        )
    turned = [name for name in arrays if name.startswith("coefs_")]
    about = {"estimator": type(estimator).__name__, "turned": turned}

    def finish(packed: PackedModel) -> PackedModel:
        return PackedEstimator(dict(packed), packed.recipe, packed.metadata, estimator)

    options = {"min_size": 1, "exclude": ("intercept*",)}
    return Imported(PackedModel(arrays, metadata={METADATA: json.dumps(about)}), options, finish)


def _coefficients(tensor: Weight, *, turned: bool) -> Any:
    """Return coefficients as an estimator multiplies with them: [in, out] if they were `turned`."""
    if isinstance(tensor, PackedTensor):
        return _Coefficients(tensor, turned)
    return tensor.T if turned else tensor


class _Coefficients:
    """A packed weight in place of an array of coefficients: as it is, or transposed."""

    __array_ufunc__ = None  # NumPy leaves the product to this class

    def __init__(self, tensor: PackedTensor, transposed: bool) -> None:
        self._tensor, self._transposed = tensor, transposed
        self.shape = tensor.shape[::-1] if transposed else tensor.shape
        self.ndim, self.dtype = tensor.ndim, tensor.dtype

    @property
    def T(self) -> _Coefficients:  # noqa: N802 - NumPy's name
        return _Coefficients(self._tensor, not self._transposed)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        array = self._tensor.to_dense()
        array = array.T if self._transposed else array
        return array if dtype is None else array.astype(dtype, copy=False)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        x = np.asarray(x)
        if not self._transposed and self.ndim == 2:
            raise TypeError("x @ coef_: packed coefficients are [out, in]: use x @ coef_.T")
        product: Array = linear(x, self._tensor).astype(np.result_type(x.dtype, self.dtype), copy=False)
        return product if self.ndim == 2 else product[..., 0]
