"""A search for the bits of each tensor that asks the whole model: the smallest file within a loss of score."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt._text import printable, shown, text_table
from fastopt._types import PathLike
from fastopt.files.atomic import replacing, write_text
from fastopt.files.sources import open_weights
from fastopt.files.torch_files import without_tensors
from fastopt.files.weights import Weights, spec_of, tied_in
from fastopt.models.choose import Choice, Sizes, Wanted, measured
from fastopt.models.model import PackedModel
from fastopt.models.model import pack as pack_model
from fastopt.models.recipe import Recipe, RecipeOptions, recipe_of
from fastopt.tensors.packed import Weight

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PROBE = 0.04  # the squared relative error at which a tensor is probed: that of about 3 bits
_PRIOR = 0.1  # the share of the mean sensitivity that each tensor has at least: scores are coarse
_LEAST_GAIN = 0.003  # the search ends when the last step could save no more than this share of the bytes
_WORST = 1e30  # the loss that an infinite score counts as
_VERSION = 1

# Called with the evaluations done, those expected in all, and a note.
NotifySearch = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trial:
    """A whole model that was scored.

    Attributes
    ----------
    nbytes : int
        The bytes of its tensors.
    bits_per_weight : float
    score, loss : float
        The loss is how much worse the score is than that of the original model.
    recipe : Recipe
    """

    nbytes: int
    bits_per_weight: float
    score: float
    loss: float
    recipe: Recipe


@dataclass(frozen=True)
class SearchResult:
    """The result of `search`.

    Attributes
    ----------
    recipe : Recipe
        Makes the smallest model that was found within the budget, without a search.
    best : Trial
        That model.
    original : float
        The score of the original model.
    budget : float
        The largest loss of score.
    sensitivity : dict from name to float
        The loss of score with this tensor alone packed to about 3 bits.
    bits : dict from name to int
        The bits that were chosen.
    trials : tuple of Trial
        All whole models that were scored, by rising bytes.
    """

    recipe: Recipe
    best: Trial
    original: float
    budget: float
    sensitivity: dict[str, float]
    bits: dict[str, int]
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        """Return a table of the models that were scored, and one of the tensors."""
        rows = [["model", "bits/w", "bytes", "score", "loss"]]
        rows.append(["original", "", "", f"{self.original:.6g}", ""])
        for trial in self.trials:
            kept = "chosen" if trial is self.best else "within" if trial.loss <= self.budget else "too far"
            numbers = [f"{trial.bits_per_weight:.2f}", f"{trial.nbytes:,}", f"{trial.score:.6g}", f"{trial.loss:.3g}"]
            rows.append([kept, *numbers])
        tensors = [["tensor", "bits", "loss alone"]]
        for name, loss in sorted(self.sensitivity.items(), key=lambda item: -item[1]):
            tensors.append([printable(name), str(self.bits[name]), f"{loss:.3g}"])
        return "\n\n".join(map(text_table, (rows, tensors)))

    def chart(self, path: PathLike) -> None:
        """Draw the scores over the bytes, and the sensitivity of the tensors.

        Parameters
        ----------
        path : path-like
            A .svg, .png or .pdf file.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        figure = require_matplotlib()(figsize=(9, 4), layout="constrained")
        scores, tensors = figure.subplots(1, 2)
        for color, label, those in (
            ("#9ca3af", "too far", [t for t in self.trials if t.loss > self.budget and t.loss < _WORST]),
            ("#4d77cf", "within the budget", [t for t in self.trials if t.loss <= self.budget]),
            ("#c2410c", "chosen", [self.best]),
        ):
            if those:
                scores.plot([t.bits_per_weight for t in those], [t.score for t in those], "o", color=color, label=label)
        worse = -1 if self.best.score - self.original == -self.best.loss else 1
        scores.axhline(self.original, color="#9ca3af", linewidth=1)
        scores.axhline(self.original + worse * self.budget, color="#9ca3af", linewidth=1, linestyle="--")
        scores.set(title="score of the model", xlabel="bits a weight", ylabel="score")
        scores.legend(frameon=False)
        top = sorted(self.sensitivity.items(), key=lambda item: -item[1])[:24][::-1]
        names = [f"{name if len(name) < 32 else '…' + name[-30:]} ({self.bits[name]})" for name, _ in top]
        tensors.barh(range(len(top)), [min(loss, _WORST) for _, loss in top], color="#4d77cf")
        tensors.set_yticks(range(len(top)), names, fontsize=7, parse_math=False)
        tensors.set(title="loss by one tensor (bits chosen)", xlabel="loss of score")
        kind = Path(path).suffix.removeprefix(".") or "png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=110)


def search(
    weights: Mapping[str, Weight] | PathLike,
    evaluate: Callable[[Any], float],
    recipe: Recipe | None = None,
    *,
    budget: float | str,
    minimize: bool = False,
    evaluations: int = 8,
    state: PathLike | None = None,
    pack: Callable[[Recipe], Any] | None = None,
    notify: NotifySearch | None = None,
    **options: Unpack[RecipeOptions],
) -> SearchResult:
    """Search the bits of each tensor for the smallest model whose score stays within a budget.

    The model is scored with each tensor packed alone, once. The sensitivity that this shows, with the error of each
    setting of the tensor, predicts the loss of any mixture of settings. A few whole models are then scored, to find the
    smallest that is good enough. This costs one evaluation a tensor, and `evaluations` more.

    Parameters
    ----------
    weights : mapping from name to array, or path-like
        As in `pack`.
    evaluate : callable
        Called with a `PackedModel`, returns its score: a number, larger if the model is better. The same model must
        get the same score. Judge the result by other data than `evaluate` has.
    recipe : Recipe, optional
        Its `bits` are None. Its other options hold, also overrides that give bits.
    budget : float or str
        How much of the score may be lost; "1%" is a share of the original's score.
    minimize : bool
        True if a smaller score is better, as that of a loss or of a perplexity.
    evaluations : int
        The most whole models to score.
    state : path-like, optional
        A JSON file that each score is added to, at once and durably. A search that was interrupted goes on where it
        was if it gets the same file. Another budget may be asked for.
    pack : callable, optional
        Called with a `Recipe`, makes what `evaluate` takes, such as the path of a file that `pack_onnx` wrote. By
        default, `fastopt.pack` of `weights`.
    notify : callable, optional
        Called before each evaluation with the number of those done, that of all, at most, and a note.
    **options
        The fields of `Recipe`, instead of `recipe`.

    Returns
    -------
    SearchResult
        With the `recipe` for `pack`, and the method `chart`.

    Raises
    ------
    TypeError
        If `evaluate` does not return a number.
    ValueError
        If a score is NaN, that of the original is not finite, no mixture is within the budget, `state` belongs to
        another search, or an option is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import fastopt as fo
    >>> rng = np.random.default_rng(0)
    >>> weights = {name: rng.standard_normal((64, 128)).astype("f4") for name in ("first", "second")}
    >>> x = rng.standard_normal((100, 128)).astype("f4")
    >>> def evaluate(model):  # the second layer matters most
    ...     away = sum(k * np.abs(fo.linear(x, model[name]) - fo.linear(x, weights[name])).mean()
    ...                for name, k in (("first", 1), ("second", 20)))
    ...     return -float(away)
    >>> found = fo.search(weights, evaluate, fit="lsq", budget=4)
    >>> found.bits["first"] < found.bits["second"]
    True
    >>> small = fo.pack(weights, found.recipe)
    """
    given = open_weights(weights) if isinstance(weights, str | os.PathLike) else without_tensors(weights)
    make: Callable[[Recipe], Any] = pack or (lambda chosen: pack_model(given, chosen))
    return search_sized(
        given, evaluate, recipe_of(recipe, options), make, Sizes(),
        budget=budget, minimize=minimize, evaluations=evaluations, state=state, notify=notify,
    )  # fmt: skip


def search_sized(
    given: Mapping[str, Weight],
    evaluate: Callable[[Any], float],
    wanted: Recipe,
    make: Callable[[Recipe], Any],
    sizes: Sizes,
    *,
    budget: float | str,
    minimize: bool = False,
    evaluations: int = 8,
    state: PathLike | None = None,
    notify: NotifySearch | None = None,
    packing: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search for the smallest model as `search` does, by the bytes that tensors take in any format.

    `packing` has the options of `make` that are not in the recipe: the scores in `state` depend on them too.
    """
    wanted.require_fitting(given)
    if wanted.bits is not None:
        raise ValueError(f"bits: expected None, as the search chooses them, got {wanted.bits}")
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations: expected a number, 1 or more, got {shown(evaluations)}")
    _parse_budget(budget, 1.0)
    tensors = _Tensors(given, wanted, sizes)
    if not tensors.choices:
        raise ValueError("weights: expected tensors whose bits are open; all are kept or have their bits")
    expected = 1 + len(tensors.choices) + evaluations
    scores = _Scores(tensors.fingerprint(packing), evaluate, make, minimize, state, notify, expected)
    original = scores.of("original", wanted.replace(include=()), "the original model")
    if not math.isfinite(original):
        raise ValueError(f"evaluate: expected a finite score of the original model, got {original}")
    most = _parse_budget(budget, original)

    def loss_of(score: float) -> float:
        loss = score - original if minimize else original - score
        return min(loss, _WORST)

    losses = {}
    for name, probe in tensors.probes.items():
        losses[name] = loss_of(scores.of(f"only {name}", tensors.only(name, probe), name))
    path = _Path(tensors, losses)
    trials: dict[int, Trial] = {}

    def try_step(step: int) -> Trial:
        chosen, nbytes = tensors.recipe(path.chosen(step)), path.nbytes[step]
        key = hashlib.sha256(json.dumps(chosen.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:16]
        bits = 8 * nbytes / tensors.count
        score = scores.of(f"model {key}", chosen, f"{bits:.2f} bits a weight")
        trials[step] = Trial(nbytes, bits, score, loss_of(score), chosen)
        return trials[step]

    best = _smallest(path, try_step, most, evaluations)
    if best is None:
        least = min(trial.loss for trial in trials.values())
        raise ValueError(f"budget: no model that was tried is within {most:g}; the least loss is {least:.3g}")
    chosen = path.chosen(best)
    bits = {name: int(choice.changes["bits"]) for name, choice in chosen.items()}
    in_order = tuple(trials[step] for step in sorted(trials))
    return SearchResult(trials[best].recipe, trials[best], original, most, losses, bits, in_order)


def _smallest(path: _Path, try_step: Callable[[int], Trial], budget: float, evaluations: int) -> int | None:
    """Return the step of the smallest model within the budget that some evaluations find, None if none is.

    The first guess is where the prediction meets the budget; each result corrects the prediction. The last evaluation
    is kept for the largest model as long as none is good enough.
    """
    low, high = -1, len(path.nbytes)  # the largest that was too bad, the smallest that was good enough
    end, factor = len(path.nbytes) - 1, 1.0
    for left in range(evaluations, 0, -1):
        if high - low <= 1:
            break
        if high <= end and low >= 0 and path.nbytes[high] - path.nbytes[low] < _LEAST_GAIN * path.nbytes[high]:
            break
        within = np.flatnonzero(np.asarray(path.losses) * factor <= budget)
        step = int(within[0]) if within.size else end
        if not low < step < high:  # the prediction leads nowhere: halve the bytes between both
            bottom, top = path.nbytes[max(low, 0)], path.nbytes[min(high, end)]
            step = int(np.searchsorted(path.nbytes, (bottom + top) / 2))
        step = min(max(step, low + 1), high - 1)
        if left == 1 and high > end:
            step = end
        loss = try_step(step).loss
        if loss > 0 and path.losses[step] > 0:
            factor = loss / path.losses[step]
        low, high = (low, step) if loss <= budget else (step, high)
    return high if high <= end else None


class _Tensors:
    """The settings of each tensor whose bits are open, by rising bytes and falling error."""

    def __init__(self, weights: Mapping[str, Weight], recipe: Recipe, sizes: Sizes) -> None:
        self._recipe, self._open = recipe, recipe.replace(bits=8)
        self.choices: dict[str, list[Choice]] = {}
        self._tied: dict[str, list[str]] = {}
        self.fixed, self.count = 0, 0
        self.sizes: dict[str, int] = {}
        tied = tied_in(dict(weights) if isinstance(weights, PackedModel) else weights, weights)
        for name in weights:
            if name in tied:
                self._tied.setdefault(tied[name], []).append(name)
                continue
            shape, dtype = spec_of(weights, name)
            self.sizes[name] = int(np.prod(shape, dtype=object))
            self.count += self.sizes[name]
            options, _ = self._open.of(name, shape, dtype)
            found = measured(weights, Wanted(name, options, "bits" not in self._open.override_of(name)[1]), sizes)
            if isinstance(found, list):
                self.choices[name] = _hull(found)
            else:
                self.fixed += found
            if isinstance(weights, Weights):
                weights.release(name)
        self.probes = {name: min(choices, key=self._far_from_probe(name)) for name, choices in self.choices.items()}

    def relative(self, name: str, choice: Choice) -> float:
        """Return the squared relative error of a setting."""
        return choice.error / math.sqrt(self.sizes[name])

    def _far_from_probe(self, name: str) -> Callable[[Choice], float]:
        return lambda choice: abs(math.log((self.relative(name, choice) or 1e-30) / _PROBE))

    def only(self, name: str, choice: Choice) -> Recipe:
        """Return the recipe that packs one tensor, and those that are tied to it."""
        recipe = self.recipe({name: choice})
        return recipe.replace(include=[escape(one) for one in (name, *self._tied.get(name, []))])

    def recipe(self, chosen: Mapping[str, Choice]) -> Recipe:
        """Return the recipe with these settings."""
        mine: dict[str, Mapping[str, Any]] = {}
        for name, choice in chosen.items():
            for one in (name, *self._tied.get(name, [])):
                mine[escape(one)] = {**self._open.override_of(one)[1], **choice.changes}
        others = {pattern: changes for pattern, changes in self._recipe.overrides.items() if pattern not in mine}
        return self._recipe.replace(overrides={**mine, **others})

    def fingerprint(self, packing: Mapping[str, Any] | None) -> str:
        """Return a text that differs for other weights or options."""
        settings = {
            name: [(choice.nbytes, f"{choice.error:.4g}", choice.changes) for choice in choices]
            for name, choices in self.choices.items()
        }
        facts = [self._recipe.to_dict(), settings, *([packing] if packing else [])]
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hull(choices: list[Choice]) -> list[Choice]:
    """Return the settings of the lower convex hull: each step gains less for a byte than the one before it."""
    hull: list[Choice] = []
    for choice in choices:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(one: Choice, better: Choice) -> float:
    return (one.error - better.error) / (better.nbytes - one.nbytes)


class _Path:
    """Models from the smallest to the largest: each step takes the change that gains most for a byte.

    Attributes
    ----------
    nbytes : list of int
    losses : list of float
        The predicted loss of score.
    """

    def __init__(self, tensors: _Tensors, losses: Mapping[str, float]) -> None:
        self._choices = tensors.choices
        probed = {name: tensors.probes[name].error for name in losses}
        mean = sum(max(loss, 0.0) for loss in losses.values()) / (sum(probed.values()) or 1.0)
        # The loss for a unit of error. One that no probe shows is still some of the mean; with no loss at all, errors
        # decide.
        factor = {
            name: max(losses[name], 0.0) / (probed[name] or 1.0) + _PRIOR * mean if mean > 0 else 1.0 for name in losses
        }
        steps = sorted(
            (-factor[name] * _gain(one, better), order, to, name)
            for order, (name, choices) in enumerate(self._choices.items())
            for to, (one, better) in enumerate(pairwise(choices), 1)
        )
        self._steps = [(name, to) for _, _, to, name in steps]
        first = [choices[0] for choices in self._choices.values()]
        self.nbytes = [tensors.fixed + sum(choice.nbytes for choice in first)]
        self.losses = [sum(factor[name] * choices[0].error for name, choices in self._choices.items())]
        for name, to in self._steps:
            one, better = self._choices[name][to - 1], self._choices[name][to]
            self.nbytes.append(self.nbytes[-1] + better.nbytes - one.nbytes)
            self.losses.append(max(self.losses[-1] - factor[name] * (one.error - better.error), 0.0))
        if mean == 0:  # no probe lost anything, so all models are predicted to be good enough
            self.losses = [0.0] * len(self.losses)

    def chosen(self, step: int) -> dict[str, Choice]:
        """Return the settings of a model."""
        at = dict.fromkeys(self._choices, 0)
        for name, to in self._steps[:step]:
            at[name] = to
        return {name: self._choices[name][to] for name, to in at.items()}


class _Scores:
    """Scores of models, each asked for once and kept in a file."""

    def __init__(
        self,
        fingerprint: str,
        evaluate: Callable[[Any], float],
        make: Callable[[Recipe], Any],
        minimize: bool,
        path: PathLike | None,
        notify: NotifySearch | None,
        expected: int,
    ) -> None:
        self._evaluate, self._make, self._minimize, self._path = evaluate, make, minimize, path
        self._notify, self._done, self._expected = notify, 0, expected
        self._head = {"fastopt_search": _VERSION, "fingerprint": fingerprint, "minimize": minimize}
        self._known = dict(self._read())

    def _read(self) -> Iterator[tuple[str, float]]:
        if self._path is None or not Path(self._path).exists():
            return
        try:
            content = json.loads(Path(self._path).read_text("utf-8"))
            scores = {str(key): float(score) for key, score in content.pop("scores").items()}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"state: {self._path} is not the state of a search") from error
        if content != self._head:
            raise ValueError(f"state: {self._path} belongs to a search with other weights or options; remove it")
        yield from scores.items()

    def of(self, key: str, recipe: Recipe, note: str) -> float:
        """Return the score of the model that a recipe makes."""
        if self._notify is not None:
            self._notify(self._done, self._expected, note)
        if key not in self._known:
            score = self._evaluate(self._make(recipe))
            try:
                self._known[key] = value = float(score)
            except (TypeError, ValueError):
                raise TypeError(f"evaluate: expected a number, got {shown(score)} for {note}") from None
            if math.isnan(value) or value == (-math.inf if self._minimize else math.inf):
                raise ValueError(f"evaluate: expected a number, got {value} for {note}")
            if self._path is not None:
                write_text(self._path, json.dumps({**self._head, "scores": self._known}, indent=1))
        self._done += 1
        return self._known[key]


def _parse_budget(budget: float | str, original: float) -> float:
    """Return a loss of score that is given as a number, or as a share of the original's, such as "1%"."""
    try:
        value = float(budget.rstrip().removesuffix("%")) if isinstance(budget, str) else float(budget)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf or isinstance(budget, bool):
        raise ValueError(f"budget: expected a number, 0 or more, or a share such as '1%', got {shown(budget)}")
    if isinstance(budget, str) and budget.rstrip().endswith("%"):
        return value / 100 * abs(original)
    return value


def require_matplotlib() -> Any:
    """Return the class of matplotlib's figures; raise ImportError if it is not installed."""
    try:
        return import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError("a chart needs matplotlib: pip install matplotlib") from error
